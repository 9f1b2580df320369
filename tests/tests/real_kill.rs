//! `kill -9` at random moments under load, of the server and of the apps: what was promised is kept, and no app is told
//! twice, but for what it was killed with before its disk knew.
//!
//! 50 rounds in a run; `BELLWIRE_KILL_ROUNDS=1000` runs more, `BELLWIRE_KILL_SEED=n` repeats the moments of one run (the
//! rest of the timing is the machine's).

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::collections::BTreeMap;
use std::time::Duration;

use bellwire_client::{Notification, Verdict};
use bellwire_protocol::limits::WINDOW_MAX;
use bellwire_tests::real::{Phone, Proxy, Publisher, Server, Site, Way};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A device and the way it takes; on the way through a proxy its address stays, so it may outlive servers.
struct Device {
    phone: Phone,
    proxy: Option<Proxy>,
    /// What may rightly come once more: given to the app, and its process ended before its disk knew.
    unsaved: Vec<String>,
}

impl Device {
    /// Ends the round: the server is gone, and the app crashes, leaves in good order, or waits for the next server.
    async fn end_round(&mut self, chance: &mut StdRng) {
        match chance.random_range(0..10) {
            0..=4 => {
                let unsaved = self.phone.crash().await;
                self.unsaved.extend(unsaved);
            }
            5.. if self.proxy.is_some() => {}
            5..=8 => {
                let unsaved = self.phone.crash().await;
                self.unsaved.extend(unsaved);
            }
            _ => self.phone.leave().await,
        }
    }

    async fn begin_round(&mut self, server: &Server) {
        if let Some(proxy) = &self.proxy {
            proxy.hold_after(None);
            proxy.lead_to(server.listen().devices);
        }
        if self.phone.runs() {
            self.phone.nudge().await;
        } else {
            self.phone.start(server, verdict).await;
        }
    }
}

/// What a device says is held back every so many rounds.
const HOLD_EVERY: u64 = 8;

/// More than `seen` of a `hello` can tell, and no more than may be in flight: what is beyond it must be repeated by the
/// server and recognised by the device.
const HELD_BACK: usize = 230;
/// The length of each: together far more than [`HANDSHAKE_BYTES`].
const HELD_BACK_BYTES: usize = 200;
/// So many bytes of the server belong to the handshake and the first notifications.
const HANDSHAKE_BYTES: u64 = 12_000;

#[tokio::test(flavor = "multi_thread")]
async fn what_was_promised_survives_kill_nine_and_no_app_is_told_twice() {
    let rounds = setting("BELLWIRE_KILL_ROUNDS").unwrap_or(50);
    let seed = setting("BELLWIRE_KILL_SEED").unwrap_or_else(rand::random);
    eprintln!("BELLWIRE_KILL_SEED={seed}, {rounds} rounds");
    let mut chance = StdRng::seed_from_u64(seed);

    let site = Site::new();
    let server = site.start();
    let api = server.api();
    let mut ways = Vec::new();
    for way in Way::ALL {
        let phone = Phone::register(&server, &api, site.dir(), "ann", way).await;
        ways.push(if way == Way::Quic {
            Device {
                phone,
                proxy: None,
                unsaved: Vec::new(),
            }
        } else {
            let proxy = Proxy::start().await;
            Device {
                phone: phone.through(proxy.address()).with_window(WINDOW_MAX),
                proxy: Some(proxy),
                unsaved: Vec::new(),
            }
        });
    }
    // One device that is away all the time, until the end.
    let mut away = Phone::register(&server, &api, site.dir(), "ann", Way::Quic).await;
    let devices = ways.iter().map(|way| way.phone.id());
    let publisher = Publisher::new(devices.chain([away.id()]).collect());
    server.kill();

    for round in 0..rounds {
        let server = site.start();
        let api = server.api();
        // Every few rounds, what one of the devices says is held back from the server until that is killed.
        let held =
            (round % HOLD_EVERY == HOLD_EVERY - 1).then(|| 1 + (round / HOLD_EVERY) as usize % 2);
        for (index, way) in ways.iter_mut().enumerate() {
            if held != Some(index) {
                way.begin_round(&server).await;
            }
        }
        let load = publisher.begin(&api, (seed >> 8) ^ round);
        if let Some(way) = held.map(|index| &mut ways[index]) {
            let unsaved = way.phone.crash().await;
            way.unsaved.extend(unsaved);
            let before = way.phone.reached();
            publisher
                .fill(&api, &way.phone.id(), HELD_BACK, HELD_BACK_BYTES)
                .await;
            way.begin_round(&server).await;
            let proxy = way.proxy.as_ref().unwrap();
            proxy.hold_after(Some(HANDSHAKE_BYTES));
            // What it knows from earlier rounds comes again and takes a place in the window without reaching the app.
            way.phone.reached_by(before + HELD_BACK).await;
        }
        tokio::time::sleep(Duration::from_millis(chance.random_range(20..200))).await;
        server.kill();
        load.end().await;
        for (index, way) in ways.iter_mut().enumerate() {
            // Whose words were held back lives on: it knows what the server does not.
            if held != Some(index) {
                way.end_round(&mut chance).await;
            }
        }
    }

    let server = site.start();
    let api = server.api();
    for way in &mut ways {
        way.begin_round(&server).await;
        way.phone.attached(&api).await;
    }
    away.attach(&server, &api).await;
    let promised = publisher.promised();
    assert!(
        promised as u64 > rounds,
        "there was load: {promised} promises"
    );
    let everybody: Vec<&Phone> = ways.iter().map(|way| &way.phone).chain([&away]).collect();
    told_twice(&ways);
    publisher.kept(&api, &everybody).await;
    told_twice(&ways);

    eprintln!("{promised} promises kept over {rounds} kills");
    for phone in ways.iter_mut().map(|way| &mut way.phone).chain([&mut away]) {
        phone.crash().await;
    }
}

/// Some cannot be used. A repeat of one that was taken is answered before anybody looks for what was said; one of these is not.
fn verdict(notification: &Notification) -> Verdict {
    if notification.id.as_bytes()[15].is_multiple_of(4) {
        Verdict::Decline("unusable".to_owned())
    } else {
        Verdict::Acknowledge
    }
}

/// No app was told anything twice, but for what it was killed with.
fn told_twice(ways: &[Device]) {
    for Device { phone, unsaved, .. } in ways {
        let mut times = BTreeMap::<String, usize>::new();
        for id in phone.ledger.ids() {
            *times.entry(id).or_default() += 1;
        }
        for (id, times) in times {
            let may_be = 1 + unsaved.iter().filter(|one| **one == id).count();
            assert!(
                times <= may_be,
                "{} was told {id} {times} times, and its app crashed {} times before its disk knew",
                phone.id(),
                may_be - 1
            );
        }
    }
}
