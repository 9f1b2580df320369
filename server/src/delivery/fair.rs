//! Turns between apps: who has much to do waits behind its own work, and nobody else does.
//!
//! Each app has a lane. A lane is served while it has credit; what is served is charged; a lane without credit is given
//! [`FairQueue::new`]'s quantum and lets the next one go first (deficit round robin, charged afterwards, because the cost of
//! a mailbox is known once it was sealed). So between two lanes that both have work, what they were served never differs by more than a
//! quantum and one piece of work, however long the queue of either is. Within a lane the order is that of arrival.

use std::collections::{BTreeMap, VecDeque};

use super::ids::AppId;

/// Work of several apps, served in turns. Nothing is allocated or remembered for an app without work once its debt is paid.
#[derive(Debug)]
pub struct FairQueue<T> {
    lanes: BTreeMap<AppId, Lane<T>>,
    /// Whose turn it is, and who comes next. Every lane is here once.
    ring: VecDeque<AppId>,
    /// Pieces of work in all lanes.
    len: usize,
    quantum: i64,
}

#[derive(Debug)]
struct Lane<T> {
    items: VecDeque<T>,
    /// What may be served before others have their turn; negative: what was served ahead of it.
    credit: i64,
}

impl<T> FairQueue<T> {
    /// An empty queue. `quantum`: what one app is served before the next has its turn, in the unit of
    /// [`FairQueue::charge`]; at least 1.
    #[must_use]
    pub fn new(quantum: u32) -> FairQueue<T> {
        FairQueue {
            lanes: BTreeMap::new(),
            ring: VecDeque::new(),
            len: 0,
            quantum: i64::from(quantum.max(1)),
        }
    }

    /// Adds work of an app behind what it has.
    pub fn push(&mut self, app: AppId, item: T) {
        self.len += 1;
        match self.lanes.get_mut(&app) {
            Some(lane) => lane.items.push_back(item),
            None => {
                let lane = Lane {
                    items: VecDeque::from([item]),
                    credit: 0,
                };
                self.lanes.insert(app, lane);
                self.ring.push_back(app);
            }
        }
    }

    /// The next piece of work and whose it is, charged with 1; what it costs beyond that is to be
    /// [charged](FairQueue::charge).
    pub fn pop(&mut self) -> Option<(AppId, T)> {
        if self.len == 0 {
            // Nobody waits, so nobody is owed a turn.
            self.lanes.clear();
            self.ring.clear();
            return None;
        }
        loop {
            let app = *self.ring.front()?;
            let Some(lane) = self.lanes.get_mut(&app) else {
                self.ring.pop_front();
                continue;
            };
            if lane.credit <= 0 {
                lane.credit = lane.credit.saturating_add(self.quantum);
                self.ring.rotate_left(1);
                continue;
            }
            if let Some(item) = lane.items.pop_front() {
                lane.credit -= 1;
                self.len -= 1;
                return Some((app, item));
            }
            // Credit is for work that waits, not for later.
            self.lanes.remove(&app);
            self.ring.pop_front();
        }
    }

    /// Takes out what `keep` says no to. Turns and debts stay as they are.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for lane in self.lanes.values_mut() {
            let before = lane.items.len();
            lane.items.retain(&mut keep);
            self.len -= before - lane.items.len();
        }
    }

    /// What was served to an app cost so much more than 1.
    pub fn charge(&mut self, app: AppId, cost: u64) {
        if let Some(lane) = self.lanes.get_mut(&app) {
            let cost = i64::try_from(cost).unwrap_or(i64::MAX);
            lane.credit = lane.credit.saturating_sub(cost);
        }
    }

    /// Pieces of work that wait.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: AppId = AppId(1);
    const B: AppId = AppId(2);
    const C: AppId = AppId(3);

    fn served(queue: &mut FairQueue<u32>, cost: impl Fn(AppId) -> u64, count: usize) -> Vec<AppId> {
        let mut served = Vec::new();
        for _ in 0..count {
            let Some((app, _)) = queue.pop() else { break };
            queue.charge(app, cost(app) - 1);
            served.push(app);
        }
        served
    }

    #[test]
    fn an_app_alone_is_served_in_its_order_whatever_it_costs() {
        let mut queue = FairQueue::new(4);
        for number in 0..1_000 {
            queue.push(A, number);
        }
        for number in 0..1_000 {
            assert_eq!(queue.pop(), Some((A, number)));
            queue.charge(A, 1_000_000);
        }
        assert_eq!(queue.pop(), None);
        assert!(queue.lanes.is_empty() && queue.ring.is_empty());
    }

    #[test]
    fn a_flood_of_one_app_costs_another_one_turn() {
        let mut queue = FairQueue::new(8);
        for number in 0..100_000 {
            queue.push(A, number);
        }
        assert_eq!(served(&mut queue, |_| 1, 1_000).len(), 1_000);
        for number in 0..20 {
            queue.push(B, number);
        }
        let turn = served(&mut queue, |_| 1, 60);
        let place = |nth: usize| {
            let places = turn.iter().enumerate().filter(|(_, app)| **app == B);
            places.map(|(place, _)| place).nth(nth)
        };
        // The first within a turn of the other, all twenty within three.
        assert!(place(0).is_some_and(|place| place <= 8), "{turn:?}");
        assert!(
            place(19).is_some_and(|place| place < 20 + 3 * 8),
            "{turn:?}"
        );
    }

    #[test]
    fn what_is_taken_out_is_neither_served_nor_counted() {
        let mut queue = FairQueue::new(2);
        for number in 0..100 {
            queue.push(A, number);
            queue.push(B, number);
        }
        queue.push(C, 1);
        queue.retain(|number| number % 10 == 0);
        assert_eq!(queue.len(), 20);
        let served = served(&mut queue, |_| 1, 100);
        assert_eq!(served.iter().filter(|app| **app == A).count(), 10);
        assert_eq!(served.len(), 20);
        assert!(queue.is_empty() && queue.pop().is_none());
    }

    #[test]
    fn whoever_sends_larger_ones_is_served_fewer() {
        let mut queue = FairQueue::new(100);
        for number in 0..10_000 {
            queue.push(A, number);
            queue.push(B, number);
            queue.push(C, number);
        }
        let cost = |app| match app {
            A => 1_000,
            B => 100,
            _ => 10,
        };
        let mut spent = BTreeMap::<AppId, u64>::new();
        for app in served(&mut queue, cost, 3_000) {
            *spent.entry(app).or_default() += cost(app);
        }
        let (least, most) = (spent.values().min().copied(), spent.values().max().copied());
        assert!(
            most.zip(least)
                .is_some_and(|(most, least)| most - least <= 100 + 1_000),
            "{spent:?}"
        );
    }

    #[test]
    fn whoever_was_served_ahead_waits_for_it_even_if_it_comes_and_goes() {
        let mut queue = FairQueue::new(10);
        for number in 0..1_000 {
            queue.push(B, number);
        }
        let mut spent = (0, 0);
        for number in 0..400 {
            // Never two at the same time, each as dear as ten turns.
            if queue.lanes.get(&A).is_none_or(|lane| lane.items.is_empty()) {
                queue.push(A, number);
            }
            let Some((app, _)) = queue.pop() else { break };
            if app == A {
                queue.charge(A, 99);
                spent.0 += 100;
            } else {
                spent.1 += 1;
            }
        }
        assert!(spent.0 <= spent.1 + 100 + 10, "{spent:?}");
    }
}
