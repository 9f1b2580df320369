//! The floor under delivering: messages of one size to many connections on loopback, once one to each in turn, once many to
//! one in one write, or one to each, which each answers. The writer is a process of its own and counts its own processor time; this
//! side only reads, answers and counts.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bellwire_protocol::ALPN;
use futures_util::{SinkExt, StreamExt};
use hdrhistogram::Histogram;
use quinn::crypto::rustls::QuicClientConfig;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};

use super::server::{endpoint, listen};
use crate::child::{self, Child};
use crate::device;
use crate::failure::{During, Failure, Outcome};
use crate::process;
use crate::tls::{self, Identity};

/// Longest wait for anything that takes no measured time.
const STEP_MAX: Duration = Duration::from_secs(60);

/// Most that is read at a time, bytes.
const READ_BYTES: usize = 64 * 1024;

/// The same where there are thousands of connections that are written to one message at a time.
const ANSWERED_READ_BYTES: usize = 1024;

/// Size of an answer, about that of an acknowledgement, bytes.
const ANSWER_BYTES: usize = 32;

/// Round trips before they are counted.
const TRIPS_WARM_UP: u64 = 200;

/// Round trips longer than this count as this, in microseconds.
const TRIP_MAX_MICROS: u64 = 10_000_000;

/// What the messages go over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Over {
    /// Bare TCP
    Tcp,
    /// TLS 1.3
    Tls,
    /// WebSocket frames over TLS 1.3
    Websocket,
    /// A stream of QUIC
    Quic,
}

impl Over {
    pub(crate) const ALL: [Over; 4] = [Over::Tcp, Over::Tls, Over::Websocket, Over::Quic];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Over::Tcp => "tcp",
            Over::Tls => "tls",
            Over::Websocket => "websocket",
            Over::Quic => "quic",
        }
    }

    /// Bytes on the stream of a message of so many bytes.
    fn on_stream(self, bytes: usize) -> u64 {
        let header = match (self, bytes) {
            (Over::Websocket, ..126) => 2,
            (Over::Websocket, 126..0x1_0000) => 4,
            (Over::Websocket, _) => 10,
            (Over::Tcp | Over::Tls | Over::Quic, _) => 0,
        };
        header + bytes as u64
    }
}

/// How the writer writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Manner {
    /// So many messages to one connection in one write, then the next connection.
    Write(usize),
    /// A message to each connection, each of which has a task and answers; then the next round.
    Answered,
    /// What comes goes back.
    Echo,
}

/// Write messages to connections, started by `floor`
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct FloorWrite {
    /// A [`Job`] as JSON.
    job: String,
}

/// What is to be measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) over: Over,
    pub(crate) manner: Manner,
    pub(crate) connections: usize,
    /// Size of a message.
    pub(crate) bytes: usize,
    pub(crate) seconds: u32,
}

#[derive(Debug, Serialize, Deserialize)]
struct Told {
    address: SocketAddr,
    authority: String,
}

/// What a writer did.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Written {
    messages: u64,
    seconds: f64,
    cpu_seconds: f64,
}

/// What was found.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Found {
    Rates {
        messages: u64,
        per_second: f64,
        per_cpu_second: f64,
    },
    /// Milliseconds of a round trip.
    Trips { count: u64, p50: f64, p99: f64 },
}

// ---- The parent's side ---------------------------------------------------------------------------------------------

