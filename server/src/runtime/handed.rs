//! A ping to one device of which nothing has to be looked up, remembered or waited for before its shard has it.
//!
//! Nearly every ping is one. All that is left to do then is to hear one word of the shard: that takes no timer and no large future, and
//! a batch keeps hundreds of these in one row.

use std::future::Future as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};

use futures_util::future::BoxFuture;
use tokio::sync::oneshot;

use super::api::{PingAnswer, PingError, PingRequest, RuntimeError, Target};
use super::handle::{Handle, Inner};
use super::settings::{Limits, TRANSIENT_MS};
use super::shard::{Input, Settled, Waiter};
use super::traces::Origin;
use super::turn::Turn;
use crate::delivery::{AppId, DeviceId, Hold, Mono, Notification, PingId, WireSlot};
use crate::telemetry::metrics as names;

/// What a shard was given, and how it answers.
pub(super) struct Handed {
    ping: PingId,
    ttl_s: u64,
    /// Its trace is kept.
    traced: bool,
    settled: oneshot::Receiver<Settled>,
}

/// A ping that was begun.
pub enum Begun {
    /// It is over already.
    Over(Result<PingAnswer, PingError>),
    /// Its shard has it. It goes on whether or not it is polled.
    Handed(HandedPing),
    /// It goes on while it is polled.
    Long(BoxFuture<'static, Result<PingAnswer, PingError>>),
}

/// A ping that its shard has.
pub struct HandedPing {
    handed: Handed,
    request: About,
    origin: Option<Arc<Origin>>,
}

/// What is counted of a ping when it was answered.
#[derive(Debug, Clone, Copy)]
pub(super) struct About {
    pub(super) app: AppId,
    pub(super) begun: Mono,
    /// Its notifications count as they are reached.
    pub(super) to_audience: bool,
}

impl HandedPing {
    /// Its answer, once there is one.
    pub fn poll(
        &mut self,
        handle: &Handle,
        cx: &mut Context<'_>,
    ) -> Poll<Result<PingAnswer, PingError>> {
        let inner = &*handle.inner;
        let answer = ready!(self.handed.poll(inner, self.request.app, cx));
        inner.told(self.request, &answer, self.origin.as_deref());
        Poll::Ready(answer)
    }
}

impl Handed {
    /// The answer, once the shard has given its word.
    pub(super) fn poll(
        &mut self,
        inner: &Inner,
        app: AppId,
        cx: &mut Context<'_>,
    ) -> Poll<Result<PingAnswer, PingError>> {
        let settled = ready!(Pin::new(&mut self.settled).poll(cx));
        Poll::Ready(match settled {
            Ok(Settled::Accepted) => Ok(PingAnswer {
                id: self.ping,
                devices: 1,
                ttl_s: self.ttl_s,
                rejected: Vec::new(),
                outcomes: Vec::new(),
            }),
            Ok(Settled::Busy) => Err(RuntimeError::StoreBusy.into()),
            Ok(Settled::Rejected(why)) => {
                if self.traced {
                    inner.shared.traces.rejected(self.ping, 1);
                }
                Err(inner.refusal(app, why))
            }
            // The shard was stopped.
            Err(_) => Err(RuntimeError::Draining.into()),
        })
    }
}

impl Handle {
    /// Begins a ping of a batch, and ends `turn` when it has its place in every mailbox that it addresses, or is refused: whatever is
    /// published after that comes after it. A ping that waits for the answer of another with the same key has its places from that.
    /// `origin`: its acceptance and its outcomes name that trace.
    #[must_use]
    pub fn begin_ping(
        &self,
        mut request: PingRequest,
        turn: Turn,
        origin: Option<Arc<Origin>>,
    ) -> Begun {
        let inner = &self.inner;
        let mut turn = Some(turn);
        if request.wait_acknowledged.is_none() {
            let about = inner.about(&request);
            match inner.hand_over(&mut request, &mut turn, origin.as_deref()) {
                Some(Ok(handed)) => {
                    return Begun::Handed(HandedPing {
                        handed,
                        request: about,
                        origin,
                    });
                }
                Some(Err(error)) => {
                    let answer = Err(error);
                    inner.told(about, &answer, origin.as_deref());
                    return Begun::Over(answer);
                }
                None => {}
            }
        }
        let inner = Arc::clone(inner);
        Begun::Long(Box::pin(async move {
            inner.ping(request, turn, origin.as_deref()).await
        }))
    }
}

impl Inner {
    /// Hands a ping over that needs nothing but its shard, and takes its content. `None`: it needs more, and nothing was done.
    pub(super) fn hand_over(
        &self,
        request: &mut PingRequest,
        turn: &mut Option<Turn>,
        origin: Option<&Origin>,
    ) -> Option<Result<Handed, PingError>> {
        match request.target {
            Target::Device(device) if request.idempotency.is_none() => {
                Some(self.hand_over_to(device, request, turn.take(), origin))
            }
            Target::Device(_)
            | Target::Devices(_)
            | Target::Topic(_)
            | Target::Everyone
            | Target::Users(_) => None,
        }
    }

