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
