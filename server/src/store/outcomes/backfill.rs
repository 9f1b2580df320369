//! Filling the history from the engine, for a store that had none.

use std::io;
use std::sync::{Arc, PoisonError};

use super::{BACKFILL_MAX, EnginePage, History, SLACK_MS, query};
use crate::delivery::DeviceId;
use crate::ports::OutcomeRecord;
use crate::store::outcomes::segment::Segment;

impl History {
    /// Writes again what the engine knows and the history lost: the outcomes of stored notifications of earlier runs that
    /// ended since shortly before the last record. `page` reads what ended at a time or later, from a cursor on.
    /// Between pages the writer takes its turn.
    pub(in crate::store) fn backfill<C>(
        &self,
        mut page: impl FnMut(u64, Option<C>) -> Result<EnginePage<C>, String>,
    ) {
        // With an index a look is cheap.
        let wanting = || {
            let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            self.wanting(&writing).map(|segment| segment.number)
        };
        let mut wanted = wanting();
        while let Some(number) = wanted {
            self.turn();
            // One that is still to be made cannot be made now.
            wanted = wanting().filter(|next| *next != number);
        }
        let segments = self.list();
        let last_ms = segments
            .iter()
            .rev()
            .filter_map(|segment| segment.span())
            .map(|(_, latest)| latest)
            .filter(|latest| *latest < self.begun_ms)
            .max();
        let from_ms = last_ms
            .map_or(0, |last| last.saturating_sub(SLACK_MS))
            .max(self.told_since_ms());
        let segments: Vec<_> = segments
            .into_iter()
            .filter(|segment| segment.may_hold(from_ms, u64::MAX))
            .collect();
        let (mut looked, mut added, mut cursor) = (0, 0u64, None);
        loop {
            let (records, next) = match page(from_ms, cursor.take()) {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(error, "outcomes that the history lost could not be read");
                    break;
                }
            };
            looked += records.len();
            let earlier = records
                .iter()
                .take_while(|record| record.at_ms < self.begun_ms)
                .count();
            let mut missing = Vec::new();
            for record in &records[..earlier] {
                match self.has(&segments, record) {
                    Ok(true) => {}
                    Ok(false) => missing.push(*record),
                    Err(error) => {
                        tracing::warn!(%error, "outcomes could not be compared with their history");
                        return;
                    }
                }
            }
            added += missing.len() as u64;
            self.record(&mut missing);
            let over = earlier < records.len() || next.is_none();
            if over || self.queue().closing {
                break;
            }
            if looked >= BACKFILL_MAX {
                tracing::warn!(
                    looked,
                    "the history of outcomes lost more than is written again at a start"
                );
                break;
            }
            self.turn();
            cursor = next;
        }
        if added > 0 {
            tracing::info!(
                added,
                "outcomes of an earlier run were written again to the history"
            );
        }
    }

    fn has(&self, segments: &[Arc<Segment>], record: &OutcomeRecord) -> io::Result<bool> {
        // From right before the device on, the first one is it or it is not there.
        let before = u128::from_be_bytes(record.device.0).checked_sub(1);
        let after = before.map(|before| DeviceId(before.to_be_bytes()));
        let (app, ping) = (record.app, record.ping);
        let first = query::of_ping(&*self.disk, segments, app, ping, 0, after, 1)?;
        Ok(first
            .first()
            .is_some_and(|first| first.device == record.device))
    }
}
