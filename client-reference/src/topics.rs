//! The topics that the app asked for: what still has to be said to the server, and what it answered. Pure; the file is in
//! `state::subscriptions`.
//!
//! The server keeps memberships on its disk, and the backend may change them at any time. So a wish is said once: it is kept
//! until a `subscribed` has answered it, over broken connections and restarts, and never said again after that. A client that repeated what
//! it once wanted would undo what the backend decided later.
//!
//! One request is under way at a time, so that an answer always belongs to the request before it.

use std::collections::{BTreeMap, BTreeSet};

use bellwire_protocol::limits::{DEVICE_FRAME_MAX_BYTES, TOPIC_BYTES_MAX, TOPICS_MAX};
use serde::Serialize;

/// Wishes that may wait for an answer: all topics of a device left, and as many joined.
pub(crate) const WISHES_MAX: usize = 2 * TOPICS_MAX;

/// Room for names in one request, in bytes of JSON: the frame has a type and a bracket around them.
const REQUEST_NAMES_MAX_BYTES: usize = DEVICE_FRAME_MAX_BYTES - 64;

/// How often the server may end a session over a request before the client stops asking. A session that breaks otherwise does not
/// count.
const BLAMES_MAX: u8 = 3;

// A single name fits, even when every byte of it is written as an escape of six.
const _: () = assert!(name_bytes_at_most(TOPIC_BYTES_MAX) <= REQUEST_NAMES_MAX_BYTES);

const fn name_bytes_at_most(bytes: usize) -> usize {
    bytes * 6 + 3
}

/// What is known of the topics of this device.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[non_exhaustive]
pub struct Subscriptions {
    /// All topics that the device was a member of when the server last said so, sorted; `None`: it never did.
    pub topics: Option<Vec<String>>,
    /// Asked to join, and not answered yet.
    pub joining: Vec<String>,
    /// Asked to leave, and not answered yet.
    pub leaving: Vec<String>,
}

/// What the app wants of a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    Join,
    Leave,
}

#[derive(Debug)]
struct Pending {
    wish: Wish,
    /// Told apart from a later wish for the same topic.
    number: u64,
    /// Sessions that the server ended over it.
    blames: u8,
}

/// A request that was said and waits for its answer.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) wish: Wish,
    names: Vec<(String, u64)>,
}

impl Request {
    pub(crate) fn topics(&self) -> Vec<String> {
        self.names.iter().map(|(name, _)| name.clone()).collect()
    }
}

/// Too many wishes wait for an answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Full;

/// All wishes of one client.
#[derive(Debug, Default)]
pub(crate) struct Wishes {
    confirmed: Option<BTreeSet<String>>,
    pending: BTreeMap<String, Pending>,
    /// The full set is asked for although nothing is to change.
    ask: bool,
    last_number: u64,
}

impl Wishes {
    /// What an earlier process left behind.
    pub(crate) fn from_earlier(earlier: Subscriptions) -> Self {
        let mut wishes = Self {
            confirmed: earlier
                .topics
                .map(|topics| topics.into_iter().take(TOPICS_MAX).collect()),
            ..Self::default()
        };
        for (wish, names) in [
            (Wish::Leave, earlier.leaving),
            (Wish::Join, earlier.joining),
        ] {
            // No names would be a question. The writer kept the limit; a file that somebody else wrote may not.
            if !names.is_empty() {
                let _ = wishes.want(wish, names);
            }
        }
        wishes
    }

    pub(crate) fn subscriptions(&self) -> Subscriptions {
        let wanted = |wish| {
            let pending = self.pending.iter();
            let such = pending.filter(|(_, pending)| pending.wish == wish);
            such.map(|(name, _)| name.clone()).collect()
        };
        Subscriptions {
            topics: self
                .confirmed
                .as_ref()
                .map(|topics| topics.iter().cloned().collect()),
            joining: wanted(Wish::Join),
            leaving: wanted(Wish::Leave),
        }
    }

    /// The app wants this; of two wishes for one topic the later one counts. None at all: it only asks.
    pub(crate) fn want(&mut self, wish: Wish, names: Vec<String>) -> Result<(), Full> {
        let names: BTreeSet<String> = names.into_iter().collect();
        let new = names
            .iter()
            .filter(|name| !self.pending.contains_key(*name));
        if self.pending.len() + new.count() > WISHES_MAX {
            return Err(Full);
        }
        self.ask |= names.is_empty();
        for name in names {
            self.last_number += 1;
            let pending = Pending {
                wish,
                number: self.last_number,
                blames: 0,
            };
            self.pending.insert(name, pending);
        }
        Ok(())
    }

