//! Peers that do not mean well, or are not there any more, and what becomes of the others meanwhile.

use std::collections::HashSet;

use tokio::net::UdpSocket;

use super::*;

/// Time enough for what must not happen.
const MOMENT: Duration = Duration::from_millis(200);

fn bounds(places: usize, patience: Duration) -> Bounds {
    Bounds {
        places,
        waiting: WAITING_MAX,
        patience,
    }
}

/// The datagrams with which a device begins, one or two, as nobody has heard them yet.
async fn first_flight(house: &House) -> Vec<Vec<u8>> {
    let capture = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let near = capture.local_addr().unwrap();
    let _connecting = house.client.connect(near, "localhost").unwrap();
    let mut flight = Vec::new();
    let mut datagram = [0; 2_000];
    while flight.len() < 2 {
        match timeout(MOMENT, capture.recv(&mut datagram)).await {
            Ok(length) => flight.push(datagram[..length.unwrap()].to_vec()),
            Err(_) if flight.is_empty() => {}
            Err(_) => break,
        }
    }
    flight
}

/// Begins as a device would, at an address where nobody listens to what is answered.
async fn begin_with(house: &House, flight: &[Vec<u8>]) -> UdpSocket {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    for datagram in flight {
        silent.send_to(datagram, house.address).await.unwrap();
    }
    silent
}

async fn begin_and_leave(house: &House) -> UdpSocket {
    begin_with(house, &first_flight(house).await).await
}

