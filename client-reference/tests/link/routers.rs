//! A router that translates addresses and forgets flows, between the client and a server on real QUIC: what a client can know
//! of it, it must learn from packets alone.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bellwire_client::Carriers;
use bellwire_client::testing::{Clock, by_clock, inspect};
use tokio::net::UdpSocket;

use crate::support::{Everyone, FakeServer, PATIENCE, Seen, Udp};

/// Greatest datagram.
const DATAGRAM_MAX: usize = 2_048;

/// A router by the test's clock.
struct Router {
    front: SocketAddr,
    forgotten: Arc<Mutex<u32>>,
}

impl Router {
    /// Forgets a flow on which nothing passed for this long. Nobody is told: the next packet of the device simply comes from
    /// another port, and what the server sent in between is gone.
    async fn start(server: SocketAddr, clock: Clock, forgets_after: Duration) -> Self {
        let front = Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap());
        let address = front.local_addr().unwrap();
        let forgotten = Arc::new(Mutex::new(0));
        let count = forgotten.clone();
        tokio::spawn(async move {
            let mut behind = Flow::new(server).await;
            let mut passed_ms = clock.wall_ms();
            let mut device = None;
            let (mut up, mut down) = ([0; DATAGRAM_MAX], [0; DATAGRAM_MAX]);
            loop {
                let upward = tokio::select! {
                    received = front.recv_from(&mut up) => Some(received.unwrap()),
                    received = behind.0.recv(&mut down) => {
                        // A server that is gone is told by ICMP, which is nothing to pass on.
                        if let (Ok(length), Some(device)) = (received, device)
                            && clock.wall_ms() - passed_ms < forgets_after.as_millis() as u64
                        {
                            passed_ms = clock.wall_ms();
                            front.send_to(&down[..length], device).await.unwrap();
                        }
                        None
                    }
                };
                if let Some((length, from)) = upward {
                    if clock.wall_ms() - passed_ms >= forgets_after.as_millis() as u64 {
                        behind = Flow::new(server).await;
                        *count.lock().unwrap() += 1;
                    }
                    passed_ms = clock.wall_ms();
                    device = Some(from);
                    let _ = behind.0.send(&up[..length]).await;
                }
            }
        });
        Self {
            front: address,
            forgotten,
        }
    }

    fn forgotten(&self) -> u32 {
        *self.forgotten.lock().unwrap()
    }
}

/// A flow as the server sees it.
struct Flow(UdpSocket);

impl Flow {
    async fn new(server: SocketAddr) -> Self {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        socket.connect(server).await.unwrap();
        Self(socket)
    }
}

/// Waits until the client has had its answer and waits for nothing but the next sign of life.
async fn quiet(clock: &Clock) -> Duration {
    let waiting = async {
        loop {
            // An answer is awaited for 15 s; the shortest interval is 20 s.
            if let Some(due) = clock.due_in().filter(|due| due.as_secs() > 15) {
                return due;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, waiting).await;
    waited.expect("the client does not come to rest")
}

#[tokio::test]
async fn on_real_quic_a_forgotten_flow_is_noticed_although_the_session_lives_on() {
    let mut server = FakeServer::start(Udp::Quic).await;
    let everyone = server.welcome_everyone(Everyone::Now);
    let clock = Clock::new();
    let forgets_after = Duration::from_secs(40);
    let router = Router::start(server.address, clock.clone(), forgets_after).await;
    let (seen, state) = (Seen::default(), tempfile::tempdir().unwrap());
    let builder = server
        .client(state.path(), &seen)
        .server(format!("localhost:{}", router.front.port()))
        .carriers(Carriers::Quic)
        .network("home");
    let client = by_clock(builder, &clock).start().await.unwrap();
    everyone.at_least(1).await;
    seen.connected_times(1).await;
    let mut silences = Vec::new();
    for _ in 0..400 {
        let due = quiet(&clock).await;
        silences.push(due);
        clock.advance(due);
    }
    quiet(&clock).await;
    client.shutdown().await;

    // It tried a longer silence than the router bears, noticed, and stays below.
    assert!(router.forgotten() >= 1, "{silences:?}");
    let late = silences[300..].iter().filter(|due| **due >= forgets_after);
    assert!(late.count() <= 5, "{silences:?}");
    let bears_s = inspect(state.path(), &clock).unwrap().networks.unwrap()[0].quic_bears_s;
    assert!(
        bears_s.is_some_and(|s| (25..40).contains(&s)),
        "{bears_s:?}"
    );
    // One session all the while.
    assert_eq!(everyone.hellos(), 1);
}
