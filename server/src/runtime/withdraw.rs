//! Taking delivered notifications off the screen.
//!
//! What still waits is revoked, and its mailbox sees to it that a device that may have it all the same is told. Devices that
//! have acknowledged it are found through outcomes: for each the store keeps a withdrawal until the device has shown that it
//! heard, or `limits.withdrawals_keep` is over (`docs/decisions/0036`). The store hears of it before the mailbox does, so
//! that a device that attaches in between is told by one or the other; being told twice does no harm.

use std::collections::HashSet;
use std::sync::Arc;

use super::api::{RuntimeError, WithdrawCounts};
use super::handle::{Inner, millis};
use super::pings::{Depth, REVOKE_PAGE};
use super::shard::Input;
use crate::delivery::{AppId, DeviceId, Event, Outcome, PingId, WITHDRAWALS_MAX, Withdrawal};
use crate::ports::{Batch, Op, PairState, ReadError, Store};

impl Inner {
    /// Takes a ping back everywhere but on `except`: where it waits, and where it is shown. `None`: not known, or no longer.
    pub(super) async fn withdraw_ping(
        self: &Arc<Inner>,
        app: AppId,
        ping: PingId,
        except: HashSet<DeviceId>,
    ) -> Result<Option<WithdrawCounts>, RuntimeError> {
        let inner = Arc::clone(self);
        // Once begun it is done to the end, whether or not the caller still waits.
        let work = tokio::spawn(async move { inner.withdraw_everywhere(app, ping, &except).await });
        work.await.map_err(|_| RuntimeError::StoreUnavailable)?
    }

    async fn withdraw_everywhere(
        self: &Arc<Inner>,
        app: AppId,
        ping: PingId,
        except: &HashSet<DeviceId>,
    ) -> Result<Option<WithdrawCounts>, RuntimeError> {
        // First what waits, so that nothing is delivered behind the walk over what was.
        let Some(taken) = self.revoke_except(app, ping, except).await? else {
            return Ok(None);
        };
        let mut counts = WithdrawCounts {
            revoked: taken.revoked,
            ..WithdrawCounts::default()
        };
        let mut after = None;
        loop {
            let page = self.ping_view(app, ping, after, REVOKE_PAGE, Depth::History);
            let Some(page) = page.await? else { break };
            let mut shown = Vec::new();
            for pair in page.devices {
                match pair.state {
                    _ if except.contains(&pair.device) => counts.kept += 1,
                    PairState::Ended {
                        outcome: Outcome::Acknowledged,
                        ..
                    } => shown.push(pair.device),
                    PairState::Ended { .. } | PairState::Waiting { .. } => counts.ended += 1,
                }
            }
            let asked = u32::try_from(shown.len()).unwrap_or(u32::MAX);
            let told = self.withdraw_from(app, ping, shown).await?;
            counts.withdrawn += told;
            counts.ended += asked.saturating_sub(told);
            if page.next.is_none() {
                break;
            }
            after = page.next;
        }
        // What was revoked now has ended by now.
        counts.ended = counts.ended.saturating_sub(counts.revoked);
        Ok(Some(counts))
    }

    /// Has these devices told to take off the screen what they have acknowledged. Answers how many of them there are.
    async fn withdraw_from(
        &self,
        app: AppId,
        ping: PingId,
        devices: Vec<DeviceId>,
    ) -> Result<u32, RuntimeError> {
        if devices.is_empty() {
            return Ok(0);
        }
        let keep_ms = millis(self.limits.load().withdrawals_keep);
        let withdrawal = Withdrawal {
            ping,
            until_ms: match keep_ms {
                0 => 0,
                _ => self.shared.clock.now().unix_ms.saturating_add(keep_ms),
            },
        };
        // Neither a device that goes nor another withdrawal comes between what is read and what is written.
        let _alone = self.users.changing_all(&devices).await;
        let (devices, batch) = self
            .shared
            .reading
            .read(move |store| plan(store, app, withdrawal, &devices))
            .await?;
        if !batch.is_empty() {
            self.commit_fully(batch, || {}).await?;
        }
        for &device in &devices {
            let told = Input::Event(device, Event::Withdraw(withdrawal));
            self.shard(device).inbox.push(told);
        }
        Ok(u32::try_from(devices.len()).unwrap_or(u32::MAX))
    }
}

/// The devices among these that exist, and what the store is to keep for them.
fn plan(
    store: &dyn Store,
    app: AppId,
    withdrawal: Withdrawal,
    devices: &[DeviceId],
) -> Result<(Vec<DeviceId>, Batch), ReadError> {
    let mut there = Vec::with_capacity(devices.len());
    let mut batch = Batch::new();
    for &device in devices {
        if store.device(device)?.is_none_or(|record| record.app != app) {
            continue;
        }
        there.push(device);
        if withdrawal.until_ms == 0 {
            continue;
        }
        let known = store.withdrawals(device)?;
        let again = known.iter().find(|one| one.ping == withdrawal.ping);
        let room = WITHDRAWALS_MAX - usize::from(again.is_none());
        let oldest = known.iter().take(known.len().saturating_sub(room));
        batch.extend(oldest.chain(again).map(|&old| Op::DropWithdrawal {
            device,
            withdrawal: old,
        }));
        batch.push(Op::PutWithdrawal {
            app,
            device,
            withdrawal,
        });
    }
    Ok((there, batch))
}
