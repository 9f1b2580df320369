//! Mailbox tables: a script of events and times in, effects as text out.
//!
//! Each file under `tests/tables/` holds stories: `== title`, then commands; the indented lines under a command are
//! what it caused, in order. `UPDATE_TABLES=1` writes them anew: read the difference before you believe it.
//! Reads of the store are answered at once from a small model of it, unless a story holds them.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use bellwire_server::delivery::*;

const DEVICE: DeviceId = DeviceId(*b"device-of-tables");
const START_MS: u64 = 1_000_000;

/// A store of one mailbox, as the log would have it.
#[derive(Default)]
struct ModelStore {
    summary: Option<Summary>,
    rows: BTreeMap<u64, (RowMeta, Arc<Notification>)>,
    rotten: Vec<u64>,
    withdrawals: Vec<Withdrawal>,
}

impl ModelStore {
    fn apply(&mut self, changes: Vec<Change>) {
        for change in changes {
            match change {
                Change::Insert {
                    order,
                    run,
                    notification,
                    ..
                } => {
                    let meta = RowMeta {
                        key: RowKey {
                            urgency: notification.urgency,
                            order,
                        },
                        ping: notification.ping,
                        size: notification.size,
                        expires_ms: notification.expires_ms,
                        collapse: notification.collapse.clone(),
                        run,
                        shared: notification.shared,
                    };
                    assert!(
                        self.rows.insert(order, (meta, notification)).is_none(),
                        "order {order} used twice"
                    );
                }
                Change::Remove { row, .. } => {
                    assert!(
                        self.rows.remove(&row.key.order).is_some(),
                        "removal of what is not there"
                    );
                }
                Change::Outcome { .. } => {}
                Change::Withdraw { withdrawal, .. } => self.withdraw(withdrawal),
                Change::Summary { summary, .. } => self.summary = Some(summary),
                Change::Forget { .. } => self.summary = None,
                Change::Cleared { .. } => {}
            }
        }
        if let Some(summary) = self.summary {
            assert_eq!(
                summary.count as usize,
                self.rows.len(),
                "the summary counts the rows"
            );
            let bytes: u64 = self
                .rows
                .values()
                .map(|(meta, _)| u64::from(meta.size))
                .sum();
            assert_eq!(summary.bytes, bytes, "the summary counts the bytes");
            assert!(
                self.rows.keys().all(|&order| order < summary.next_order),
                "orders stay below the next"
            );
        } else {
            assert!(self.rows.is_empty(), "a mailbox that is forgotten is empty");
        }
    }

    fn withdraw(&mut self, withdrawal: Withdrawal) {
        self.withdrawals.retain(|one| one.ping != withdrawal.ping);
        self.withdrawals.push(withdrawal);
    }

    fn read(&self, request: &MailboxRead) -> MailboxView {
        let mut rows: BTreeMap<u64, RowMeta> = BTreeMap::new();
        let mut take = |meta: &RowMeta| {
            rows.insert(meta.key.order, meta.clone());
        };
        let all = self.rows.values().map(|(meta, _)| meta);
        if request.all {
            all.clone().for_each(&mut take);
        }
        if let Some(ping) = request.ping {
            all.clone()
                .filter(|meta| meta.ping == ping)
                .for_each(&mut take);
        }
        if let Some(key) = &request.collapse {
            all.clone()
                .rfind(|meta| meta.collapse.as_ref() == Some(key))
                .into_iter()
                .for_each(&mut take);
        }
        if let Some(lowest) = request.lowest {
            let mut ranked: Vec<&RowMeta> = all.clone().collect();
            ranked.sort_by_key(|meta| meta.key);
            let (mut count, mut bytes) = (0, 0);
            for meta in ranked {
                if count >= lowest.count && bytes >= lowest.bytes {
                    break;
                }
                count += 1;
                bytes += u64::from(meta.size);
                take(meta);
            }
        }
        for key in &request.rows {
            if let Some((meta, _)) = self.rows.get(&key.order) {
                take(meta);
            }
        }
        MailboxView {
            summary: self.summary,
            rows: rows.into_values().collect(),
            complete: request.all,
            withdrawals: request.withdrawals.then(|| self.withdrawals.clone()),
        }
    }
}