    /// What is to be said next: first what is left, because a device has a limited number of topics.
    pub(crate) fn next_request(&self) -> Option<Request> {
        for wish in [Wish::Leave, Wish::Join] {
            let mut room = REQUEST_NAMES_MAX_BYTES;
            let mut names = Vec::new();
            for (name, pending) in self.pending.iter().filter(|(_, one)| one.wish == wish) {
                let Some(left) = room.checked_sub(written_bytes(name)) else {
                    break;
                };
                if names.len() == TOPICS_MAX {
                    break;
                }
                room = left;
                names.push((name.clone(), pending.number));
                // A name that the server once would not have goes alone, so that the others do not suffer with it.
                if pending.blames > 0 {
                    if names.len() > 1 {
                        names.pop();
                    }
                    break;
                }
            }
            if !names.is_empty() {
                return Some(Request { wish, names });
            }
        }
        self.ask.then(|| Request {
            wish: Wish::Join,
            names: Vec::new(),
        })
    }

    /// The server named all topics of the device; `request` is what it answered. Answers with what was asked for and did not
    /// come true.
    pub(crate) fn confirm(&mut self, request: Option<Request>, topics: &[String]) -> Vec<String> {
        let confirmed: BTreeSet<String> = topics.iter().cloned().collect();
        let mut refused = Vec::new();
        if let Some(request) = request {
            self.ask &= !request.names.is_empty();
            for (name, number) in request.names {
                // The app has changed its mind since: that is said next.
                if self
                    .pending
                    .get(&name)
                    .is_none_or(|one| one.number != number)
                {
                    continue;
                }
                self.pending.remove(&name);
                if confirmed.contains(&name) != (request.wish == Wish::Join) {
                    refused.push(name);
                }
            }
        }
        self.confirmed = Some(confirmed);
        refused
    }

    /// The server ended the session because of what was said while `request` waited. Answers with what is not asked for any more.
    pub(crate) fn blame(&mut self, request: Request) -> Vec<String> {
        let mut given_up = Vec::new();
        for (name, number) in request.names {
            let Some(pending) = self.pending.get_mut(&name) else {
                continue;
            };
            if pending.number != number {
                continue;
            }
            pending.blames += 1;
            if pending.blames >= BLAMES_MAX {
                self.pending.remove(&name);
                given_up.push(name);
            }
        }
        given_up
    }
}

