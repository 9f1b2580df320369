//! `bellwire events`: outcomes as they happen.

use std::time::Duration;

use bellwire_server::runtime::Outcome as Ending;
use clap::Args;
use clap::builder::PossibleValuesParser;
use serde_json::Value;

use super::api::{Api, ApiArgs, encode};
use super::console::Paint;
use super::failure::Trouble;
use super::outcomes::{heading, row};
use super::{Console, Failure, Outcome, plain};

/// Longest event: far longer than any that a server writes.
const EVENT_MAX: usize = 64 << 10;
/// Waits before asking again after the stream broke off: first and longest.
const PAUSE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

const AFTER_HELP: &str = "\
Examples:
  bellwire events                                    what ends from now on
  bellwire events --from oldest --count 1000 --json  the first thousand that are kept
  bellwire events --from o0000000c00000155           what came after the event with this id
  bellwire events --outcome expired,evicted          what was lost, as it happens

With --json there is one object a line: {\"id\", \"event\", \"data\"}. A `gap` says that outcomes may be missing there, and why.
A stream that breaks off is taken up again behind the last event that was printed; it ends with --count, or with Ctrl-C.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct EventsArgs {
    /// Where to begin: `now`, `oldest`, or behind the event with this id
    #[arg(long, value_name = "WHERE", default_value = "now")]
    from: String,
    /// Only the outcomes of this ping
    #[arg(long, value_name = "ID", help_heading = "Which")]
    ping: Option<String>,
    /// Only the outcomes of this device
    #[arg(long, value_name = "ID", help_heading = "Which")]
    device: Option<String>,
    /// Only those that ended so; more of them with commas between them
    #[arg(long, value_name = "OUTCOME", value_delimiter = ',', help_heading = "Which",
          value_parser = PossibleValuesParser::new(Ending::ALL.map(Ending::as_str)))]
    outcome: Vec<String>,
    /// End after so many events
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

impl EventsArgs {
    /// What to ask for, from here on.
    fn path(&self, from: &str) -> String {
        let mut path = format!("/v1/events?from={}", encode(from));
        for (name, value) in [("ping", &self.ping), ("device", &self.device)] {
            if let Some(value) = value {
                path += &format!("&{name}={}", encode(value));
            }
        }
        if !self.outcome.is_empty() {
            path += &format!("&outcome={}", encode(&self.outcome.join(",")));
        }
        path
    }
}

pub(crate) async fn run(args: &EventsArgs) -> Outcome {
    let api = Api::find(&args.api)?;
    let mut reader = Reader {
        text: Vec::new(),
        last: args.from.clone(),
        left: args.count,
        json: args.api.json,
        heard: false,
        headed: false,
    };
    let mut pause = PAUSE.0;
    let mut ever = false;
    loop {
        reader.text.clear();
        reader.heard = false;
        let path = args.path(&reader.last);
        let ended = api.download(&path, &mut |bytes| reader.take(bytes)).await;
        if reader.left == Some(0) {
            return Ok(());
        }
        ever |= reader.heard;
        let why = match ended {
            Ok(()) => "the server ended the stream".to_owned(),
            // What the server refuses, and a server that was never there, waiting does not help.
            Err(failure) if !ever || refused(&failure) => return Err(failure),
            Err(Failure::Trouble(Trouble { what, .. })) => what,
            Err(failure @ Failure::Config(_)) => return Err(failure),
        };
        if reader.heard {
            pause = PAUSE.0;
        }
        let err = Console::err();
        err.line(&err.paint(
            Paint::Dim,
            &format!("{}; asked again in {} s", plain(&why), pause.as_secs()),
        ));
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSE.1);
    }
}

/// Whether the server said no, and not only "not now".
fn refused(failure: &Failure) -> bool {
    match failure {
        Failure::Trouble(Trouble {
            api: Some((_, status)),
            ..
        }) => *status < 500,
        Failure::Trouble(_) | Failure::Config(_) => false,
    }
}

