//! Answers from the history.
//!
//! A position is the number of a segment and a place in it. Records are only ever added at the end and dropped a segment at a
//! time from the beginning, so a walk in either direction meets each record that stays exactly once, however many come
//! or go meanwhile.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::sync::Arc;

use super::follow::{parts, position};
use super::format::{Slot, prefix};
use super::segment::{CHUNK, Found, Kind, PAGE_COST, Segment};
use crate::delivery::{AppId, DeviceId, PingId};
use crate::ports::{OutcomeOrder, OutcomePage, OutcomeQuery, OutcomeRecord};
use crate::store::log::disk::Disk;

/// Most records that one call looks at: 4 MiB of them, some ten milliseconds.
pub(super) const LOOKS_MAX: usize = 65_536;
/// Most records of segments without an index that a look at a ping reads: 64 MiB of them, four whole segments. There are more
/// only while a start makes indexes that were lost.
pub(super) const UNINDEXED_MAX: u64 = if cfg!(test) { 4_096 } else { 1_048_576 };
/// For more devices than this the records of the open segment are read, instead of its keys once for each.
const OPEN_WALKS_MAX: usize = 16;
/// Places that an index is asked for at once, over all devices.
const PLACES_AT_ONCE: usize = 4_096;

/// A listing under way.
struct Listing<'a> {
    disk: &'a dyn Disk,
    query: &'a OutcomeQuery,
    devices: Option<HashSet<DeviceId>>,
    looks_left: usize,
    page: OutcomePage,
}

/// The records that fit a query, from segments by rising number.
pub(super) fn list(
    disk: &dyn Disk,
    segments: &[Arc<Segment>],
    query: &OutcomeQuery,
) -> io::Result<OutcomePage> {
    let mut listing = Listing {
        disk,
        query,
        devices: query
            .devices
            .as_ref()
            .map(|devices| devices.iter().copied().collect()),
        looks_left: LOOKS_MAX,
        page: OutcomePage::default(),
    };
    let start = query.start.map(parts);
    match query.order {
        OutcomeOrder::OldestFirst => {
            let (number, place) = start.unwrap_or((0, 0));
            for segment in segments.iter().filter(|segment| segment.number >= number) {
                let place = if segment.number == number { place } else { 0 };
                if !listing.segment(segment, place)? {
                    break;
                }
            }
        }
        OutcomeOrder::NewestFirst => {
            let (number, place) = start.unwrap_or((u32::MAX, u32::MAX));
            for segment in segments
                .iter()
                .rev()
                .filter(|segment| segment.number <= number)
            {
                let Some(last) = segment.length().checked_sub(1) else {
                    continue;
                };
                let place = if segment.number == number {
                    place.min(last)
                } else {
                    last
                };
                if !listing.segment(segment, place)? {
                    break;
                }
            }
        }
    }
    Ok(listing.page)
}