type Stream = Box<dyn Duplex>;

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// Measures with a writer in a process of its own. Fails if what arrived is not what was written.
pub(crate) async fn measure(job: &Job) -> Outcome<Found> {
    let mut child = Child::start("floor-write", job)?;
    let told: Told = child.hear(STEP_MAX).await?;
    let dialer = Dialer::new(job.over, &told)?;
    let mut streams = Vec::new();
    for _ in 0..job.connections {
        let mut stream = timeout(STEP_MAX, dialer.dial())
            .await
            .map_err(|_| Failure::new("a connection did not stand within 60 s"))??;
        // The writer takes a connection for ready at its first byte; QUIC shows a stream by it.
        stream.write_all(&[0]).await.during("greet the writer")?;
        stream.flush().await.during("greet the writer")?;
        streams.push(stream);
    }
    let seconds = Duration::from_secs(job.seconds.into());
    let () = child.hear(STEP_MAX).await?;
    if job.manner == Manner::Echo {
        let stream = streams.pop();
        let stream = stream.ok_or_else(|| Failure::new("an echo needs a connection"))?;
        let found = trips(stream, job.bytes, seconds).await?;
        child.stop().await;
        return Ok(found);
    }
    let mut readers = JoinSet::new();
    for stream in streams {
        match job.manner {
            Manner::Answered => readers.spawn(answer(stream, job.over, job.bytes)),
            Manner::Write(_) | Manner::Echo => readers.spawn(count(stream)),
        };
    }
    child.tell("go").await?;
    let written: Written = child.hear(STEP_MAX + seconds).await?;
    let mut arrived = 0;
    while let Some(bytes) = readers.join_next().await {
        arrived += bytes.during("read")??;
    }
    child.stop().await;
    let expected = written.messages * job.over.on_stream(job.bytes);
    if arrived != expected || written.messages == 0 {
        return Err(Failure::new(format!(
            "{} messages were written over {}, which is {expected} bytes, and {arrived} bytes arrived",
            written.messages,
            job.over.name()
        )));
    }
    Ok(Found::Rates {
        messages: written.messages,
        per_second: written.messages as f64 / written.seconds,
        per_cpu_second: written.messages as f64 / written.cpu_seconds.max(f64::MIN_POSITIVE),
    })
}

/// Reads until the stream ends, and counts.
async fn count(mut stream: Stream) -> Outcome<u64> {
    let mut buffer = vec![0; READ_BYTES];
    let mut bytes = 0;
    loop {
        match stream.read(&mut buffer).await.during("read a stream")? {
            0 => return Ok(bytes),
            read => bytes += read as u64,
        }
    }
}

/// Answers each message until the stream ends, and counts the bytes of the messages on the stream.
async fn answer(mut stream: Stream, over: Over, bytes: usize) -> Outcome<u64> {
    let answer = bytes::Bytes::from(vec![b'y'; ANSWER_BYTES]);
    let mut arrived = 0;
    if over == Over::Websocket {
        let config = WebSocketConfig::default()
            .read_buffer_size(ANSWERED_READ_BYTES)
            .write_buffer_size(0);
        let mut socket = WebSocketStream::from_raw_socket(stream, Role::Client, Some(config)).await;
        // The writer ends the stream and not the WebSocket; whether anything is missing shows in the count.
        while let Some(Ok(message)) = socket.next().await {
            arrived += over.on_stream(message.len());
            let answer = Message::Binary(answer.clone());
            socket.send(answer).await.during("answer a message")?;
        }
        return Ok(arrived);
    }
    let mut message = vec![0; bytes];
    while stream.read_exact(&mut message).await.is_ok() {
        arrived += over.on_stream(bytes);
        stream.write_all(&answer).await.during("answer a message")?;
        stream.flush().await.during("answer a message")?;
    }
    Ok(arrived)
}

/// One message at a time, there and back.
async fn trips(mut stream: Stream, bytes: usize, time: Duration) -> Outcome<Found> {
    let mut micros = Histogram::<u64>::new_with_max(TRIP_MAX_MICROS * 1_000, 3)
        .unwrap_or_else(|_| unreachable!("the bounds are valid"));
    let message = vec![b'x'; bytes];
    let mut answer = vec![0; bytes];
    let mut count = 0;
    let mut end = Instant::now() + time;
    while Instant::now() < end {
        let began = Instant::now();
        let trip = async {
            stream.write_all(&message).await.during("send a message")?;
            stream.flush().await.during("send a message")?;
            stream
                .read_exact(&mut answer)
                .await
                .during("read an echo")
                .map(|_| ())
        };
        timeout(STEP_MAX, trip)
            .await
            .map_err(|_| Failure::new("an echo did not come within 60 s"))??;
        if answer != message {
            return Err(Failure::new("an echo differs from what was sent"));
        }
        let took = u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX);
        count += 1;
        if count == TRIPS_WARM_UP {
            micros.reset();
            end = Instant::now() + time;
        }
        micros.saturating_record(took);
    }
    Ok(Found::Trips {
        count,
        p50: micros.value_at_quantile(0.5) as f64 / 1e6,
        p99: micros.value_at_quantile(0.99) as f64 / 1e6,
    })
}

