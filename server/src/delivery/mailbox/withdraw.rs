//! What was delivered and is to be taken off the screen.

use super::{Context, Departure, Mailbox, Told};
use crate::delivery::event::{Effect, Outcome, Withdrawal};
use crate::delivery::ids::PingId;
use crate::delivery::policy::Policy;

/// Most withdrawals that a mailbox tells a device that comes back; of more, the newest. As many as fit one frame of the
/// link twice over, and far more than a screen shows.
pub const WITHDRAWALS_MAX: usize = 256;

impl Mailbox {
    /// What the store knows joins what is known here.
    pub(super) fn learn(&mut self, stored: &[Withdrawal]) {
        self.withdrawals_known = true;
        for &what in stored {
            if !self
                .withdrawals
                .iter()
                .any(|told| told.what.ping == what.ping)
            {
                self.withdrawals.push(Told { what, after: None });
            }
        }
    }

    /// A new session hears everything that is left.
    pub(super) fn tell_withdrawals(&mut self, cx: &mut Context<'_>) {
        let now_ms = cx.now.unix_ms;
        self.withdrawals.retain(|told| told.what.until_ms > now_ms);
        let Some(session) = self
            .session
            .as_ref()
            .filter(|_| !self.withdrawals.is_empty())
        else {
            return;
        };
        let (session, seq) = (session.id, session.seq);
        self.withdrawals.sort_by_key(|told| told.what.until_ms);
        let older = self.withdrawals.len().saturating_sub(WITHDRAWALS_MAX);
        self.withdrawals.drain(..older);
        let mut pings = Vec::with_capacity(self.withdrawals.len());
        for told in &mut self.withdrawals {
            told.after = Some(seq);
            pings.push(told.what.ping);
        }
        cx.emit(Effect::Withdraw { session, pings });
    }

    /// One more, which the store knows already.
    pub(super) fn withdraw(&mut self, what: Withdrawal, cx: &mut Context<'_>) {
        if self.wipe.is_some() {
            return;
        }
        let known = self
            .withdrawals
            .iter_mut()
            .find(|told| told.what.ping == what.ping);
        match known {
            Some(told) => told.what.until_ms = told.what.until_ms.max(what.until_ms),
            None => self.keep(Told { what, after: None }),
        }
        self.tell(what.ping, cx);
    }

    /// These are revoked while the device may have them: a session is told at once, whatever the disk can do. The store
    /// hears of it in the frame of their removal.
    pub(super) fn withdraw_now(&mut self, pings: Vec<PingId>, cx: &mut Context<'_>) {
        if pings.is_empty() {
            return;
        }
        let session = self
            .session
            .as_ref()
            .map(|session| (session.id, session.seq));
        let after = session.map(|(_, seq)| seq);
        let until_ms = until(cx.now.unix_ms, cx.policy);
        for &ping in &pings {
            let known = self
                .withdrawals
                .iter_mut()
                .find(|told| told.what.ping == ping);
            let what = Withdrawal { ping, until_ms };
            match known {
                Some(told) => {
                    told.what.until_ms = told.what.until_ms.max(until_ms);
                    told.after = after;
                }
                None => self.keep(Told { what, after }),
            }
        }
        if let Some((session, _)) = session {
            cx.emit(Effect::Withdraw { session, pings });
        }
    }

    fn keep(&mut self, told: Told) {
        if self.withdrawals.len() >= WITHDRAWALS_MAX {
            self.withdrawals.remove(0);
        }
        self.withdrawals.push(told);
    }

    /// Tells the session of one, unless it was told.
    fn tell(&mut self, ping: PingId, cx: &mut Context<'_>) {
        let Some(session) = self.session.as_ref() else {
            return;
        };
        let (session, seq) = (session.id, session.seq);
        let untold = self
            .withdrawals
            .iter_mut()
            .find(|told| told.what.ping == ping && told.after.is_none());
        if let Some(told) = untold {
            told.after = Some(seq);
            cx.emit(Effect::Withdraw {
                session,
                pings: vec![ping],
            });
        }
    }

    /// The device has answered what was sent under this number: whatever was told before it has arrived.
    pub(super) fn heard_before(&mut self, seq: u64, cx: &mut Context<'_>) {
        if self.withdrawals.is_empty() {
            return;
        }
        let going: Vec<PingId> = self
            .departures
            .iter()
            .chain(&self.sealed)
            .filter(|departure| departure.may_be_shown())
            .map(|departure| departure.meta.ping)
            .collect();
        let mut heard = Vec::new();
        self.withdrawals.retain(|told| {
            // One that is not in the store yet would come there after it was forgotten.
            let arrived =
                told.after.is_some_and(|after| after < seq) && !going.contains(&told.what.ping);
            if arrived {
                heard.push(told.what);
            }
            !arrived
        });
        if self.withdrawals.is_empty() {
            self.withdrawals = Vec::new();
        }
        if !heard.is_empty() {
            let device = cx.device;
            cx.emit(Effect::WithdrawalsHeard { device, heard });
        }
    }

    /// The session is gone: the next one is told again.
    pub(super) fn untell(&mut self) {
        self.withdrawals.retain(|told| told.what.until_ms > 0);
        for told in &mut self.withdrawals {
            told.after = None;
        }
    }
}

impl Departure {
    /// It was taken back, and the device may have it all the same.
    pub(super) fn may_be_shown(&self) -> bool {
        self.outcome == Outcome::Revoked && self.sent
    }
}

/// What the store is to keep of a departure that may be shown; `None`: nothing is kept.
pub(super) fn withdrawal(departure: &Departure, policy: &Policy) -> Option<Withdrawal> {
    (!policy.withdrawals_keep.is_zero()).then(|| Withdrawal {
        ping: departure.meta.ping,
        until_ms: until(departure.at_ms, policy),
    })
}

/// Until when a device that comes back is told, Unix milliseconds; 0: it is not.
fn until(now_ms: u64, policy: &Policy) -> u64 {
    match u64::try_from(policy.withdrawals_keep.as_millis()) {
        Ok(0) => 0,
        Ok(keep_ms) => now_ms.saturating_add(keep_ms),
        Err(_) => u64::MAX,
    }
}