/// Reads server-sent events and prints them.
struct Reader {
    /// What came of an event that is not complete.
    text: Vec<u8>,
    /// Where to go on.
    last: String,
    left: Option<u64>,
    json: bool,
    /// Something came over this connection.
    heard: bool,
    /// The heading was printed.
    headed: bool,
}

impl Reader {
    fn take(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.heard = true;
        self.text.extend_from_slice(bytes);
        while let Some(end) = self.text.windows(2).position(|two| two == b"\n\n") {
            let event: Vec<u8> = self.text.drain(..end + 2).collect();
            self.event(&String::from_utf8_lossy(&event))?;
        }
        if self.text.len() > EVENT_MAX {
            return Err(Failure::new(
                "the answer is not a stream of events",
                "is this the API of a bellwire server?",
            ));
        }
        Ok(())
    }

    fn event(&mut self, event: &str) -> Result<(), Failure> {
        let field = |name: &str| {
            event.lines().find_map(|line| {
                let (field, value) = line.split_once(':')?;
                (field == name).then(|| value.strip_prefix(' ').unwrap_or(value))
            })
        };
        let id = field("id").unwrap_or_default();
        if let (Some(name), Some(data)) = (field("event"), field("data")) {
            let data: Value = serde_json::from_str(data).unwrap_or(Value::Null);
            self.print(id, name, &data);
            self.left = self.left.map(|left| left - 1);
        }
        if !id.is_empty() {
            self.last = id.to_owned();
        }
        if self.left == Some(0) {
            // Ends the download; whoever asked looks at `left` first.
            return Err(Failure::new("as many events as were asked for", ""));
        }
        Ok(())
    }

    fn print(&mut self, id: &str, name: &str, data: &Value) {
        let out = Console::out();
        if self.json {
            out.line(&serde_json::json!({"id": id, "event": name, "data": data}).to_string());
            return;
        }
        if !std::mem::replace(&mut self.headed, true) {
            out.line(&out.paint(Paint::Bold, &aligned(&heading().map(str::to_owned))));
        }
        if name == "gap" {
            let why = data.get("why").and_then(Value::as_str).unwrap_or("unknown");
            let told = format!("outcomes may be missing here: {}", plain(why));
            out.line(&out.paint(Paint::Yellow, &told));
        } else {
            out.line(&aligned(&row(data)));
        }
    }
}

/// The columns of a list that has no end, so that nobody knows how wide they will be.
fn aligned(cells: &[String]) -> String {
    const WIDTHS: [usize; 5] = [24, 12, 9, 26, 26];
    let cells = cells.iter().zip(WIDTHS);
    let line: String = cells
        .map(|(cell, width)| format!("{cell:<width$}  "))
        .collect();
    line.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn reader(left: Option<u64>) -> Reader {
        Reader {
            text: Vec::new(),
            last: "now".to_owned(),
            left,
            json: true,
            heard: false,
            headed: false,
        }
    }

    #[test]
    fn a_stream_is_read_however_it_is_cut() {
        let stream =
            b"retry: 2000\nid: o1\n\nid: o2\nevent: gap\ndata: {\"why\":\"lost\"}\n\nid: o3\n\n";
        for size in 1..stream.len() {
            let mut reader = reader(Some(5));
            for piece in stream.chunks(size) {
                reader.take(piece).unwrap();
            }
            assert_eq!((reader.last.as_str(), reader.left), ("o3", Some(4)));
            assert!(reader.text.is_empty());
        }
    }

    #[test]
    fn it_ends_with_the_event_that_was_asked_for() {
        let mut reader = reader(Some(1));
        let two = b"id: o1\nevent: outcome\ndata: {}\n\nid: o2\nevent: outcome\ndata: {}\n\n";
        assert!(reader.take(two).is_err());
        assert_eq!((reader.last.as_str(), reader.left), ("o1", Some(0)));
    }

    #[test]
    fn what_is_no_stream_of_events_is_said() {
        let mut reader = reader(None);
        assert!(reader.take(&vec![b'x'; EVENT_MAX + 1]).is_err());
    }
}
