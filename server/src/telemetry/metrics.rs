//! Every metric, in one list.
//!
//! A name is used through its constant, so that a typing error does not compile and `docs/operations.md` cannot
//! drift (a test compares them). Labels have few values: carriers, codes, routes, app names (the first
//! [`APPS_LABELLED`] of them). No device, user, ping or address is ever a label.

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

/// Apps with a label value of their own; later ones share the value `other`.
pub const APPS_LABELLED: usize = 100;

/// How a metric behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only rises in a run.
    Counter,
    /// Rises and falls.
    Gauge,
    /// A distribution, in the buckets of its [`Metric::buckets`].
    Histogram,
}

impl Kind {
    /// The word for it in the documentation.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// One metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name in the exposition.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
    /// Its labels, in order.
    pub labels: &'static [&'static str],
    /// What it says.
    pub help: &'static str,
}

impl Metric {
    /// Upper bounds of a histogram's buckets, seconds: from one memory access away to a minute.
    #[must_use]
    pub fn buckets(&self) -> &'static [f64] {
        &[
            0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5,
            1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
        ]
    }
}

macro_rules! metrics {
    ($($constant:ident: $kind:ident $name:literal [$($label:literal),*] $help:literal;)*) => {
        $(
            #[doc = $help]
            pub const $constant: &str = $name;
        )*

        /// All of them, in the order of the documentation.
        pub const METRICS: &[Metric] = &[
            $(Metric { name: $name, kind: Kind::$kind, labels: &[$($label),*], help: $help },)*
        ];
    };
}