/// Connects to a writer.
enum Dialer {
    Tcp(SocketAddr),
    Tls(SocketAddr, TlsConnector),
    Quic(SocketAddr, quinn::Endpoint),
}

impl Dialer {
    fn new(over: Over, told: &Told) -> Outcome<Dialer> {
        let mut config = tls::client(told.authority.as_bytes())?;
        Ok(match over {
            Over::Tcp => Dialer::Tcp(told.address),
            Over::Tls | Over::Websocket => {
                Dialer::Tls(told.address, TlsConnector::from(Arc::new(config)))
            }
            Over::Quic => {
                config.alpn_protocols = vec![ALPN.to_vec()];
                let config = QuicClientConfig::try_from(config).during("set up QUIC")?;
                let mut endpoint = device::endpoint(Ipv4Addr::LOCALHOST.into())?;
                endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(config)));
                Dialer::Quic(told.address, endpoint)
            }
        })
    }

    async fn dial(&self) -> Outcome<Stream> {
        let tcp = async |address: &SocketAddr| {
            let tcp = TcpStream::connect(address).await.during("connect by TCP")?;
            tcp.set_nodelay(true).during("set an option of a socket")?;
            Ok::<_, Failure>(tcp)
        };
        Ok(match self {
            Dialer::Tcp(address) => Box::new(tcp(address).await?),
            Dialer::Tls(address, connector) => {
                Box::new(tls::over(connector, tcp(address).await?).await?)
            }
            Dialer::Quic(address, endpoint) => {
                let connection = endpoint
                    .connect(*address, tls::SERVER_NAME)
                    .during("start a QUIC connection")?
                    .await
                    .during("complete the QUIC handshake")?;
                let (send, receive) = connection.open_bi().await.during("open a stream")?;
                Box::new(tokio::io::join(receive, send))
            }
        })
    }
}

// ---- The child's side ----------------------------------------------------------------------------------------------

/// Runs one job.
pub(crate) async fn serve(args: FloorWrite) -> Outcome<()> {
    process::raise_file_limit();
    let job: Job = child::job(&args.job)?;
    let identity = Identity::fresh()?;
    let acceptor = Acceptor::new(&job, &identity)?;
    child::say(&Told {
        address: acceptor.address()?,
        authority: identity.authority,
    })?;
    let mut sinks = Vec::new();
    for _ in 0..job.connections {
        sinks.push(acceptor.accept(&job).await?);
    }
    child::say(&())?;
    if job.manner == Manner::Echo {
        let sink = sinks.pop();
        let sink = sink.ok_or_else(|| Failure::new("an echo needs a connection"))?;
        return sink.echo().await;
    }
    child::heard()?;

    let me = std::process::id();
    let cpu = process::cpu_time(me)?;
    let started = Instant::now();
    let end = started + Duration::from_secs(job.seconds.into());
    let messages = match job.manner {
        Manner::Answered => ask(sinks, job.bytes, end).await?,
        Manner::Write(group) => write_all(sinks, job.bytes, group, end).await?,
        Manner::Echo => 0,
    };
    child::say(&Written {
        messages,
        seconds: started.elapsed().as_secs_f64(),
        cpu_seconds: process::cpu_time(me)?.saturating_sub(cpu).as_secs_f64(),
    })
}

/// Writes from as many tasks as there are processors. Answers the number of messages.
async fn write_all(sinks: Vec<Sink>, bytes: usize, group: usize, end: Instant) -> Outcome<u64> {
    let writers = std::thread::available_parallelism().map_or(1, usize::from);
    let mut parts: Vec<Vec<Sink>> = (0..writers).map(|_| Vec::new()).collect();
    for (place, sink) in sinks.into_iter().enumerate() {
        parts[place % writers].push(sink);
    }
    let mut tasks = JoinSet::new();
    for part in parts.into_iter().filter(|part| !part.is_empty()) {
        tasks.spawn(write(part, bytes, group, end));
    }
    let mut messages = 0;
    while let Some(done) = tasks.join_next().await {
        messages += done.during("write")??;
    }
    Ok(messages)
}