impl Listing<'_> {
    /// Adds what fits of one segment, from a place on. `false`: the page is complete. What the disk does not give is left out.
    fn segment(&mut self, segment: &Segment, start: u32) -> io::Result<bool> {
        self.walk(segment, start)
            .or_else(|error| segment.skip(error).map(|()| true))
    }

    fn walk(&mut self, segment: &Segment, start: u32) -> io::Result<bool> {
        if !segment.may_hold(self.query.from_ms, self.query.to_ms) {
            return Ok(true);
        }
        // Opening files is not free.
        if !self.look(PAGE_COST) {
            return Ok(self.stop(segment, start));
        }
        let open = matches!(segment.kind, Kind::Open(_));
        let asks = |devices: &&Vec<DeviceId>| !open || devices.len() <= OPEN_WALKS_MAX;
        if let Some(devices) = self.query.devices.as_ref().filter(asks) {
            let devices = devices.clone();
            match self.indexed(segment, &devices, start)? {
                Walked::Through => return Ok(true),
                Walked::Complete => return Ok(false),
                Walked::Unindexed(at) => return self.scan(segment, at),
            }
        }
        self.scan(segment, start)
    }

    /// Counts what is looked at; `false`: enough for one call.
    fn look(&mut self, cost: usize) -> bool {
        let enough = self.looks_left == 0;
        self.looks_left = self.looks_left.saturating_sub(cost);
        !enough
    }

    /// The page ends before this place.
    fn stop(&mut self, segment: &Segment, place: u32) -> bool {
        self.page.next = Some(position(segment.number, place));
        false
    }

    fn fits(&self, record: &OutcomeRecord) -> bool {
        let query = self.query;
        record.app == query.app
            && query
                .outcome
                .is_none_or(|outcome| record.outcome == outcome)
            && (query.from_ms..query.to_ms).contains(&record.at_ms)
            && self
                .devices
                .as_ref()
                .is_none_or(|devices| devices.contains(&record.device))
    }

    /// Adds a record if it fits; `false`: the page was full, and the next one begins here.
    fn add(&mut self, segment: &Segment, place: u32, record: OutcomeRecord) -> bool {
        if !self.fits(&record) {
            return true;
        }
        if self.page.items.len() >= self.query.limit {
            return self.stop(segment, place);
        }
        self.page.items.push(record);
        true
    }

    /// Reads every record from a place on.
    fn scan(&mut self, segment: &Segment, start: u32) -> io::Result<bool> {
        let Some(mut records) = segment.records_of(self.disk)? else {
            return Ok(true);
        };
        let length = segment.length();
        let mut at = start;
        while at < length {
            let (first, count) = match self.query.order {
                OutcomeOrder::OldestFirst => (at, CHUNK.min(length - at)),
                OutcomeOrder::NewestFirst => {
                    let count = CHUNK.min(at + 1);
                    (at + 1 - count, count)
                }
            };
            if !self.look(count as usize) {
                return Ok(self.stop(segment, at));
            }
            let mut slots: Vec<(u32, Slot)> = (first..).zip(records.some(first, count)?).collect();
            if self.query.order == OutcomeOrder::NewestFirst {
                slots.reverse();
            }
            for (place, slot) in slots {
                match slot {
                    Slot::Record(record) => {
                        if !self.add(segment, place, record) {
                            return Ok(false);
                        }
                    }
                    Slot::Empty | Slot::Missing { .. } => {}
                    Slot::Rotten => records.rotten(place),
                }
            }
            match self.query.order {
                OutcomeOrder::OldestFirst => at = first + count,
                OutcomeOrder::NewestFirst => match first.checked_sub(1) {
                    Some(below) => at = below,
                    None => break,
                },
            }
        }
        Ok(true)
    }

    /// Reads the records that the index names for the devices.
    fn indexed(
        &mut self,
        segment: &Segment,
        devices: &[DeviceId],
        start: u32,
    ) -> io::Result<Walked> {
        let Some(mut records) = segment.records_of(self.disk)? else {
            return Ok(Walked::Through);
        };
        let order = self.query.order;
        let most = (PLACES_AT_ONCE / devices.len().max(1))
            .min(self.query.limit.saturating_add(1))
            .max(16);
        let mut at = start;
        loop {
            let mut places = BTreeSet::new();
            // Beyond it not every device was asked.
            let mut edge = None;
            for device in devices {
                let mut cost = 0;
                let found = segment.of_device(self.disk, *device, order, at, most, &mut cost)?;
                self.look(cost);
                let Found::Places(found) = found else {
                    return Ok(Walked::Unindexed(at));
                };
                if found.len() >= most
                    && let Some(last) = found.last().copied()
                {
                    edge = Some(edge.map_or(last, |edge: u32| match order {
                        OutcomeOrder::OldestFirst => edge.min(last),
                        OutcomeOrder::NewestFirst => edge.max(last),
                    }));
                }
                places.extend(found);
            }
            let within = |place: &u32| match (edge, order) {
                (None, _) => true,
                (Some(edge), OutcomeOrder::OldestFirst) => *place <= edge,
                (Some(edge), OutcomeOrder::NewestFirst) => *place >= edge,
            };
            let mut places: Vec<u32> = places.into_iter().filter(within).collect();
            if order == OutcomeOrder::NewestFirst {
                places.reverse();
            }
            for place in places {
                if !self.look(1) {
                    self.stop(segment, place);
                    return Ok(Walked::Complete);
                }
                if let Some(record) = records.one(place)?
                    && !self.add(segment, place, record)
                {
                    return Ok(Walked::Complete);
                }
            }
            let Some(edge) = edge else {
                return Ok(Walked::Through);
            };
            match order {
                OutcomeOrder::OldestFirst => at = edge + 1,
                OutcomeOrder::NewestFirst => match edge.checked_sub(1) {
                    Some(below) => at = below,
                    None => return Ok(Walked::Through),
                },
            }
            if self.looks_left == 0 {
                self.stop(segment, at);
                return Ok(Walked::Complete);
            }
        }
    }
}

