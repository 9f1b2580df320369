//! What a client does over hours and days, by the server and the clock for tests: no socket, no waiting.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "a test names what it expects"
)]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bellwire_client::testing::{Clock, Outcome, PATIENCE, Reach, Server, content, inspect};
use bellwire_client::{
    Builder, Carriers, Client, Disconnect, Event, KnownNetwork, PresenceState, Verdict,
};
use bellwire_protocol::DeviceFrame;
use tokio::sync::Semaphore;

/// Turns of the other tasks until nothing happens any more: everything here runs on one thread and waits for the manual clock
/// alone.
const TURNS: usize = 64;

async fn settle() {
    for _ in 0..TURNS {
        tokio::task::yield_now().await;
    }
}

/// What happened, as text, and which titles the app saw.
#[derive(Clone, Default)]
struct Seen {
    events: Arc<Mutex<Vec<String>>>,
    titles: Arc<Mutex<Vec<String>>>,
}

impl Seen {
    fn told(&self, event: &Event) {
        let text = match event {
            Event::Connected { carrier, .. } => format!("connected {}", carrier.name()),
            Event::Disconnected { why, .. } => match why {
                Disconnect::Silent => "silent".to_owned(),
                Disconnect::Left => "left".to_owned(),
                other => format!("lost: {other}"),
            },
            Event::Woke { slept } => format!("slept {} s", slept.as_secs()),
            Event::Moved { network } => format!("moved to {network}"),
            other => format!("{other:?}"),
        };
        self.events.lock().unwrap().push(text);
    }

    fn count(&self, beginning: &str) -> usize {
        let events = self.events.lock().unwrap();
        let alike = events.iter().filter(|event| event.starts_with(beginning));
        alike.count()
    }

    fn titles(&self) -> Vec<String> {
        self.titles.lock().unwrap().clone()
    }
}

fn client(server: &Server, state: &Path, seen: &Seen) -> Builder {
    let (for_events, for_titles) = (seen.clone(), seen.clone());
    server
        .client()
        .state_dir(state)
        .on_event(move |event| for_events.told(&event))
        .on_notification(move |notification| {
            let title = notification.content.title.unwrap_or_default();
            for_titles.titles.lock().unwrap().push(title);
            Verdict::Acknowledge
        })
}

/// What the directory remembers of a network.
fn known(state: &Path, clock: &Clock, network: &str) -> KnownNetwork {
    let networks = inspect(state, clock).unwrap().networks.unwrap();
    let found = networks.into_iter().find(|known| known.name == network);
    found.unwrap_or_else(|| panic!("nothing is known of {network}"))
}

/// Goes from one thing that is due to the next until so much time has passed; answers with the time before each sign of life
/// that reached the server, in milliseconds.
async fn pass(clock: &Clock, server: &Server, time: Duration) -> Vec<u64> {
    let until_ms = clock.wall_ms() + time.as_millis() as u64;
    let mut silences = Vec::new();
    settle().await;
    server.take_heard();
    let mut heard_ms = clock.wall_ms();
    while clock.wall_ms() < until_ms {
        let due = clock.due_in().expect("a client always waits for something");
        clock.advance(due);
        settle().await;
        for frame in server.take_heard() {
            let now_ms = clock.wall_ms();
            if frame == DeviceFrame::Ping {
                silences.push(now_ms - heard_ms);
            }
            heard_ms = now_ms;
        }
    }
    silences
}

const HOUR: Duration = Duration::from_secs(3_600);

fn seconds(number: u64) -> Duration {
    Duration::from_secs(number)
}

#[track_caller]
fn all_within(silences: &[u64], from_s: u64, to_s: u64) {
    assert!(!silences.is_empty());
    let (least, most) = (
        silences.iter().min().unwrap(),
        silences.iter().max().unwrap(),
    );
    assert!(
        *least >= from_s * 1_000 && *most <= to_s * 1_000,
        "from {least} ms to {most} ms"
    );
}