struct World {
    shard: Shard,
    policy: Policy,
    store: ModelStore,
    now_ms: u64,
    tickets: u64,
    sealed: Option<Vec<Change>>,
    hold_reads: bool,
    /// Answers as of the moment of the question, not told yet.
    held: Vec<Event>,
    out: String,
}

fn name(ping: PingId) -> char {
    char::from(ping.0[0])
}

fn ping(text: &str) -> PingId {
    PingId([text.as_bytes()[0]; 16])
}

fn span(text: &str) -> Duration {
    if let Some(ms) = text.strip_suffix("ms") {
        return Duration::from_millis(ms.parse().unwrap());
    }
    Duration::from_secs(text.strip_suffix('s').unwrap().parse().unwrap())
}

fn urgency(text: &str) -> Urgency {
    match text {
        "very-low" => Urgency::VeryLow,
        "low" => Urgency::Low,
        "normal" => Urgency::Normal,
        "high" => Urgency::High,
        other => panic!("no urgency {other}"),
    }
}

fn session(text: &str) -> SessionId {
    SessionId(text.strip_prefix('s').unwrap().parse().unwrap())
}

fn pings(pings: &[PingId]) -> String {
    pings
        .iter()
        .map(|&ping| name(ping).to_string())
        .collect::<Vec<_>>()
        .join(",")
}

impl World {
    fn new() -> World {
        let policy = Policy {
            defer_max: Duration::ZERO,
            ..Policy::default()
        };
        World {
            shard: Shard::new(policy.clone()),
            policy,
            store: ModelStore::default(),
            now_ms: 0,
            tickets: 0,
            sealed: None,
            hold_reads: false,
            held: Vec::new(),
            out: String::new(),
        }
    }

    fn now(&self) -> Now {
        Now {
            mono: Mono(self.now_ms * 1_000),
            unix_ms: START_MS + self.now_ms,
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    fn event(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.shard.handle(DEVICE, event, self.now(), &mut effects);
        self.show(effects);
    }

    /// Writes effects down and answers reads.
    fn show(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            let line = self.text(&effect);
            writeln!(self.out, "  {line}").unwrap();
            if let Effect::WithdrawalsHeard { heard, .. } = &effect {
                self.store.withdrawals.retain(|one| !heard.contains(one));
            }
            if matches!(effect, Effect::Read(_) | Effect::Fetch { .. }) {
                let answer = self.answer(effect);
                if self.hold_reads {
                    self.held.push(answer);
                } else {
                    self.event(answer);
                }
            }
        }
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "only reads are questions")]
    fn answer(&self, effect: Effect) -> Event {
        match effect {
            Effect::Read(request) => Event::Read(Ok(Box::new(self.store.read(&request)))),
            Effect::Fetch { rows, .. } => Event::Bodies(Ok(rows
                .into_iter()
                .map(|key| {
                    let body = self
                        .store
                        .rows
                        .get(&key.order)
                        .filter(|_| !self.store.rotten.contains(&key.order));
                    (key, body.map(|(_, notification)| Arc::clone(notification)))
                })
                .collect())),
            other => panic!("not a question: {other:?}"),
        }
    }