impl House {
    async fn until(&self, what: &str, met: impl Fn(&Seen) -> bool) {
        let waits = async {
            while !met(&self.seen.lock().unwrap()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let done = timeout(LONG, waits).await;
        assert!(done.is_ok(), "{what}: {:?}", self.seen.lock().unwrap());
    }

    /// Takes the only place, and holds it: a handshake that gets no turns.
    async fn hold_place(&mut self) -> Connection {
        let _silent = begin_and_leave(self).await;
        timeout(LONG, self.arrivals.recv()).await.unwrap().unwrap()
    }

    /// So many begin, leave, and wait for a place.
    async fn abandoned(&self, count: u32) {
        let before = self.seen.lock().unwrap().let_in;
        let mut flights = Vec::new();
        for _ in 0..count {
            flights.push(first_flight(self).await);
        }
        for flight in &flights {
            begin_with(self, flight).await;
        }
        self.until("they wait", |seen| seen.let_in == before + count)
            .await;
    }

    /// Serves the next one who begins, which is this device, until its handshake is through.
    async fn next_comes_in(
        &mut self,
        device: tokio::task::JoinHandle<Result<quinn::Connection, ConnectionError>>,
    ) {
        let begun = timeout(LONG, self.arrivals.recv()).await.unwrap().unwrap();
        let serves = tokio::spawn(async move {
            let mut deadline = Box::pin(tokio::time::sleep(LONG));
            accept(begun, deadline.as_mut(), pending(), 16 * 1024)
                .await
                .map(drop)
        });
        let connected = timeout(LONG, device).await.unwrap().unwrap().unwrap();
        connected.close(0_u32.into(), b"");
        timeout(LONG, serves).await.unwrap().unwrap().unwrap_err();
    }

    fn failed(&self) -> Vec<&'static str> {
        self.seen.lock().unwrap().failed.clone()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_go_on_keeps_its_place_for_a_while_only() {
    // What is answered is more than three times what was said, so that the protocol's timer stands still.
    let bounds = bounds(1, LONG);
    let mut house = House::with_bounds(Ask::Nobody, bounds, testing::long_tls_and_root());
    let silent = begin_and_leave(&house).await;
    let stuck = timeout(LONG, house.arrivals.recv()).await.unwrap().unwrap();
    let stuck = tokio::spawn(async move {
        let mut deadline = Box::pin(tokio::time::sleep(LONG * 10));
        accept(stuck, deadline.as_mut(), pending(), 16 * 1024)
            .await
            .map(drop)
    });
    let (connection, _send, _receive, pipe) = timeout(LONG, house.connect()).await.unwrap();
    assert!(!stuck.is_finished(), "the other still waits for its peer");
    let (mut heard, mut datagram) = (0, [0; 2_000]);
    while let Ok(length) = silent.try_recv(&mut datagram) {
        heard += length;
    }
    assert!(heard > 0 && heard <= 2 * 3 * 1_472, "{heard}");
    stuck.abort();
    drop((connection, pipe));
    house.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_places_are_short_newcomers_are_asked_for_proof_and_those_who_give_it_come_in() {
    let mut house = House::with_places(Ask::WhenDue, 1);
    let holder = house.hold_place().await;
    assert_eq!(house.seen.lock().unwrap().asked, 0);
    // A stranger is asked, and costs nothing more: it does not even wait.
    let flight = first_flight(&house).await;
    let silent = begin_with(&house, &flight).await;
    let all = u32::try_from(flight.len()).unwrap();
    house
        .until("each word was asked back", |seen| seen.asked == all)
        .await;
    let mut answer = [0; 2_000];
    let answered = timeout(LONG, silent.recv(&mut answer)).await;
    assert!(answered.unwrap().unwrap() < 200);
    assert_eq!(answer[0] & 0xf0, 0xf0, "a Retry packet");
    assert_eq!(house.seen.lock().unwrap().let_in, 1);
    // One that proves itself while there is no place waits for one.
    let connecting = house.client.connect(house.address, "localhost").unwrap();
    let device = tokio::spawn(connecting.into_future());
    house
        .until("it proved itself", |seen| seen.let_in == 2)
        .await;
    drop(holder);
    house.next_comes_in(device).await;
}

/// An id in a Retry that a living connection has too would lead the words of whoever is asked to that connection.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_is_asked_back_under_an_id_that_was_given_before() {
    // With 24 bits of chance, some 27 of them repeat.
    const TIMES: usize = 30_000;
    let house = House::new(Ask::Everybody);
    let flight = first_flight(&house).await;
    let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut given = HashSet::new();
    let mut answer = [0; 2_000];
    for _ in 0..TIMES {
        socket.send_to(&flight[0], house.address).await.unwrap();
        let answered = timeout(LONG, socket.recv(&mut answer)).await;
        let answer = &answer[..answered.unwrap().unwrap()];
        assert_eq!(answer[0] & 0xf0, 0xf0, "a Retry packet");
        // Behind the version stand the peer's id and ours, each behind its length (RFC 9000 section 17.2.5).
        let ours = 6 + usize::from(answer[5]);
        let length = usize::from(answer[ours]);
        given.insert(answer[ours + 1..][..length].to_vec());
    }
    assert_eq!(given.len(), TIMES);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_who_left_while_they_waited_cost_no_handshake() {
    let patience = Duration::from_secs(1);
    let mut house = House::with_bounds(Ask::Nobody, bounds(1, patience), testing::tls_and_root());
    let holder = house.hold_place().await;
    house.abandoned(4).await;
    tokio::time::sleep(patience).await;
    // The endpoint looks at them when something comes.
    let connecting = house.client.connect(house.address, "localhost").unwrap();
    let device = tokio::spawn(connecting.into_future());
    house
        .until("they are given up", |seen| seen.failed.len() == 4)
        .await;
    assert_eq!(house.failed(), ["waited_too_long"; 4]);
    drop(holder);
    house.next_comes_in(device).await;
    assert_eq!(house.seen.lock().unwrap().begun.len(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_newest_begins_first_and_the_oldest_goes_when_too_many_wait() {
    let few = Bounds {
        waiting: 3,
        ..bounds(1, LONG)
    };
    let mut house = House::with_bounds(Ask::Nobody, few, testing::tls_and_root());
    let holder = house.hold_place().await;
    house.abandoned(5).await;
    assert_eq!(house.failed(), ["queue_full"; 2]);
    let connecting = house.client.connect(house.address, "localhost").unwrap();
    let device = tokio::spawn(async move { connecting.await.map(drop) });
    house
        .until("it waits too", |seen| seen.failed.len() == 3)
        .await;
    drop(holder);
    let begun = timeout(LONG, house.arrivals.recv()).await.unwrap().unwrap();
    let live = house.client.local_addr().unwrap().port();
    assert_eq!(house.seen.lock().unwrap().begun[1].port(), live);
    device.abort();
    drop(begun);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_nobody_is_let_in_any_more_those_who_wait_are_told() {
    let mut house = House::with_places(Ask::Nobody, 1);
    let holder = house.hold_place().await;
    let devices: Vec<_> = (0..3)
        .map(|_| house.client.connect(house.address, "localhost").unwrap())
        .map(|connecting| tokio::spawn(async move { connecting.await.map(drop) }))
        .collect();
    house.until("all wait", |seen| seen.let_in == 4).await;
    house.endpoint.set_server_config(None);
    for device in devices {
        match timeout(LONG, device).await.unwrap().unwrap() {
            Err(ConnectionError::ConnectionClosed(close)) => {
                let refused = quinn::TransportErrorCode::CONNECTION_REFUSED;
                assert_eq!(close.error_code, refused);
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(house.failed(), ["shutdown"; 3]);
    drop(holder);
    house.nobody_is_left().await;
    assert!(house.arrivals.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waited_through_a_reload_is_shown_the_new_certificate() {
    let mut house = House::with_places(Ask::Nobody, 1);
    let holder = house.hold_place().await;
    let (settings, root) = testing::tls_and_root();
    house.client = client_of(&root);
    let connecting = house.client.connect(house.address, "localhost").unwrap();
    let device = tokio::spawn(connecting.into_future());
    house.until("it waits", |seen| seen.let_in == 2).await;
    let tls = Tls::new(&settings).unwrap();
    let config = server_config(tls.quic(), Duration::from_secs(60));
    house.endpoint.set_server_config(Some(config));
    tokio::time::sleep(MOMENT).await;
    drop(holder);
    house.next_comes_in(device).await;
    house.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_aes_256_is_asked_for_devices_speak_it_and_others_are_refused() {
    let (settings, root) = testing::tls_and_root();
    let suites = Suites::Aes256;
    let mut house = House::with_tls((TlsSettings { suites, ..settings }, root.clone()));
    let (connection, ..) = house.connect().await;
    drop(connection);
    let mut light = Suites::All.provider();
    light
        .cipher_suites
        .retain(|suite| format!("{:?}", suite.suite()).contains("AES_128"));
    house.client = client_speaking(light, &root);
    let connecting = house.client.connect(house.address, "localhost").unwrap();
    let server = async {
        let connection = house.arrivals.recv().await.unwrap();
        let deadline = std::pin::pin!(tokio::time::sleep(LONG));
        accept(connection, deadline, pending(), 16 * 1024).await
    };
    let (refused, server) = timeout(LONG, async { tokio::join!(connecting, server) })
        .await
        .unwrap();
    assert!(matches!(
        refused.unwrap_err(),
        ConnectionError::ConnectionClosed(_)
    ));
    assert!(server.is_err());
    house.nobody_is_left().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_comes_from_strangers_others_go_on() {
    let mut house = House::new(Ask::Nobody);
    let (connection, mut send, _receive, mut pipe) = house.connect().await;
    let stranger = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let mut seed = 1_u64;
    let mut any = move || {
        // Knuth's multiplier; the same garbage every time.
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        seed.to_be_bytes()[0]
    };
    let flight = first_flight(&house).await;
    let mut words: Vec<Vec<u8>> = Vec::new();
    // Garbage of every kind of first byte and many lengths, among them headers of connections that were never issued, what
    // looks like a stateless reset, and what is larger than we take.
    for length in [
        0, 1, 7, 20, 21, 39, 43, 100, 1_199, 1_200, 1_472, 1_473, 9_000,
    ] {
        for first in [0x00, 0x40, 0x4f, 0x7f, 0x80, 0xc0, 0xd0, 0xe0, 0xf0, 0xff] {
            let mut word: Vec<u8> = (0..length).map(|_| any()).collect();
            if let Some(start) = word.first_mut() {
                *start = first;
            }
            // A known version now and then.
            if first & 1 == 0 && length > 6 {
                word[1..5].copy_from_slice(&[0, 0, 0, 1]);
            }
            words.push(word);
        }
    }
    // Beginnings that are cut short, damaged, or grown.
    for datagram in &flight {
        words.extend(
            (1..datagram.len())
                .step_by(37)
                .map(|end| datagram[..end].to_vec()),
        );
        for at in (0..datagram.len()).step_by(41) {
            let mut damaged = datagram.clone();
            damaged[at] ^= 0x55;
            words.push(damaged);
        }
        let mut grown = datagram.clone();
        grown.resize(4_000, 0);
        words.push(grown);
    }
    let (mut said, mut heard) = (0, 0);
    for word in &words {
        stranger.send_to(word, house.address).await.unwrap();
        said += word.len();
        let mut answer = [0; 2_000];
        while let Ok(length) = stranger.try_recv(&mut answer) {
            heard += length;
        }
    }
    assert!(heard <= 3 * said, "{heard} for {said}");
    // One who was there is heard, and another comes in.
    send.write_all(&[0, 1, 7]).await.unwrap();
    let frame = turn(&mut pipe, |pipe, cx| {
        loop {
            match ready!(pipe.poll_receive(cx)) {
                Ok(Some(frame)) if !frame.is_empty() => return Poll::Ready(frame),
                Ok(_) => {}
                Err(_) => panic!("the link is gone"),
            }
        }
    })
    .await;
    assert_eq!(frame[..], [7]);
    while house.arrivals.try_recv().is_ok() {}
    let known = house.client.local_addr().unwrap();
    let before = begun_from(&house.seen.lock().unwrap(), known);
    let connecting = house.client.connect(house.address, "localhost").unwrap();
    let device = tokio::spawn(connecting.into_future());
    house
        .until("another begins", |seen| begun_from(seen, known) > before)
        .await;
    device.abort();
    drop((connection, pipe));
    assert!(house.failed().iter().all(|reason| *reason == "closed"));
}

fn begun_from(seen: &Seen, peer: SocketAddr) -> usize {
    seen.begun.iter().filter(|begun| **begun == peer).count()
}

#[test]
fn only_beginnings_must_be_long_and_nothing_may_be_longer_than_we_say() {
    let is_fit = |first: u8, length: usize| {
        let mut datagram = vec![0; length];
        datagram[0] = first;
        endpoint::is_fit(&datagram, 1_472)
    };
    for (first, what) in [(0xc3, "Initial"), (0xd1, "0-RTT")] {
        assert!(!is_fit(first, 1_199), "{what}");
        assert!(is_fit(first, 1_200), "{what}");
        assert!(!is_fit(first, 1_473), "{what}");
    }
    for (first, what) in [(0xe0, "Handshake"), (0xf0, "Retry"), (0x40, "1-RTT")] {
        assert!(is_fit(first, 21), "{what}");
        assert!(!is_fit(first, 1_473), "{what}");
    }
    assert!(endpoint::is_fit(&[], 1_472));
}