metrics! {
    BUILD_INFO: Gauge "bellwire_build_info" ["version"] "Always 1; names the version that runs.";
    STARTED_SECONDS: Gauge "bellwire_started_seconds" [] "When this run started, Unix seconds.";
    DRAINING: Gauge "bellwire_draining" [] "1 while the server goes down.";
    RELOADS_TOTAL: Counter "bellwire_reloads_total" ["result"] "Times that settings and certificates were read anew: `taken`, or `refused` because something was wrong and everything stayed as it was.";
    SETTINGS_LOADED_SECONDS: Gauge "bellwire_settings_loaded_seconds" [] "When the settings in force were read, Unix seconds.";
    SETTINGS_WAITING: Gauge "bellwire_settings_waiting" [] "Settings that were changed and wait for a restart.";

    PINGS_TOTAL: Counter "bellwire_pings_total" ["app", "result"] "Publish requests by what they were answered: `accepted`, or the reason of the refusal.";
    NOTIFICATIONS_TOTAL: Counter "bellwire_notifications_total" ["app"] "Notifications accepted, one for each device that a ping addresses.";
    REJECTIONS_TOTAL: Counter "bellwire_rejections_total" ["reason"] "Notifications not accepted, device by device.";
    OUTCOMES_TOTAL: Counter "bellwire_outcomes_total" ["app", "outcome"] "Notifications that ended, by how.";
    OUTCOMES_REPEATED_TOTAL: Counter "bellwire_outcomes_repeated_total" [] "Outcomes announced for a notification that had one. Other than after a repeated idempotency key this must stay 0.";
    ACCEPT_SECONDS: Histogram "bellwire_accept_seconds" [] "From a checked publish request to its answer.";
    ACKNOWLEDGE_SECONDS: Histogram "bellwire_acknowledge_seconds" [] "From acceptance to the device's acknowledgement, as far as the ledger knows the ping.";
    SENDS_TOTAL: Counter "bellwire_sends_total" ["redelivered"] "Notifications handed to links, by whether they may have been sent before.";
    WITHDRAWALS_TOTAL: Counter "bellwire_withdrawals_total" [] "Notifications that devices were told to take off the screen.";
    NOTICES_TOTAL: Counter "bellwire_notices_total" ["notice"] "Things the core noticed that change nothing: `unknown_verdict`, `duplicate_device`, `unreadable_body`, `collapse_repaired`, `deferred`, `deferral_won`.";
    REVOCATIONS_TOTAL: Counter "bellwire_revocations_total" [] "Notifications taken back by their publisher before they ended.";

    APP_NOTIFICATIONS: Gauge "bellwire_app_notifications" ["app"] "Notifications that wait in the mailboxes of an app.";
    APP_BYTES: Gauge "bellwire_app_bytes" ["app"] "Their content bytes.";
    APP_DEVICES: Gauge "bellwire_app_devices" ["app"] "Devices of an app.";
    QUOTA_COUNTING: Gauge "bellwire_quota_counting" [] "1 after a start until the mailboxes of all apps are counted; until then the three above are too low.";
    QUOTA_REFUSALS_TOTAL: Counter "bellwire_quota_refusals_total" ["app", "quota"] "What was turned away because a quota of its app would have been crossed: `notifications`, `bytes` (notifications, device by device), `devices`.";

    SESSIONS: Gauge "bellwire_sessions" ["carrier"] "Devices attached now.";
    ATTACHES_TOTAL: Counter "bellwire_attaches_total" ["carrier"] "Sessions that were greeted.";
    ATTACH_REFUSALS_TOTAL: Counter "bellwire_attach_refusals_total" ["reason"] "Authenticated sessions that were not attached.";
    SESSION_CLOSES_TOTAL: Counter "bellwire_session_closes_total" ["reason"] "Sessions that the server ended: `replaced`, `revoked`, `ack_timeout`, `drain`.";
    AUTHENTICATIONS_TOTAL: Counter "bellwire_authentications_total" ["who", "result"] "Checks of devices and API keys, by result.";
    LINKS_UNAUTHENTICATED: Gauge "bellwire_links_unauthenticated" [] "Connections that have not said hello yet.";
    LINK_ACCEPTS_TOTAL: Counter "bellwire_link_accepts_total" ["carrier"] "Connections let in to try TLS and hello.";
    LINK_REFUSALS_TOTAL: Counter "bellwire_link_refusals_total" ["carrier", "reason"] "Connections that never became a link: `address_crowded`, `total_crowded`, `retry` (asked to prove their address), `alpn`, `tls`, `closed`, `waited_too_long` (gone, as far as we can tell, before there was a place to begin), `queue_full` (the oldest of those who wait, when too many do), `shutdown`, `accept_failed`, an error code, or on `listen.devices_plain`: `not_a_proxy`, `proxy_header_missing`, `proxy_version`, `proxy_header`, `proxy_header_too_large`.";
    LINK_ENDS_TOTAL: Counter "bellwire_link_ends_total" ["carrier", "reason"] "Links that ended: an error code (`bye`, `silence`, `slow_reader`, `replaced` and so on), `left` (closed without `bye`), `lost`, `tls`, `protocol_violation` or `shutdown`.";
    LINK_BYTES_TOTAL: Counter "bellwire_link_bytes_total" ["carrier", "direction"] "Bytes of links, `received` and `sent`: on TCP with TLS, on QUIC within the stream.";
    LINK_FRAMES_TOTAL: Counter "bellwire_link_frames_total" ["carrier", "direction"] "Frames of links, `received` and `sent`.";

    MAILBOXES_AWAKE: Gauge "bellwire_mailboxes_awake" [] "Mailboxes in memory.";
    SHARD_INPUTS_WAITING: Gauge "bellwire_shard_inputs_waiting" [] "Events that wait for their shard.";
    READS_WAITING: Gauge "bellwire_reads_waiting" [] "Store reads that wait for a reading thread.";
    READS_REFUSED_TOTAL: Counter "bellwire_reads_refused_total" [] "Store reads for HTTP that found the queue full.";
    SECRETS_ROTATED_TOTAL: Counter "bellwire_secrets_rotated_total" [] "Secrets of devices that were rotated.";
    SEEN_WAITING: Gauge "bellwire_seen_waiting" [] "Devices whose last sighting waits for a frame that is written anyway.";
    SEEN_DROPPED_TOTAL: Counter "bellwire_seen_dropped_total" [] "Sightings of devices that were not noted because too many waited for the disk.";
    EXPANSIONS_OPEN: Gauge "bellwire_expansions_open" [] "Pings on their way to audiences: topics, everyone, long lists.";
    EXPANSION_OLDEST_SECONDS: Gauge "bellwire_expansion_oldest_seconds" [] "Age of the oldest of these; 0 while there is none.";
    EXPANDED_TOTAL: Counter "bellwire_expanded_total" [] "Devices that pings to audiences have come to.";
    EXPANSION_PAUSES_TOTAL: Counter "bellwire_expansion_pauses_total" ["reason"] "Times that a ping to an audience waited: `shards` (they have enough to do), `reads` (so has whoever reads the store), `engine` (behind by half of what it may be), `disk` (no room).";
    SUBSCRIPTIONS_REFUSED_TOTAL: Counter "bellwire_subscriptions_refused_total" [] "Topics that devices asked to join or leave and may not.";
    RESERVE_BYTES: Gauge "bellwire_reserve_bytes" [] "Bodies in flight, of the memory reserve.";
    LEDGER_ENTRIES: Gauge "bellwire_ledger_entries" [] "Notifications in the ledger of recent outcomes.";
    LEDGER_BYTES: Gauge "bellwire_ledger_bytes" [] "Bytes of the ledger.";
    LEDGER_DROPPED_TOTAL: Counter "bellwire_ledger_dropped_total" [] "Pings that left the ledger because it was full.";
    IDEMPOTENCY_ENTRIES: Gauge "bellwire_idempotency_entries" [] "Idempotency keys remembered.";
    IDEMPOTENCY_HITS_TOTAL: Counter "bellwire_idempotency_hits_total" ["result"] "Idempotency keys seen before: `same`, `conflict`, `joined` (while the first request was under way).";

    STORE_HEALTH: Gauge "bellwire_store_health" ["state"] "1 for the state the store is in: `open`, `full`, `behind`, `failed`.";
    STORE_FRAMES_TOTAL: Counter "bellwire_store_frames_total" [] "Frames written to the log.";
    STORE_SYNCS_TOTAL: Counter "bellwire_store_syncs_total" [] "Syncs of the log.";
    STORE_SYNC_MEDIAN_SECONDS: Gauge "bellwire_store_sync_median_seconds" [] "Median duration of the last 1,024 syncs.";
    STORE_SYNC_WORST_SECONDS: Gauge "bellwire_store_sync_worst_seconds" [] "Worst duration of the last 1,024 syncs.";
    STORE_LAG_BYTES: Gauge "bellwire_store_lag_bytes" [] "How far the engine is behind the log, bytes.";
    STORE_LAG_SECONDS: Gauge "bellwire_store_lag_seconds" [] "Age of the oldest frame that the engine does not have.";
    BACKUP_LAST_SUCCESS_SECONDS: Gauge "bellwire_backup_last_success_seconds" [] "When the last good backup of the server's own schedule was begun, Unix seconds; 0 if there is none.";
    BACKUP_SECONDS: Gauge "bellwire_backup_seconds" [] "How long that one took; 0 if an earlier run made it.";
    BACKUP_BYTES: Gauge "bellwire_backup_bytes" [] "Its size.";
    BACKUPS_KEPT: Gauge "bellwire_backups_kept" [] "Backups in the directory that the schedule made of this store.";
    BACKUP_RUNNING: Gauge "bellwire_backup_running" [] "1 while a backup is made.";
    BACKUP_FAILURES_TOTAL: Counter "bellwire_backup_failures_total" [] "Backups of the server's own schedule that could not be made.";
    STORE_LOG_BYTES: Gauge "bellwire_store_log_bytes" [] "Size of the log.";
    STORE_LOG_SEGMENTS: Gauge "bellwire_store_log_segments" [] "Segments of the log.";
    STORE_ENGINE_BYTES: Gauge "bellwire_store_engine_bytes" [] "Size of the engine's files.";
    STORE_LIVE_BYTES: Gauge "bellwire_store_live_bytes" [] "Keys and values that lived when the newest snapshot was taken.";
    STORE_SNAPSHOT_BYTES: Gauge "bellwire_store_snapshot_bytes" [] "Size of the snapshots.";
    STORE_REBUILDS_TOTAL: Counter "bellwire_store_rebuilds_total" [] "Times that the engine was built anew while serving, because its files had grown.";
    STORE_FREE_BYTES: Gauge "bellwire_store_free_bytes" [] "Free space on the store's volume.";
    STORE_ASIDE_BYTES: Gauge "bellwire_store_aside_bytes" [] "Size of everything that was set aside and is still there; at most a minute old.";
    STORE_SET_ASIDE: Gauge "bellwire_store_set_aside" [] "Records that could not be read and were set aside.";
    COMMIT_FAILURES_TOTAL: Counter "bellwire_commit_failures_total" ["reason"] "Batches of shards that did not reach the disk: `no_room`, `failed`.";

    SWEEP_ROWS_TOTAL: Counter "bellwire_sweep_rows_total" [] "Rows past their expiry that the sweep found.";
    SWEEP_PAUSED: Gauge "bellwire_sweep_paused" [] "1 while the sweep pauses because the clock jumped.";
    OUTCOMES_NOT_DURABLE_TOTAL: Counter "bellwire_outcomes_not_durable_total" [] "Outcomes announced although `receipts.durable` could not make them safe: no room, a failed store, or too many at once.";
    HISTORY_BYTES: Gauge "bellwire_history_bytes" [] "Size of the history of outcomes.";
    HISTORY_SEGMENTS: Gauge "bellwire_history_segments" [] "Segments of the history of outcomes.";
    HISTORY_RECORDS: Gauge "bellwire_history_records" [] "Outcomes in the history.";
    HISTORY_OLDEST_SECONDS: Gauge "bellwire_history_oldest_seconds" [] "When the oldest outcome in the history ended, Unix seconds; 0 while there is none.";
    HISTORY_UNREADABLE: Gauge "bellwire_history_unreadable" [] "Outcomes and files of the history that cannot be read.";
    HISTORY_WRITTEN_TOTAL: Counter "bellwire_history_written_total" [] "Outcomes written to the history.";
    HISTORY_LOST_TOTAL: Counter "bellwire_history_lost_total" ["reason"] "Outcomes left out of the history: `overflow` (more than it can take), `failed` (a write failed).";
    HISTORY_SEGMENTS_DROPPED_TOTAL: Counter "bellwire_history_segments_dropped_total" [] "Segments of the history dropped by age or size.";
    RECEIPTS_DROPPED_TOTAL: Counter "bellwire_receipts_dropped_total" [] "Outcomes and idempotency keys dropped by age.";
    CLOCK_JUMP_SECONDS: Gauge "bellwire_clock_jump_seconds" [] "System clock minus ours while it is not followed, 0 otherwise.";

    HTTP_REQUESTS_TOTAL: Counter "bellwire_http_requests_total" ["route", "method", "status"] "HTTP requests by route template, method and class of status (`2xx`).";
    HTTP_SECONDS: Histogram "bellwire_http_seconds" ["route"] "Duration of HTTP requests by route template.";
    HTTP_CONNECTIONS: Gauge "bellwire_http_connections" ["listener"] "HTTP connections open now, by listener (`api`, `operations`).";
    HTTP_CONNECTION_ERRORS_TOTAL: Counter "bellwire_http_connection_errors_total" ["listener", "reason"] "HTTP connections that failed: `accept` (out of descriptors or memory), `full` (had to wait for a place), `tls`, `http` (broken off, no HTTP, head too slow).";
    CALLBACKS: Gauge "bellwire_callbacks" ["state"] "Callbacks that are set, by state: `ok`, `failing` (tried again), `gone` (the receiver said 410; nothing is posted).";
    CALLBACK_POSTS_TOTAL: Counter "bellwire_callback_posts_total" ["result"] "Attempts to post outcomes, by result: `ok`, `gone`, `redirect`, `refused`, `server_error`, or why there was no answer (`not_allowed`, `lookup`, `connect`, `tls`, `timeout`, `broken`).";
    CALLBACK_EVENTS_TOTAL: Counter "bellwire_callback_events_total" [] "Outcomes and gaps that receivers have taken.";
    CALLBACK_LAG: Gauge "bellwire_callback_lag_seconds" [] "Age of the oldest outcome that a callback has not posted yet, over all callbacks.";
    CALLBACK_DEAD_LETTERS: Gauge "bellwire_callback_dead_letters" [] "Batches that were given up and are kept.";
    CALLBACK_DEAD_LETTERS_TOTAL: Counter "bellwire_callback_dead_letters_total" [] "Batches that were given up.";
    CALLBACK_DEAD_LETTERS_DROPPED_TOTAL: Counter "bellwire_callback_dead_letters_dropped_total" [] "Batches that were given up and are not kept any more, because there were too many.";
    EVENT_STREAMS: Gauge "bellwire_event_streams" [] "Streams of events that are open.";
    EVENTS_SENT_TOTAL: Counter "bellwire_events_sent_total" [] "Events handed to streams.";
    HTTP_REFUSALS_TOTAL: Counter "bellwire_http_refusals_total" ["code"] "Requests of the native API that were refused, by the code of docs/errors.md. Lines of batches are not among them.";
    WAITS_TOTAL: Counter "bellwire_waits_total" ["result"] "Pings with `wait=acknowledged` that were answered: `settled` (everything had ended), `timeout` (`timeout_s` was over), `drain`.";
    TTLS_LOWERED_TOTAL: Counter "bellwire_ttls_lowered_total" [] "Pings whose TTL was lowered to `limits.ttl_max`.";
    PINGS_THROTTLED_TOTAL: Counter "bellwire_pings_throttled_total" ["app", "by"] "Pings turned away because an allowance was used up: that of their API key (`key`, `limits.pings_per_second`) or of their app (`app`, `quota.pings_per_day`).";
    HTTP_BATCH_LINES_TOTAL: Counter "bellwire_http_batch_lines_total" ["status"] "Lines of batches that were answered, by the class of their status (`2xx`, `4xx`, `5xx`).";
    HTTP_BATCHES_STALLED_TOTAL: Counter "bellwire_http_batches_stalled_total" [] "Batches that were cut because their caller took none of the answers for `limits.batch_stall`.";
}

