//! `bellwire ping --batch`: many pings out of a file, one a line, sent in batches as large as a server takes.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs};
use super::key::text;
use super::progress::Progress;
use super::{Console, Failure, Outcome, plain};

/// Most lines of one request, as the server has it.
const LINES_MAX: usize = 1_000;
/// Most bytes of one request: less than the server takes.
const BYTES_MAX: usize = 4 << 20;
/// Longest line, as the server has it.
const LINE_MAX: usize = 1 << 20;
/// Most bytes of one line of an answer.
const ANSWER_LINE_MAX: usize = 1 << 20;
/// So many times lines are sent again in a row without one of them being accepted.
const TRIES_MAX: u32 = 3;
/// Longest pause before that, seconds, whatever the server says.
const PAUSE_MAX_S: u64 = 30;
/// Refused lines that are shown one by one.
const SHOWN: usize = 20;

/// What became of the lines so far.
#[derive(Default)]
struct Tally {
    accepted: u64,
    devices: u64,
    rejected: u64,
    refused: u64,
    /// The first of those refused: line, code, what is wrong.
    shown: Vec<(u64, String, String)>,
}

pub(crate) async fn run(file: &Path, args: &ApiArgs) -> Outcome {
    let api = Api::find(args)?;
    let (mut input, size): (Box<dyn BufRead>, u64) = if file == Path::new("-") {
        (Box::new(BufReader::new(std::io::stdin())), 0)
    } else {
        let opened = File::open(file).map_err(|error| unreadable(file, &error))?;
        let size = opened.metadata().map_or(0, |found| found.len());
        (Box::new(BufReader::new(opened)), size)
    };
    let mut progress = Progress::new(args.json);
    let mut tally = Tally::default();
    let (mut number, mut read) = (0, 0);
    let mut kept = None;
    loop {
        let lines = gather(&mut *input, &mut number, &mut kept)
            .map_err(|error| unreadable(file, &error))?;
        if lines.is_empty() {
            break;
        }
        read += lines.iter().map(|line| line.text.len() as u64).sum::<u64>();
        send(&api, lines, args.json, &mut tally).await?;
        progress.bytes("send", read.min(size.max(1)), size);
    }
    progress.done();
    tell(&tally, args.json)
}

/// A line and its number in the file.
struct Line {
    number: u64,
    /// With its end.
    text: Vec<u8>,
}

impl Line {
    /// Whether it can be sent again without a second ping, after the server had no room for it.
    fn may_repeat(&self, code: &str) -> bool {
        // These are refused before anything else happens.
        if matches!(code, "rate_limited" | "memory_reserve") {
            return true;
        }
        let ping: Value = serde_json::from_slice(&self.text).unwrap_or(Value::Null);
        ping.get("idempotency_key").is_some_and(Value::is_string)
    }
}

/// Whom lines address that were accepted.
#[derive(Default)]
struct Addressed {
    devices: HashSet<String>,
    users: HashSet<String>,
}

impl Addressed {
    /// Topics and everyone are not here: such a ping takes its place in a mailbox when it arrives there.
    fn by(line: &Line) -> Addressed {
        let ping: Value = serde_json::from_slice(&line.text).unwrap_or(Value::Null);
        let named = |one: &str, several: &str| {
            let to = ping.get("to");
            let one = to.and_then(|to| to.get(one)).into_iter();
            let several = to.and_then(|to| to.get(several)).and_then(Value::as_array);
            one.chain(several.into_iter().flatten())
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        };
        Addressed {
            devices: named("device", "devices"),
            users: named("user", "users"),
        }
    }

    fn add(&mut self, other: Addressed) {
        self.devices.extend(other.devices);
        self.users.extend(other.users);
    }

    /// Whether both may have reached one device. Who owns which is not known here.
    fn may_meet(&self, other: &Addressed) -> bool {
        let mixed =
            |one: &HashSet<String>, other: &HashSet<String>| !one.is_empty() && !other.is_empty();
        !self.devices.is_disjoint(&other.devices)
            || !self.users.is_disjoint(&other.users)
            || mixed(&self.devices, &other.users)
            || mixed(&self.users, &other.devices)
    }
}

