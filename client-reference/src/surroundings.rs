//! What happens around the client: the machine sleeps and wakes, and moves from network to network.

use std::time::Duration;

use crate::clock::{Clock, NextLook};
use crate::network::{self, Place};

/// Who says on which network the device is.
#[derive(Debug)]
enum Naming {
    /// The app.
    App(String),
    /// The system's tables.
    System(Place),
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Change {
    /// The machine woke up; so long it slept.
    pub(crate) slept: Option<Duration>,
    /// Connections of before use an address that is gone, or a way that is.
    pub(crate) moved: bool,
}

/// Knows where the device is, and notices what changes.
#[derive(Debug)]
pub(crate) struct Surroundings {
    naming: Naming,
    slept_ms: u64,
    /// There was a way out, and now there is none. Nothing is tried until there is one again.
    cut_off: bool,
    next_look: NextLook,
}

impl Surroundings {
    /// `name`: the app names networks; otherwise they are told apart by the system's tables.
    pub(crate) fn new(name: Option<String>, clock: &Clock) -> Self {
        let naming = match name {
            Some(name) => Naming::App(name),
            None => Naming::System(network::look()),
        };
        Self {
            naming,
            slept_ms: clock.slept_ms(),
            cut_off: false,
            next_look: clock.first_look(),
        }
    }

    /// Name of the network that the device is on.
    pub(crate) fn network(&self) -> &str {
        match &self.naming {
            Naming::App(name) => name,
            Naming::System(place) => &place.name,
        }
    }

    /// Tells networks and addresses apart within this run.
    pub(crate) fn mark(&self) -> u64 {
        match &self.naming {
            Naming::App(_) => 0,
            Naming::System(place) => place.mark,
        }
    }

    /// The app says that the network changed, perhaps how it is called.
    pub(crate) fn told(&mut self, name: Option<String>) {
        match (name, &mut self.naming) {
            (Some(name), naming) => *naming = Naming::App(name),
            (None, Naming::System(place)) => *place = network::look(),
            (None, Naming::App(_)) => {}
        }
    }

    /// A new link: which network does it stand on? The neighbours are known best just now.
    pub(crate) fn look(&mut self) {
        if let Naming::System(place) = &mut self.naming {
            *place = network::look();
        }
    }

    /// Waits for a change; may be dropped without losing one.
    pub(crate) async fn change(&mut self, clock: &Clock) -> Change {
        loop {
            clock.look_again(&mut self.next_look).await;
            let found = match &self.naming {
                Naming::App(_) => None,
                Naming::System(_) => Some(network::look()),
            };
            if let Some(change) = self.compare(found, clock.slept_ms()) {
                return change;
            }
        }
    }

    fn compare(&mut self, found: Option<Place>, slept_ms: u64) -> Option<Change> {
        let mut moved = false;
        if let (Naming::System(place), Some(found)) = (&mut self.naming, found) {
            if place.way_out && !found.way_out {
                self.cut_off = true;
                return None;
            }
            // The name alone may change when a neighbour is forgotten; that breaks no connection.
            moved = found.mark != place.mark || self.cut_off;
            self.cut_off = false;
            if moved {
                *place = found;
            }
        }
        let now_slept = slept_ms.saturating_sub(self.slept_ms);
        let slept = Clock::is_sleep(now_slept).then(|| Duration::from_millis(now_slept));
        if slept.is_some() {
            self.slept_ms = slept_ms;
        }
        (slept.is_some() || moved).then_some(Change { slept, moved })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(mark: u64, way_out: bool) -> Place {
        Place {
            name: "here".to_owned(),
            mark,
            way_out,
        }
    }

    fn surroundings(place: Place) -> Surroundings {
        Surroundings {
            naming: Naming::System(place),
            slept_ms: 0,
            cut_off: false,
            next_look: NextLook::default(),
        }
    }

    const MOVED: Option<Change> = Some(Change {
        slept: None,
        moved: true,
    });

    #[test]
    fn a_new_address_is_a_move_and_a_machine_without_any_way_out_waits_for_one() {
        let mut here = surroundings(place(1, true));
        assert_eq!(here.compare(Some(place(1, true)), 0), None);
        assert_eq!(here.compare(Some(place(2, true)), 0), MOVED);
        assert_eq!(here.compare(Some(place(2, true)), 0), None);
        // Out of reach, and back at the same place: connections may be gone all the same.
        assert_eq!(here.compare(Some(place(9, false)), 0), None);
        assert_eq!(here.compare(Some(place(9, false)), 60_000), None);
        let back = here.compare(Some(place(2, true)), 60_000);
        assert_eq!(
            back,
            Some(Change {
                slept: Some(Duration::from_secs(60)),
                moved: true
            })
        );
        assert_eq!(here.compare(Some(place(2, true)), 60_000), None);
    }

    #[test]
    fn a_machine_that_never_had_a_way_out_still_wakes_up() {
        let mut here = surroundings(place(1, false));
        assert_eq!(here.compare(Some(place(1, false)), 1_000), None);
        let woke = here.compare(Some(place(1, false)), 9_000);
        assert_eq!(
            woke,
            Some(Change {
                slept: Some(Duration::from_secs(9)),
                moved: false
            })
        );
    }
}
