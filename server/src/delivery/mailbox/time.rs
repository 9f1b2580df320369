//! What is due.

use super::{Context, Mailbox};
use crate::delivery::event::{Closing, Effect, Outcome};

impl Mailbox {
    /// Does what is due; too early changes nothing.
    pub(in crate::delivery) fn handle_deadline(&mut self, cx: &mut Context<'_>) {
        let now = cx.now;
        if self.read_again_at.is_some_and(|at| at <= now.mono) {
            self.read_again_at = None;
            self.work_off(cx);
        }
        if self.fetch_again_at.is_some_and(|at| at <= now.mono) {
            self.fetch_again_at = None;
        }
        self.release(
            |flight| flight.held_until.is_some_and(|until| until <= now.mono),
            cx,
        );
        if let Some(session) = self.session.as_ref() {
            let expired: Vec<u64> = session
                .in_flight
                .iter()
                .filter(|flight| flight.expires_at <= now.mono)
                .map(|f| f.order)
                .collect();
            for order in expired {
                if let Some(index) = self.index_of(order) {
                    let at_ms = self.rows[index].meta.expires_ms;
                    self.end(index, Outcome::Expired, at_ms, None, cx);
                }
            }
        }
        let timeout = cx.policy.ack_timeout;
        if let Some(session) = self.session.as_ref()
            && session
                .in_flight
                .front()
                .is_some_and(|flight| flight.sent_at + timeout <= now.mono)
        {
            let session = session.id;
            cx.emit(Effect::Close {
                session,
                why: Closing::AckTimeout,
            });
            self.detach(cx);
        }
        self.pump(cx);
    }
}
