//! The core in step with the naive model: every read is answered at once, every frame is safe at once, and each step must cause
//! what the model says, word for word.

use std::time::Duration;

use bellwire_server::delivery::{Effect, PingId};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::reference::{Line, Redelivered, Reference};
use super::step::Step;
use super::storm::{Maker, Temper};
use super::world::{START_MS, World, name};

/// The naive model keeps no withdrawal of what is revoked: whether that was sent is known for sure only while the mailbox is
/// awake.
fn world() -> World {
    let mut world = World::new();
    world.policy.withdrawals_keep = Duration::ZERO;
    world.shard.set_policy(world.policy.clone());
    world
}

/// A history from a seed.
#[must_use]
pub fn make(seed: u64) -> Vec<Step> {
    let mut random = StdRng::seed_from_u64(seed);
    let temper = Temper::calm(&mut random);
    let mut maker = Maker::default();
    let mut world = world();
    let mut steps = vec![Step::Device, Maker::policy(&mut random, false)];
    for step in &steps {
        let _ = world.step(step);
    }
    while steps.len() < temper.len {
        let step = maker.next(&temper, &world, &mut random);
        let went = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            world.step(&step).and_then(|()| world.step(&Step::Commit))
        }));
        steps.push(step);
        // What goes wrong here goes wrong again when the history is played.
        if !matches!(went, Ok(Ok(()))) {
            break;
        }
    }
    steps
}

/// Plays a history with a frame behind each step.
///
/// # Errors
/// Where core and model part.
pub fn play(steps: &[Step]) -> Result<(), String> {
    let mut world = world();
    let mut model = Reference::new();
    for step in steps {
        // Until somebody reads the whole mailbox, a crash leaves both the one in flight and its successor.
        if matches!(step, Step::Crash(_)) && model.has_superseded() {
            continue;
        }
        world.step(step)?;
        let mut told: Vec<String> = world.effects.iter().filter_map(text).collect();
        world.step(&Step::Commit)?;
        told.extend(world.effects.iter().filter_map(text));
        let expected = model.step(step);
        compare(&told, &expected).map_err(|why| {
            let expected: Vec<&str> = expected.iter().map(|line| line.text.as_str()).collect();
            format!("at `{step}` {why}\n  core:  {told:?}\n  model: {expected:?}")
        })?;
    }
    world.settle()
}

fn compare(told: &[String], expected: &[Line]) -> Result<(), String> {
    let mut left: Vec<&str> = told.iter().map(String::as_str).collect();
    for line in expected {
        let (plain, again) = (line.text.clone(), format!("{} redelivered", line.text));
        let found = left.iter().position(|told| match line.redelivered {
            Redelivered::No => *told == plain,
            Redelivered::Yes if plain.starts_with("send ") => *told == again,
            Redelivered::Yes => *told == plain,
            Redelivered::Either => *told == plain || *told == again,
        });
        match found {
            Some(at) => {
                left.remove(at);
            }
            None if line.optional => {}
            None => return Err(format!("`{plain}` is missing")),
        }
    }
    match left.first() {
        Some(told) => Err(format!("`{told}` is too much")),
        None => Ok(()),
    }
}

/// An effect in the language of the tables; `None` for what is the core's own affair: reads, and things to count.
fn text(effect: &Effect) -> Option<String> {
    let named = |pings: &[PingId]| {
        let names: Vec<String> = pings.iter().map(|&ping| name(ping).to_string()).collect();
        names.join(",")
    };
    let sorted = |pings: &[PingId]| {
        let mut pings = pings.to_vec();
        pings.sort_unstable();
        named(&pings)
    };
    Some(match effect {
        Effect::Accepted { ticket, ping, .. } => format!("accepted t{} {}", ticket.0, name(*ping)),
        Effect::Ended {
            tickets,
            ping,
            outcome,
            at_ms,
            stored,
            ..
        } => {
            let tickets: Vec<String> = tickets.iter().map(|t| format!("t{}", t.0)).collect();
            format!(
                "ended [{}] {} {} @{}ms{}",
                tickets.join(","),
                name(*ping),
                outcome.as_str(),
                at_ms.wrapping_sub(START_MS),
                if *stored { " stored" } else { "" }
            )
        }
        Effect::Rejected {
            ticket, ping, why, ..
        } => format!("rejected t{} {} {why:?}", ticket.0, name(*ping)),
        Effect::RevokeAnswered { ticket, revoked } => format!("revoke t{} {revoked}", ticket.0),
        Effect::Wiped {
            ticket, revoked, ..
        } => format!("wiped t{} {revoked}", ticket.0),
        Effect::Cleared {
            ticket, revoked, ..
        } => format!("cleared t{} {revoked}", ticket.0),
        Effect::Welcome {
            session,
            pending,
            window,
        } => format!("welcome s{} pending={pending} window={window}", session.0),
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
        Effect::Withdraw { session, pings } => {
            format!("withdraw s{} {}", session.0, sorted(pings))
        }
        Effect::Close { session, why } => format!("close s{} {why:?}", session.0),
        Effect::Read(_)
        | Effect::Fetch { .. }
        | Effect::WithdrawalsHeard { .. }
        | Effect::Noticed(_) => return None,
    })
}
