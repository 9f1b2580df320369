//! Short ways to say what the tests are about.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bytes::Bytes;

use super::super::testing::{ManualClock, SeededEntropy};
use super::super::{EngineKind, Opened, StoreSettings, open};
use crate::delivery::{
    AppId, Change, CollapseKey, DeviceId, Hold, MailboxRead, Notification, Outcome, PingId, RowKey,
    RowMeta, Summary, Urgency, WireSlot,
};
use crate::ports::{Committed, DeviceRecord, Op, Store};

/// How long a test waits for something that happens on another thread before it gives up.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

pub(super) fn device_id(n: u64) -> DeviceId {
    let mut id = [0xd0; 16];
    id[8..].copy_from_slice(&n.to_be_bytes());
    DeviceId(id)
}

pub(super) fn ping_id(n: u64) -> PingId {
    let mut id = [0x50; 16];
    id[8..].copy_from_slice(&n.to_be_bytes());
    PingId(id)
}

pub(super) fn key(text: &str) -> Option<CollapseKey> {
    CollapseKey::new(text)
}

pub(super) fn notification(
    ping: PingId,
    change: impl FnOnce(&mut Notification),
) -> Arc<Notification> {
    let mut notification = Notification {
        ping,
        app: AppId::DEFAULT,
        accepted_ms: 1_000,
        expires_ms: 50_000,
        urgency: Urgency::Normal,
        collapse: None,
        size: 5,
        transient: false,
        shared: false,
        content: Bytes::from_static(b"hello"),
        wire: WireSlot::default(),
        hold: Hold::default(),
    };
    change(&mut notification);
    Arc::new(notification)
}

pub(super) fn insert(device: DeviceId, order: u64, notification: &Arc<Notification>) -> Op {
    Op::Mailbox(Change::Insert {
        device,
        order,
        run: 1,
        notification: Arc::clone(notification),
    })
}

pub(super) fn row_meta(order: u64, notification: &Notification) -> RowMeta {
    RowMeta {
        key: RowKey {
            urgency: notification.urgency,
            order,
        },
        ping: notification.ping,
        size: notification.size,
        expires_ms: notification.expires_ms,
        collapse: notification.collapse.clone(),
        run: 1,
        shared: notification.shared,
    }
}

pub(super) fn remove(
    device: DeviceId,
    order: u64,
    notification: &Notification,
    outcome: Outcome,
    at_ms: u64,
) -> Op {
    Op::Mailbox(Change::Remove {
        app: notification.app,
        device,
        row: row_meta(order, notification),
        outcome,
        at_ms,
    })
}

pub(super) fn summary(device: DeviceId, count: u32, bytes: u64, next_order: u64) -> Op {
    Op::Mailbox(Change::Summary {
        device,
        summary: Summary {
            count,
            bytes,
            next_order,
            ..Summary::new(AppId::DEFAULT)
        },
    })
}

pub(super) fn device_record(device: DeviceId, user: &str) -> DeviceRecord {
    DeviceRecord {
        id: device,
        app: AppId::DEFAULT,
        user: user.to_owned(),
        name: None,
        created_ms: 7,
        secret_hash: [3; 32],
        previous_secrets: Vec::new(),
    }
}

pub(super) fn register(device: DeviceId, user: &str) -> Op {
    Op::PutDevice {
        record: device_record(device, user),
        fresh: true,
        previous_user: None,
    }
}

pub(super) fn everything(device: DeviceId) -> MailboxRead {
    MailboxRead {
        device,
        all: true,
        ping: None,
        collapse: None,
        lowest: None,
        rows: Vec::new(),
        withdrawals: true,
    }
}

/// Settings that suit tests: small segments, no reserve, a short rest.
pub(super) fn settings(dir: &Path, engine: EngineKind) -> StoreSettings {
    StoreSettings {
        engine,
        segment_bytes: 256 << 10,
        memory_bytes: 64 << 20,
        reserve_bytes: 0,
        rest_time: Duration::from_millis(5),
        ..StoreSettings::new(dir)
    }
}

pub(super) fn open_at(dir: &Path, engine: EngineKind) -> Opened {
    open(
        &settings(dir, engine),
        Arc::new(ManualClock::new(1_700_000_000_000)),
        Arc::new(SeededEntropy::new(9)),
    )
    .unwrap()
}

pub(super) fn commit(store: &dyn Store, batch: Vec<Op>) -> Committed {
    let (sender, receiver) = mpsc::channel();
    store.commit(
        batch,
        Box::new(move |verdict| sender.send(verdict).unwrap()),
    );
    receiver.recv_timeout(PATIENCE).unwrap()
}