/// Of the lines to be sent again (`again`, by place, in order), those that would arrive behind a later line to the same device
/// (`accepted`, by place, in order).
fn overtaken(lines: &[Line], again: &[usize], accepted: &[usize]) -> HashSet<usize> {
    let mut later = Addressed::default();
    let mut accepted = accepted.iter().rev().peekable();
    let mut overtaken = HashSet::new();
    for &place in again.iter().rev() {
        while let Some(&behind) = accepted.next_if(|behind| **behind > place) {
            later.add(Addressed::by(&lines[behind]));
        }
        if later.may_meet(&Addressed::by(&lines[place])) {
            overtaken.insert(place);
        }
    }
    overtaken
}

/// Reads as many lines as one request takes; the one that is too many waits in `kept`. A line that is longer than servers take is
/// cut a little behind that, so that it is refused at its place.
fn gather(
    input: &mut dyn BufRead,
    number: &mut u64,
    kept: &mut Option<Line>,
) -> std::io::Result<Vec<Line>> {
    let mut lines = Vec::new();
    let mut bytes = 0;
    while lines.len() < LINES_MAX {
        let line = match kept.take() {
            Some(line) => line,
            None => {
                let mut text = Vec::new();
                let mut limited = (&mut *input).take(LINE_MAX as u64 + 2);
                if limited.read_until(b'\n', &mut text)? == 0 {
                    break;
                }
                if text.last() != Some(&b'\n') {
                    input.skip_until(b'\n')?;
                    text.push(b'\n');
                }
                *number += 1;
                Line {
                    number: *number,
                    text,
                }
            }
        };
        if line.text.trim_ascii().is_empty() {
            continue;
        }
        if bytes + line.text.len() > BYTES_MAX && !lines.is_empty() {
            *kept = Some(line);
            break;
        }
        bytes += line.text.len();
        lines.push(line);
    }
    Ok(lines)
}

/// Sends lines, and again those for which the server had no room, as long as that brings something. One that a later line to the same
/// device has overtaken meanwhile is refused: each device is reached in the order of the file.
async fn send(api: &Api, mut lines: Vec<Line>, as_json: bool, tally: &mut Tally) -> Outcome {
    let mut fruitless = 0;
    loop {
        let before = tally.accepted;
        let (again, pause) = post(api, &lines, as_json, fruitless < TRIES_MAX, tally).await?;
        if again.is_empty() {
            return Ok(());
        }
        fruitless = if tally.accepted > before {
            0
        } else {
            fruitless + 1
        };
        let mut place = 0;
        lines.retain(|_| {
            place += 1;
            again.binary_search(&(place - 1)).is_ok()
        });
        tokio::time::sleep(pause).await;
    }
}

