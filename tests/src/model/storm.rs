//! Histories in which anything may be late, fail or die.

use bellwire_server::delivery::{Disk, Urgency, Verdict};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::step::{Name, Step};
use super::world::{World, name};

/// The names that pings get, in order.
const NAMES: &str = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ";

/// What a history is made of: weights of steps, and how much may go wrong.
#[derive(Debug, Clone)]
pub(super) struct Temper {
    pub(super) enqueue: u32,
    pub(super) attach: u32,
    pub(super) detach: u32,
    pub(super) ack: u32,
    pub(super) revoke: u32,
    pub(super) wipe: u32,
    pub(super) time: u32,
    pub(super) sweep: u32,
    pub(super) frame: u32,
    pub(super) no_room: u32,
    pub(super) fail: u32,
    pub(super) disk: u32,
    pub(super) reads: u32,
    pub(super) crash: u32,
    pub(super) rot: u32,
    keys: u8,
    urgencies: bool,
    transient: f64,
    repeat: f64,
    patient: f64,
    short_lives: f64,
    window: u16,
    pub(super) len: usize,
}

impl Temper {
    pub(super) fn storm(random: &mut StdRng) -> Temper {
        let mut some = |weight: u32, chance: f64| {
            if random.random_bool(chance) {
                random.random_range(1..=weight)
            } else {
                0
            }
        };
        Temper {
            enqueue: 10,
            attach: some(6, 0.9),
            detach: some(3, 0.7),
            ack: some(8, 0.9),
            revoke: some(4, 0.4),
            wipe: some(1, 0.1),
            time: some(4, 0.7),
            sweep: some(3, 0.3),
            frame: some(10, 0.95),
            no_room: some(5, 0.4),
            fail: some(1, 0.1),
            disk: some(4, 0.3),
            reads: some(6, 0.5),
            crash: some(2, 0.5),
            rot: some(2, 0.1),
            keys: u8::try_from(some(3, 0.6)).unwrap_or(0),
            urgencies: random.random_bool(0.5),
            transient: if random.random_bool(0.3) { 0.2 } else { 0.0 },
            repeat: if random.random_bool(0.4) { 0.3 } else { 0.0 },
            patient: if random.random_bool(0.5) { 0.5 } else { 0.0 },
            short_lives: if random.random_bool(0.4) { 0.4 } else { 0.0 },
            window: if random.random_bool(0.5) { 3 } else { 8 },
            len: random.random_range(10..=60),
        }
    }

    /// Everything in its turn: what a naive model can say beforehand.
    pub(super) fn calm(random: &mut StdRng) -> Temper {
        Temper {
            frame: 0,
            no_room: 0,
            fail: 0,
            disk: 0,
            reads: 0,
            rot: 0,
            ..Temper::storm(random)
        }
    }
}

/// What the maker of a history remembers.
#[derive(Debug, Default)]
pub(super) struct Maker {
    used: usize,
    attempts: [u64; 5],
    full: bool,
    holding: bool,
}

impl Maker {
    pub(super) fn policy(random: &mut StdRng, defer: bool) -> Step {
        Step::Policy {
            count: random.random_range(1..=6),
            bytes: random.random_range(30..=200),
            refuse: random.random_bool(0.15),
            defer_ms: if defer && random.random_bool(0.5) {
                50
            } else {
                0
            },
        }
    }

    fn known(&self, random: &mut StdRng) -> Name {
        let at = random.random_range(0..self.used.max(1));
        char::from(NAMES.as_bytes()[at])
    }

    fn names(&self, world: &World, random: &mut StdRng) -> Vec<Name> {
        let mut names: Vec<Name> = Vec::new();
        let waiting = world.observer.session().map_or(&[][..], |(_, all)| all);
        for _ in 0..random.random_range(1..=3) {
            let one = if !waiting.is_empty() && random.random_bool(0.7) {
                name(waiting[random.random_range(0..waiting.len())].1)
            } else {
                self.known(random)
            };
            if !names.contains(&one) {
                names.push(one);
            }
        }
        names
    }

