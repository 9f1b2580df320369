//! Which settings hold at once when the settings are read anew, and which ones wait for a restart.

use std::collections::BTreeMap;

use super::checked::{ApiAccess, Checked};
use super::keys;
use super::setting::Given;
use super::source::Source;

/// Settings that a reload takes. A setting that is not here waits for a restart, so that a new one is never said to
/// hold while it does not.
const LIVE: &[&str] = &[
    "listen.proxy_networks",
    "tls.cert",
    "tls.key",
    "api.cert",
    "api.key",
    "store.defer_max",
    "limits.content_bytes",
    "limits.mailbox_notifications",
    "limits.mailbox_bytes",
    "limits.mailbox_full",
    "limits.ttl_default",
    "limits.ttl_max",
    "limits.in_flight",
    "limits.in_flight_max",
    "limits.wait_default",
    "limits.wait_max",
    "limits.body_bytes",
    "limits.batch_bytes",
    "limits.batch_lines",
    "limits.hello_deadline",
    "limits.write_deadline",
    "limits.ack_timeout",
    "limits.keep_alive_quic_min",
    "limits.keep_alive_quic_max",
    "limits.keep_alive_websocket_min",
    "limits.keep_alive_websocket_max",
    "limits.silence_percent",
    "limits.frame_bytes",
    "limits.connections_per_address",
    "limits.exempt_networks",
    "limits.unauthenticated_connections",
    "limits.list_devices",
    "limits.memory_bytes",
    "limits.open_expansions",
    "limits.pings_per_second",
    "limits.ping_burst",
    "limits.device_pings_per_second",
    "limits.device_ping_burst",
    "limits.backup_stall",
    "limits.batch_stall",
    "limits.event_streams",
    "limits.secret_overlap",
    "limits.withdrawals_keep",
    "callbacks.allow",
    "callbacks.plain_http",
    "callbacks.ca",
    "callbacks.timeout",
    "callbacks.batch",
    "callbacks.retry_max",
    "callbacks.give_up",
    "callbacks.dead_letters",
    "quota.pings_per_day",
    "quota.notifications",
    "quota.bytes",
    "quota.devices",
    "topics.self_subscribe",
    "drain.window",
    "log.level",
];

/// Whether a reload takes this setting.
#[must_use]
pub fn is_live(name: &str) -> bool {
    LIVE.contains(&name)
}

/// Every setting as it was given, where it was.
#[derive(Debug, Clone, Default)]
pub(super) struct Values {
    given: BTreeMap<&'static str, Given>,
    apps: BTreeMap<(String, &'static str), Given>,
}

impl Values {
    pub(super) fn of(source: &Source) -> Values {
        Values {
            given: source.values(),
            apps: source.app_values(),
        }
    }
}

/// What differs between two sets of settings, by name, in the order of the documentation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Taken by a reload.
    pub live: Vec<&'static str>,
    /// Taken at the next start only.
    pub restart: Vec<&'static str>,
}

impl Checked {
    /// What differs from `before`. A value written in another way (`4KiB`, `4096`) is the same value.
    #[must_use]
    pub fn changes_since(&self, before: &Checked) -> Changes {
        let secured = |checked: &Checked| matches!(checked.api, ApiAccess::Https(_));
        let other_scheme = secured(self) != secured(before);
        let mut changes = Changes::default();
        for key in keys::ALL {
            let name = key.name();
            let given = |checked: &Checked| checked.values.given.get(name).cloned();
            let default = || Given::Text(key.default().to_owned());
            let (new, old) = (given(self), given(before));
            let same = match (&new, &old) {
                (None, None) => true,
                // A key without a default is off when it is not given.
                (None, Some(_)) | (Some(_), None) if key.default().is_empty() => false,
                (new, old) => key.same(
                    new.as_ref().unwrap_or(&default()),
                    old.as_ref().unwrap_or(&default()),
                ),
            };
            if same {
                continue;
            }
            // Certificates of the API are exchanged while it speaks HTTPS; whether it does is settled at the start.
            if is_live(name) && !(other_scheme && name.starts_with("api.")) {
                changes.live.push(name);
            } else {
                changes.restart.push(name);
            }
        }
        if self.values.apps != before.values.apps {
            changes.live.push("quota.apps");
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::{Environment, load};
    use super::*;

    fn settings(text: &str) -> Checked {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bellwire.toml");
        std::fs::write(&path, text).unwrap();
        load(Some(&path), &Environment::default()).unwrap()
    }

    #[test]
    fn every_live_setting_is_a_setting() {
        for name in LIVE {
            assert!(keys::ALL.iter().any(|key| key.name() == *name), "{name}");
        }
    }

    /// A limit that a reload takes and the list does not know would be said to wait.
    #[test]
    fn every_limit_is_live_but_the_one_whose_places_are_made_at_the_start() {
        let waiting: Vec<&str> = keys::ALL
            .iter()
            .map(|key| key.name())
            .filter(|name| {
                ["limits.", "quota."]
                    .iter()
                    .any(|part| name.starts_with(part))
            })
            .filter(|name| !is_live(name))
            .collect();
        assert_eq!(waiting, ["limits.api_connections"]);
    }

    #[test]
    fn changes_are_sorted_by_whether_a_reload_takes_them() {
        let before = settings("");
        let after = settings(
            "data_dir = \"elsewhere\"\n[limits]\nttl_default = \"2d\"\napi_connections = 7\n[log]\nlevel = \"debug\"\n",
        );
        let changes = after.changes_since(&before);
        assert_eq!(changes.live, ["limits.ttl_default", "log.level"]);
        assert_eq!(changes.restart, ["data_dir", "limits.api_connections"]);
        // And back again: a value that is no longer given is its default.
        assert_eq!(before.changes_since(&after), changes);
    }

    #[test]
    fn the_same_value_written_in_another_way_is_no_change() {
        let one = settings("[limits]\ncontent_bytes = 4096\nttl_max = \"720h\"\n");
        let other = settings("[limits]\ncontent_bytes = \"4KiB\"\n");
        assert_eq!(one.changes_since(&other), Changes::default());
    }

    #[test]
    fn a_quota_of_one_app_holds_at_once() {
        let before =
            settings("[quota]\npings_per_day = 5\n[quota.apps.default]\npings_per_day = 7\n");
        let after =
            settings("[quota]\npings_per_day = 5\n[quota.apps.default]\npings_per_day = 8\n");
        assert_eq!(after.changes_since(&before).live, ["quota.apps"]);
        assert_eq!(after.quotas.of("default").pings_per_day, 8);
        assert_eq!(after.quotas.of("other").pings_per_day, 5);
    }

    #[test]
    fn whether_the_api_speaks_https_waits_for_a_restart() {
        let https = |cert: &str| settings(&format!("[api]\ncert = \"{cert}\"\nkey = \"k\"\n"));
        let changes = https("a").changes_since(&settings(""));
        assert_eq!(
            (changes.live.len(), changes.restart),
            (0, vec!["api.cert", "api.key"])
        );
        assert_eq!(https("b").changes_since(&https("a")).live, ["api.cert"]);
    }
}