enum Walked {
    /// The segment has no more.
    Through,
    /// The page is complete.
    Complete,
    /// There is no index; to be read from this place on.
    Unindexed(u32),
}

/// What is known of a ping, from segments by rising number: its records by device, those after `after`, at most `limit`. The
/// first verdict wins. What the disk does not give is left out.
///
/// # Errors
/// `WouldBlock`: too much of the history has no index at the moment.
pub(super) fn of_ping(
    disk: &dyn Disk,
    segments: &[Arc<Segment>],
    app: AppId,
    ping: PingId,
    from_ms: u64,
    after: Option<DeviceId>,
    limit: usize,
) -> io::Result<Vec<OutcomeRecord>> {
    let mut known: BTreeMap<DeviceId, OutcomeRecord> = BTreeMap::new();
    let add = |known: &mut BTreeMap<DeviceId, OutcomeRecord>, record: OutcomeRecord| {
        let fits = record.app == app
            && record.ping == ping
            && record.at_ms >= from_ms
            && after.is_none_or(|after| record.device > after);
        if fits {
            known.entry(record.device).or_insert(record);
            if known.len() > limit {
                known.pop_last();
            }
        }
        fits
    };
    let mut unindexed = 0;
    let mut look = |segment: &Segment| -> io::Result<()> {
        if !segment.may_hold(from_ms, u64::MAX) {
            return Ok(());
        }
        let places = segment.of_ping(disk, ping)?;
        if let Found::Places(places) = &places
            && places.is_empty()
        {
            return Ok(());
        }
        let Some(mut records) = segment.records_of(disk)? else {
            return Ok(());
        };
        match places {
            Found::Places(places) => {
                let first = match after {
                    Some(after) => first_from(&mut records, &places, prefix(after.0))?,
                    None => 0,
                };
                let mut found = 0;
                let mut last = None;
                for place in places.iter().skip(first) {
                    let Some(record) = records.one(*place)? else {
                        continue;
                    };
                    let key = prefix(record.device.0);
                    // Devices whose ids begin alike stand in no order.
                    if found >= limit && last != Some(key) {
                        break;
                    }
                    if add(&mut known, record) && last != Some(key) {
                        found += 1;
                        last = Some(key);
                    }
                }
            }
            Found::Unindexed => {
                let length = segment.length();
                unindexed += u64::from(length);
                if unindexed > UNINDEXED_MAX {
                    return Err(io::Error::new(
                        io::ErrorKind::WouldBlock,
                        "indexes of outcomes are being made again",
                    ));
                }
                let mut first = 0;
                while first < length {
                    let count = CHUNK.min(length - first);
                    for slot in records.some(first, count)? {
                        if let Slot::Record(record) = slot {
                            add(&mut known, record);
                        }
                    }
                    first += count;
                }
            }
        }
        Ok(())
    };
    for segment in segments {
        match look(segment) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(error),
            Err(error) => segment.skip(error)?,
            Ok(()) => {}
        }
    }
    Ok(known.into_values().collect())
}

/// Among places by the beginning of the device's id, the first whose device begins with `key` or more.
fn first_from(
    records: &mut super::segment::Records<'_>,
    places: &[u32],
    key: u64,
) -> io::Result<usize> {
    let (mut low, mut high) = (0, places.len());
    while low < high {
        let middle = low + (high - low) / 2;
        let Some(record) = records.one(places[middle])? else {
            // What cannot be read cannot be compared: from the beginning then.
            return Ok(0);
        };
        if prefix(record.device.0) < key {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Ok(low)
}
