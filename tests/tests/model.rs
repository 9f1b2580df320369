//! The delivery core against a naive model, over random histories.

use bellwire_tests::model::{history, storm};

#[test]
fn whatever_is_late_fails_or_dies_no_promise_is_broken() {
    history::check(0..20_000, storm::make, storm::play);
}
