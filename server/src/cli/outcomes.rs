//! `bellwire outcomes`: how notifications ended, by ping, by device, by user, by time.

use bellwire_server::runtime::Outcome as Ending;
use clap::Args;
use clap::builder::PossibleValuesParser;
use http::Method;
use serde_json::{Value, json};
use time::{Date, Month, OffsetDateTime, Time};

use super::api::{Api, ApiArgs, encode};
use super::console::Paint;
use super::key::text;
use super::{Console, Outcome, moment, now, plain};

/// Outcomes asked for at a time; the server may give fewer.
const PAGE: usize = 1_000;

const AFTER_HELP: &str = "\
Examples:
  bellwire outcomes                                   the last hundred
  bellwire outcomes --ping k5xw6ztqmfzwk3thonuw4zlsme
  bellwire outcomes --device mfrggzdfmztwq2lknnwg23tpoa --from 2h
  bellwire outcomes --user anna --outcome expired --from 2026-11-20T18:00:00Z --to 2026-11-21T06:00:00Z
  bellwire outcomes --limit 1000 --after n0000000c00000155 --json     the next page: `next` of the one before

A moment is a time back from now (30s, 15m, 2h, 3d), a date or date and time in UTC, or Unix milliseconds.
Lists know an outcome about a second after it happened; --ping knows it at once, and what still waits as well.
How far back outcomes go says `receipts.keep`.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct OutcomesArgs {
    /// Of this ping: what is known of each of its devices
    #[arg(long, value_name = "ID", help_heading = "Which",
          conflicts_with_all = ["device", "user", "outcome", "from", "to", "oldest_first"])]
    ping: Option<String>,
    /// Of this device
    #[arg(
        long,
        value_name = "ID",
        help_heading = "Which",
        conflicts_with = "user"
    )]
    device: Option<String>,
    /// Of the devices that this user has now
    #[arg(long, help_heading = "Which")]
    user: Option<String>,
    /// Only those that ended so
    #[arg(long, help_heading = "Which", value_parser = PossibleValuesParser::new(Ending::ALL.map(Ending::as_str)))]
    outcome: Option<String>,
    /// Only those that ended at this moment or later
    #[arg(long, value_name = "WHEN", value_parser = when, help_heading = "Which")]
    from: Option<u64>,
    /// Only those that ended before this moment
    #[arg(long, value_name = "WHEN", value_parser = when, help_heading = "Which")]
    to: Option<u64>,
    /// The oldest first; default: the newest
    #[arg(long, help_heading = "How")]
    oldest_first: bool,
    /// Stop after so many
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=100_000), help_heading = "How")]
    limit: u32,
    /// Go on where a listing with the same choices stopped: its `next`
    #[arg(long, value_name = "NEXT", help_heading = "How")]
    after: Option<String>,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

pub(crate) async fn run(args: &OutcomesArgs) -> Outcome {
    let (base, member) = match &args.ping {
        Some(ping) => (format!("/v1/pings/{}?", encode(ping)), "devices"),
        None => (listing(args), "outcomes"),
    };
    let api = Api::find(&args.api)?;
    let limit = usize::try_from(args.limit).unwrap_or(usize::MAX);
    let mut found = Vec::new();
    let mut after = args.after.clone();
    let next = loop {
        let mut path = format!("{base}limit={}", PAGE.min(limit - found.len()));
        if let Some(after) = &after {
            path.push_str(&format!("&after={}", encode(after)));
        }
        let page = api.ask(Method::GET, &path, None).await?;
        let some = page.get(member).and_then(Value::as_array);
        found.extend(some.cloned().unwrap_or_default());
        let next = page.get("next").and_then(Value::as_str).map(str::to_owned);
        // A server that gives the same place again would be asked for ever.
        if next.is_none() || next == after || found.len() >= limit {
            break next;
        }
        after = next;
    };
    let out = Console::out();
    if args.api.json {
        out.line(&json!({ member: found, "next": next }).to_string());
        return Ok(());
    }
    if args.ping.is_some() {
        out.table(
            &["DEVICE", "STATE", "AT"],
            &found.iter().map(state).collect::<Vec<_>>(),
        );
    } else {
        out.table(&heading(), &found.iter().map(row).collect::<Vec<_>>());
    }
    if let Some(next) = next {
        out.line(&out.paint(
            Paint::Dim,
            &format!(
                "There are more: raise --limit, or go on with --after {}",
                plain(&next)
            ),
        ));
    }
    Ok(())
}

/// The path of a list, up to where its page is named.
fn listing(args: &OutcomesArgs) -> String {
    let mut path = match &args.device {
        Some(device) => format!("/v1/devices/{}/outcomes?", encode(device)),
        None => "/v1/outcomes?".to_owned(),
    };
    let mut add = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            path.push_str(&format!("{name}={}&", encode(&value)));
        }
    };
    add("user", args.user.clone());
    add("outcome", args.outcome.clone());
    add("from_ms", args.from.map(|from| from.to_string()));
    add("to_ms", args.to.map(|to| to.to_string()));
    add("order", args.oldest_first.then(|| "oldest".to_owned()));
    path
}

