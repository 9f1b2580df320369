//! Why there is no session: the way to a server, step by step, each with its result and with what to do.
//!
//! The steps are those that a client takes, by the same code; only here each is taken by itself and told. For a command, or
//! for a page of an app that a person opens when nothing arrives.

use std::time::Duration;

use bellwire_protocol::{
    Carrier, Code, Decoded, DeviceFrame, Hello, Id, Retry, Secret, ServerFrame, Urgency, Welcome,
    limits::WELCOME_TIMEOUT_MS,
};
use serde::Serialize;
use tokio::time::Instant;

use crate::carrier::{ConnectError, DIAL_TIMEOUT, Dialer, Link, Route, resolve};
use crate::clock::{Clock, wall_ms};

/// A clock that differs by more than this from the server's is a fault, in milliseconds: certificates end by it, and people
/// read times.
const SKEW_MAX_MS: u64 = 60_000;

/// How one step went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// Which step: `name`, `proxy`, `tcp`, `tls`, `websocket`, `udp`, `hello` or `clock`.
    pub name: &'static str,
    /// How it went.
    pub result: CheckResult,
    /// One line: what was found.
    pub detail: String,
    /// What to do; empty when there is nothing to do.
    pub advice: String,
    /// How long it took, in milliseconds.
    pub took_ms: u64,
}

/// How a step went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckResult {
    /// As it should.
    Ok,
    /// It did not.
    Failed,
    /// It was not tried; `detail` says why.
    Skipped,
}

/// What all steps together mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// Everything works.
    Good,
    /// A session is possible, but something is not as it should be.
    Limited,
    /// The server does not want this device; only a person can change that.
    Refused,
    /// There is no way to a session.
    Unreachable,
}

/// The result of [`Examination::run`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Diagnosis {
    /// The server.
    pub server: String,
    /// What it means.
    pub health: Health,
    /// The steps, in order.
    pub checks: Vec<Check>,
}

/// What is to be looked at.
#[derive(Debug)]
#[must_use]
pub struct Examination {
    dialer: Dialer,
    /// For `hello`; otherwise why there will be none.
    identity: Result<(Id, Secret), String>,
}

/// What a step found.
struct Found {
    detail: String,
    /// Of a step that failed.
    advice: Option<String>,
}

impl Found {
    fn well(detail: impl Into<String>) -> Self {
        Self {
            detail: detail.into(),
            advice: None,
        }
    }

    fn wrong(detail: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            detail: detail.into(),
            advice: Some(advice.into()),
        }
    }

    fn failed(error: &ConnectError) -> Self {
        Self::wrong(error.to_string(), error.advice())
    }
}

/// How `hello` was answered.
enum Greeting {
    Welcome(Welcome),
    Refused(Code, Retry),
    Broken,
}

impl Examination {
    /// Looks at the way to the dialer's server, its proxy included. Nothing is said to the server until
    /// [`as_device`](Self::as_device).
    pub fn new(dialer: Dialer) -> Self {
        Self {
            dialer,
            identity: Err("no credentials were given".to_owned()),
        }
    }

    /// Says `hello` as well. **A session of this device that stands is replaced by it**, and its client stays away for a
    /// minute. Notifications that the server sends meanwhile are not answered, so they stay with it.
    pub fn as_device(mut self, device: Id, secret: impl Into<Secret>) -> Self {
        self.identity = Ok((device, secret.into()));
        self
    }

    /// Says no `hello`, for this reason.
    pub fn without_hello(mut self, why: impl Into<String>) -> Self {
        self.identity = Err(why.into());
        self
    }

    /// Takes the steps; `told` hears of each as soon as it is done. Takes at most about a minute.
    pub async fn run(self, told: impl FnMut(&Check)) -> Diagnosis {
        let mut run = Run {
            dialer: &self.dialer,
            checks: Vec::new(),
            told,
        };
        let (direct, quic, by_proxy) = self.ways();

        run.name(direct).await;
        let through_proxy = run.proxy(by_proxy).await;
        let tcp = run.tcp(direct).await;
        let websocket = run.websocket(through_proxy.or(tcp)).await;
        let udp = run.udp(quic).await;
        let reachable = websocket.is_some() || udp.is_some();
        let mut refused = false;
        match (udp.or(websocket), &self.identity) {
            (Some(link), Ok((device, secret))) => {
                let (greeting, took) = run.hello(link, *device, secret.clone()).await;
                refused = matches!(greeting, Greeting::Refused(_, Retry::Never));
                run.clock(&greeting, took);
            }
            (Some(_), Err(why)) => {
                run.skip("hello", why);
                run.skip("clock", "only `welcome` tells the server's time");
            }
            (None, _) => {
                run.skip("hello", "there is no connection");
                run.skip("clock", "there is no connection");
            }
        }

        let checks = run.checks;
        let failed = |name: &str| {
            checks
                .iter()
                .any(|check| check.name == name && check.result == CheckResult::Failed)
        };
        let any_failed = checks
            .iter()
            .any(|check| check.result == CheckResult::Failed);
        let health = match (reachable, refused) {
            (_, true) => Health::Refused,
            (false, _) => Health::Unreachable,
            (true, _) if failed("hello") => Health::Unreachable,
            (true, _) if any_failed => Health::Limited,
            (true, _) => Health::Good,
        };
        Diagnosis {
            server: self.dialer.endpoint().to_string(),
            health,
            checks,
        }
    }

