//! Backends: connections that post pings, a thread each. A thread that writes, waits and reads costs less than one that
//! asks a poll in between, and it wakes up when a ping is due and not a millisecond later.
//!
//! **By the clock.** The n-th ping is due at a time that depends on nothing but n, and its latency counts from then,
//! whenever a connection gets round to posting it. A pause of the server so shows in every ping that it delayed, as it
//! would at backends that do not wait for each other (coordinated omission).

use std::collections::BTreeMap;
use std::io::{BufRead as _, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bellwire_protocol::Id;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::{Kind, Recorded, TITLE_BYTES, Title, histogram, record, recorded};
use crate::api::{self, Lines};
use crate::child::{self, Child};
use crate::clock::{self, SECOND};
use crate::failure::{During, Failure, Outcome};

/// Longest wait for an answer. A server that needs longer is stuck.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// How long after its end a run by the clock may go on posting what is overdue.
const OVERDUE_MAX: u64 = 10 * SECOND;

/// Pause after a refusal, so that a server in trouble is not hammered.
const AFTER_REFUSAL: Duration = Duration::from_millis(20);

/// Room for an answer that is read, bytes; it grows where one is longer.
const READ_BYTES: usize = 16 * 1024;

/// What the answer to a line of a batch has that was accepted.
const ACCEPTED: &[u8] = b"\"status\":202";

/// What comes before the code of a refusal.
const CODE: &[u8] = b"\"code\":\"";

/// The longest that a setup may take to be understood.
const SETUP_MAX: Duration = Duration::from_secs(60);

/// Whom pings are for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Target {
    /// These by turns.
    Devices(Vec<Id>),
    /// All in a topic.
    Topic(String),
    Everyone,
}

/// What backends are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) api: SocketAddr,
    pub(crate) key: String,
    pub(crate) target: Target,
    /// Keep-alive connections, each one request at a time.
    pub(crate) connections: u32,
    /// Pings of a request; more than one: of the batch endpoint.
    pub(crate) batch: u32,
    /// Content of a ping.
    pub(crate) bytes: u32,
    pub(crate) ttl_s: Option<u32>,
}

/// What they are to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Post {
    /// Number of the first ping.
    pub(crate) first: u64,
    /// Most pings.
    pub(crate) limit: u64,
    /// Pings a second by the clock; without it each connection posts when it has its answer.
    pub(crate) rate: Option<u32>,
    /// When the first ping is due, or posted where no clock says when.
    pub(crate) start: u64,
    /// What is measured: pings due, or posted where no clock says when, from here ...
    pub(crate) from: u64,
    /// ... to here, which also is when posting ends.
    pub(crate) to: u64,
    /// The first so many devices of the target are a sample whose pings are counted by themselves.
    pub(crate) sample: u64,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Posted {
    /// The first number that was not posted.
    pub(crate) next: u64,
    pub(crate) accepted: u64,
    /// Of these, for devices of the sample.
    pub(crate) sampled: u64,
    /// Answers that did not accept, by their code.
    pub(crate) refused: BTreeMap<String, u64>,
    /// Pings that were due and not posted, because the server was too far behind.
    pub(crate) unposted: u64,
    /// Accepted while measuring, by the time of the answer.
    pub(crate) measured: u64,
    /// From when a ping was due (or posted) to its answer, microseconds.
    pub(crate) answer: Recorded,
    /// How late this program was itself: from when a ping was due to its posting, where a connection was free in time.
    pub(crate) lag: Recorded,
    /// Accepted in each second from `start`.
    pub(crate) seconds: Vec<u64>,
}

impl Posted {
    pub(crate) fn refusals(&self) -> u64 {
        self.refused.values().sum()
    }
}

// ---- The parent's side ---------------------------------------------------------------------------------------------

/// Backends as a process.
pub(crate) struct Backends(Child);