/// A router that forgets, a client on it, and what it must come to.
struct Router {
    carriers: Carriers,
    forgets_after_s: u64,
    bounds_s: (u64, u64),
    begins_s: (u64, u64),
    settles_s: (u64, u64),
    /// Silences that may be lost in two days.
    losses_max: usize,
}

async fn settles(router: Router) {
    let Router {
        carriers,
        forgets_after_s,
        bounds_s,
        begins_s,
        settles_s,
        losses_max,
    } = router;
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    server.keep_alive(bounds_s.0 as u32, bounds_s.1 as u32);
    server.router_forgets_after(Some(seconds(forgets_after_s)));
    let builder = || client(&server, state.path(), &seen).carriers(carriers);
    let running = builder().network("home").start().await.unwrap();
    let carrier = server.attached().await;

    let first = pass(&clock, &server, seconds(begins_s.1)).await;
    all_within(&first[..1], begins_s.0, begins_s.1);
    let mut silences = pass(&clock, &server, 48 * HOUR).await;
    all_within(&silences, bounds_s.0, bounds_s.1);
    // At the end it is close below what the router bears. A rare try above it is what tells that nothing has changed.
    let last = silences.split_off(silences.len() - 100);
    let below = last
        .iter()
        .filter(|silent_ms| **silent_ms < forgets_after_s * 1_000);
    assert!(below.count() >= 95, "{last:?}");
    let mean_s = last.iter().sum::<u64>() / 100_000;
    assert!(
        (settles_s.0..=settles_s.1).contains(&mean_s),
        "{mean_s} s in the mean"
    );
    // Over WebSocket a lost silence is a lost connection.
    let lost = seen.count("silent");
    assert!(lost <= losses_max, "{lost} lost");
    running.shutdown().await;

    // It is remembered for this network, over a restart, and not believed of another one.
    let home = known(state.path(), &clock, "home");
    let (bears, other) = match carrier {
        bellwire_client::Carrier::Quic => (home.quic_bears_s, home.websocket_bears_s),
        bellwire_client::Carrier::WebSocket => (home.websocket_bears_s, home.quic_bears_s),
    };
    let bears_s = u64::from(bears.expect("something was learned"));
    assert!(
        bears_s <= forgets_after_s && bears_s >= settles_s.0 * 7 / 8,
        "{bears_s} s"
    );
    assert_eq!(other, None);
    for (network, from_s, to_s) in [
        ("home", settles_s.0 * 3 / 4, forgets_after_s),
        ("office", begins_s.0, begins_s.1),
    ] {
        let sessions = seen.count("connected");
        let running = builder().network(network).start().await.unwrap();
        while seen.count("connected") == sessions {
            settle().await;
        }
        let again = pass(&clock, &server, seconds(to_s)).await;
        all_within(&again[..1], from_s, to_s);
        running.shutdown().await;
    }
}

#[tokio::test]
async fn on_quic_the_interval_settles_below_what_a_router_forgets_and_is_remembered() {
    settles(Router {
        carriers: Carriers::Quic,
        forgets_after_s: 60,
        bounds_s: (20, 120),
        begins_s: (21, 29),
        settles_s: (45, 59),
        losses_max: 0,
    })
    .await;
}

#[tokio::test]
async fn on_websocket_the_interval_settles_below_what_a_firewall_forgets_and_is_remembered() {
    settles(Router {
        carriers: Carriers::WebSocket,
        forgets_after_s: 400,
        bounds_s: (60, 900),
        begins_s: (210, 270),
        settles_s: (300, 399),
        losses_max: 6,
    })
    .await;
}

