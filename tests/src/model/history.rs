//! Histories: making them from a seed, playing them, and cutting down those that fail.

use std::fmt::Write as _;
use std::panic::{self, AssertUnwindSafe};

use super::step::Step;

/// How a history is played: `Err` says what went wrong.
pub type Play = fn(&[Step]) -> Result<(), String>;

/// Plays a history; a panic of the core is a way to fail.
pub fn play(how: Play, steps: &[Step]) -> Result<(), String> {
    panic::catch_unwind(AssertUnwindSafe(|| how(steps))).unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied());
        Err(format!("panicked: {}", text.unwrap_or("with something")))
    })
}

/// Drops steps as long as what is left still fails, and tells the rest with what goes wrong.
#[must_use]
pub fn shrink(how: Play, steps: Vec<Step>) -> (Vec<Step>, String) {
    let hook = panic::take_hook();
    // Hundreds of the same panic would bury the result.
    panic::set_hook(Box::new(|_| {}));
    let mut steps = steps;
    let mut failure = play(how, &steps).err().unwrap_or_default();
    let mut size = steps.len() / 2;
    while size > 0 {
        let mut at = 0;
        let mut dropped = false;
        while at + size <= steps.len() {
            let mut fewer = steps.clone();
            fewer.drain(at..at + size);
            match play(how, &fewer) {
                Err(why) => {
                    steps = fewer;
                    failure = why;
                    dropped = true;
                }
                Ok(()) => at += 1,
            }
        }
        if !(dropped && size == 1) {
            size /= 2;
        }
    }
    panic::set_hook(hook);
    (steps, failure)
}

/// A failed history for people: the seed, what went wrong, and the fewest steps, ready for a table.
#[must_use]
pub fn tell(seed: u64, how: Play, steps: Vec<Step>) -> String {
    let (steps, failure) = shrink(how, steps);
    let mut text = format!("seed {seed}: {failure}\n\n");
    for step in steps {
        let _ = writeln!(text, "{step}");
    }
    text
}

/// Plays a history for each seed.
///
/// # Panics
/// On the first that fails, with its fewest steps.
pub fn check(seeds: std::ops::Range<u64>, make: fn(u64) -> Vec<Step>, how: Play) {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let failed = seeds
        .into_iter()
        .map(|seed| (seed, make(seed)))
        .find(|(_, steps)| play(how, steps).is_err());
    panic::set_hook(hook);
    if let Some((seed, steps)) = failed {
        panic!("{}", tell(seed, how, steps));
    }
}
