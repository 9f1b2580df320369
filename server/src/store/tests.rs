//! The store as its callers see it: promises, crashes, broken disks, lost engines.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod applying;
mod backups;
mod committing;
mod crashes;
mod damages;
mod examining;
mod files;
pub(super) mod formats;
mod growing;
mod model;
mod mounted;
mod rebuilding;
mod resting;
mod restores;
mod schedules;
mod support;

use super::*;
use support::*;

#[test]
fn what_was_committed_is_read_back_with_either_engine() {
    for engine in [EngineKind::Memory, EngineKind::Sled, EngineKind::Fjall] {
        let dir = tempfile::tempdir().unwrap();
        let opened = open_at(dir.path(), engine);
        let device = device_id(1);
        let note = notification(ping_id(1), |note| note.collapse = key("score"));
        commit(&*opened.store, vec![register(device, "ada")]).unwrap();
        commit(
            &*opened.store,
            vec![insert(device, 1, &note), summary(device, 1, 5, 2)],
        )
        .unwrap();
        let mut store = opened.store;
        for round in 0..2 {
            if round > 0 {
                drop(store);
                let reopened = open_at(dir.path(), engine);
                assert_eq!(reopened.report.rebuilt, None);
                store = reopened.store;
            }
            let view = store.read_mailbox(&everything(device)).unwrap();
            assert_eq!(view.rows.len(), 1);
            assert!(view.complete);
            assert_eq!(view.summary.unwrap().count, 1);
            let bodies = store.read_bodies(device, &[view.rows[0].key]).unwrap();
            assert_eq!(bodies[0].1.as_ref().unwrap().content, note.content);
        }
    }
}

#[test]
fn bodies_are_the_same_whichever_rows_are_asked_for_together() {
    let dir = tempfile::tempdir().unwrap();
    let opened = open_at(dir.path(), EngineKind::Sled);
    let device = device_id(1);
    let urgency = |order: u64| match order % 7 {
        0 => crate::delivery::Urgency::High,
        _ => crate::delivery::Urgency::Normal,
    };
    let mut batch = vec![register(device, "ada")];
    // One in five was never there, and some share a body.
    for order in (1..=60).filter(|order| order % 5 > 0) {
        let note = notification(ping_id(order), |note| {
            note.urgency = urgency(order);
            note.shared = order % 4 == 0;
            note.content = vec![order as u8; 100].into();
        });
        batch.push(insert(device, order, &note));
    }
    commit(&*opened.store, batch).unwrap();
    let row = |order| RowKey {
        urgency: urgency(order),
        order,
    };
    let of_urgency = |wanted| (1..=60).map(row).filter(move |row| row.urgency == wanted);
    let normal: Vec<_> = of_urgency(crate::delivery::Urgency::Normal).collect();
    let asked: [Vec<_>; 6] = [
        normal.clone(),
        of_urgency(crate::delivery::Urgency::High).collect(),
        normal.iter().copied().step_by(2).collect(),
        normal.iter().copied().rev().collect(),
        (1..=60).map(row).collect(),
        Vec::new(),
    ];
    for rows in asked {
        let together = opened.store.read_bodies(device, &rows).unwrap();
        assert_eq!(together.len(), rows.len());
        for ((found, body), row) in together.iter().zip(&rows) {
            assert_eq!(found, row);
            let there = row.order % 5 > 0;
            assert_eq!(body.is_some(), there, "{row:?}");
            if let Some(body) = body {
                assert_eq!(body.ping, ping_id(row.order));
                assert_eq!(&*body.content, [row.order as u8; 100]);
            }
        }
    }
}