#[tokio::test]
async fn where_nothing_is_forgotten_the_interval_comes_to_the_servers_bound_and_stays_within() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    server.keep_alive(20, 120);
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    server.attached().await;
    let silences = pass(&clock, &server, 48 * HOUR).await;
    all_within(&silences, 20, 120);
    let last = &silences[silences.len() - 20..];
    all_within(last, 88, 120);
    assert_eq!(seen.count("connected"), 1);
    // The server asks for more signs of life: that counts from the next session on, whatever was learned.
    server.keep_alive(20, 40);
    server.break_link();
    server.detached().await;
    let silences = pass(&clock, &server, HOUR).await;
    all_within(&silences[1..], 20, 40);
    running.shutdown().await;
}

#[tokio::test]
async fn a_server_that_is_away_teaches_nothing_about_the_network() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    server.attached().await;
    pass(&clock, &server, seconds(300)).await;
    // It falls silent and stays away for longer than a router would explain.
    server.be_silent(true);
    server.reach(Reach::Nothing);
    pass(&clock, &server, HOUR).await;
    assert_eq!(seen.count("silent"), 1);
    server.be_silent(false);
    server.reach(Reach::All);
    server.sessions_in_time(2).await;
    settle().await;
    running.shutdown().await;
    assert_eq!(lost(state.path()), 0.0);

    // The same with a server that is back at once is put down to the network.
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    server.attached().await;
    settle().await;
    server.be_silent(true);
    while seen.count("silent") == 1 {
        clock.advance(clock.due_in().unwrap());
        settle().await;
    }
    server.be_silent(false);
    server.sessions_in_time(4).await;
    settle().await;
    running.shutdown().await;
    assert_eq!(lost(state.path()), 1.0);
}

/// The weight of all silences that are put down to a network as lost.
fn lost(state: &Path) -> f64 {
    let text = std::fs::read_to_string(state.join("networks.json")).unwrap();
    let file: serde_json::Value = serde_json::from_str(&text).unwrap();
    let networks = file["networks"].as_object().unwrap().values();
    let carriers = networks.flat_map(|network| [&network["quic"], &network["websocket"]]);
    let bands = carriers.flat_map(|evidence| evidence["bands"].as_object().unwrap().values());
    bands.map(|band| band["lost"].as_f64().unwrap()).sum()
}

#[tokio::test]
async fn an_interval_that_the_app_sets_is_kept() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    server.keep_alive(20, 120);
    let builder = client(&server, state.path(), &seen).keep_alive(seconds(33));
    let running = builder.start().await.unwrap();
    server.attached().await;
    let silences = pass(&clock, &server, HOUR).await;
    all_within(&silences, 33, 33);
    running.shutdown().await;
}

#[tokio::test]
async fn a_machine_that_slept_asks_at_once_and_replaces_a_dead_link_within_seconds() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    server.attached().await;
    settle().await;
    server.take_heard();

    // The link is still there: one question, one answer, the session stays.
    clock.sleep_machine(8 * HOUR);
    settle().await;
    assert_eq!(seen.count("slept 28800 s"), 1);
    assert_eq!(server.take_heard(), [DeviceFrame::Ping]);
    clock.advance(seconds(6));
    settle().await;
    assert_eq!(seen.count("connected"), 1);

    // The router forgot the device meanwhile, and something came in.
    server.be_silent(true);
    let missed = server.notify_for(content("while asleep", ""), 24 * HOUR);
    clock.sleep_machine(8 * HOUR);
    settle().await;
    clock.advance(seconds(5));
    settle().await;
    assert_eq!(seen.count("lost"), 1, "{:?}", seen.events.lock().unwrap());
    server.be_silent(false);
    server.sessions_in_time(2).await;
    assert_eq!(server.outcome(missed).await, Outcome::Acknowledged);
    assert_eq!(seen.titles(), ["while asleep"]);
    running.shutdown().await;
    // A night's sleep is no evidence of what the network bears.
    let network = known(state.path(), &clock, "test");
    assert_eq!(
        (network.quic_bears_s, network.websocket_bears_s),
        (None, None)
    );
}