/// The columns of a list of outcomes.
pub(crate) fn heading() -> [&'static str; 5] {
    ["ENDED", "OUTCOME", "AFTER", "PING", "DEVICE"]
}

/// One outcome in these columns.
pub(crate) fn row(entry: &Value) -> Vec<String> {
    let number = |name: &str| entry.get(name).and_then(Value::as_u64);
    let took = match (number("accepted_ms"), number("at_ms")) {
        (Some(accepted), Some(at)) => took(at.saturating_sub(accepted)),
        (None, _) | (_, None) => "-".to_owned(),
    };
    vec![
        number("at_ms").map(moment).unwrap_or_default(),
        text(entry, "outcome"),
        took,
        text(entry, "ping"),
        text(entry, "device"),
    ]
}

fn state(pair: &Value) -> Vec<String> {
    let number = |name: &str| pair.get(name).and_then(Value::as_u64);
    let at = match (number("at_ms"), number("expires_ms")) {
        (Some(at), _) => moment(at),
        (None, Some(expires)) => format!("expires {}", moment(expires)),
        (None, None) => String::new(),
    };
    vec![text(pair, "device"), text(pair, "state"), at]
}

/// A time for people, rounded.
fn took(ms: u64) -> String {
    match ms {
        0..10_000 => format!("{ms} ms"),
        10_000..600_000 => format!("{} s", ms / 1_000),
        600_000..36_000_000 => format!("{} min", ms / 60_000),
        _ => format!("{} h", ms / 3_600_000),
    }
}

/// A moment of the command line, Unix milliseconds.
fn when(text: &str) -> Result<u64, String> {
    let now_ms = u64::try_from(now().unix_timestamp_nanos() / 1_000_000).unwrap_or(0);
    let found = text
        .parse()
        .ok()
        .or_else(|| Some(now_ms.saturating_sub(back(text)?)))
        .or_else(|| calendar(text));
    found.ok_or_else(|| {
        "give a time back from now (30s, 15m, 2h, 3d), a date or date and time in UTC \
         (2026-11-21, 2026-11-21T14:00:00Z), or Unix milliseconds"
            .to_owned()
    })
}

/// A time back from now, milliseconds.
fn back(text: &str) -> Option<u64> {
    let unit_ms = match text.bytes().last()? {
        b's' => 1_000,
        b'm' => 60_000,
        b'h' => 3_600_000,
        b'd' => 86_400_000,
        _ => return None,
    };
    // The last byte is one of these letters, so the rest is whole as well.
    let number: u64 = text.get(..text.len() - 1)?.parse().ok()?;
    number.checked_mul(unit_ms)
}

/// A date, or a date and time, in UTC.
fn calendar(text: &str) -> Option<u64> {
    let (date, clock) = match text.split_once(['T', ' ']) {
        Some((date, clock)) => (date, clock.strip_suffix('Z').unwrap_or(clock)),
        None => (text, "00:00:00"),
    };
    let mut parts = date.splitn(3, '-');
    let year = parts.next()?.parse().ok()?;
    let month: u8 = parts.next()?.parse().ok()?;
    let day = parts.next()?.parse().ok()?;
    let date = Date::from_calendar_date(year, Month::try_from(month).ok()?, day).ok()?;
    let mut parts = clock.splitn(3, ':');
    let hour = parts.next()?.parse().ok()?;
    let minute = parts.next()?.parse().ok()?;
    let second = parts.next().map_or(Some(0), |text| text.parse().ok())?;
    let moment = OffsetDateTime::new_utc(date, Time::from_hms(hour, minute, second).ok()?);
    u64::try_from(moment.unix_timestamp_nanos() / 1_000_000).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn moments_are_read_in_every_form_and_nothing_else_is() {
        assert_eq!(when("1795250000000"), Ok(1_795_250_000_000));
        assert_eq!(calendar("1970-01-02"), Some(86_400_000));
        assert_eq!(calendar("1970-01-01T01:02:03Z"), Some(3_723_000));
        assert_eq!(calendar("1970-01-01 01:02"), Some(3_720_000));
        assert_eq!(back("15m"), Some(900_000));
        assert!(when("2h").unwrap() < when("1h").unwrap());
        for bad in [
            "",
            "h",
            "-1h",
            "yesterday",
            "2026-13-01",
            "2026-01-32",
            "2026-01-01T25:00",
            "1.5h",
            "99999999999999999999d",
            "1960-01-01",
            "ä",
        ] {
            assert!(when(bad).is_err(), "{bad}");
        }
    }
}