    fn text(&self, effect: &Effect) -> String {
        let since = |ms: &u64| format!("@{}ms", ms.wrapping_sub(START_MS).cast_signed());
        let named = |tickets: &[Ticket]| {
            tickets
                .iter()
                .map(|t| format!("t{}", t.0))
                .collect::<Vec<_>>()
                .join(",")
        };
        match effect {
            Effect::Accepted { ticket, ping, .. } => {
                format!("accepted t{} {}", ticket.0, name(*ping))
            }
            Effect::Ended {
                tickets,
                ping,
                outcome,
                at_ms,
                stored,
                ..
            } => format!(
                "ended [{}] {} {} {}{}",
                named(tickets),
                name(*ping),
                outcome.as_str(),
                since(at_ms),
                if *stored { " stored" } else { "" }
            ),
            Effect::Rejected {
                ticket, ping, why, ..
            } => format!("rejected t{} {} {why:?}", ticket.0, name(*ping)),
            Effect::RevokeAnswered { ticket, revoked } => format!("revoke t{} {revoked}", ticket.0),
            Effect::Wiped {
                ticket, revoked, ..
            } => format!("wiped t{} {revoked}", ticket.0),
            Effect::Cleared {
                ticket,
                revoked,
                known,
            } => {
                let known = if *known { "" } else { " unknown" };
                format!("cleared t{} {revoked}{known}", ticket.0)
            }
            Effect::Welcome {
                session,
                pending,
                window,
            } => {
                format!("welcome s{} pending={pending} window={window}", session.0)
            }
            Effect::Refuse { session, why } => format!("refuse s{} {why:?}", session.0),
            Effect::Send {
                session,
                seq,
                redelivered,
                notification,
            } => format!(
                "send s{} #{seq} {}{}",
                session.0,
                name(notification.ping),
                if *redelivered { " redelivered" } else { "" }
            ),
            Effect::Withdraw {
                session,
                pings: taken,
            } => format!("withdraw s{} {}", session.0, pings(taken)),
            Effect::WithdrawalsHeard { heard, .. } => {
                let heard: Vec<PingId> = heard.iter().map(|one| one.ping).collect();
                format!("heard {}", pings(&heard))
            }
            Effect::Close { session, why } => format!("close s{} {why:?}", session.0),
            Effect::Read(request) => {
                let mut line = "read".to_owned();
                if request.all {
                    line.push_str(" all");
                }
                if let Some(ping) = request.ping {
                    write!(line, " ping={}", name(ping)).unwrap();
                }
                if let Some(key) = &request.collapse {
                    write!(line, " key={}", key.as_str()).unwrap();
                }
                if let Some(lowest) = request.lowest {
                    write!(line, " lowest={}/{}", lowest.count, lowest.bytes).unwrap();
                }
                if request.withdrawals && !request.all {
                    line.push_str(" withdrawals");
                }
                if !request.rows.is_empty() {
                    write!(line, " rows={}", request.rows.len()).unwrap();
                }
                line
            }
            Effect::Fetch { rows, .. } => format!("fetch {}", rows.len()),
            Effect::Noticed(notice) => format!("notice {notice:?}"),
        }
    }

    fn seal(&mut self) {
        let changes = self.shard.seal();
        let told: Vec<String> = changes
            .iter()
            .map(|change| match change {
                Change::Insert { notification, .. } => format!("+{}", name(notification.ping)),
                Change::Remove { row, outcome, .. } => {
                    format!("-{} {}", name(row.ping), outcome.as_str())
                }
                Change::Outcome { ping, outcome, .. } => {
                    format!("{} {}", name(*ping), outcome.as_str())
                }
                Change::Withdraw { withdrawal, .. } => {
                    format!("withdraw {}", name(withdrawal.ping))
                }
                Change::Summary { summary, .. } => format!("n={}", summary.count),
                Change::Forget { .. } => "forget".to_owned(),
                Change::Cleared { .. } => "cleared".to_owned(),
            })
            .collect();
        writeln!(self.out, "  frame {}", told.join(", ")).unwrap();
        self.sealed = Some(changes);
    }

    fn committed(&mut self, result: Result<(), CommitFailure>) {
        let changes = self.sealed.take().expect("a frame is outstanding");
        if result.is_ok() {
            self.store.apply(changes);
        }
        let mut effects = Vec::new();
        self.shard
            .handle_committed(result, self.now(), &mut effects);
        self.show(effects);
    }

