//! The endpoint and its connections, with quinn's client as the device.

use std::future::pending;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bellwire_protocol::ALPN;
use rustls::crypto::CryptoProvider;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::endpoint::{Bounds, WAITING_MAX};
use super::*;
use crate::transport::testing;
use crate::transport::tls::{Suites, Tls, TlsSettings};

const LONG: Duration = Duration::from_secs(20);

/// Silence that the server bears: longer than any test.
const SILENCE: Duration = Duration::from_secs(60);

mod hostile;

/// Whom the gate asks for a proof of its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    Nobody,
    /// Everybody who can be asked.
    Everybody,
    /// Those whom the endpoint wants asked.
    WhenDue,
}

/// What the gate saw.
#[derive(Debug, Default)]
struct Seen {
    asked: u32,
    let_in: u32,
    begun: Vec<SocketAddr>,
    failed: Vec<&'static str>,
}

/// Lets everybody in, or asks for a proof first.
struct Open {
    ask: Ask,
    seen: Arc<Mutex<Seen>>,
    arrived: mpsc::UnboundedSender<Connection>,
}

impl Gate for Open {
    type Ticket = ();

    fn judge(&mut self, _: SocketAddr, proof: Proof) -> Judgement<()> {
        let mut seen = self.seen.lock().unwrap();
        let asks = match self.ask {
            Ask::Nobody => false,
            Ask::Everybody => proof != Proof::Given,
            Ask::WhenDue => proof == Proof::Due,
        };
        if asks {
            seen.asked += 1;
            return Judgement::Prove;
        }
        // Whoever is asked comes back.
        assert!(self.ask != Ask::Everybody || seen.asked > 0);
        seen.let_in += 1;
        Judgement::Admit(())
    }

    fn admit(&mut self, connection: Connection, peer: SocketAddr, (): ()) {
        self.seen.lock().unwrap().begun.push(peer);
        // A test may have seen enough.
        let _ = self.arrived.send(connection);
    }

    fn failed(&mut self, _: SocketAddr, (): (), reason: &'static str) {
        self.seen.lock().unwrap().failed.push(reason);
    }
}

struct House {
    endpoint: Endpoint,
    address: SocketAddr,
    seen: Arc<Mutex<Seen>>,
    arrivals: mpsc::UnboundedReceiver<Connection>,
    client: quinn::Endpoint,
}

/// A device's side that trusts this authority.
fn client_of(root: &str) -> quinn::Endpoint {
    client_speaking(rustls::crypto::aws_lc_rs::default_provider(), root)
}

fn client_speaking(provider: CryptoProvider, root: &str) -> quinn::Endpoint {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_slice(root.as_bytes()).unwrap())
        .unwrap();
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let config = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let mut client = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    client.set_default_client_config(quinn::ClientConfig::new(Arc::new(config)));
    client
}

impl House {
    fn new(ask: Ask) -> House {
        House::with_places(ask, 64)
    }

    fn with_places(ask: Ask, places: usize) -> House {
        let bounds = Bounds {
            places,
            waiting: WAITING_MAX,
            patience: LONG,
        };
        House::with_bounds(ask, bounds, testing::tls_and_root())
    }

    fn with_tls(tls: (TlsSettings, String)) -> House {
        let bounds = Bounds {
            places: 64,
            waiting: WAITING_MAX,
            patience: LONG,
        };
        House::with_bounds(Ask::Nobody, bounds, tls)
    }

    fn with_bounds(ask: Ask, bounds: Bounds, tls: (TlsSettings, String)) -> House {
        let (settings, root) = tls;
        let tls = Tls::new(&settings).unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.set_nonblocking(true).unwrap();
        let address = socket.local_addr().unwrap();
        let (arrived, arrivals) = mpsc::unbounded_channel();
        let seen = Arc::default();
        let gate = Open {
            ask,
            seen: Arc::clone(&seen),
            arrived,
        };
        let config = server_config(tls.quic(), SILENCE);
        let endpoint = Endpoint::with_bounds(socket, config, gate, bounds).unwrap();

        House {
            endpoint,
            address,
            seen,
            arrivals,
            client: client_of(&root),
        }
    }

    /// A device with its stream open, and the server's end of it.
    async fn connect(
        &mut self,
    ) -> (
        quinn::Connection,
        quinn::SendStream,
        quinn::RecvStream,
        QuicPipe,
    ) {
        let connecting = self.client.connect(self.address, "localhost").unwrap();
        let device = async {
            let connection = connecting.await.unwrap();
            let (mut send, receive) = connection.open_bi().await.unwrap();
            send.write_all(&[0, 0]).await.unwrap();
            (connection, send, receive)
        };
        let server = async {
            let connection = self.arrivals.recv().await.unwrap();
            let deadline = std::pin::pin!(tokio::time::sleep(LONG));
            accept(connection, deadline, pending(), 16 * 1024)
                .await
                .unwrap()
        };
        let ((connection, send, receive), pipe) = tokio::join!(device, server);
        (connection, send, receive, pipe)
    }