    fn hand_over_to(
        &self,
        device: DeviceId,
        request: &mut PingRequest,
        turn: Option<Turn>,
        origin: Option<&Origin>,
    ) -> Result<Handed, PingError> {
        let limits = self.takes(request)?;
        if self.shared.failed.load(Ordering::Relaxed) {
            return Err(RuntimeError::StoreUnavailable.into());
        }
        let ping = self.new_ping_id();
        let (notification, ttl_s) = self.notification(request, ping, &limits, false, 0)?;
        // Before the shard sees it, so that no outcome comes before the trace is known.
        if let Some(origin) = origin {
            self.shared.traces.open(ping, origin.clone(), 1);
        }
        let settled = self.hand_to_shard(device, Arc::new(notification), false);
        if let Some(turn) = turn {
            turn.end();
        }
        Ok(Handed {
            ping,
            ttl_s,
            traced: origin.is_some(),
            settled,
        })
    }

    /// Gives one notification to the shard of its device.
    pub(super) fn hand_to_shard(
        &self,
        device: DeviceId,
        notification: Arc<Notification>,
        may_repeat: bool,
    ) -> oneshot::Receiver<Settled> {
        let (sender, settled) = oneshot::channel();
        self.shard(device).inbox.push(Input::Enqueue {
            device,
            notification,
            may_repeat,
            paced: true,
            patient: false,
            waiter: Waiter::One(sender),
        });
        settled
    }

    /// An id for a ping without a key.
    pub(super) fn new_ping_id(&self) -> PingId {
        let mut id = [0; 16];
        self.entropy.fill(&mut id);
        PingId(id)
    }

    /// What every ping has to pass first. Answers the limits that hold for it.
    pub(super) fn takes(&self, request: &PingRequest) -> Result<Limits, PingError> {
        if self.refusing.load(Ordering::Relaxed) {
            return Err(RuntimeError::Draining.into());
        }
        let limits = **self.limits.load();
        if request.content.size > limits.content_max {
            return Err(PingError::ContentTooLarge {
                size: request.content.size,
                limit: limits.content_max,
            });
        }
        if self.app(request.app).is_none() {
            return Err(PingError::UnknownDevice);
        }
        Ok(limits)
    }

    /// The notification of a ping that is accepted now, with the content and the replacement key of the request, and the TTL that is
    /// granted. `shared`: it is for several devices. `more`: bytes that it takes of the reserve besides its content.
    pub(super) fn notification(
        &self,
        request: &mut PingRequest,
        ping: PingId,
        limits: &Limits,
        shared: bool,
        more: usize,
    ) -> Result<(Notification, u64), RuntimeError> {
        let size = request.content.encoded.len() + more;
        let share = self
            .take_room(request.app, size, limits.memory_reserve)
            .ok_or(RuntimeError::MemoryReserve)?;
        let accepted_ms = self.shared.clock.now().unix_ms;
        let ttl_s = request
            .ttl_s
            .unwrap_or(limits.ttl_default_s)
            .min(limits.ttl_max_s);
        if request.ttl_s.is_some_and(|asked| asked > ttl_s) {
            metrics::counter!(names::TTLS_LOWERED_TOTAL).increment(1);
        }
        let transient = ttl_s == 0;
        let lifetime_ms = if transient {
            TRANSIENT_MS
        } else {
            ttl_s.saturating_mul(1_000)
        };
        let notification = Notification {
            ping,
            app: request.app,
            accepted_ms,
            expires_ms: accepted_ms.saturating_add(lifetime_ms),
            urgency: request.urgency,
            collapse: request.collapse.take(),
            size: request.content.size,
            transient,
            shared,
            content: std::mem::take(&mut request.content.encoded),
            wire: WireSlot::default(),
            hold: Hold::of(share),
        };
        Ok((notification, ttl_s))
    }
}