/// Has each write a message and wait for its answer, round after round until the time is over, then ends all streams. Answers the
/// number of messages.
async fn ask(sinks: Vec<Sink>, bytes: usize, end: Instant) -> Outcome<u64> {
    let message = bytes::Bytes::from(vec![b'x'; bytes]);
    let all = sinks.len();
    let missing = Arc::new((AtomicUsize::new(all), Notify::new()));
    let (round, rounds) = watch::channel(0_u64);
    let mut asking = JoinSet::new();
    for mut sink in sinks {
        let (message, missing) = (message.clone(), Arc::clone(&missing));
        let mut rounds = rounds.clone();
        asking.spawn(async move {
            while rounds.changed().await.is_ok() {
                sink.write(&message, &message, 1).await?;
                sink.answered().await?;
                if missing.0.fetch_sub(1, Ordering::AcqRel) == 1 {
                    missing.1.notify_one();
                }
            }
            sink.end().await
        });
    }
    drop(rounds);
    let mut messages = 0;
    while Instant::now() < end {
        missing.0.store(all, Ordering::Release);
        round.send_modify(|round| *round += 1);
        timeout(STEP_MAX, missing.1.notified())
            .await
            .map_err(|_| Failure::new("not all answered within 60 s"))?;
        messages += all as u64;
    }
    drop(round);
    while let Some(done) = asking.join_next().await {
        done.during("end a stream")??;
    }
    Ok(messages)
}

/// Writes to each in turn until the time is over, then ends all streams. Answers the number of messages.
async fn write(mut sinks: Vec<Sink>, bytes: usize, group: usize, end: Instant) -> Outcome<u64> {
    let message = bytes::Bytes::from(vec![b'x'; bytes]);
    let together = message.repeat(group);
    let mut messages = 0;
    while Instant::now() < end {
        for sink in &mut sinks {
            sink.write(&message, &together, group).await?;
            messages += group as u64;
        }
    }
    // At once, so that one slow reader does not hold up the end of the others.
    let mut ending: JoinSet<_> = sinks.into_iter().map(Sink::end).collect();
    while let Some(done) = ending.join_next().await {
        done.during("end a stream")??;
    }
    Ok(messages)
}

enum Acceptor {
    Tcp(tokio::net::TcpListener),
    Tls(tokio::net::TcpListener, TlsAcceptor),
    Quic(quinn::Endpoint),
}

impl Acceptor {
    fn new(job: &Job, identity: &Identity) -> Outcome<Acceptor> {
        let config = identity.server()?;
        Ok(match job.over {
            Over::Tcp => Acceptor::Tcp(listen()?),
            Over::Tls | Over::Websocket => {
                Acceptor::Tls(listen()?, TlsAcceptor::from(Arc::new(config)))
            }
            Over::Quic => {
                // Whatever is written before the last was acknowledged would go out together with what follows.
                let group = match job.manner {
                    Manner::Write(group) => group,
                    Manner::Answered | Manner::Echo => 1,
                };
                Acceptor::Quic(endpoint(config, Some((group * job.bytes) as u64))?)
            }
        })
    }

    fn address(&self) -> Outcome<SocketAddr> {
        match self {
            Acceptor::Tcp(listener) | Acceptor::Tls(listener, _) => listener.local_addr(),
            Acceptor::Quic(endpoint) => endpoint.local_addr(),
        }
        .during("find the port")
    }

    /// Takes the next connection and waits for its first byte.
    async fn accept(&self, job: &Job) -> Outcome<Sink> {
        let mut first = [0];
        let accept = async |listener: &tokio::net::TcpListener| {
            let (tcp, _) = listener.accept().await.during("accept")?;
            tcp.set_nodelay(true).during("set an option of a socket")?;
            Ok::<_, Failure>(tcp)
        };
        match self {
            Acceptor::Tcp(listener) => {
                let mut tcp = accept(listener).await?;
                tcp.read_exact(&mut first).await.during("be greeted")?;
                Ok(Sink::Stream(Box::new(tcp)))
            }
            Acceptor::Tls(listener, acceptor) => {
                let tcp = accept(listener).await?;
                let mut stream = acceptor
                    .accept(tcp)
                    .await
                    .during("complete the TLS handshake")?;
                stream.read_exact(&mut first).await.during("be greeted")?;
                let stream: Stream = Box::new(stream);
                if job.over == Over::Tls {
                    return Ok(Sink::Stream(stream));
                }
                let read_buffer = match job.manner {
                    Manner::Answered => ANSWERED_READ_BYTES,
                    Manner::Write(_) | Manner::Echo => READ_BYTES,
                };
                let config = WebSocketConfig::default()
                    .read_buffer_size(read_buffer)
                    // Whatever belongs into one write is kept until it is flushed.
                    .write_buffer_size(usize::MAX / 2)
                    .max_write_buffer_size(usize::MAX);
                let socket =
                    WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await;
                Ok(Sink::WebSocket(Box::new(socket)))
            }
            Acceptor::Quic(endpoint) => {
                let incoming = endpoint.accept().await;
                let connection = incoming
                    .ok_or_else(|| Failure::new("the QUIC endpoint closed"))?
                    .await
                    .during("complete the QUIC handshake")?;
                let (send, mut receive) = connection.accept_bi().await.during("take a stream")?;
                receive.read_exact(&mut first).await.during("be greeted")?;
                Ok(Sink::Quic(connection, send, receive))
            }
        }
    }
}