    async fn nobody_is_left(&self) {
        timeout(LONG, self.endpoint.wait_idle()).await.unwrap();
    }
}

/// Serves the pipe as a link would until `done`.
async fn turn<T>(
    pipe: &mut QuicPipe,
    mut done: impl FnMut(&mut QuicPipe, &mut Context<'_>) -> Poll<T>,
) -> T {
    let turns = poll_fn(|cx| {
        pipe.begin_turn(cx);
        let done = done(pipe, cx);
        if done.is_pending() {
            pipe.end_turn(cx);
        }
        done
    });
    timeout(LONG, turns).await.unwrap()
}

/// Reads until nothing more can come; answers why.
async fn end_of(pipe: &mut QuicPipe) -> Broken {
    turn(pipe, |pipe, cx| {
        loop {
            if let Err(broken) = ready!(pipe.poll_receive(cx)) {
                return Poll::Ready(broken);
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_leaves_is_forgotten_whichever_side_ended_it() {
    let mut house = House::new(Ask::Nobody);
    for round in 0..12 {
        let (connection, send, receive, mut pipe) = house.connect().await;
        match round % 3 {
            0 => {
                connection.close(0_u32.into(), b"");
                end_of(&mut pipe).await;
                drop(pipe);
            }
            1 => {
                drop(pipe);
                let closed = timeout(LONG, connection.closed()).await.unwrap();
                assert!(matches!(closed, ConnectionError::ApplicationClosed(_)));
            }
            _ => {
                pipe.end(Code::Bye, "that was it");
                let reads = async {
                    let mut receive = receive;
                    receive.read_to_end(64).await.unwrap()
                };
                let ends = turn(&mut pipe, |pipe, cx| pipe.poll_end(cx));
                let (said, ()) = tokio::join!(reads, ends);
                assert!(said.is_empty());
                drop(pipe);
            }
        }
        drop(send);
    }
    house.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn much_is_said_in_order_and_in_turns_to_a_device_that_reads_slowly() {
    let mut house = House::new(Ask::Nobody);
    let (connection, _send, mut receive, mut pipe) = house.connect().await;
    let frames = 2_000_u32;
    let says = async {
        for number in 0..frames {
            pipe.queue(&number.to_be_bytes(), &[7; 500]);
        }
        turn(&mut pipe, |pipe, cx| {
            pipe.poll_send(cx).map(|sent| assert!(sent.is_ok()))
        })
        .await;
        pipe.end(Code::Bye, "");
        turn(&mut pipe, |pipe, cx| pipe.poll_end(cx)).await;
    };
    let hears = async {
        let mut reader = FrameReader::new(16 * 1024);
        let mut next = 0_u32;
        while let Some(chunk) = receive.read_chunk(2_000, true).await.unwrap() {
            reader.push(&chunk.bytes);
            while let Some(frame) = reader.pull().unwrap() {
                assert_eq!(frame[..4], next.to_be_bytes());
                next += 1;
            }
            tokio::task::yield_now().await;
        }
        next
    };
    let ((), heard) = timeout(LONG, async { tokio::join!(says, hears) })
        .await
        .unwrap();
    assert_eq!(heard, frames);
    drop((pipe, connection));
    house.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stranger_proves_its_address_and_comes_in() {
    let mut house = House::new(Ask::Everybody);
    let (connection, _send, _receive, pipe) = house.connect().await;
    drop(pipe);
    timeout(LONG, connection.closed()).await.unwrap();
    house.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn closing_ends_every_connection_and_lets_nobody_in() {
    let mut house = House::new(Ask::Nobody);
    let mut there = Vec::new();
    for _ in 0..5 {
        there.push(house.connect().await);
    }
    house.endpoint.close(close_number(Code::Drain), b"over");
    for (connection, _send, _receive, mut pipe) in there {
        let gone = end_of(&mut pipe).await;
        assert!(matches!(gone, Broken::Gone("shutdown")));
        drop(pipe);
        timeout(LONG, connection.closed()).await.unwrap();
    }
    house.nobody_is_left().await;
    let late = house.client.connect(house.address, "localhost").unwrap();
    // Whether it is refused or nobody answers any more: it does not come in.
    let late = timeout(Duration::from_secs(1), late).await;
    assert!(!matches!(late, Ok(Ok(_))));
    assert_eq!(house.arrivals.len(), 0);
}

#[tokio::test]
async fn what_a_connection_without_turns_is_sent_is_bounded() {
    let mut house = House::new(Ask::Nobody);
    let (connection, mut send, _receive, pipe) = house.connect().await;
    // The window of the stream is small; whatever a peer does, no more datagrams than this wait.
    let writes = async {
        let nothing = [0; 512];
        loop {
            if send.write_all(&nothing).await.is_err() {
                break;
            }
        }
    };
    assert!(timeout(Duration::from_millis(300), writes).await.is_err());
    let waiting = pipe.connection.as_ref().unwrap().waiting();
    assert!(
        waiting > 0 && waiting <= connection::ARRIVED_MAX,
        "{waiting}"
    );
    drop(pipe);
    timeout(LONG, connection.closed()).await.unwrap();
    house.nobody_is_left().await;
    assert_eq!(house.endpoint.hub().open.load(Ordering::Acquire), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handshakes_begin_as_places_become_free_and_nobody_is_forgotten() {
    let mut house = House::with_places(Ask::Nobody, 2);
    let devices: Vec<_> = (0..6)
        .map(|_| {
            let connecting = house.client.connect(house.address, "localhost").unwrap();
            tokio::spawn(async move {
                let connection = connecting.await.unwrap();
                let (mut send, _receive) = connection.open_bi().await.unwrap();
                send.write_all(&[0, 0]).await.unwrap();
                connection.closed().await;
            })
        })
        .collect();
    let mut begun = Vec::new();
    for _ in 0..2 {
        begun.push(house.arrivals.recv().await.unwrap());
    }
    // Time enough for a third.
    let third = timeout(Duration::from_millis(200), house.arrivals.recv()).await;
    assert!(third.is_err(), "nobody begins without a place");
    // Who is through makes room for the next.
    for through in 1..=6 {
        let deadline = std::pin::pin!(tokio::time::sleep(LONG));
        let pipe = accept(begun.remove(0), deadline, pending(), 16 * 1024).await;
        drop(pipe.unwrap());
        if through <= 4 {
            let next = timeout(LONG, house.arrivals.recv()).await.unwrap();
            begun.push(next.unwrap());
        }
    }
    for device in devices {
        timeout(LONG, device).await.unwrap().unwrap();
    }
    house.nobody_is_left().await;
}

/// Has the pipe say this in a turn of its own.
async fn say(pipe: &mut QuicPipe, words: &[u8]) {
    pipe.queue(words, b"");
    poll_fn(|cx| {
        pipe.begin_turn(cx);
        assert!(matches!(pipe.poll_send(cx), Poll::Ready(Ok(()))));
        pipe.end_turn(cx);
        Poll::Ready(())
    })
    .await;
}

/// Gives the pipe turns until the device's next word came; how many datagrams the turn sent that brought it.
async fn hear(pipe: &mut QuicPipe) -> u64 {
    let sent = |pipe: &QuicPipe| pipe.connection.as_ref().unwrap().sent();
    let turns = poll_fn(|cx| {
        let before = sent(pipe);
        pipe.begin_turn(cx);
        let came = pipe.poll_receive(cx);
        pipe.end_turn(cx);
        came.map(|came| {
            came.unwrap().unwrap();
            sent(pipe) - before
        })
    });
    timeout(LONG, turns).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_to_what_was_said_after_a_pause_is_acknowledged_in_the_turn_that_takes_it() {
    let mut house = House::new(Ask::Nobody);
    let (connection, mut send, mut receive, mut pipe) = house.connect().await;
    // What the device said when it opened its stream: two frames without anything in them.
    hear(&mut pipe).await;
    hear(&mut pipe).await;
    let (mut at_once, mut later) = (0, 0);
    for round in 0.. {
        // Nothing of the words before is left to be acknowledged.
        let quiet = turn(&mut pipe, |_, _| Poll::<()>::Pending);
        let _ = timeout(3 * connection::ACK_DELAY, quiet).await;
        let has_pause = round % 2 == 0;
        let mut word = [0; 5];
        say(&mut pipe, b"once").await;
        receive.read_exact(&mut word).await.unwrap();
        if has_pause {
            tokio::time::sleep(2 * connection::ACK_DELAY).await;
        }
        say(&mut pipe, b"more").await;
        receive.read_exact(&mut word).await.unwrap();
        let before = connection.stats().frame_rx.acks;
        send.write_all(&[1, 0]).await.unwrap();
        let sent = hear(&mut pipe).await;
        if has_pause {
            assert!(sent > 0);
            // It gets no other turn.
            let heard = async {
                while connection.stats().frame_rx.acks == before {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            timeout(LONG, heard).await.unwrap();
            at_once += 1;
        } else if sent == 0 {
            later += 1;
        }
        if at_once > 1 && later > 0 {
            break;
        }
        // On a machine that stands still in between there may have been a pause.
        assert!(round < 50, "words that follow each other are waited for");
    }
    drop(pipe);
    timeout(LONG, connection.closed()).await.unwrap();
    house.nobody_is_left().await;
}
