//! What was delivered and is to be taken off the screen.

use super::{Context, Mailbox, Told};
use crate::delivery::event::{Effect, Withdrawal};
use crate::delivery::ids::PingId;

/// Most withdrawals that a mailbox tells a device that comes back; of more, the newest. As many as fit one frame of the
/// link twice over, and far more than a screen shows.
pub const WITHDRAWALS_MAX: usize = 256;

impl Mailbox {
    /// What the store knows joins what is known here.
    pub(super) fn learn(&mut self, stored: &[Withdrawal]) {
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
            Some(told) => told.what = what,
            None => self.keep(Told { what, after: None }),
        }
        self.tell(what.ping, cx);
    }

    /// One that is revoked while the device may have it: told at once, whatever the disk can do.
    pub(super) fn withdraw_now(&mut self, ping: PingId, cx: &mut Context<'_>) {
        let Some(session) = self.session.as_ref() else {
            return;
        };
        let (session, after) = (session.id, Some(session.seq));
        // The store hears of it from whoever revoked; until then nothing of it is to be kept there.
        let known = self
            .withdrawals
            .iter_mut()
            .find(|told| told.what.ping == ping);
        match known {
            Some(told) => told.after = after,
            None => self.keep(Told {
                what: Withdrawal { ping, until_ms: 0 },
                after,
            }),
        }
        cx.emit(Effect::Withdraw {
            session,
            pings: vec![ping],
        });
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
        let mut heard = Vec::new();
        self.withdrawals.retain(|told| {
            let arrived = told.after.is_some_and(|after| after < seq);
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
