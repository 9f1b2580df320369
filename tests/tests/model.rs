//! The delivery core against a naive model, over random histories.

use bellwire_tests::model::{history, lockstep, storm};

/// How many histories are played; `BELLWIRE_MODEL_SEEDS` says otherwise.
fn seeds() -> u64 {
    let said = std::env::var("BELLWIRE_MODEL_SEEDS").ok();
    said.and_then(|seeds| seeds.parse().ok()).unwrap_or(20_000)
}

#[test]
fn whatever_is_late_fails_or_dies_no_promise_is_broken() {
    history::check(0..seeds(), storm::make, storm::play);
}

#[test]
fn in_quiet_times_the_core_does_word_for_word_what_a_naive_model_says() {
    history::check(0..seeds(), lockstep::make, lockstep::play);
}