impl Backends {
    pub(crate) async fn start(setup: &Setup) -> Outcome<Backends> {
        let mut child = Child::start("play-backends", &())?;
        let line = serde_json::to_string(setup).during("write down what backends are")?;
        child.tell(&line).await?;
        child
            .hear::<Result<(), String>>(SETUP_MAX)
            .await?
            .map_err(Failure::new)?;
        Ok(Backends(child))
    }

    pub(crate) fn pid(&self) -> Outcome<u32> {
        self.0.pid()
    }

    /// Lets them begin.
    pub(crate) async fn post(&mut self, post: &Post) -> Outcome<()> {
        let line = serde_json::to_string(post).during("write down what backends do")?;
        self.0.tell(&line).await
    }

    /// Waits until they are done.
    pub(crate) async fn done(&mut self, post: &Post) -> Outcome<Posted> {
        let left = clock::until(post.to + OVERDUE_MAX) + 2 * ANSWER_MAX;
        self.0
            .hear::<Result<Posted, String>>(left)
            .await?
            .map_err(Failure::new)
    }

    pub(crate) async fn stop(self) {
        self.0.stop().await;
    }
}

// ---- The child's side ----------------------------------------------------------------------------------------------

/// Post pings, started by workloads
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PlayBackends {
    /// Nothing: all it has to know comes over standard input.
    _job: String,
}

/// Runs until the parent is gone.
pub(crate) fn play() -> Outcome<()> {
    crate::process::raise_file_limit();
    let mut lines = std::io::stdin().lock().lines();
    let mut next = || lines.next().transpose().during("hear of the parent");
    let Some(line) = next()? else { return Ok(()) };
    let setup: Setup = child::job(&line)?;
    child::say(&Ok::<_, String>(()))?;
    while let Some(line) = next()? {
        let post: Post = child::job(&line)?;
        let posted = post_all(&setup, &post).map_err(|failure| failure.to_string());
        child::say(&posted)?;
    }
    Ok(())
}

/// What the connections share.
struct Shared<'a> {
    setup: &'a Setup,
    post: &'a Post,
    next: AtomicU64,
    posted: Mutex<Posted>,
}

fn post_all(setup: &Setup, post: &Post) -> Outcome<Posted> {
    let shared = Shared {
        setup,
        post,
        next: AtomicU64::new(0),
        posted: Mutex::default(),
    };
    let connections = (0..setup.connections)
        .map(|_| Connection::open(setup))
        .collect::<Outcome<Vec<_>>>()?;
    let (mut answer, mut lag) = (histogram(), histogram());
    std::thread::scope(|scope| {
        let threads: Vec<_> = connections
            .into_iter()
            .map(|connection| scope.spawn(|| Poster::new(connection, &shared).run()))
            .collect();
        for thread in threads {
            let (its_answer, its_lag) = thread
                .join()
                .map_err(|_| Failure::new("a connection's thread panicked"))??;
            // Both have the same bounds.
            answer.add(its_answer).during("add up latencies")?;
            lag.add(its_lag).during("add up latencies")?;
        }
        Ok::<_, Failure>(())
    })?;
    let taken = shared.next.load(Ordering::Relaxed).min(post.limit);
    let mut posted = shared
        .posted
        .into_inner()
        .map_err(|_| Failure::new("a connection's thread panicked"))?;
    posted.next = post.first + taken;
    posted.answer = recorded(&answer);
    posted.lag = recorded(&lag);
    Ok(posted)
}

struct Poster<'a> {
    connection: Connection,
    shared: &'a Shared<'a>,
    answer: Histogram<u64>,
    lag: Histogram<u64>,
    line: Line,
    request: Vec<u8>,
    /// Where its body starts, and how many pings it has.
    start: usize,
    pings: u64,
    /// What this thread counted and has not handed over.
    own: Posted,
}

/// One ping as JSON, and where in it stands what changes.
struct Line {
    text: String,
    device_at: Option<usize>,
    title_at: usize,
}

