//! Topics: named sets of devices. The backend says who is in; a device may choose by itself among those that its app allows.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::api::{RuntimeError, TopicsChange};
use super::audiences::commit_error;
use super::handle::Inner;
use super::settings::{TOPIC_MAX_BYTES, TOPICS_PER_DEVICE};
use crate::delivery::{AppId, DeviceId};
use crate::ports::{Membership, Op, Span, Spans, Stamp, TopicChange};

const RULE: &str = "a topic is 1 to 128 characters of a-z, A-Z, 0-9 and -._~/:@+";
const TOO_MANY: &str = "topics: a device is in at most 100";

/// Whether a text can be the name of a topic: 1 to 128 characters that need no quoting in a list, a pattern or a shell.
#[must_use]
pub fn is_topic(name: &str) -> bool {
    (1..=TOPIC_MAX_BYTES).contains(&name.len())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-._~/:@+".contains(&byte))
}

/// Topics that devices may join and leave by themselves: exact names, and beginnings that end in `*`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patterns(Arc<[String]>);

impl Patterns {
    /// Patterns at most.
    pub const MAX: usize = 100;

    /// Reads patterns with commas between them; nothing: none. `None`: one of them is neither the name of a topic nor a
    /// beginning of names followed by `*`, or they are too many.
    #[must_use]
    pub fn read(text: &str) -> Option<Patterns> {
        let mut patterns = Vec::new();
        for pattern in text.split(',').map(str::trim) {
            if pattern.is_empty() && text.trim().is_empty() {
                break;
            }
            let name = pattern.strip_suffix('*').unwrap_or(pattern);
            if !(is_topic(name) || pattern == "*") || patterns.len() == Patterns::MAX {
                return None;
            }
            patterns.push(pattern.to_owned());
        }
        Some(Patterns(patterns.into()))
    }

    /// Whether a device may join and leave this topic.
    #[must_use]
    pub fn allow(&self, topic: &str) -> bool {
        is_topic(topic)
            && self
                .0
                .iter()
                .any(|pattern| match pattern.strip_suffix('*') {
                    Some(beginning) => topic.starts_with(beginning),
                    None => topic == pattern,
                })
    }
}

/// The spans of a device that joins at `at`. `open`: the pings to the topic that are on their way.
fn joined(mut spans: Spans, at: Stamp, open: &[Stamp]) -> Spans {
    keep_needed(&mut spans, open);
    spans.push(Span {
        joined: at,
        left: None,
    });
    spans
}

/// The spans of a device that leaves at `at`.
fn left(mut spans: Spans, at: Stamp, open: &[Stamp]) -> Spans {
    for span in &mut spans {
        span.left.get_or_insert(at);
    }
    keep_needed(&mut spans, open);
    spans
}

/// Without the closed spans that no ping on its way needs. Spans do not overlap, so at most one is kept for each such ping:
/// that bounds them.
fn keep_needed(spans: &mut Spans, open: &[Stamp]) {
    spans.retain(|span| span.left.is_none() || open.iter().any(|at| span.holds(*at)));
}

impl Inner {
    /// The topics of a device, by name. `None`: no such device.
    pub(super) async fn topics(
        &self,
        app: AppId,
        device: DeviceId,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        let read = self
            .shared
            .reading
            .read(move |store| {
                let known = store.device(device)?.is_some_and(|found| found.app == app);
                known.then(|| store.topics(device)).transpose()
            })
            .await?;
        Ok(read.map(names))
    }

    pub(super) async fn change_topics(
        self: &Arc<Inner>,
        app: AppId,
        device: DeviceId,
        change: TopicsChange,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        let (TopicsChange::Set(join) | TopicsChange::Edit { join, .. }) = &change;
        if !join.iter().all(|topic| is_topic(topic)) {
            return Err(RuntimeError::Invalid(RULE));
        }
        let inner = Arc::clone(self);
        self.to_the_end(async move { inner.changed_topics(Some(app), device, change, false).await })
            .await
    }

    /// What a device asks for by itself. What its app does not allow is left out, and so is what would be too many: the answer
    /// is the full set that it is in then. `None`: it was revoked meanwhile.
    pub(super) async fn subscribe(
        self: &Arc<Inner>,
        device: DeviceId,
        mut join: Vec<String>,
        mut leave: Vec<String>,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        let patterns = self.subscribable.load_full();
        let asked = join.len() + leave.len();
        join.retain(|topic| patterns.allow(topic));
        leave.retain(|topic| patterns.allow(topic));
        let refused = asked - join.len() - leave.len();
        if refused > 0 {
            metrics::counter!(crate::telemetry::metrics::SUBSCRIPTIONS_REFUSED_TOTAL)
                .increment(refused as u64);
        }
        let inner = Arc::clone(self);
        let change = TopicsChange::Edit { join, leave };
        self.to_the_end(async move { inner.changed_topics(None, device, change, true).await })
            .await
    }