/// Sends lines once. Answers the places of those to send again, and when.
async fn post(
    api: &Api,
    lines: &[Line],
    as_json: bool,
    may_repeat: bool,
    tally: &mut Tally,
) -> Result<(Vec<usize>, Duration), Failure> {
    let bytes: Vec<u8> = lines
        .iter()
        .flat_map(|line| line.text.iter().copied())
        .collect();
    let mut waiting = Vec::new();
    let mut answered = 0;
    let mut again: Vec<(usize, Value)> = Vec::new();
    let mut accepted = Vec::new();
    let mut pause = Duration::ZERO;
    let sent = api
        .batch(Bytes::from(bytes), &mut |piece| {
            waiting.extend_from_slice(piece);
            while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
                let answer: Vec<u8> = waiting.drain(..=end).collect();
                let answer: Value = serde_json::from_slice(&answer).map_err(|_| strange())?;
                let line = lines.get(answered).ok_or_else(strange)?;
                let problem = answer.get("problem").unwrap_or(&Value::Null);
                match problem.get("retry_after_s").and_then(Value::as_u64) {
                    Some(seconds) if may_repeat && line.may_repeat(&text(problem, "code")) => {
                        again.push((answered, answer));
                        pause = pause.max(Duration::from_secs(seconds.min(PAUSE_MAX_S)));
                    }
                    Some(_) | None => {
                        if problem.is_null() {
                            accepted.push(answered);
                        }
                        take(answer, line.number, as_json, tally)?;
                    }
                }
                answered += 1;
            }
            if waiting.len() > ANSWER_LINE_MAX {
                return Err(strange());
            }
            Ok(())
        })
        .await;
    let unknown = &lines[answered.min(lines.len())..];
    match (sent, unknown.first()) {
        (Ok(()), None) => {
            let places: Vec<usize> = again.iter().map(|(place, _)| *place).collect();
            let overtaken = overtaken(lines, &places, &accepted);
            for (place, answer) in again {
                if overtaken.contains(&place) {
                    take(answer, lines[place].number, as_json, tally)?;
                }
            }
            let again = places
                .into_iter()
                .filter(|place| !overtaken.contains(place));
            Ok((again.collect(), pause))
        }
        (Ok(()), Some(_)) => Err(strange()),
        (Err(failure), first) => {
            if let Some(first) = first {
                Console::err().line(&format!(
                    "{} lines were accepted, {} refused and {} are still to be sent again; of {} lines from line {} on nothing \
                     is known: send them again (safe where they have an idempotency_key); nothing behind them was sent",
                    tally.accepted,
                    tally.refused,
                    again.len(),
                    unknown.len(),
                    first.number
                ));
            }
            Err(failure)
        }
    }
}

/// Takes the answer to one line; its number in the request becomes that in the file.
fn take(mut answer: Value, number: u64, as_json: bool, tally: &mut Tally) -> Outcome {
    let count = |name: &str| answer.get(name).and_then(Value::as_u64).unwrap_or(0);
    let rejected = answer
        .get("rejected")
        .and_then(Value::as_array)
        .map_or(0, Vec::len);
    if count("status") / 100 == 2 {
        tally.accepted += 1;
        tally.devices += count("devices");
        tally.rejected += rejected as u64;
    } else {
        tally.refused += 1;
        if tally.shown.len() < SHOWN {
            let problem = answer.get("problem").unwrap_or(&Value::Null);
            tally
                .shown
                .push((number, text(problem, "code"), text(problem, "detail")));
        }
    }
    if as_json {
        let object = answer.as_object_mut().ok_or_else(strange)?;
        object.insert("line".to_owned(), json!(number));
        Console::out().line(&answer.to_string());
    }
    Ok(())
}

fn tell(tally: &Tally, as_json: bool) -> Outcome {
    let out = Console::out();
    if !as_json {
        out.pairs(&[
            ("accepted", format!("{} lines", tally.accepted)),
            ("devices", tally.devices.to_string()),
            ("refused", format!("{} lines", tally.refused)),
        ]);
        let rows: Vec<Vec<String>> = tally
            .shown
            .iter()
            .map(|(line, code, detail)| vec![line.to_string(), code.clone(), plain(detail)])
            .collect();
        if !rows.is_empty() {
            out.table(&["LINE", "CODE", "WHAT IS WRONG"], &rows);
        }
        if tally.refused > tally.shown.len() as u64 {
            out.line("There are more; --json tells all of them.");
        }
    }
    if tally.refused + tally.rejected > 0 {
        return Err(Failure::new(
            format!(
                "refused: {} of {} lines, and {} of {} devices of the others",
                tally.refused,
                tally.refused + tally.accepted,
                tally.rejected,
                tally.devices
            ),
            "mend these lines and send them again; what was accepted needs nothing",
        ));
    }
    Ok(())
}

fn unreadable(file: &Path, error: &std::io::Error) -> Failure {
    Failure::usage(
        format!("{}: {error}", file.display()),
        "name a file that can be read, or - for standard input",
    )
}