    #[expect(clippy::wildcard_enum_match_arm, reason = "only answers are held")]
    fn command(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let option = |key: &str| {
            words.iter().find_map(|word| {
                word.strip_prefix(key)
                    .and_then(|rest| rest.strip_prefix('='))
            })
        };
        let flag = |key: &str| words.contains(&key);
        match words[0] {
            "device" => self.store.summary = Some(Summary::new(AppId::DEFAULT)),
            "policy" => {
                if let Some(count) = option("count") {
                    self.policy.mailbox_notifications = count.parse().unwrap();
                }
                if let Some(bytes) = option("bytes") {
                    self.policy.mailbox_bytes = bytes.parse().unwrap();
                }
                if flag("refuse") {
                    self.policy.overflow = OverflowRule::Refuse;
                }
                if let Some(defer) = option("defer") {
                    self.policy.defer_max = span(defer);
                }
                self.shard.set_policy(self.policy.clone());
            }
            "enqueue" => {
                let transient = flag("transient");
                let ttl = option("ttl").map_or(Duration::from_secs(3_600), span);
                let ttl = if transient {
                    Duration::from_secs(30)
                } else {
                    ttl
                };
                let ticket = self.ticket();
                let now = self.now().unix_ms;
                let notification = Arc::new(Notification {
                    ping: ping(words[1]),
                    app: option("app").map_or(AppId::DEFAULT, |app| AppId(app.parse().unwrap())),
                    accepted_ms: now,
                    expires_ms: now + u64::try_from(ttl.as_millis()).unwrap(),
                    urgency: option("urgency").map_or(Urgency::Normal, urgency),
                    collapse: option("key").map(|key| CollapseKey::new(key).unwrap()),
                    size: option("size").map_or(10, |size| size.parse().unwrap()),
                    transient,
                    shared: false,
                    content: Bytes::new(),
                    wire: WireSlot::default(),
                    hold: Hold::default(),
                });
                self.event(Event::Enqueue(Enqueue {
                    ticket,
                    notification,
                    may_repeat: flag("repeat"),
                    too_fast: flag("too_fast"),
                    patient: flag("patient"),
                }));
            }
            "attach" => {
                let seen = option("seen").map_or(Vec::new(), |seen| {
                    seen.split(',')
                        .map(|word| {
                            let verdict = if word.ends_with('-') {
                                Verdict::Declined
                            } else {
                                Verdict::Acknowledged
                            };
                            (ping(word), verdict)
                        })
                        .collect()
                });
                self.event(Event::Attach(Attach {
                    session: session(words[1]),
                    instance: option("instance").map_or(1, |text| text.parse().unwrap()),
                    attempt: option("attempt").map_or(1, |text| text.parse().unwrap()),
                    window: option("window").map_or(32, |text| text.parse().unwrap()),
                    min_urgency: option("min").map_or(Urgency::VeryLow, urgency),
                    seen,
                }));
            }
            "detach" => self.event(Event::Detach {
                session: session(words[1]),
            }),
            "ack" => {
                let what = match words[2].parse() {
                    Ok(seq) => Acknowledged::UpTo(seq),
                    Err(_) => Acknowledged::Ids(words[2].split(',').map(ping).collect()),
                };
                self.event(Event::Acknowledge {
                    session: session(words[1]),
                    what,
                });
            }
            "decline" => self.event(Event::Decline {
                session: session(words[1]),
                ping: ping(words[2]),
            }),
            "release" => self.event(Event::Release {
                ping: ping(words[1]),
            }),
            "revoke" => {
                let ticket = self.ticket();
                self.event(Event::Revoke {
                    ticket,
                    ping: ping(words[1]),
                });
            }
            // Until so many milliseconds after the start; the store has it already.
            "withdraw" => {
                let withdrawal = Withdrawal {
                    ping: ping(words[1]),
                    until_ms: START_MS + u64::try_from(span(words[2]).as_millis()).unwrap(),
                };
                self.store.withdraw(withdrawal);
                self.event(Event::Withdraw(withdrawal));
            }
            "wipe" => {
                let ticket = self.ticket();
                self.event(Event::Wipe { ticket });
            }
            "clear" => {
                let ticket = self.ticket();
                self.event(Event::Clear { ticket });
            }
            "sweep" => {
                let now = self.now().unix_ms;
                let metas = self.store.rows.values().map(|(meta, _)| meta);
                let rows: Vec<RowKey> = metas
                    .filter(|meta| meta.expires_ms <= now)
                    .map(|meta| meta.key)
                    .collect();
                self.event(Event::Expire { rows });
            }
            "expire" => {
                let rows = words[1].split(',').map(|order| RowKey {
                    urgency: Urgency::Normal,
                    order: order.parse().unwrap(),
                });
                self.event(Event::Expire {
                    rows: rows.collect(),
                });
            }
            "at" => {
                self.now_ms = u64::try_from(span(words[1]).as_millis()).unwrap();
                let mut effects = Vec::new();
                self.shard.handle_deadlines(self.now(), &mut effects);
                self.show(effects);
            }
            "seal" => self.seal(),
            "commit" => {
                if self.sealed.is_none() {
                    if !self.shard.has_offers() {
                        return writeln!(self.out, "  nothing to commit").unwrap();
                    }
                    self.seal();
                }
                self.committed(Ok(()));
            }
            "no-room" => self.committed(Err(CommitFailure::NoRoom)),
            "fail" => {
                // Nobody knows what is on disk until a restart; a story does.
                if flag("written") {
                    self.store.apply(self.sealed.clone().unwrap());
                }
                self.committed(Err(CommitFailure::Failed));
            }
            "disk" => {
                let disk = match words[1] {
                    "open" => Disk::Open,
                    "full" => Disk::Full,
                    "failed" => Disk::Failed,
                    other => panic!("no disk {other}"),
                };
                let mut effects = Vec::new();
                self.shard.set_disk(disk, self.now(), &mut effects);
                self.show(effects);
            }
            "hold-reads" => self.hold_reads = true,
            "answer-one" => {
                let answer = self.held.remove(0);
                self.event(answer);
            }
            "answer-reads" => {
                self.hold_reads = false;
                for answer in std::mem::take(&mut self.held) {
                    self.event(answer);
                }
            }
            "fail-reads" => {
                self.hold_reads = false;
                for answer in std::mem::take(&mut self.held) {
                    self.event(match answer {
                        Event::Read(_) => Event::Read(Err(())),
                        _ => Event::Bodies(Err(())),
                    });
                }
            }
            "rot" => {
                let ping = ping(words[1]);
                let rows = self
                    .store
                    .rows
                    .values()
                    .filter(|(meta, _)| meta.ping == ping);
                self.store
                    .rotten
                    .extend(rows.map(|(meta, _)| meta.key.order));
            }
            "crash" => {
                if let Some(changes) = self.sealed.take().filter(|_| flag("written")) {
                    self.store.apply(changes);
                }
                self.policy.run += 1;
                self.shard = Shard::new(self.policy.clone());
            }
            "store" => {
                let rows: Vec<String> = self
                    .store
                    .rows
                    .values()
                    .map(|(meta, _)| name(meta.ping).to_string())
                    .collect();
                writeln!(self.out, "  [{}]", rows.join(" ")).unwrap();
            }
            "awake" => writeln!(self.out, "  {}", self.shard.awake()).unwrap(),
            "next" => {
                let next = self
                    .shard
                    .next_deadline()
                    .map(|at| Duration::from_micros(at.0));
                writeln!(self.out, "  {next:?}").unwrap();
            }
            other => panic!("no command {other}"),
        }
    }
}