#[tokio::test]
async fn what_ran_out_while_the_machine_slept_is_declined_and_not_shown() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    let gate = Arc::new(Semaphore::new(0));
    let (open, titles) = (gate.clone(), seen.titles.clone());
    let running = client(&server, state.path(), &seen)
        .on_notification_async(move |notification| {
            let (open, titles) = (open.clone(), titles.clone());
            async move {
                let title = notification.content.title.unwrap_or_default();
                titles.lock().unwrap().push(title);
                open.acquire().await.unwrap().forget();
                Verdict::Acknowledge
            }
        })
        .start()
        .await
        .unwrap();
    server.attached().await;
    let shown = server.notify_for(content("shown", ""), 24 * HOUR);
    let short = server.notify_for(content("too late", ""), seconds(60));
    let long = server.notify_for(content("still good", ""), 24 * HOUR);
    while seen.titles().is_empty() {
        settle().await;
    }
    clock.sleep_machine(8 * HOUR);
    gate.add_permits(3);
    assert_eq!(server.outcome(shown).await, Outcome::Acknowledged);
    assert_eq!(server.outcome(long).await, Outcome::Acknowledged);
    let expired = Outcome::Declined("expired".to_owned());
    assert_eq!(server.outcome(short).await, expired);
    assert_eq!(seen.titles(), ["shown", "still good"]);
    running.shutdown().await;
}

#[tokio::test]
async fn a_pause_ends_when_the_machine_wakes_up_but_not_before_the_server_permits() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    server.reach(Reach::Nothing);
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    // Long enough for pauses of minutes.
    let mut by_then = 0;
    while by_then < 12 {
        settle().await;
        clock.advance(clock.due_in().unwrap());
        settle().await;
        by_then = seen.count("lost");
    }
    server.reach(Reach::All);
    clock.sleep_machine(seconds(3));
    settle().await;
    clock.advance(seconds(1));
    server.sessions(1).await;

    // A server that says when is obeyed.
    server.send_away(bellwire_client::GoawayReason::Drain, (600_000, 600_000));
    server.detached().await;
    settle().await;
    clock.sleep_machine(seconds(30));
    settle().await;
    clock.advance(seconds(60));
    settle().await;
    assert_eq!(seen.count("connected"), 1);
    clock.advance(seconds(600));
    server.sessions(2).await;
    running.shutdown().await;
}

#[tokio::test]
async fn leaving_works_at_every_moment_and_frees_the_directory() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    let leave = async |running: Client| {
        let leaving = tokio::spawn(running.shutdown());
        // A callback that never returns has five seconds.
        settle().await;
        clock.advance(seconds(6));
        tokio::time::timeout(PATIENCE, leaving)
            .await
            .expect("it does not end")
            .unwrap();
        assert!(!inspect(state.path(), &clock).unwrap().in_use);
    };

    // While it connects, and while it pauses.
    server.reach(Reach::Nothing);
    for turns in [0, 1, TURNS] {
        let running = client(&server, state.path(), &seen).start().await.unwrap();
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        leave(running).await;
    }
    // Attached; with a server that does not answer any more; and before `welcome`.
    server.reach(Reach::All);
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    server.attached().await;
    settle().await;
    leave(running).await;
    assert_eq!(seen.count("left"), 1);
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    server.attached().await;
    server.be_silent(true);
    leave(running).await;
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    settle().await;
    leave(running).await;
    server.be_silent(false);
    // With a callback that never returns: its notification stays with the server.
    let stuck =
        client(&server, state.path(), &seen).on_notification_async(|_| std::future::pending());
    let running = stuck.start().await.unwrap();
    server.attached().await;
    let waiting = server.notify(content("stuck", ""));
    settle().await;
    leave(running).await;
    assert_eq!(server.outcome_now(waiting), None);
    // And the next client gets it.
    let running = client(&server, state.path(), &seen).start().await.unwrap();
    assert_eq!(server.outcome(waiting).await, Outcome::Acknowledged);
    leave(running).await;
}