    /// Whether the direct ways, QUIC, and the proxy are ways at all.
    fn ways(&self) -> (bool, bool, bool) {
        let routes = self.dialer.routes();
        let any = |found: &dyn Fn(&Route) -> bool| routes.iter().any(found);
        (
            any(&|route| !route.by_proxy),
            any(&|route| route.carrier == Carrier::Quic),
            any(&|route| route.by_proxy),
        )
    }
}

struct Run<'a, F> {
    dialer: &'a Dialer,
    checks: Vec<Check>,
    told: F,
}

impl<F: FnMut(&Check)> Run<'_, F> {
    async fn name(&mut self, direct: bool) {
        if !direct {
            return self.skip("name", "the proxy finds the server by itself");
        }
        let (host, port) = (self.dialer.endpoint().host(), self.dialer.endpoint().port());
        let looking = tokio::time::timeout(DIAL_TIMEOUT, resolve(host, port));
        let from = Instant::now();
        let found = match looking.await {
            Ok(Ok(addresses)) => {
                let addresses: Vec<_> = addresses.iter().map(|it| it.ip().to_string()).collect();
                Found::well(format!("{host} is {}", addresses.join(", ")))
            }
            Ok(Err(error)) => Found::failed(&error),
            Err(_) => Found::wrong(
                format!("no answer about `{host}` within 10 s"),
                "Check this machine's DNS servers.",
            ),
        };
        self.tell("name", found, from);
    }

    async fn proxy(&mut self, used: bool) -> Option<crate::carrier::Pipe> {
        let proxy = self.dialer.proxy().filter(|_| used);
        let Some(proxy) = proxy.map(|used| used.proxy.to_string()) else {
            self.skip("proxy", "none is used for this server");
            return None;
        };
        let from = Instant::now();
        let opened = self.within(self.dialer.open_pipe(true)).await;
        let found = match &opened {
            Ok(_) => Found::well(format!("{proxy} lets us through")),
            Err(error) => Found::failed(error),
        };
        self.tell("proxy", found, from);
        opened.ok()
    }

    async fn tcp(&mut self, direct: bool) -> Option<crate::carrier::Pipe> {
        if !direct {
            self.skip("tcp", "everything goes through the proxy");
            return None;
        }
        let from = Instant::now();
        let opened = self.within(self.dialer.open_pipe(false)).await;
        let found = match &opened {
            Ok(_) => Found::well(format!("port {} answers", self.dialer.endpoint().port())),
            Err(error) => Found::failed(error),
        };
        self.tell("tcp", found, from);
        opened.ok()
    }

    async fn websocket(&mut self, pipe: Option<crate::carrier::Pipe>) -> Option<Link> {
        let Some(pipe) = pipe else {
            self.skip("tls", "there is no TCP connection");
            self.skip("websocket", "there is no TCP connection");
            return None;
        };
        let from = Instant::now();
        let secured = self.within(self.dialer.secure(pipe)).await;
        let found = match &secured {
            Ok(stream) => {
                let (_, tls) = stream.get_ref();
                let version = match tls.protocol_version() {
                    Some(rustls::ProtocolVersion::TLSv1_3) => "TLS 1.3",
                    _ => "TLS 1.2",
                };
                let chain = tls.peer_certificates().map_or(0, <[_]>::len);
                Found::well(format!(
                    "{version}; the certificate ({chain} in its chain) is trusted and names {}",
                    self.dialer.endpoint().host()
                ))
            }
            Err(error) => Found::failed(error),
        };
        self.tell("tls", found, from);
        let Ok(stream) = secured else {
            self.skip("websocket", "there is no TLS");
            return None;
        };
        let from = Instant::now();
        let upgraded = self.within(self.dialer.upgrade(stream)).await;
        let found = match &upgraded {
            Ok(link) => Found::well(format!("upgraded, frames in {}", link.codec().name())),
            Err(error) => Found::failed(error),
        };
        self.tell("websocket", found, from);
        upgraded.ok()
    }

    async fn udp(&mut self, used: bool) -> Option<Link> {
        if !used {
            self.skip("udp", "QUIC is not used with this address or proxy");
            return None;
        }
        let from = Instant::now();
        let route = Route {
            carrier: Carrier::Quic,
            by_proxy: false,
        };
        let dialed = self.dialer.dial_route(route).await;
        let found = match &dialed {
            Ok(_) => Found::well("the QUIC handshake passed"),
            Err(error) => Found::failed(error),
        };
        self.tell("udp", found, from);
        dialed.ok()
    }

    async fn hello(&mut self, mut link: Link, device: Id, secret: Secret) -> (Greeting, Duration) {
        let from = Instant::now();
        let carrier = link.carrier();
        let hello = Hello {
            device,
            secret: Some(secret),
            instance: Clock::new().id(),
            attempt: 1,
            seen: Vec::new(),
            // As little as possible is sent that nobody will answer.
            window: Some(1),
            min_urgency: Some(Urgency::High),
            agent: Some(concat!("bellwire-doctor/", env!("CARGO_PKG_VERSION")).to_owned()),
        };
        let greeting = tokio::time::timeout(Duration::from_millis(WELCOME_TIMEOUT_MS), async {
            link.send(&DeviceFrame::Hello(hello))
                .await
                .map_err(|end| end.code)?;
            loop {
                match link.receive().await.map_err(|end| end.code)? {
                    Ok(Decoded::Frame(ServerFrame::Welcome(welcome))) => {
                        return Ok(Greeting::Welcome(welcome));
                    }
                    Ok(Decoded::Frame(ServerFrame::Error(error))) => {
                        let code = error.known_code();
                        return Ok(code.map_or(Greeting::Broken, |code| {
                            Greeting::Refused(code, error.retry)
                        }));
                    }
                    Ok(_) => {}
                    Err(_) => return Ok(Greeting::Broken),
                }
            }
        });
        let greeting = match greeting.await {
            Ok(Ok(greeting)) => greeting,
            // The error may have been lost; the close says the same.
            Ok(Err(Some(code))) => Greeting::Refused(code, code.retry()),
            Ok(Err(None)) | Err(_) => Greeting::Broken,
        };
        let took = from.elapsed();
        let found = match &greeting {
            Greeting::Welcome(welcome) => Found::well(format!(
                "welcome over {}: session {}, {} waiting",
                carrier.name(),
                welcome.session,
                welcome.pending
            )),
            Greeting::Refused(code, _) => Found::wrong(
                format!("the server said `{}`: {}", code.name(), code.meaning()),
                code.remedy(),
            ),
            Greeting::Broken => Found::wrong(
                format!("no `welcome` came over {}", carrier.name()),
                "Check that this is the device port of a Bellwire server, and the server's log.",
            ),
        };
        self.tell("hello", found, from);
        if matches!(greeting, Greeting::Welcome(_)) {
            let _ = link.feed(&DeviceFrame::Bye).await;
            link.close(Code::Bye).await;
        }
        (greeting, took)
    }

    fn clock(&mut self, greeting: &Greeting, took: Duration) {
        let Greeting::Welcome(welcome) = greeting else {
            return self.skip("clock", "only `welcome` tells the server's time");
        };
        // The answer left the server about half of the time ago.
        let server_ms = welcome.now_ms + took.as_millis() as u64 / 2;
        self.tell("clock", skew(server_ms, wall_ms()), Instant::now());
    }

    async fn within<T>(
        &self,
        step: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        let to = self.dialer.endpoint().authority();
        let done = tokio::time::timeout(DIAL_TIMEOUT, step).await;
        done.unwrap_or(Err(ConnectError::Timeout {
            carrier: Carrier::WebSocket,
            to,
        }))
    }

    fn tell(&mut self, name: &'static str, found: Found, from: Instant) {
        self.push(Check {
            name,
            result: match found.advice {
                None => CheckResult::Ok,
                Some(_) => CheckResult::Failed,
            },
            detail: found.detail,
            advice: found.advice.unwrap_or_default(),
            took_ms: from.elapsed().as_millis() as u64,
        });
    }

    fn skip(&mut self, name: &'static str, why: &str) {
        self.push(Check {
            name,
            result: CheckResult::Skipped,
            detail: why.to_owned(),
            advice: String::new(),
            took_ms: 0,
        });
    }

    fn push(&mut self, check: Check) {
        (self.told)(&check);
        self.checks.push(check);
    }
}

fn skew(server_ms: u64, here_ms: u64) -> Found {
    let seconds = server_ms.abs_diff(here_ms) as f64 / 1_000.0;
    let side = if here_ms < server_ms {
        "behind"
    } else {
        "ahead of"
    };
    let detail = format!("this machine's clock is {seconds:.1} s {side} the server's");
    match server_ms.abs_diff(here_ms) <= SKEW_MAX_MS {
        true => Found::well(detail),
        false => Found::wrong(
            detail,
            "Set the clock (NTP). Notifications do not depend on it, but certificates do, and times that people see.",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_may_differ_by_a_minute() {
        let check = |server_ms, here_ms, text: &str, well: bool| {
            let found = skew(server_ms, here_ms);
            assert!(found.detail.contains(text), "{}", found.detail);
            assert_eq!(found.advice.is_none(), well);
        };
        check(100_000, 40_000, "60.0 s behind", true);
        check(40_000, 100_000, "60.0 s ahead of", true);
        check(100_001, 40_000, "60.0 s behind", false);
        check(0, u64::MAX, "ahead of", false);
    }
}