fn run(script: &str) -> String {
    let mut out = String::new();
    let mut world = World::new();
    for line in script.lines() {
        if line.starts_with("  ") {
            continue;
        }
        if line.starts_with("==") {
            world = World::new();
        }
        out.push_str(line);
        out.push('\n');
        if !line.trim().is_empty() && !line.starts_with('#') && !line.starts_with("==") {
            world.command(line);
            out.push_str(&std::mem::take(&mut world.out));
        }
    }
    out
}

#[track_caller]
fn check(file: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/tables")
        .join(file);
    let expected = std::fs::read_to_string(&path).unwrap();
    let actual = run(&expected);
    if std::env::var_os("UPDATE_TABLES").is_some() {
        std::fs::write(&path, &actual).unwrap();
        return;
    }
    for (number, (expected, actual)) in expected.lines().zip(actual.lines()).enumerate() {
        assert_eq!(expected, actual, "{file}, line {}", number + 1);
    }
    assert_eq!(expected, actual, "{file}");
}

#[test]
fn acceptance_is_answered_when_safe_and_ends_once() {
    check("acceptance.txt");
}

#[test]
fn sessions_receive_in_order_within_their_window() {
    check("sessions.txt");
}

#[test]
fn rows_of_quick_devices_are_held_back_from_the_disk() {
    check("deferral.txt");
}

#[test]
fn a_newer_notification_takes_the_place_of_an_older_one() {
    check("collapse.txt");
}

#[test]
fn a_full_mailbox_evicts_the_lowest_and_oldest() {
    check("eviction.txt");
}

#[test]
fn nothing_outlives_its_ttl() {
    check("expiry.txt");
}

#[test]
fn what_was_revoked_is_gone_when_the_answer_comes() {
    check("revoke.txt");
}

#[test]
fn what_was_delivered_and_is_taken_back_is_told_until_it_is_heard() {
    check("withdraw.txt");
}

#[test]
fn trouble_with_the_disk_is_told_and_loses_nothing() {
    check("disk.txt");
}