/// Renders what was measured.
#[derive(Clone)]
pub struct Exposition(PrometheusHandle);

impl Exposition {
    /// The metrics in the Prometheus text format.
    #[must_use]
    pub fn render(&self) -> String {
        self.0.render()
    }

    /// Folds histogram samples together. Call it every few seconds, or memory grows between scrapes.
    pub fn upkeep(&self) {
        self.0.run_upkeep();
    }
}

/// The metrics cannot be collected.
#[derive(Debug, thiserror::Error)]
#[error("metrics cannot be collected: {0}")]
pub struct MetricsError(#[from] BuildError);

/// Starts to collect, once per process and before anything else starts: handles made earlier count into nothing.
pub fn install() -> Result<Exposition, MetricsError> {
    let mut builder = PrometheusBuilder::new();
    for metric in METRICS
        .iter()
        .filter(|metric| metric.kind == Kind::Histogram)
    {
        builder =
            builder.set_buckets_for_metric(Matcher::Full(metric.name.into()), metric.buckets())?;
    }
    let handle = builder.install_recorder()?;
    describe();
    Ok(Exposition(handle))
}

fn describe() {
    for metric in METRICS {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.help),
        }
    }
}

/// The table for `docs/operations.md`, between its `generated:metrics` markers.
#[must_use]
pub fn documentation() -> String {
    let mut text =
        String::from("| metric | kind | labels | meaning |\n| --- | --- | --- | --- |\n");
    for metric in METRICS {
        let labels: Vec<String> = metric
            .labels
            .iter()
            .map(|label| format!("`{label}`"))
            .collect();
        text.push_str(&format!(
            "| `{}` | {} | {} | {} |\n",
            metric.name,
            metric.kind.as_str(),
            labels.join(", "),
            metric.help
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn names_are_unique_and_say_their_kind() {
        let mut seen = Vec::new();
        for metric in METRICS {
            assert!(
                !seen.contains(&metric.name),
                "{} is listed twice",
                metric.name
            );
            seen.push(metric.name);
            assert!(metric.name.starts_with("bellwire_"), "{}", metric.name);
            assert_eq!(
                metric.name.ends_with("_total"),
                metric.kind == Kind::Counter,
                "{}: counters, and only they, end in _total",
                metric.name
            );
            assert!(
                metric.help.ends_with('.'),
                "{} needs a sentence",
                metric.name
            );
        }
    }

    #[test]
    fn the_operations_page_lists_exactly_these_metrics() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
        let page = std::fs::read_to_string(path).unwrap();
        let (begin, end) = (
            "<!-- generated:metrics -->\n",
            "<!-- /generated:metrics -->",
        );
        let (before, rest) = page.split_once(begin).unwrap();
        let (table, after) = rest.split_once(end).unwrap();
        let wanted = documentation();
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(path, format!("{before}{begin}{wanted}{end}{after}")).unwrap();
            return;
        }
        assert!(
            table.trim() == wanted.trim(),
            "the section Metrics of docs/operations.md must read as follows (UPDATE_DOCS=1 writes it):\n\n{wanted}"
        );
    }
}