fn strange() -> Failure {
    Failure::new(
        "the answer is not that of a batch",
        "is this the API of a bellwire server of this version?",
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_file_is_cut_into_requests_and_lines_keep_their_numbers() {
        let long = "x".repeat(LINE_MAX + 100);
        let text = format!("\na\n\n{}{long}\nlast", "b\n".repeat(LINES_MAX));
        let mut input = text.as_bytes();
        let (mut number, mut kept) = (0, None);
        let numbers = |lines: &[Line]| lines.iter().map(|line| line.number).collect::<Vec<_>>();
        let first = gather(&mut input, &mut number, &mut kept).unwrap();
        assert_eq!(first.len(), LINES_MAX);
        assert_eq!(numbers(&first)[..2], [2, 4]);
        let second = gather(&mut input, &mut number, &mut kept).unwrap();
        assert_eq!(numbers(&second), [1_003, 1_004, 1_005]);
        assert_eq!(second[0].text, b"b\n");
        // Cut, and still too long for the server.
        assert_eq!(second[1].text.len(), LINE_MAX + 3);
        assert_eq!(second[2].text, b"last\n");
        assert!(
            gather(&mut input, &mut number, &mut kept)
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_request_stays_below_the_size_that_servers_take() {
        let line = format!("{}\n", "y".repeat(LINE_MAX - 1));
        let text = line.repeat(9);
        let mut input = text.as_bytes();
        let (mut number, mut kept) = (0, None);
        let mut found = Vec::new();
        loop {
            let lines = gather(&mut input, &mut number, &mut kept).unwrap();
            if lines.is_empty() {
                break;
            }
            assert!(lines.iter().map(|line| line.text.len()).sum::<usize>() <= BYTES_MAX);
            found.extend(lines.into_iter().map(|line| line.number));
        }
        assert_eq!(found, (1..=9).collect::<Vec<_>>());
    }

    #[test]
    fn a_line_that_was_overtaken_on_its_way_to_a_device_is_not_sent_again() {
        let lines: Vec<Line> = [
            r#"{"to": {"device": "a"}}"#,
            r#"{"to": {"devices": ["b", "c"]}}"#,
            r#"{"to": {"device": "d"}}"#,
            r#"{"to": {"topic": "t"}}"#,
            r#"{"to": {"device": "c"}}"#,
            r#"{"to": {"device": "a"}}"#,
            r#"{"to": {"everyone": true}}"#,
        ]
        .into_iter()
        .map(|text| Line {
            number: 1,
            text: text.as_bytes().to_vec(),
        })
        .collect();
        let found = |again: &[usize], accepted: &[usize]| {
            let mut found: Vec<_> = overtaken(&lines, again, accepted).into_iter().collect();
            found.sort_unstable();
            found
        };
        assert_eq!(found(&[0, 1, 2, 3], &[4, 6]), [1]);
        assert_eq!(found(&[0, 1, 2, 5], &[3, 4]), [1]);
        assert_eq!(found(&[1, 4], &[0, 2, 5]), [0_usize; 0]);
        assert_eq!(found(&[0, 1], &[4, 5]), [0, 1]);
        // Who owns which device is not known here.
        let mixed: Vec<Line> = [r#"{"to": {"user": "ana"}}"#, r#"{"to": {"device": "a"}}"#]
            .into_iter()
            .map(|text| Line {
                number: 1,
                text: text.as_bytes().to_vec(),
            })
            .collect();
        assert_eq!(overtaken(&mixed, &[0], &[1]).len(), 1);
    }

    #[test]
    fn only_what_makes_no_second_ping_is_sent_again() {
        let line = |text: &str| Line {
            number: 1,
            text: text.as_bytes().to_vec(),
        };
        let plain = line(r#"{"to": {"user": "ana"}, "idempotency_key": null}"#);
        assert!(plain.may_repeat("rate_limited"));
        assert!(!plain.may_repeat("store_busy"));
        assert!(
            line(r#"{"to": {"user": "ana"}, "idempotency_key": "k"}"#).may_repeat("store_busy")
        );
    }
}