#[tokio::test]
async fn a_way_that_works_is_taken_again_on_the_same_network() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let clock = server.clock();
    let proxy = || "http://ann:secret@proxy.test:3128".parse().unwrap();
    let start = async |network: &str| {
        let builder = client(&server, state.path(), &seen).network(network);
        builder.proxy_when_needed(proxy()).start().await.unwrap()
    };
    server.reach(Reach::ProxyOnly);
    let running = start("office").await;
    server.attached().await;
    settle().await;
    running.shutdown().await;
    let office = known(state.path(), &clock, "office");
    assert_eq!(office.carrier, Some("websocket"));
    assert_eq!(office.proxy.as_deref(), Some("proxy.test:3128"));
    let text = std::fs::read_to_string(state.path().join("networks.json")).unwrap();
    assert!(!text.contains("secret"), "{text}");

    // At home it is not needed, so it is not used; in the office it goes first even when others would do.
    server.reach(Reach::All);
    let running = start("home").await;
    server.attached().await;
    settle().await;
    running.shutdown().await;
    assert_eq!(known(state.path(), &clock, "home").carrier, Some("quic"));
    assert_eq!(known(state.path(), &clock, "home").proxy, None);
    let running = start("office").await;
    server.attached().await;
    settle().await;
    running.shutdown().await;
    let last = inspect(state.path(), &clock).unwrap().last_session.unwrap();
    assert_eq!(last.proxy.as_deref(), Some("proxy.test:3128"));
}

#[tokio::test]
async fn an_app_that_wanted_one_ends_after_it_although_the_network_is_gone() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    let gate = Arc::new(Semaphore::new(0));
    let for_app = gate.clone();
    let app = client(&server, state.path(), &seen)
        .leave_after(1)
        .on_notification_async(move |_| {
            let gate = for_app.clone();
            async move {
                gate.acquire().await.unwrap().forget();
                Verdict::Acknowledge
            }
        })
        .start()
        .await
        .unwrap();
    server.attached().await;
    let id = server.notify(content("one", ""));
    settle().await;
    server.reach(Reach::Nothing);
    server.break_link();
    server.detached().await;
    gate.add_permits(1);
    // The clock stands still: no pause of the client ever ends.
    let ended = tokio::time::timeout(PATIENCE, app.ended()).await;
    ended.expect("it waits for a network");

    // The verdict is on disk, and told by the next one.
    server.reach(Reach::All);
    let app = client(&server, state.path(), &seen).start().await.unwrap();
    assert_eq!(server.outcome(id).await, Outcome::Acknowledged);
    assert!(seen.titles().is_empty(), "nothing is shown twice");
    app.shutdown().await;
}

#[tokio::test]
async fn every_session_hears_whether_a_person_uses_the_app() {
    let (server, seen, state) = (Server::new(), Seen::default(), tempfile::tempdir().unwrap());
    server.reach(Reach::Nothing);
    let app = client(&server, state.path(), &seen).start().await.unwrap();
    // Said before there is anybody to hear it.
    app.presence(PresenceState::Active).await.unwrap();
    server.reach(Reach::All);
    server.sessions_in_time(1).await;
    let presences = || {
        let heard = server.take_heard().into_iter();
        let presences = heard.filter_map(|frame| match frame {
            DeviceFrame::Presence(presence) => Some(presence.state),
            _ => None,
        });
        presences.collect::<Vec<_>>()
    };
    settle().await;
    assert_eq!(presences(), [PresenceState::Active]);
    app.presence(PresenceState::Idle).await.unwrap();
    settle().await;
    server.break_link();
    server.sessions_in_time(2).await;
    settle().await;
    assert_eq!(presences(), [PresenceState::Idle; 2]);
    app.shutdown().await;
}