impl Line {
    fn new(setup: &Setup) -> Line {
        let (to, device_at) = match &setup.target {
            Target::Devices(_) => {
                let before = r#"{"to":{"device":""#;
                let text = format!(r#"{before}{}"}}"#, "a".repeat(Id::TEXT_LEN));
                (text, Some(before.len()))
            }
            Target::Topic(topic) => (format!(r#"{{"to":{{"topic":"{topic}"}}"#), None),
            Target::Everyone => (r#"{"to":{"everyone":true}"#.to_owned(), None),
        };
        let ttl = setup.ttl_s.map(|ttl_s| format!(r#","ttl_s":{ttl_s}"#));
        let before = format!(r#"{to}{},"title":""#, ttl.unwrap_or_default());
        let body = (setup.bytes as usize).saturating_sub(TITLE_BYTES);
        Line {
            text: format!(
                r#"{before}{}","body":"{}"}}"#,
                "0".repeat(TITLE_BYTES),
                "x".repeat(body)
            ),
            device_at,
            title_at: before.len(),
        }
    }
}

impl<'a> Poster<'a> {
    fn new(connection: Connection, shared: &'a Shared<'a>) -> Poster<'a> {
        Poster {
            connection,
            shared,
            answer: histogram(),
            lag: histogram(),
            line: Line::new(shared.setup),
            request: Vec::new(),
            start: 0,
            pings: 0,
            own: Posted::default(),
        }
    }

    fn run(mut self) -> Outcome<(Histogram<u64>, Histogram<u64>)> {
        let batch = u64::from(self.shared.setup.batch.max(1));
        let post = self.shared.post;
        std::thread::sleep(clock::until(post.start));
        loop {
            let number = self.shared.next.fetch_add(batch, Ordering::Relaxed);
            if number >= post.limit {
                break;
            }
            let due = match post.rate {
                Some(rate) => {
                    let due = post.start + due(number, rate);
                    if due >= post.to {
                        break;
                    }
                    let wait = clock::until(due);
                    if wait > Duration::ZERO {
                        std::thread::sleep(wait);
                        record(&mut self.lag, clock::now() - due);
                    } else if clock::now() > post.to + OVERDUE_MAX {
                        self.own.unposted += batch.min(post.limit - number);
                        continue;
                    }
                    due
                }
                None => {
                    let now = clock::now();
                    if now >= post.to {
                        break;
                    }
                    now
                }
            };
            let refused = self.own.refusals();
            let pings = batch.min(post.limit - number);
            self.make_room(pings);
            for place in 0..pings {
                self.address(place, post.first + number + place, due);
            }
            if batch > 1 {
                self.exchange_batch(post.first + number, due)?;
            } else {
                self.exchange(post.first + number, due)?;
            }
            if self.own.refusals() > refused {
                std::thread::sleep(AFTER_REFUSAL);
            }
        }
        let mut whole = self
            .shared
            .posted
            .lock()
            .map_err(|_| Failure::new("a connection's thread panicked"))?;
        whole.accepted += self.own.accepted;
        whole.sampled += self.own.sampled;
        whole.unposted += self.own.unposted;
        whole.measured += self.own.measured;
        for (code, count) in self.own.refused {
            *whole.refused.entry(code).or_default() += count;
        }
        let length = whole.seconds.len().max(self.own.seconds.len());
        whole.seconds.resize(length, 0);
        for (whole, own) in whole.seconds.iter_mut().zip(&self.own.seconds) {
            *whole += own;
        }
        drop(whole);
        Ok((self.answer, self.lag))
    }

    /// Posts one ping.
    fn exchange(&mut self, number: u64, due: u64) -> Outcome<()> {
        let answer = self.connection.exchange(&self.request)?;
        if answer.status == 202 {
            let shared = self.shared;
            take(&mut self.own, &mut self.answer, shared, number, due);
        } else {
            let code = code(self.connection.body(answer), answer.status);
            *self.own.refused.entry(code).or_default() += 1;
        }
        Ok(())
    }

    /// Posts a batch; each of its pings counts from the moment at which all of them are posted.
    fn exchange_batch(&mut self, first: u64, due: u64) -> Outcome<()> {
        let mut lines = 0;
        let (own, latency, shared) = (&mut self.own, &mut self.answer, self.shared);
        let answer = self.connection.exchange_lines(&self.request, &mut |line| {
            if line.windows(ACCEPTED.len()).any(|part| part == ACCEPTED) {
                take(own, latency, shared, first + lines, due);
            } else {
                *own.refused.entry(code(line, 0)).or_default() += 1;
            }
            lines += 1;
        })?;
        if let Some(answer) = answer {
            let code = code(self.connection.body(answer), answer.status);
            *self.own.refused.entry(code).or_default() += self.pings;
        } else if lines != self.pings {
            return Err(Failure::new(format!(
                "a batch of {} pings has {lines} answers",
                self.pings
            )));
        }
        Ok(())
    }

    /// Makes the request one of so many pings.
    fn make_room(&mut self, pings: u64) {
        if self.pings == pings {
            return;
        }
        let Setup {
            api, key, batch, ..
        } = self.shared.setup;
        (self.request, self.start) = if *batch > 1 {
            let lines = format!("{}\n", self.line.text).repeat(pings as usize);
            api::post_as("application/x-ndjson", "/v1/pings/batch", *api, key, &lines)
        } else {
            api::post("/v1/pings", *api, key, &self.line.text)
        };
        self.pings = pings;
    }

    /// Writes number and device into a ping of the request.
    fn address(&mut self, place: u64, number: u64, due: u64) {
        let at = self.start + place as usize * (self.line.text.len() + 1);
        let ping = &mut self.request[at..];
        let kind = match (&self.shared.setup.target, self.line.device_at) {
            (Target::Devices(devices), Some(at)) => {
                let device = devices[(number % devices.len() as u64) as usize];
                ping[at..][..Id::TEXT_LEN].copy_from_slice(&device.text());
                Kind::Single
            }
            (Target::Devices(_) | Target::Topic(_) | Target::Everyone, _) => Kind::Fan,
        };
        Title { kind, number, due }.write(&mut ping[self.line.title_at..]);
    }
}

/// Counts one that was accepted just now.
fn take(
    own: &mut Posted,
    latency: &mut Histogram<u64>,
    shared: &Shared<'_>,
    number: u64,
    due: u64,
) {
    let now = clock::now();
    let post = shared.post;
    own.accepted += 1;
    if let Target::Devices(devices) = &shared.setup.target
        && number % (devices.len().max(1) as u64) < post.sample
    {
        own.sampled += 1;
    }
    if (post.from..post.to).contains(&now) {
        own.measured += 1;
    }
    if (post.from..post.to).contains(&due) {
        record(latency, now.saturating_sub(due));
    }
    let second = (now.saturating_sub(post.start) / SECOND) as usize;
    if own.seconds.len() <= second {
        own.seconds.resize(second + 1, 0);
    }
    own.seconds[second] += 1;
}

/// When the n-th ping is due after the first.
fn due(number: u64, rate: u32) -> u64 {
    (u128::from(number) * u128::from(SECOND) / u128::from(rate)) as u64
}

/// The code in a problem document, or the status where there is none.
fn code(body: &[u8], status: u16) -> String {
    let start = body.windows(CODE.len()).position(|part| part == CODE);
    let text = start.and_then(|start| {
        let rest = &body[start + CODE.len()..];
        let end = rest.iter().position(|byte| *byte == b'"')?;
        std::str::from_utf8(&rest[..end]).ok()
    });
    text.map_or_else(|| format!("status {status}"), str::to_owned)
}

/// A keep-alive connection that blocks its thread.
struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    /// How much of it was read.
    filled: usize,
}

impl Connection {
    fn open(setup: &Setup) -> Outcome<Connection> {
        let stream = TcpStream::connect(setup.api)
            .during(format_args!("connect to the API at {}", setup.api))?;
        stream
            .set_nodelay(true)
            .during("set an option of a socket")?;
        let limit = Some(ANSWER_MAX);
        stream
            .set_read_timeout(limit)
            .during("set an option of a socket")?;
        stream
            .set_write_timeout(limit)
            .during("set an option of a socket")?;
        Ok(Connection {
            stream,
            buffer: vec![0; READ_BYTES],
            filled: 0,
        })
    }

    fn send(&mut self, request: &[u8]) -> Outcome<()> {
        self.filled = 0;
        self.stream.write_all(request).during("send a request")
    }

    /// Reads what there is.
    fn read(&mut self) -> Outcome<()> {
        if self.filled == self.buffer.len() {
            let more = self.buffer.len() * 2;
            if more > api::ANSWER_MAX_BYTES {
                return Err(Failure::new("an answer of the API is larger than 4 MiB"));
            }
            self.buffer.resize(more, 0);
        }
        let read = self
            .stream
            .read(&mut self.buffer[self.filled..])
            .during("read an answer within 60 s")?;
        if read == 0 {
            return Err(Failure::new(
                "the API closed the connection instead of answering",
            ));
        }
        self.filled += read;
        Ok(())
    }

    /// Sends one whole request and reads its answer.
    fn exchange(&mut self, request: &[u8]) -> Outcome<api::Answer> {
        self.send(request)?;
        loop {
            self.read()?;
            if let Some(answer) = api::parse(&self.buffer[..self.filled])? {
                return Ok(answer);
            }
        }
    }

    /// Sends a batch and hands on the lines of its answer as they come. An answer that is none of a batch is given whole.
    fn exchange_lines(
        &mut self,
        request: &[u8],
        take: &mut impl FnMut(&[u8]),
    ) -> Outcome<Option<api::Answer>> {
        self.send(request)?;
        let mut lines = Lines::default();
        let mut begun = false;
        loop {
            self.read()?;
            let mut from = 0;
            if !begun {
                let head = &self.buffer[..self.filled];
                match api::chunks_at(head)? {
                    Some(at) => {
                        begun = true;
                        from = at;
                    }
                    // No chunks, or not the whole head.
                    None => match api::parse(head) {
                        Ok(Some(answer)) => return Ok(Some(answer)),
                        Ok(None) | Err(_) => continue,
                    },
                }
            }
            let (used, ended) = lines.feed(&self.buffer[from..self.filled], take)?;
            if ended {
                return Ok(None);
            }
            self.buffer.copy_within(from + used..self.filled, 0);
            self.filled -= from + used;
        }
    }

    fn body(&self, answer: api::Answer) -> &[u8] {
        &self.buffer[answer.body.0..answer.body.1]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn due_times_do_not_drift() {
        assert_eq!(due(0, 3), 0);
        assert_eq!(due(3, 3), SECOND);
        assert_eq!(due(3_000_000, 3), 1_000_000 * SECOND);
    }

    #[test]
    fn refusals_are_counted_by_code() {
        let body = br#"{"type":"about:blank","code":"store_busy","status":503}"#;
        assert_eq!(code(body, 503), "store_busy");
        assert_eq!(code(b"oops", 500), "status 500");
    }

    #[test]
    fn a_line_has_number_and_device_where_it_says() {
        let setup = |target| Setup {
            api: "127.0.0.1:1".parse().unwrap(),
            key: String::new(),
            target,
            connections: 1,
            batch: 1,
            bytes: 100,
            ttl_s: Some(60),
        };
        let line = Line::new(&setup(Target::Devices(vec![Id([1; 16])])));
        let json: serde_json::Value = serde_json::from_str(&line.text).unwrap();
        assert_eq!(json["to"]["device"].as_str().unwrap().len(), Id::TEXT_LEN);
        assert_eq!(json["ttl_s"], 60);
        let title = json["title"].as_str().unwrap();
        assert_eq!(title.len() + json["body"].as_str().unwrap().len(), 100);
        assert_eq!(&line.text[line.title_at..][..TITLE_BYTES], title);
        let line = Line::new(&setup(Target::Topic("news".to_owned())));
        let json: serde_json::Value = serde_json::from_str(&line.text).unwrap();
        assert_eq!(json["to"]["topic"], "news");
    }
}
