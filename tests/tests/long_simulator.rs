//! Whole installations under every fault, thousands of seeds in every run.

use bellwire_tests::simulator::{Sabotage, check, run};

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// `BELLWIRE_SIM_SEED=n` replays one seed and tells what happens; `BELLWIRE_SIM_SEEDS=n` runs more or fewer.
#[test]
fn whatever_fails_nothing_accepted_is_lost_doubled_or_late() {
    if let Some(seed) = number("BELLWIRE_SIM_SEED") {
        match run(seed, Sabotage::None, true) {
            Ok(report) => return println!("{report:?}"),
            Err(objection) => panic!("seed {seed}: {objection}"),
        }
    }
    let (seeds, sum) = check(number("BELLWIRE_SIM_SEEDS").unwrap_or(10_000));
    println!("{seeds} seeds: {sum:?}");
    // A simulator in which nothing happens objects to nothing.
    assert!(sum.calls > 5 * seeds, "{sum:?}");
    assert!(u64::from(sum.crashes) > seeds / 2, "{sum:?}");
}

fn objects_to(sabotage: Sabotage) {
    let objections = (0..300).filter_map(|seed| run(seed, sabotage, false).err());
    let first = objections.take(1).last();
    println!("{sabotage:?}: {first:?}");
    assert!(first.is_some(), "nobody objects to {sabotage:?}");
}

#[test]
fn a_store_that_answers_before_it_syncs_is_found_out() {
    objects_to(Sabotage::AnswersBeforeSync);
}

#[test]
fn a_client_that_acknowledges_before_it_saves_is_found_out() {
    objects_to(Sabotage::AcknowledgesBeforeSaving);
}

#[test]
fn a_client_without_a_window_of_ids_is_found_out() {
    objects_to(Sabotage::ForgetsWhatItHad);
}