/// How many bytes a name takes in JSON, with quotation marks and comma; never less than in CBOR.
fn written_bytes(name: &str) -> usize {
    let escaped = |byte: u8| match byte {
        b'"' | b'\\' => 2,
        0..0x20 => 6,
        _ => 1,
    };
    name.bytes().map(escaped).sum::<usize>() + 3
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use bellwire_protocol::{Codec, DeviceFrame, Topics};

    fn names(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// `+a b` or `-a b`.
    fn told(request: &Option<Request>) -> String {
        let Some(request) = request else {
            return String::new();
        };
        let sign = match request.wish {
            Wish::Join => '+',
            Wish::Leave => '-',
        };
        format!("{sign}{}", request.topics().join(" "))
    }

    #[test]
    fn a_wish_is_said_until_it_is_answered_and_not_again() {
        let mut wishes = Wishes::default();
        wishes.want(Wish::Join, names("news staff")).unwrap();
        // The session breaks, twice.
        for _ in 0..2 {
            assert_eq!(told(&wishes.next_request()), "+news staff");
        }
        let request = wishes.next_request();
        assert_eq!(wishes.confirm(request, &names("news old")), ["staff"]);
        assert_eq!(told(&wishes.next_request()), "");
        let known = wishes.subscriptions();
        assert_eq!(known.topics, Some(names("news old")));
        assert!(known.joining.is_empty() && known.leaving.is_empty());
    }

    #[test]
    fn what_is_left_goes_before_what_is_joined() {
        let mut wishes = Wishes::default();
        wishes.want(Wish::Join, names("b")).unwrap();
        wishes.want(Wish::Leave, names("a")).unwrap();
        let request = wishes.next_request();
        assert_eq!(told(&request), "-a");
        assert_eq!(wishes.confirm(request, &names("x")), [""; 0]);
        let request = wishes.next_request();
        assert_eq!(told(&request), "+b");
        // It may not leave what the backend set.
        wishes.want(Wish::Leave, names("x")).unwrap();
        wishes.confirm(request, &names("b x"));
        let request = wishes.next_request();
        assert_eq!(wishes.confirm(request, &names("b x")), ["x"]);
    }

    #[test]
    fn of_two_wishes_for_one_topic_the_later_one_counts_even_while_the_first_is_under_way() {
        let mut wishes = Wishes::default();
        wishes.want(Wish::Join, names("a")).unwrap();
        let request = wishes.next_request();
        wishes.want(Wish::Leave, names("a")).unwrap();
        assert_eq!(wishes.confirm(request, &names("a")), [""; 0]);
        let request = wishes.next_request();
        assert_eq!(told(&request), "-a");
        wishes.confirm(request, &[]);
        assert_eq!(
            wishes.subscriptions(),
            Subscriptions {
                topics: Some(Vec::new()),
                ..Subscriptions::default()
            }
        );
    }

    #[test]
    fn a_word_that_nobody_asked_for_changes_what_is_known_and_no_wish() {
        let mut wishes = Wishes::default();
        wishes.want(Wish::Join, names("a")).unwrap();
        assert_eq!(wishes.confirm(None, &names("b")), [""; 0]);
        assert_eq!(told(&wishes.next_request()), "+a");
        assert_eq!(wishes.subscriptions().topics, Some(names("b")));
    }

    #[test]
    fn an_empty_wish_asks_for_the_full_set_once() {
        let mut wishes = Wishes::default();
        wishes.want(Wish::Join, Vec::new()).unwrap();
        let request = wishes.next_request();
        assert_eq!(told(&request), "+");
        wishes.confirm(request, &names("a"));
        assert_eq!(told(&wishes.next_request()), "");
    }

    #[test]
    fn there_is_a_limit_and_a_wish_beyond_it_changes_nothing() {
        let mut wishes = Wishes::default();
        let many = |prefix: &str, count: usize| -> Vec<String> {
            (0..count).map(|n| format!("{prefix}{n}")).collect()
        };
        wishes.want(Wish::Join, many("a", TOPICS_MAX)).unwrap();
        wishes.want(Wish::Leave, many("b", TOPICS_MAX)).unwrap();
        assert_eq!(wishes.want(Wish::Join, names("a1 new")), Err(Full));
        assert_eq!(wishes.subscriptions().joining.len(), TOPICS_MAX);
        // What waits already may still change.
        wishes.want(Wish::Leave, names("a1")).unwrap();
    }

    #[test]
    fn every_request_fits_into_a_frame_in_both_codecs() {
        let mut wishes = Wishes::default();
        let worst = |n: usize| format!("{}{n:03}", "\u{1}".repeat(TOPIC_BYTES_MAX - 3));
        wishes
            .want(Wish::Join, (0..TOPICS_MAX).map(worst).collect())
            .unwrap();
        let mut joined: Vec<String> = Vec::new();
        while let Some(request) = wishes.next_request() {
            let topics = request.topics();
            assert!(!topics.is_empty());
            for codec in [Codec::Json, Codec::Cbor] {
                let frame = DeviceFrame::Subscribe(Topics {
                    topics: topics.clone(),
                });
                assert!(codec.encode_device(&frame).len() <= DEVICE_FRAME_MAX_BYTES);
            }
            joined.extend(topics);
            assert_eq!(wishes.confirm(Some(request), &joined), [""; 0]);
        }
        assert_eq!(joined.len(), TOPICS_MAX);
    }

    #[test]
    fn a_name_over_which_the_server_ends_sessions_is_given_up_and_the_others_are_not() {
        let mut wishes = Wishes::default();
        wishes.want(Wish::Join, names("bad good")).unwrap();
        let mut given_up = Vec::new();
        let mut joined = Vec::new();
        for _ in 0..10 {
            let Some(request) = wishes.next_request() else {
                break;
            };
            if request.topics().contains(&"bad".to_owned()) {
                given_up.extend(wishes.blame(request));
            } else {
                joined.extend(request.topics());
                wishes.confirm(Some(request), &joined);
            }
        }
        assert_eq!(given_up, ["bad"]);
        assert_eq!(joined, ["good"]);
    }

    #[test]
    fn a_restart_goes_on_with_what_was_not_answered() {
        let fresh = Wishes::from_earlier(Subscriptions::default());
        assert_eq!(told(&fresh.next_request()), "");
        let mut wishes = Wishes::default();
        wishes.want(Wish::Join, names("a b")).unwrap();
        let request = wishes.next_request();
        wishes.confirm(request, &names("a b"));
        wishes.want(Wish::Leave, names("a")).unwrap();
        wishes.want(Wish::Join, names("c")).unwrap();
        let again = Wishes::from_earlier(wishes.subscriptions());
        assert_eq!(again.subscriptions(), wishes.subscriptions());
        assert_eq!(told(&again.next_request()), "-a");
    }
}
