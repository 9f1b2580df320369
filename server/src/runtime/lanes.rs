//! What a shard was told and has not done yet: what publishers asked for, by app in turns, and everything else.
//!
//! One call can address a thousand devices, and one batch can have hundreds of such calls under way. The notifications of one app
//! wait behind each other, never behind all of another's. What links and the house itself say is bounded by
//! devices and windows, so it has a queue of its own that no publisher can make longer.
//!
//! Within an app everything is done in the order in which it came: a ping before the revocation that
//! means it, and before the device that it was for changes hands. Between apps, and between publishers and links, nobody is promised an order.

use std::collections::VecDeque;

use super::shard::{INBOX_KEEPS, Input, TURN_INPUTS};
use crate::delivery::FairQueue;

/// Notifications of one app before another has its turn: the work of some ten microseconds.
const QUANTUM: u32 = 32;

/// See the head of this file.
pub(super) struct Lanes {
    /// Of links and of the house, or everything while it fits into one turn.
    first: VecDeque<Input>,
    apps: FairQueue<Input>,
}

impl Lanes {
    pub(super) fn new() -> Lanes {
        Lanes {
            first: VecDeque::new(),
            apps: FairQueue::new(QUANTUM),
        }
    }

    /// Takes in everything that arrived, in its order.
    pub(super) fn take_in(&mut self, arrived: &mut VecDeque<Input>) {
        if self.is_empty()
            && arrived.len() <= TURN_INPUTS
            && arrived.iter().map(Input::cost).sum::<usize>() <= TURN_INPUTS
        {
            // All of it is done in this turn: nobody waits for anybody.
            std::mem::swap(&mut self.first, arrived);
            return;
        }
        for input in arrived.drain(..) {
            match input.publisher() {
                Some(app) => self.apps.push(app, input),
                None => self.first.push_back(input),
            }
        }
        if arrived.capacity() > INBOX_KEEPS {
            *arrived = VecDeque::new();
        }
    }

    /// The next one of links and of the house; `None` when their turn is over as well.
    pub(super) fn next_first(&mut self) -> Option<Input> {
        let next = self.first.pop_front();
        if next.is_none() && self.first.capacity() > INBOX_KEEPS {
            self.first = VecDeque::new();
        }
        next
    }

    /// The next one of a publisher.
    pub(super) fn next_of_apps(&mut self) -> Option<Input> {
        let (app, input) = self.apps.pop()?;
        self.apps.charge(app, (input.cost() - 1) as u64);
        Some(input)
    }

    pub(super) fn len(&self) -> usize {
        self.first.len() + self.apps.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.first.is_empty() && self.apps.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;
    use crate::delivery::{AppId, DeviceId, PingId, SessionId};

    fn asked(app: u32, number: u8) -> Input {
        let (answer, _) = oneshot::channel();
        Input::Revoke {
            app: AppId(app),
            device: DeviceId([number; 16]),
            ping: PingId([number; 16]),
            answer,
        }
    }

    fn left(number: u64) -> Input {
        Input::Detach {
            device: DeviceId([0; 16]),
            session: SessionId(number),
        }
    }

    /// One turn: what was done, as the app of each, 0 for a link.
    fn turn(lanes: &mut Lanes) -> Vec<u32> {
        let mut done = Vec::new();
        let app = |input: &Input| input.publisher().map_or(0, |app| app.0);
        while done.len() < TURN_INPUTS
            && let Some(input) = lanes.next_first()
        {
            done.push(app(&input));
        }
        let first = done.len();
        while done.len() < first + TURN_INPUTS
            && let Some(input) = lanes.next_of_apps()
        {
            done.push(app(&input));
        }
        done
    }

    #[test]
    fn what_fits_into_one_turn_is_done_as_it_came() {
        let mut lanes = Lanes::new();
        let mut arrived = VecDeque::from([asked(1, 1), left(1), asked(2, 1), left(2), asked(1, 2)]);
        lanes.take_in(&mut arrived);
        assert_eq!(turn(&mut lanes), [1, 0, 2, 0, 1]);
        assert!(lanes.is_empty());
    }

    #[test]
    fn a_flood_of_one_app_delays_no_other_app_and_no_link() {
        let mut lanes = Lanes::new();
        let mut arrived: VecDeque<Input> = (0..50_000).map(|_| asked(1, 0)).collect();
        lanes.take_in(&mut arrived);
        assert_eq!(turn(&mut lanes), vec![1; TURN_INPUTS]);
        arrived.extend((0..40).map(|number| asked(2, number)));
        arrived.push_back(left(1));
        lanes.take_in(&mut arrived);
        let done = turn(&mut lanes);
        assert_eq!(done[0], 0, "a link does not wait for publishers");
        assert_eq!(done.iter().filter(|app| **app == 2).count(), 40);
        assert_eq!(lanes.len(), 50_000 - 2 * TURN_INPUTS + 40);
    }

    #[test]
    fn what_is_let_go_costs_as_many_turns_as_it_has_devices() {
        let mut lanes = Lanes::new();
        let release = || Input::Release {
            app: AppId(1),
            ping: PingId([0; 16]),
            devices: vec![DeviceId([0; 16]); 32],
        };
        let mut arrived: VecDeque<Input> = (0..250).map(|_| release()).collect();
        arrived.extend((0..320).map(|_| asked(2, 0)));
        lanes.take_in(&mut arrived);
        // A piece of the one, then as many notifications of the other.
        let mut served = [0; 2];
        while served[1] < 320
            && let Some(input) = lanes.next_of_apps()
        {
            let place = usize::from(input.publisher() == Some(AppId(2)));
            served[place] += input.cost();
        }
        assert!(served[0] <= 320 + 64, "{served:?}");
    }

    #[test]
    fn an_app_keeps_its_order() {
        let mut lanes = Lanes::new();
        let mut arrived: VecDeque<Input> = (0..2_000u32)
            .map(|number| asked(1 + number % 2, u8::try_from(number / 2 % 256).unwrap_or(0)))
            .collect();
        lanes.take_in(&mut arrived);
        let mut next = [0u8; 2];
        while let Some(input) = lanes.next_of_apps() {
            if let Input::Revoke { app, device, .. } = input {
                let place = usize::from(app.0 == 2);
                assert_eq!(device.0[0], next[place]);
                next[place] = next[place].wrapping_add(1);
            }
        }
        assert!(lanes.is_empty());
    }
}