    /// The next step, given how the world stands.
    pub(super) fn next(&mut self, temper: &Temper, world: &World, random: &mut StdRng) -> Step {
        let attached = world.observer.session().map(|(id, _)| id);
        let last = attached.unwrap_or_else(|| world.observer.next_session().saturating_sub(1));
        let weights = [
            temper.enqueue,
            temper.attach,
            temper.detach,
            temper.ack * 3,
            temper.revoke,
            temper.wipe,
            temper.time,
            temper.sweep,
            temper.frame,
            temper.no_room,
            temper.fail,
            temper.disk,
            temper.reads,
            temper.crash,
            temper.rot,
        ];
        let mut at = random.random_range(0..weights.iter().sum());
        let which = weights
            .iter()
            .position(|&weight| match at.checked_sub(weight) {
                Some(rest) => {
                    at = rest;
                    false
                }
                None => true,
            });
        match which.unwrap_or(0) {
            0 => self.enqueue(temper, random),
            1 => {
                let instance = *[1, 1, 1, 2, 3, 4]
                    .get(random.random_range(0..6usize))
                    .unwrap_or(&1);
                let attempts = &mut self.attempts[instance];
                if random.random_bool(0.9) {
                    *attempts += 1;
                }
                let attempt = *attempts;
                let seen = if random.random_bool(0.2) {
                    let names = self.names(world, random);
                    let verdict = |random: &mut StdRng| {
                        if random.random_bool(0.8) {
                            Verdict::Acknowledged
                        } else {
                            Verdict::Declined
                        }
                    };
                    names
                        .into_iter()
                        .map(|name| (name, verdict(random)))
                        .collect()
                } else {
                    Vec::new()
                };
                Step::Attach {
                    session: world.observer.next_session(),
                    instance: instance as u128,
                    attempt,
                    window: random.random_range(1..=temper.window),
                    min: if temper.urgencies && random.random_bool(0.3) {
                        Urgency::ALL[random.random_range(0..4)]
                    } else {
                        Urgency::VeryLow
                    },
                    seen,
                }
            }
            2 => Step::Detach(last),
            3 => {
                let seq = world
                    .observer
                    .last_seq(bellwire_server::delivery::SessionId(last));
                let first = world
                    .observer
                    .session()
                    .and_then(|(_, waiting)| waiting.first().map(|&(seq, _)| seq));
                match random.random_range(0..10) {
                    0..=5 if seq > 0 => {
                        Step::AckUpTo(last, random.random_range(first.unwrap_or(1).min(seq)..=seq))
                    }
                    9 => Step::Decline(last, self.names(world, random)[0]),
                    _ => Step::AckIds(last, self.names(world, random)),
                }
            }
            4 => match random.random_range(0..4) {
                0 => Step::Withdraw(self.known(random)),
                _ => Step::Revoke(self.known(random)),
            },
            5 => Step::Wipe,
            6 => {
                let spans = [1, 3, 10, 20, 60, 1_000, 5_000, 31_000, 301_000];
                let until = world
                    .shard
                    .next_deadline()
                    .map(|at| at.0.div_ceil(1_000).max(world.now_ms));
                let at = match until {
                    Some(until) if random.random_bool(0.3) => until,
                    _ => world.now_ms + spans[random.random_range(0..spans.len())],
                };
                Step::At(at)
            }
            7 if temper.patient > 0.0 && random.random_bool(0.5) => {
                Step::Release(self.names(world, random)[0])
            }
            7 => Step::Sweep,
            8 => match random.random_range(0..3) {
                0 if !world.is_sealed() => Step::Seal,
                _ => Step::Commit,
            },
            9 => match world.is_sealed() {
                true => Step::NoRoom,
                false => Step::Seal,
            },
            10 => Step::Fail(random.random_bool(0.5)),
            11 => {
                self.full = !self.full;
                if random.random_bool(0.03) {
                    return Step::Disk(Disk::Failed);
                }
                Step::Disk(if self.full { Disk::Full } else { Disk::Open })
            }
            12 => {
                self.holding = !self.holding || world.held_reads() == 0;
                match (self.holding, random.random_range(0..10)) {
                    (true, _) => Step::HoldReads,
                    (false, 0..=3) => Step::AnswerOne,
                    (false, 4..=8) => Step::AnswerReads,
                    (false, _) => Step::FailReads,
                }
            }
            13 => Step::Crash(random.random_bool(0.5)),
            _ => Step::Rot(self.known(random)),
        }
    }

    fn enqueue(&mut self, temper: &Temper, random: &mut StdRng) -> Step {
        let repeat = self.used > 0 && random.random_bool(temper.repeat);
        let exhausted = self.used == NAMES.len();
        let name = if repeat || exhausted {
            self.known(random)
        } else {
            self.used += 1;
            char::from(NAMES.as_bytes()[self.used - 1])
        };
        Step::Enqueue {
            name,
            ttl_ms: if random.random_bool(temper.short_lives) {
                [0, 1, 5, 40, 900, 4_000][random.random_range(0..6)]
            } else {
                3_600_000
            },
            urgency: if temper.urgencies {
                Urgency::ALL[random.random_range(0..4)]
            } else {
                Urgency::Normal
            },
            key: (temper.keys > 0 && random.random_bool(0.6))
                .then(|| char::from(b'k' + random.random_range(0..temper.keys))),
            size: random.random_range(1..=60),
            transient: random.random_bool(temper.transient),
            // Whoever repeats an id says so.
            repeat: repeat || exhausted || temper.repeat > 0.0,
            patient: random.random_bool(temper.patient),
        }
    }
}

/// A history from a seed.
#[must_use]
pub fn make(seed: u64) -> Vec<Step> {
    let mut random = StdRng::seed_from_u64(seed);
    let temper = Temper::storm(&mut random);
    let mut maker = Maker::default();
    let mut world = World::new();
    let mut steps = vec![Step::Device, Maker::policy(&mut random, true)];
    for step in &steps {
        let _ = world.step(step);
    }
    while steps.len() < temper.len {
        let step = maker.next(&temper, &world, &mut random);
        steps.push(step);
        // What goes wrong here goes wrong again when the history is played.
        let step = steps.last().map(|step| {
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| world.step(step)))
        });
        if !matches!(step, Some(Ok(Ok(())))) {
            break;
        }
    }
    steps
}

/// Plays a history, then heals everything and lets it come to rest.
///
/// # Errors
/// What must not happen, and did.
pub fn play(steps: &[Step]) -> Result<(), String> {
    let mut world = World::new();
    for step in steps {
        world.step(step)?;
    }
    world.settle()
}