/// One connection of the writer.
enum Sink {
    Stream(Stream),
    WebSocket(Box<WebSocketStream<Stream>>),
    // The connection is kept open.
    Quic(quinn::Connection, quinn::SendStream, quinn::RecvStream),
}

impl Sink {
    /// `together` is `group` times `message`.
    async fn write(
        &mut self,
        message: &bytes::Bytes,
        together: &[u8],
        group: usize,
    ) -> Outcome<()> {
        match self {
            Sink::Stream(stream) => {
                stream.write_all(together).await.during("write")?;
                stream.flush().await.during("write")
            }
            Sink::WebSocket(socket) => {
                for _ in 0..group {
                    let message = Message::Binary(message.clone());
                    socket.feed(message).await.during("write")?;
                }
                socket.flush().await.during("write")
            }
            Sink::Quic(_, send, _) => send.write_all(together).await.during("write"),
        }
    }

    /// Waits for the answer to a message.
    async fn answered(&mut self) -> Outcome<()> {
        let mut answer = [0; ANSWER_BYTES];
        match self {
            Sink::Stream(stream) => stream
                .read_exact(&mut answer)
                .await
                .during("read an answer")
                .map(|_| ()),
            Sink::WebSocket(socket) => match socket.next().await {
                Some(answer) => answer.during("read an answer").map(|_| ()),
                None => Err(Failure::new("a stream ended before its answer")),
            },
            Sink::Quic(_, _, receive) => receive
                .read_exact(&mut answer)
                .await
                .during("read an answer"),
        }
    }

    /// Ends the stream and waits until the reader has all of it, as far as that shows.
    async fn end(self) -> Outcome<()> {
        match self {
            Sink::Stream(mut stream) => stream.shutdown().await.during("end a stream"),
            // The frame of a WebSocket's own end would be counted; the stream ends below it.
            Sink::WebSocket(mut socket) => socket.get_mut().shutdown().await.during("end a stream"),
            Sink::Quic(_connection, mut send, _receive) => {
                send.finish().during("end a stream")?;
                // A reader that has seen the end may close the connection before it has acknowledged it; whether all of
                // it arrived is the reader's to say.
                let _ = send.stopped().await;
                Ok(())
            }
        }
    }

    /// Sends back what comes, until the other side or the parent is gone.
    async fn echo(self) -> Outcome<()> {
        let mut buffer = vec![0; READ_BYTES];
        let mut stream: Stream = match self {
            Sink::Stream(stream) => stream,
            Sink::WebSocket(_) => return Err(Failure::new("bare bytes are no WebSocket frames")),
            Sink::Quic(_connection, send, receive) => Box::new(tokio::io::join(receive, send)),
        };
        loop {
            // An error here means that the parent has seen enough, and left.
            let Ok(read @ 1..) = stream.read(&mut buffer).await else {
                return Ok(());
            };
            if stream.write_all(&buffer[..read]).await.is_err() || stream.flush().await.is_err() {
                return Ok(());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_its_header_on_the_stream() {
        assert_eq!(Over::Tls.on_stream(100), 100);
        assert_eq!(Over::Websocket.on_stream(100), 102);
        assert_eq!(Over::Websocket.on_stream(1_024), 1_028);
        assert_eq!(Over::Websocket.on_stream(70_000), 70_010);
    }
}
