//! When settings were read, and what came of it: for `/v1/status` and the metrics.

use std::sync::{Mutex, PoisonError};

use metrics::{counter, gauge};
use serde::Serialize;
use utoipa::ToSchema;

use crate::telemetry::metrics::{RELOADS_TOTAL, SETTINGS_LOADED_SECONDS, SETTINGS_WAITING};

/// Most problems of a refused reload that are kept for the status; the log has all of them.
const PROBLEMS_MAX: usize = 16;

/// What is known of the settings in force. Whoever reads settings anew tells it here.
#[derive(Debug)]
pub struct LoadedSettings(Mutex<SettingsReport>);

/// The settings in force, and the last attempt to change them.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(super) struct SettingsReport {
    /// When those in force were read, Unix milliseconds.
    loaded_ms: u64,
    /// Reloads that were taken in this run.
    reloads: u64,
    /// Reloads that were refused in this run.
    refused: u64,
    /// Settings that were changed and wait for a restart.
    waiting_for_restart: Vec<String>,
    /// The last reload; absent if there was none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    last_reload: Option<ReloadReport>,
}

/// A reload.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct ReloadReport {
    /// When, Unix milliseconds.
    at_ms: u64,
    /// Whether it was taken. If not, everything stayed as it was.
    taken: bool,
    /// Settings that it changed.
    changed: Vec<String>,
    /// What was wrong, each with its place.
    problems: Vec<String>,
}

impl LoadedSettings {
    /// Settings read at the start.
    #[must_use]
    pub fn new(now_ms: u64) -> LoadedSettings {
        gauge!(SETTINGS_LOADED_SECONDS).set(seconds(now_ms));
        gauge!(SETTINGS_WAITING).set(0.0);
        // So that both can be watched for a rise from the first one on.
        for result in ["taken", "refused"] {
            counter!(RELOADS_TOTAL, "result" => result).increment(0);
        }
        LoadedSettings(Mutex::new(SettingsReport {
            loaded_ms: now_ms,
            ..SettingsReport::default()
        }))
    }

    /// A reload was taken: it changed these, and those wait for a restart.
    pub fn taken(&self, now_ms: u64, changed: &[&'static str], waiting: &[&'static str]) {
        let owned = |names: &[&'static str]| names.iter().map(|&name| name.to_owned()).collect();
        counter!(RELOADS_TOTAL, "result" => "taken").increment(1);
        gauge!(SETTINGS_LOADED_SECONDS).set(seconds(now_ms));
        #[expect(clippy::cast_precision_loss, reason = "there are less than a thousand")]
        gauge!(SETTINGS_WAITING).set(waiting.len() as f64);
        let mut report = self.report_mut();
        report.loaded_ms = now_ms;
        report.reloads += 1;
        report.waiting_for_restart = owned(waiting);
        report.last_reload = Some(ReloadReport {
            at_ms: now_ms,
            taken: true,
            changed: owned(changed),
            problems: Vec::new(),
        });
    }

    /// A reload was refused: everything stayed as it was.
    pub fn refused(&self, now_ms: u64, problems: impl IntoIterator<Item = String>) {
        counter!(RELOADS_TOTAL, "result" => "refused").increment(1);
        let problems = problems.into_iter().take(PROBLEMS_MAX).collect();
        let mut report = self.report_mut();
        report.refused += 1;
        report.last_reload = Some(ReloadReport {
            at_ms: now_ms,
            taken: false,
            changed: Vec::new(),
            problems,
        });
    }

    pub(super) fn report(&self) -> SettingsReport {
        self.report_mut().clone()
    }

    fn report_mut(&self) -> std::sync::MutexGuard<'_, SettingsReport> {
        // Plain values: none is half-written at a point where a panic could be.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[expect(clippy::cast_precision_loss, reason = "seconds fit for ages")]
fn seconds(unix_ms: u64) -> f64 {
    unix_ms as f64 / 1_000.0
}