    /// `app`: only a device of this one. `lenient`: topics beyond the limit are left out instead of refused.
    async fn changed_topics(
        self: &Arc<Inner>,
        app: Option<AppId>,
        device: DeviceId,
        change: TopicsChange,
        lenient: bool,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        let _alone = self.users.changing(device).lock().await;
        let read = self
            .shared
            .reading
            .read(move |store| {
                let Some(record) = store.device(device)? else {
                    return Ok(None);
                };
                Ok(Some((record.app, store.topics(device)?)))
            })
            .await?;
        let Some((owner, before)) = read.filter(|(owner, _)| app.is_none_or(|app| app == *owner))
        else {
            return Ok(None);
        };
        let app = owner;
        // Those it is to be in, with the stamp of those that it is in already.
        let mut wanted: BTreeMap<String, Option<Stamp>> = BTreeMap::new();
        let kept = before
            .iter()
            .map(|was| (was.topic.clone(), Some(was.joined)));
        match change {
            TopicsChange::Set(topics) => {
                let known: BTreeMap<_, _> = kept.collect();
                for topic in topics {
                    let since = known.get(&topic).copied().flatten();
                    wanted.insert(topic, since);
                }
            }
            TopicsChange::Edit { join, leave } => {
                wanted.extend(kept.filter(|(topic, _)| !leave.contains(topic)));
                for topic in join {
                    let room = !lenient || wanted.len() < TOPICS_PER_DEVICE;
                    if room && !wanted.contains_key(&topic) {
                        wanted.insert(topic, None);
                    }
                }
            }
        }
        if wanted.len() > TOPICS_PER_DEVICE {
            return Err(RuntimeError::Invalid(TOO_MANY));
        }
        let joins = wanted.iter().filter(|(_, since)| since.is_none());
        let mut changed: Vec<String> = joins.map(|(topic, _)| topic.clone()).collect();
        let joining = changed.len();
        let leaves = before.iter().filter(|was| !wanted.contains_key(&was.topic));
        changed.extend(leaves.map(|was| was.topic.clone()));
        if changed.is_empty() {
            return Ok(Some(names(before)));
        }
        let (changed, spans) = self
            .shared
            .reading
            .read(move |store| {
                let spans = store.spans(app, device, &changed)?;
                Ok((changed, spans))
            })
            .await?;
        let (at, open) = self.audiences.stamp_change(app, &changed);
        let places = changed
            .into_iter()
            .zip(spans)
            .zip(open)
            .enumerate()
            .map(|(place, ((topic, spans), open))| {
                let spans = if place < joining {
                    joined(spans, at, &open)
                } else {
                    left(spans, at, &open)
                };
                (topic, spans)
            })
            .collect();
        let topics: Vec<Membership> = wanted
            .into_iter()
            .map(|(topic, since)| Membership {
                topic,
                joined: since.unwrap_or(at),
            })
            .collect();
        let answer = topics
            .iter()
            .map(|membership| membership.topic.clone())
            .collect();
        let change = TopicChange {
            app,
            device,
            topics,
            places,
        };
        let committed = self.commit_one(vec![Op::PutTopics(change)]).await;
        committed.map_err(commit_error)?;
        Ok(Some(answer))
    }

    /// Takes what no ping on its way needs out of the place of a device in the list of a topic. `done`: this one has come past it.
    pub(super) async fn prune(
        self: &Arc<Inner>,
        app: AppId,
        topic: &str,
        device: DeviceId,
        done: Stamp,
    ) -> Result<(), RuntimeError> {
        let _alone = self.users.changing(device).lock().await;
        let name = [topic.to_owned()];
        let (record, topics, spans) = self
            .shared
            .reading
            .read(move |store| {
                let spans = store.spans(app, device, &name)?.pop().unwrap_or_default();
                Ok((store.device(device)?, store.topics(device)?, spans))
            })
            .await?;
        let mut open = self.audiences.open_to(app, topic);
        open.retain(|open| *open != done);
        let mut kept = spans.clone();
        keep_needed(&mut kept, &open);
        if record.is_none() {
            kept.clear();
        }
        if kept == spans {
            return Ok(());
        }
        let change = TopicChange {
            app,
            device,
            topics,
            places: vec![(topic.to_owned(), kept)],
        };
        let committed = self.commit_one(vec![Op::PutTopics(change)]).await;
        committed.map_err(commit_error)
    }
}

