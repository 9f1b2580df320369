//! The race: several ways to the same place, started one after the other; the first that arrives wins.

use std::future::Future;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

/// How long QUIC (or the carrier that won here last time) runs alone.
pub const HEAD_START: Duration = Duration::from_millis(250);

/// Starts the first, after `head_start` the next beside it, and so on; a failure starts the next at once. The first success
/// wins, with its place in the row; the others are dropped, which ends them. All failures come back in the order of the row.
pub(crate) async fn staggered<T, E, F>(
    runners: impl IntoIterator<Item = F>,
    head_start: Duration,
) -> Result<(usize, T), Vec<E>>
where
    F: Future<Output = Result<T, E>>,
{
    let mut waiting = runners.into_iter().enumerate().peekable();
    let mut running = FuturesUnordered::new();
    let mut failures = Vec::new();
    let numbered = |(place, runner): (usize, F)| async move { (place, runner.await) };
    loop {
        if running.is_empty() {
            match waiting.next() {
                Some(runner) => running.push(numbered(runner)),
                None => {
                    failures.sort_by_key(|(place, _)| *place);
                    return Err(failures.into_iter().map(|(_, failure)| failure).collect());
                }
            }
        }
        tokio::select! {
            biased;
            Some((place, result)) = running.next() => match result {
                Ok(arrived) => return Ok((place, arrived)),
                Err(failure) => {
                    failures.push((place, failure));
                    running.extend(waiting.next().map(numbered));
                }
            },
            () = tokio::time::sleep(head_start), if waiting.peek().is_some() => {
                running.extend(waiting.next().map(numbered));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::sync::{Arc, Mutex};
    use tokio::time::Instant;

    /// What happened, with the virtual time of the test in milliseconds.
    #[derive(Clone)]
    struct Story {
        start: Instant,
        lines: Arc<Mutex<Vec<String>>>,
    }

    struct Quit(Story, &'static str);

    impl Drop for Quit {
        fn drop(&mut self) {
            self.0.tell(format!("{} gone", self.1));
        }
    }

    impl Story {
        fn new() -> Self {
            Self {
                start: Instant::now(),
                lines: Arc::default(),
            }
        }

        fn tell(&self, line: String) {
            let line = format!("{} {line}", self.start.elapsed().as_millis());
            self.lines.lock().unwrap().push(line);
        }

        /// A dialer that needs this long and then succeeds or fails.
        async fn dial(
            self,
            name: &'static str,
            takes_ms: u64,
            succeeds: bool,
        ) -> Result<&'static str, String> {
            self.tell(format!("{name} starts"));
            let _quit = Quit(self.clone(), name);
            tokio::time::sleep(Duration::from_millis(takes_ms)).await;
            if succeeds {
                Ok(name)
            } else {
                Err(format!("{name} failed"))
            }
        }

        fn lines(&self) -> Vec<String> {
            self.lines.lock().unwrap().clone()
        }
    }

    async fn run(
        quic: (u64, bool),
        websocket: (u64, bool),
    ) -> (Result<(usize, &'static str), Vec<String>>, Vec<String>) {
        let story = Story::new();
        let runners = [("quic", quic), ("websocket", websocket)]
            .map(|(name, (ms, ok))| story.clone().dial(name, ms, ok));
        let result = staggered(runners, HEAD_START).await;
        (result, story.lines())
    }

    #[tokio::test(start_paused = true)]
    async fn a_quick_quic_runs_alone() {
        let (result, lines) = run((30, true), (30, true)).await;
        assert_eq!(result, Ok((0, "quic")));
        assert_eq!(lines, ["0 quic starts", "30 quic gone"]);
    }

    #[tokio::test(start_paused = true)]
    async fn websocket_wins_within_a_second_where_udp_is_blocked() {
        let (result, lines) = run((10_000, false), (120, true)).await;
        assert_eq!(result, Ok((1, "websocket")));
        assert_eq!(
            lines,
            [
                "0 quic starts",
                "250 websocket starts",
                "370 websocket gone",
                "370 quic gone"
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_quic_that_still_arrives_first_wins_and_websocket_is_dropped() {
        let (result, lines) = run((300, true), (100, true)).await;
        assert_eq!(result, Ok((0, "quic")));
        assert_eq!(
            lines,
            [
                "0 quic starts",
                "250 websocket starts",
                "300 quic gone",
                "300 websocket gone"
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_starts_the_next_at_once() {
        let (result, lines) = run((20, false), (100, true)).await;
        assert_eq!(result, Ok((1, "websocket")));
        assert_eq!(
            lines,
            [
                "0 quic starts",
                "20 quic gone",
                "20 websocket starts",
                "120 websocket gone"
            ]
        );
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_fail_every_reason_comes_back_in_order() {
        let (result, _) = run((900, false), (20, false)).await;
        assert_eq!(
            result,
            Err(vec![
                "quic failed".to_owned(),
                "websocket failed".to_owned()
            ])
        );
        let nobody = staggered(Vec::<std::future::Ready<Result<(), ()>>>::new(), HEAD_START).await;
        assert_eq!(nobody, Err(vec![]));
    }
}
