//! A bounded cache in two generations: what is not asked for while one generation fills is forgotten.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::Hash;

/// At most twice `weight_max` in all; a look-up is at most two of a hash map, and there is no list to keep.
pub(super) struct Generations<K, V> {
    young: HashMap<K, (V, usize)>,
    old: HashMap<K, (V, usize)>,
    /// Of the young ones.
    weight: usize,
    weight_max: usize,
}

impl<K: Hash + Eq, V: Clone> Generations<K, V> {
    /// An empty cache whose generations weigh at most so much.
    pub(super) fn new(weight_max: usize) -> Generations<K, V> {
        Generations {
            young: HashMap::new(),
            old: HashMap::new(),
            weight: 0,
            weight_max,
        }
    }

    /// The value of `key`; it counts as young again.
    pub(super) fn get<Q>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        if let Some((value, _)) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, (value, weight)) = self.old.remove_entry(key)?;
        self.insert(key, value.clone(), weight);
        Some(value)
    }

    /// Remembers a value. One that is heavier than a generation is not kept.
    pub(super) fn insert(&mut self, key: K, value: V, weight: usize) {
        self.remove(&key);
        if weight > self.weight_max {
            return;
        }
        if self.weight + weight > self.weight_max {
            self.old = std::mem::take(&mut self.young);
            self.weight = 0;
        }
        self.weight += weight;
        self.young.insert(key, (value, weight));
    }

    /// Forgets a value.
    pub(super) fn remove<Q>(&mut self, key: &Q)
    where
        K: Borrow<Q>,
        Q: Hash + Eq + ?Sized,
    {
        if let Some((_, weight)) = self.young.remove(key) {
            self.weight -= weight;
        }
        self.old.remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_survives_and_the_rest_is_forgotten() {
        let mut cache = Generations::new(3);
        cache.insert(0, 'a', 1);
        for key in 1..100 {
            cache.insert(key, 'x', 1);
            assert_eq!(cache.get(&0), Some('a'));
            assert!(cache.young.len() + cache.old.len() <= 6);
        }
        assert_eq!(cache.get(&1), None);
    }

    #[test]
    fn a_removed_value_is_gone_from_both_generations() {
        let mut cache = Generations::new(2);
        for key in 0..3 {
            cache.insert(key, key, 1);
        }
        for key in 0..3 {
            cache.remove(&key);
            assert_eq!(cache.get(&key), None);
        }
        assert_eq!(cache.weight, 0);
    }

    #[test]
    fn a_value_heavier_than_a_generation_is_not_kept() {
        let mut cache = Generations::new(2);
        cache.insert(1, 'a', 3);
        assert_eq!(cache.get(&1), None);
    }
}
