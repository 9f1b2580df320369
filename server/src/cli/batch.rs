//! `bellwire ping --batch`: many pings out of a file, one a line, sent in batches as large as a server takes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read as _};
use std::path::Path;

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
        let batch = gather(&mut *input, &mut number, &mut kept)
            .map_err(|error| unreadable(file, &error))?;
        if batch.numbers.is_empty() {
            break;
        }
        read += batch.bytes.len() as u64;
        send(&api, batch, args.json, &mut tally).await?;
        progress.bytes("send", read.min(size.max(1)), size);
    }
    progress.done();
    tell(&tally, args.json)
}

/// Lines of one request, and their numbers in the file.
#[derive(Default)]
struct Lines {
    bytes: Vec<u8>,
    numbers: Vec<u64>,
}

/// Reads as many lines as one request takes; the one that is too many waits in `kept`. A line that is longer than servers take is
/// cut a little behind that, so that it is refused at its place.
fn gather(
    input: &mut dyn BufRead,
    number: &mut u64,
    kept: &mut Option<Vec<u8>>,
) -> std::io::Result<Lines> {
    let mut lines = Lines::default();
    while lines.numbers.len() < LINES_MAX {
        let line = match kept.take() {
            Some(line) => line,
            None => {
                let mut line = Vec::new();
                // What is longer is cut, and refused by the server for its length.
                if (&mut *input)
                    .take(LINE_MAX as u64 + 2)
                    .read_until(b'\n', &mut line)?
                    == 0
                {
                    break;
                }
                if line.last() != Some(&b'\n') {
                    input.skip_until(b'\n')?;
                    line.push(b'\n');
                }
                *number += 1;
                line
            }
        };
        if line.trim_ascii().is_empty() {
            continue;
        }
        if lines.bytes.len() + line.len() > BYTES_MAX && !lines.numbers.is_empty() {
            *kept = Some(line);
            break;
        }
        lines.bytes.extend_from_slice(&line);
        lines.numbers.push(*number);
    }
    Ok(lines)
}

async fn send(api: &Api, lines: Lines, as_json: bool, tally: &mut Tally) -> Outcome {
    let Lines { bytes, numbers } = lines;
    let mut waiting = Vec::new();
    let mut answered = 0;
    let sent = api
        .batch(Bytes::from(bytes), &mut |piece| {
            waiting.extend_from_slice(piece);
            while let Some(end) = waiting.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = waiting.drain(..=end).collect();
                let number = numbers.get(answered).copied().ok_or_else(strange)?;
                take(&line, number, as_json, tally)?;
                answered += 1;
            }
            if waiting.len() > ANSWER_LINE_MAX {
                return Err(strange());
            }
            Ok(())
        })
        .await;
    let missing = numbers.get(answered).copied();
    match (sent, missing) {
        (Ok(()), None) => Ok(()),
        (Ok(()), Some(_)) => Err(strange()),
        (Err(failure), Some(first)) => {
            let last = numbers.last().copied().unwrap_or(first);
            Console::err().line(&format!(
                "{} lines were accepted, {} refused; of lines {first} to {last} nothing is known: send them again (safe where they \
                 have an idempotency_key); nothing behind them was sent",
                tally.accepted, tally.refused
            ));
            Err(failure)
        }
        (Err(failure), None) => Err(failure),
    }
}

/// Takes the answer to one line; its number in the request becomes that in the file.
fn take(line: &[u8], number: u64, as_json: bool, tally: &mut Tally) -> Outcome {
    let mut answer: Value = serde_json::from_slice(line).map_err(|_| strange())?;
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
        let first = gather(&mut input, &mut number, &mut kept).unwrap();
        assert_eq!(first.numbers.len(), LINES_MAX);
        assert_eq!(first.numbers[..2], [2, 4]);
        let second = gather(&mut input, &mut number, &mut kept).unwrap();
        assert_eq!(second.numbers, [1_003, 1_004, 1_005]);
        assert!(second.bytes.ends_with(b"x\nlast\n"));
        // Cut, and still too long for the server.
        assert_eq!(second.bytes.len(), 2 + LINE_MAX + 3 + 5);
        let third = gather(&mut input, &mut number, &mut kept).unwrap();
        assert!(third.numbers.is_empty());
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
            if lines.numbers.is_empty() {
                break;
            }
            assert!(lines.bytes.len() <= BYTES_MAX);
            found.extend(lines.numbers);
        }
        assert_eq!(found, (1..=9).collect::<Vec<_>>());
    }
}