fn names(topics: Vec<Membership>) -> Vec<String> {
    topics
        .into_iter()
        .map(|membership| membership.topic)
        .collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn stamp(count: u64) -> Stamp {
        Stamp { run: 1, count }
    }

    /// One device, one topic: a story in words, and the spans at its end. `+` joins, `-` leaves, `p` is a ping that stays on its
    /// way, `!` ends the oldest of those; each takes the next stamp.
    fn told(story: &str) -> String {
        let mut spans = Spans::new();
        let mut open: Vec<Stamp> = Vec::new();
        for (count, word) in (1..).zip(story.chars()) {
            match word {
                '+' => spans = joined(spans, stamp(count), &open),
                '-' => spans = left(spans, stamp(count), &open),
                'p' => open.push(stamp(count)),
                '!' => drop(open.remove(0)),
                other => panic!("{other}"),
            }
        }
        let span = |span: &Span| match span.left {
            Some(left) => format!("{}-{}", span.joined.count, left.count),
            None => format!("{}-", span.joined.count),
        };
        spans.iter().map(span).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_place_keeps_what_pings_on_their_way_need_and_nothing_else() {
        for (story, spans) in [
            ("+", "1-"),
            ("+-", ""),
            ("+-+", "3-"),
            ("+p-", "1-3"),
            ("p+-", ""),
            ("+p-+", "1-3 4-"),
            ("+p-+-", "1-3"),
            ("+p-!+", "5-"),
            ("+p-+p-", "1-3 4-6"),
            ("+p-+p-!+", "4-6 8-"),
            ("+p-+p-!!+", "9-"),
            ("+pp-", "1-4"),
            ("+pp-!+", "1-4 6-"),
        ] {
            assert_eq!(told(story), spans, "{story}");
        }
    }

    #[test]
    fn random_joins_leaves_and_pings_address_those_who_were_in_and_never_pile_up() {
        let mut dice = 0x9e37_79b9_7f4a_7c15_u64;
        let mut roll = move |sides: u64| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            dice % sides
        };
        for _ in 0..200 {
            let mut spans = Spans::new();
            let mut member = false;
            // Each ping with whether it is to reach the device.
            let mut open: Vec<(Stamp, bool)> = Vec::new();
            let mut run = 1;
            for count in 1..60 {
                // A crash gives the stamps a new run and loses nothing.
                run += u32::from(roll(20) == 0);
                let at = Stamp { run, count };
                let stamps: Vec<Stamp> = open.iter().map(|(at, _)| *at).collect();
                match roll(4) {
                    0 if !member => {
                        spans = joined(spans, at, &stamps);
                        member = true;
                    }
                    0 | 1 if member => {
                        spans = left(spans, at, &stamps);
                        member = false;
                    }
                    2 if open.len() < 5 => open.push((at, member)),
                    3 if !open.is_empty() => {
                        let at = roll(open.len() as u64);
                        open.remove(usize::try_from(at).unwrap());
                    }
                    _ => {}
                }
                for (at, reaches) in &open {
                    let found = spans.iter().any(|span| span.holds(*at));
                    assert_eq!(found, *reaches, "{spans:?} at {at:?}");
                }
                // One for each ping that was on its way at the last change, and that of a member.
                assert!(spans.len() <= 5 + 1);
            }
        }
    }

    #[test]
    fn patterns_are_names_and_beginnings() {
        let patterns = Patterns::read("news/*, ward-3").unwrap();
        for (topic, allowed) in [
            ("news/berlin", true),
            ("news/", true),
            ("news", false),
            ("ward-3", true),
            ("ward-33", false),
            ("", false),
        ] {
            assert_eq!(patterns.allow(topic), allowed, "{topic}");
        }
        assert!(!Patterns::read("").unwrap().allow("news"));
        assert!(Patterns::read("*").unwrap().allow("news"));
        for wrong in ["a b", "n*ws", ",", "a,,b", "ü"] {
            assert!(Patterns::read(wrong).is_none(), "{wrong}");
        }
        assert!(Patterns::read(&vec!["a"; 101].join(",")).is_none());
    }

    #[test]
    fn the_limits_are_those_of_the_protocol() {
        use bellwire_protocol::limits::{TOPIC_BYTES_MAX, TOPICS_MAX};
        assert_eq!(
            (TOPIC_MAX_BYTES, TOPICS_PER_DEVICE),
            (TOPIC_BYTES_MAX, TOPICS_MAX)
        );
        assert!(is_topic(&"x".repeat(TOPIC_MAX_BYTES)));
        assert!(!is_topic(&"x".repeat(TOPIC_MAX_BYTES + 1)));
    }
}
