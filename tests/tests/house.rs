//! The house rules that a compiler does not know: which module may know which, where time and
//! chance come in, how a file begins, and what never enters the repository.
//!
//! The rules are tables at the top; to change the house, change the table and say why in the same
//! commit. What a file imports is read from its text (comments, strings and `#[cfg(test)]` items
//! left out), so that a rule also holds for code that a feature or a platform leaves out.

#![allow(
    clippy::unwrap_used,
    reason = "a file that cannot be read is a failed test"
)]

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What one top-level module of `server/src` may know.
struct Room {
    name: &'static str,
    /// Modules of the server, besides itself.
    knows: &'static [&'static str],
    /// Crates of the workspace.
    crates: &'static [&'static str],
    /// Crates and items of the outside that it must not name.
    never: &'static [&'static str],
}

/// What keeps the core pure: nothing that waits, reads a clock, rolls dice or touches the system.
const IMPURE: &[&str] = &[
    "axum",
    "crossbeam_channel",
    "futures_util",
    "fjall",
    "http",
    "hyper",
    "hyper_util",
    "libc",
    "quinn",
    "rand",
    "rustix",
    "rustls",
    "sled",
    "socket2",
    "std::env",
    "std::fs",
    "std::net",
    "std::process",
    "std::thread",
    "std::time::Instant",
    "std::time::SystemTime",
    "tokio",
    "tokio_rustls",
    "tokio_tungstenite",
    "tokio_util",
    "tracing",
];

/// The arrows. They point inward: whoever stands further down may know those above, as listed.
const ROOMS: &[Room] = &[
    Room {
        name: "delivery",
        knows: &[],
        crates: &[],
        never: IMPURE,
    },
    Room {
        name: "ports",
        knows: &["delivery"],
        crates: &[],
        never: &["tokio", "sled", "fjall"],
    },
    // Names of metrics and events are one list that everyone but the core may read.
    Room {
        name: "telemetry",
        knows: &[],
        crates: &[],
        never: &[],
    },
    Room {
        name: "config",
        knows: &[],
        crates: &[],
        never: &[],
    },
    Room {
        name: "store",
        knows: &["ports", "delivery", "telemetry"],
        crates: &[],
        never: &["tokio"],
    },
    Room {
        name: "bridge",
        knows: &["ports", "delivery", "telemetry"],
        crates: &[],
        never: &[],
    },
    // The way out of the process: it knows what is asked of it, and nobody inside.
    Room {
        name: "outbound",
        knows: &["ports"],
        crates: &[],
        never: &[],
    },
    Room {
        name: "runtime",
        knows: &["ports", "delivery", "telemetry"],
        crates: &[],
        never: &[],
    },
    Room {
        name: "transport",
        knows: &["runtime", "ports", "delivery", "telemetry"],
        crates: &["bellwire_protocol"],
        never: &[],
    },
    Room {
        name: "http",
        knows: &["runtime", "delivery", "config", "telemetry"],
        crates: &["bellwire_protocol"],
        never: &[],
    },
    Room {
        name: "compat",
        knows: &["runtime", "delivery", "config", "telemetry"],
        crates: &["bellwire_protocol"],
        never: &[],
    },
];

/// The modules that put the others together and so may know them all.
const WIRING: &[&str] = &["main", "lib", "cli", "demo"];

/// Crates with one home, because what they bring must not spread.
const HOMES: &[(&str, &[&str])] = &[
    // Trees and keys are the store's secret, the format of its records too.
    ("bincode", &["store"]),
    ("crossbeam_epoch", &["store"]),
    ("fjall", &["store"]),
    ("sled", &["store"]),
    // The server contains no client; the demonstration plays both sides.
    ("bellwire_client", &["demo"]),
];

/// Endings of paths by which time or chance would come in by the back door.
const TIME_AND_CHANCE: &[&str] = &[
    "Instant::now",
    "SystemTime::now",
    "OffsetDateTime::now_utc",
    "UtcDateTime::now",
    "rand::rng",
    "rand::random",
    "thread_rng",
];

/// The only files where time and chance may come in, besides the wiring.
const TIME_AND_CHANCE_ADAPTERS: &[&str] = &[
    "server/src/runtime/clock.rs",
    "server/src/runtime/entropy.rs",
    // QUIC's own time: instants of the clock that its timers run by.
    "server/src/transport/quic/time.rs",
];

/// Crates that are pure as a whole: the same sources of impurity, and no other crate of ours.
const PURE_CRATES: &[&str] = &["protocol"];

/// Which crates of the workspace a crate may depend on, tests aside.
const CRATES: &[(&str, &[&str])] = &[
    ("protocol", &[]),
    ("certs", &[]),
    ("client-reference", &["bellwire-protocol"]),
    (
        "server",
        &["bellwire-protocol", "bellwire-certs", "bellwire-client"],
    ),
];

// ---------------------------------------------------------------------------------------------
// Reading Rust: tokens, then paths.

/// A word or a sign of Rust text and the line that it stands on, counted from 1.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Token {
    text: String,
    line: usize,
}

/// Splits Rust text into words and signs; comments, literals and lifetimes are left out.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let mut found = Vec::new();
    let (mut at, mut line) = (0, 1);
    let peek = |index: usize| chars.get(index).copied().unwrap_or('\0');
    while at < chars.len() {
        let start = at;
        match chars[at] {
            '/' if peek(at + 1) == '/' => {
                while at < chars.len() && chars[at] != '\n' {
                    at += 1;
                }
            }
            '/' if peek(at + 1) == '*' => {
                let mut depth = 0usize;
                loop {
                    if peek(at) == '/' && peek(at + 1) == '*' {
                        depth += 1;
                        at += 2;
                    } else if peek(at) == '*' && peek(at + 1) == '/' {
                        depth -= 1;
                        at += 2;
                    } else {
                        at += 1;
                    }
                    if depth == 0 || at >= chars.len() {
                        break;
                    }
                }
            }
            '"' => at = end_of_string(&chars, at),
            '\'' => {
                // A character literal, or else a lifetime, of which only the quote is skipped here
                // and the word below.
                if peek(at + 1) == '\\' {
                    at += 3;
                    while at < chars.len() && chars[at] != '\'' {
                        at += 1;
                    }
                    at += 1;
                } else if peek(at + 2) == '\'' {
                    at += 3;
                } else {
                    at += 1;
                    while peek(at).is_alphanumeric() || peek(at) == '_' {
                        at += 1;
                    }
                }
            }
            c if c.is_alphabetic() || c == '_' => {
                while peek(at).is_alphanumeric() || peek(at) == '_' {
                    at += 1;
                }
                let word: String = chars[start..at].iter().collect();
                let hashes = chars[at..].iter().take_while(|c| **c == '#').count();
                let raw = matches!(word.as_str(), "r" | "br" | "cr");
                if raw && peek(at + hashes) == '"' {
                    at = end_of_raw_string(&chars, at + hashes + 1, hashes);
                } else if matches!(word.as_str(), "b" | "c") && peek(at) == '"' {
                    at = end_of_string(&chars, at);
                } else if word == "r" && hashes == 1 {
                    // A raw identifier: the word itself follows.
                    at += 1;
                } else {
                    found.push(Token { text: word, line });
                }
            }
            c if c.is_ascii_digit() => {
                while peek(at).is_alphanumeric() || peek(at) == '_' {
                    at += 1;
                }
            }
            ':' if peek(at + 1) == ':' => {
                at += 2;
                found.push(Token {
                    text: "::".to_owned(),
                    line,
                });
            }
            c => {
                at += 1;
                if !c.is_whitespace() {
                    found.push(Token {
                        text: c.to_string(),
                        line,
                    });
                }
            }
        }
        let end = at.min(chars.len());
        line += chars[start..end].iter().filter(|c| **c == '\n').count();
    }
    found
}

/// The place after the string whose opening quote stands at `at`.
fn end_of_string(chars: &[char], mut at: usize) -> usize {
    at += 1;
    while at < chars.len() && chars[at] != '"' {
        at += if chars[at] == '\\' { 2 } else { 1 };
    }
    at + 1
}

/// The place after the raw string whose content starts at `at`.
fn end_of_raw_string(chars: &[char], mut at: usize, hashes: usize) -> usize {
    while at < chars.len() {
        let closing = chars[at + 1..]
            .iter()
            .take(hashes)
            .filter(|c| **c == '#')
            .count();
        if chars[at] == '"' && closing == hashes {
            return at + 1 + hashes;
        }
        at += 1;
    }
    at
}

/// Leaves out every item under `#[cfg(test)]`: tests may reach for what they need.
fn without_tests(tokens: &[Token]) -> Vec<Token> {
    let is = |index: usize, text: &str| tokens.get(index).is_some_and(|token| token.text == text);
    let mut kept = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        if !(is(at, "#") && is(at + 1, "[")) {
            kept.push(tokens[at].clone());
            at += 1;
            continue;
        }
        let end = closing(tokens, at + 1);
        let inside = &tokens[at + 2..end.min(tokens.len())];
        let has = |text: &str| inside.iter().any(|token| token.text == text);
        if !(is(at + 2, "cfg") && has("test") && !has("not")) {
            kept.extend_from_slice(&tokens[at..(end + 1).min(tokens.len())]);
            at = end + 1;
            continue;
        }
        at = end + 1;
        while is(at, "#") && is(at + 1, "[") {
            at = closing(tokens, at + 1) + 1;
        }
        // The item ends with its body, or with a semicolon outside of all brackets.
        while at < tokens.len() {
            if is(at, "{") {
                at = closing(tokens, at) + 1;
                // `use a::{b};` goes on after its braces.
                if is(at, ";") {
                    at += 1;
                }
                break;
            }
            if is(at, ";") {
                at += 1;
                break;
            }
            at = if is(at, "(") || is(at, "[") {
                closing(tokens, at) + 1
            } else {
                at + 1
            };
        }
    }
    kept
}

/// The place of the bracket that closes the one at `open`.
fn closing(tokens: &[Token], open: usize) -> usize {
    let mut depth = 0usize;
    for (index, token) in tokens.iter().enumerate().skip(open) {
        match token.text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return index;
                }
            }
            _ => {}
        }
    }
    tokens.len()
}

/// A path as written, groups spelled out: `a::{b, c::d}` is two of them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Reference {
    path: Vec<String>,
    line: usize,
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path.join("::"))
    }
}

/// Every path in the text, wherever it stands.
fn references(tokens: &[Token]) -> Vec<Reference> {
    let mut found = Vec::new();
    let mut at = 0;
    while at < tokens.len() {
        let continues = at > 0 && matches!(tokens[at - 1].text.as_str(), "." | "::");
        let leads = tokens.get(at + 1).is_some_and(|next| next.text == "::");
        let grouped_use = tokens[at].text == "use";
        if grouped_use {
            at = tree(tokens, at + 1, &[], &mut found);
        } else if is_word(&tokens[at].text) && leads && !continues {
            at = tree(tokens, at, &[], &mut found);
        } else {
            at += 1;
        }
    }
    found
}

/// Reads one path or group from `at` on and returns the place after it.
fn tree(tokens: &[Token], mut at: usize, prefix: &[String], found: &mut Vec<Reference>) -> usize {
    let text = |index: usize| tokens.get(index).map_or("", |token| token.text.as_str());
    let mut path = prefix.to_vec();
    // A leading `::` only says that a crate follows.
    if text(at) == "::" {
        at += 1;
    }
    loop {
        let line = tokens.get(at).map_or(0, |token| token.line);
        if text(at) == "{" {
            let end = closing(tokens, at);
            at += 1;
            while at < end {
                at = tree(tokens, at, &path, found);
                // Past ` as name`, up to the comma or the end.
                while at < end && text(at) != "," {
                    at += 1;
                }
                at += 1;
            }
            return end + 1;
        }
        if text(at) == "*" {
            path.push("*".to_owned());
            found.push(Reference { path, line });
            return at + 1;
        }
        if !is_word(text(at)) {
            if path.len() > prefix.len() {
                found.push(Reference { path, line });
            }
            return at;
        }
        // `a::{self}` is `a`.
        if text(at) != "self" || path.is_empty() {
            path.push(text(at).to_owned());
        }
        at += 1;
        if text(at) != "::" {
            found.push(Reference { path, line });
            return at;
        }
        at += 1;
    }
}

fn is_word(text: &str) -> bool {
    text.chars()
        .next()
        .is_some_and(|c| c.is_alphabetic() || c == '_')
}

/// Turns `self::`, `super::` and `crate::` into a path from the crate's root; `None` for anything
/// that does not start so.
fn inside_crate(reference: &Reference, module: &[&str]) -> Option<Vec<String>> {
    let owned = |parts: &[&str]| {
        parts
            .iter()
            .map(|part| (*part).to_owned())
            .collect::<Vec<_>>()
    };
    let mut rest = reference.path.as_slice();
    let mut base = match rest.first()?.as_str() {
        "crate" => Vec::new(),
        "self" => owned(module),
        "super" => {
            let mut base = owned(module);
            base.pop();
            base
        }
        _ => return None,
    };
    rest = &rest[1..];
    while rest.first().is_some_and(|part| part == "super") {
        base.pop();
        rest = &rest[1..];
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

/// `server/src/store/log/frames.rs` is `["store", "log", "frames"]`.
fn module_of(path: &str) -> Vec<&str> {
    let inside = path.split_once("src/").map_or(path, |(_, inside)| inside);
    let mut parts: Vec<_> = inside.trim_end_matches(".rs").split('/').collect();
    if parts.len() > 1 && parts.last() == Some(&"mod") {
        parts.pop();
    }
    parts
}

/// Whether the reference is, contains or stands below `item` (both from the root of a crate). A
/// module that is imported whole, by name or by `*`, brings its items along.
fn names(reference: &Reference, item: &str) -> bool {
    let item: Vec<_> = item.split("::").collect();
    let path: Vec<_> = reference
        .path
        .iter()
        .map(String::as_str)
        .filter(|part| *part != "*")
        .collect();
    let whole = path.len() > 1 || reference.path.last().is_some_and(|part| part == "*");
    path.starts_with(&item) || (whole && item.starts_with(&path))
}

// ---------------------------------------------------------------------------------------------
// The rules.

/// Every arrow that a file of the server crosses, named. `path` is `server/src/...`.
fn crossed_arrows(path: &str, text: &str) -> Vec<String> {
    let module = module_of(path);
    let room_name = module[0];
    let wiring = WIRING.contains(&room_name);
    let room = ROOMS.iter().find(|room| room.name == room_name);
    let mut crossed = Vec::new();
    if room.is_none() && !wiring {
        return vec![format!(
            "{path}: the module `{room_name}` has no rule: say in the table of tests/tests/house.rs \
             what it may know"
        )];
    }
    for reference in references(&without_tests(&tokens(text))) {
        let mut cross = |target: &str, why: &str| {
            let line = reference.line;
            crossed.push(format!(
                "{path}:{line}: {room_name} -> {target} ({reference}): {why}"
            ));
        };
        for (home_of, homes) in HOMES {
            if names(&reference, home_of) && !homes.contains(&room_name) {
                cross(home_of, &format!("its only home is {}", homes.join(", ")));
            }
        }
        let Some(room) = room else { continue };
        if let Some(inside) = inside_crate(&reference, &module) {
            let target = inside.first().map_or("*", String::as_str);
            if target != room_name && !room.knows.contains(&target) {
                cross(target, &format!("{room_name} knows {}", list(room.knows)));
            }
            continue;
        }
        let first = reference.path[0].as_str();
        if first.starts_with("bellwire_") && !room.crates.contains(&first) {
            let homeless = HOMES.iter().all(|(name, _)| *name != first);
            if homeless {
                cross(
                    first,
                    &format!("of the workspace it knows {}", list(room.crates)),
                );
            }
        }
        // A whole module may bring several forbidden items along; the first one says it.
        let told = |never: &str| HOMES.iter().any(|(name, _)| *name == never);
        let first = room
            .never
            .iter()
            .find(|never| !told(never) && names(&reference, never));
        if let Some(never) = first {
            cross(never, &format!("{room_name} must not name it"));
        }
    }
    crossed
}

fn list(names: &[&str]) -> String {
    if names.is_empty() {
        "only itself".to_owned()
    } else {
        names.join(", ")
    }
}

/// Every place where a pure crate names what is not pure.
fn impurities(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for reference in references(&without_tests(&tokens(text))) {
        if IMPURE.iter().any(|never| names(&reference, never)) {
            found.push(format!(
                "{path}:{}: {reference}: this crate is pure",
                reference.line
            ));
        }
        let other = reference.path[0].starts_with("bellwire_");
        if other {
            found.push(format!(
                "{path}:{}: {reference}: it knows no other crate",
                reference.line
            ));
        }
    }
    found
}

/// Every place where time or chance is read although it should be handed in.
fn time_and_chance(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for reference in references(&without_tests(&tokens(text))) {
        let name = reference.to_string();
        for source in TIME_AND_CHANCE {
            if name == *source || name.ends_with(&format!("::{source}")) {
                found.push(format!(
                    "{path}:{}: {name}: time and chance come in through {} only",
                    reference.line,
                    TIME_AND_CHANCE_ADAPTERS.join(" and ")
                ));
            }
        }
    }
    found
}

/// Crates of the workspace that a manifest depends on, dev-dependencies aside.
fn workspace_dependencies(manifest: &str) -> BTreeSet<String> {
    let mut section = String::new();
    let mut found = BTreeSet::new();
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            section = line.trim_matches(['[', ']']).to_owned();
        }
        let counts = section.ends_with("dependencies") && !section.ends_with("dev-dependencies");
        let table = section.rsplit_once("dependencies.").map(|(_, name)| name);
        let key = line.split(['=', '.', ' ']).next().unwrap_or_default();
        for name in [
            counts.then_some(key),
            table.filter(|_| !section.starts_with("dev-")),
        ] {
            if let Some(name) = name.filter(|name| name.starts_with("bellwire-")) {
                found.insert(name.to_owned());
            }
        }
    }
    found
}

/// What is untidy about a Rust file.
fn untidiness(path: &str, text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let first = text
        .lines()
        .find(|line| !line.trim().is_empty())
        .unwrap_or_default();
    if !first.starts_with("//! ") {
        found.push(format!(
            "{path}:1: begin with a `//!` line that says what the file is for"
        ));
    }
    // Put together here, so that this file does not find itself.
    let marks = [
        (
            concat!("#[ign", "ore"),
            "a test that does not run proves nothing: fix it or remove it",
        ),
        (concat!("to", "do!("), "finish it or leave it out"),
        (concat!("unimple", "mented!("), "finish it or leave it out"),
        (
            concat!("FIX", "ME"),
            "fix it, or write down the limit where users read it",
        ),
        (
            concat!("TO", "DO"),
            "do it, or write down the limit where users read it",
        ),
        (concat!("XX", "X"), "say what is meant"),
    ];
    for (number, line) in text.lines().enumerate() {
        for (mark, advice) in marks {
            if line.contains(mark) {
                found.push(format!("{path}:{}: `{mark}`: {advice}", number + 1));
            }
        }
    }
    found
}

/// What looks like a key or a certificate in a tracked file.
fn secrets(path: &str, text: &str) -> Vec<String> {
    const SUFFIXES: &[&str] = &[
        ".pem", ".key", ".crt", ".cer", ".der", ".p12", ".pfx", ".p8", ".jks",
    ];
    // Base64 characters after a header that make it more than an example of the form.
    const FEW: usize = 32;
    let mut found = Vec::new();
    if SUFFIXES.iter().any(|suffix| path.ends_with(suffix)) {
        found.push(format!(
            "{path}: keys and certificates are made when needed, never tracked"
        ));
    }
    for header in ["PRIVATE KEY-----", "CERTIFICATE-----"] {
        for (at, _) in text.match_indices(header) {
            // The body may follow on lines of its own or, in code, after an escaped line break.
            let body = text[at + header.len()..]
                .replace("\\n", "")
                .replace(|c: char| c.is_whitespace() || c == '"' || c == '\\', "");
            let length = body
                .bytes()
                .take_while(|b| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/'))
                .count();
            if length >= FEW {
                let line = text[..at].lines().count();
                found.push(format!(
                    "{path}:{line}: a key or certificate, not an example of one"
                ));
            }
        }
    }
    found
}

// ---------------------------------------------------------------------------------------------
// The repository.

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

/// Files of the repository, by their path from its root: what git tracks or would track. Without
/// git (an unpacked archive) everything but build results.
fn files() -> Vec<String> {
    let root = root();
    let git = Command::new("git")
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ])
        .current_dir(&root)
        .output();
    let mut found: Vec<String> = match git {
        Ok(output) if output.status.success() => String::from_utf8(output.stdout)
            .unwrap()
            .split('\0')
            .filter(|path| !path.is_empty() && root.join(path).is_file())
            .map(str::to_owned)
            .collect(),
        _ => {
            let mut found = Vec::new();
            walk(&root, &root, &mut found);
            found
        }
    };
    found.sort();
    found.dedup();
    assert!(
        found.iter().any(|path| path == "Cargo.toml"),
        "the repository was not found"
    );
    found
}

fn walk(root: &Path, directory: &Path, found: &mut Vec<String>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if path.is_dir() {
            if !matches!(
                name.as_str(),
                "target" | ".git" | "node_modules" | "bellwire-data"
            ) {
                walk(root, &path, found);
            }
        } else {
            found.push(
                path.strip_prefix(root)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned(),
            );
        }
    }
}

fn read(path: &str) -> String {
    String::from_utf8_lossy(&fs::read(root().join(path)).unwrap()).into_owned()
}

/// Rust files below `folder`, test modules in files of their own left out.
fn sources(folder: &str) -> Vec<String> {
    let mut found = files();
    found.retain(|path| {
        let test_file = path.ends_with("/tests.rs") || path.contains("/tests/");
        path.starts_with(&format!("{folder}/src/")) && path.ends_with(".rs") && !test_file
    });
    assert!(!found.is_empty(), "no Rust files in {folder}/src");
    found
}

fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}\n", found.join("\n  "));
}

#[test]
fn arrows_between_the_servers_modules_point_inward() {
    let mut crossed = Vec::new();
    let mut seen = 0;
    for path in sources("server") {
        let text = read(&path);
        seen += references(&without_tests(&tokens(&text))).len();
        crossed.extend(crossed_arrows(&path, &text));
    }
    assert!(
        seen > 20,
        "only {seen} references were found: the reader is broken"
    );
    assert_none("crossed arrows", &crossed);
}

#[test]
fn the_protocol_knows_no_sockets_no_clock_and_no_other_crate() {
    let found: Vec<_> = PURE_CRATES
        .iter()
        .flat_map(|folder| sources(folder))
        .flat_map(|path| impurities(&path, &read(&path)))
        .collect();
    assert_none("impurities", &found);
}

#[test]
fn time_and_chance_come_in_through_one_place() {
    let found: Vec<_> = ["server", "protocol", "certs"]
        .into_iter()
        .flat_map(sources)
        .filter(|path| !TIME_AND_CHANCE_ADAPTERS.contains(&path.as_str()))
        .filter(|path| !(path.starts_with("server/") && WIRING.contains(&module_of(path)[0])))
        .flat_map(|path| time_and_chance(&path, &read(&path)))
        .collect();
    assert_none("time or chance by the back door", &found);
}

#[test]
fn crates_depend_on_those_that_they_may_know() {
    for (folder, allowed) in CRATES {
        for dependency in workspace_dependencies(&read(&format!("{folder}/Cargo.toml"))) {
            assert!(
                allowed.contains(&dependency.as_str()),
                "{folder}/Cargo.toml: {folder} must not depend on {dependency} (it may on {})",
                list(allowed)
            );
        }
    }
}

#[test]
fn every_rust_file_is_tidy() {
    let mut found = Vec::new();
    for path in files().iter().filter(|path| path.ends_with(".rs")) {
        found.extend(untidiness(path, &read(path)));
    }
    assert_none("untidy files", &found);
}

#[test]
fn no_key_and_no_certificate_is_tracked() {
    let found: Vec<_> = files()
        .iter()
        .flat_map(|path| secrets(path, &read(path)))
        .collect();
    assert_none("keys or certificates in the repository", &found);
}

// ---------------------------------------------------------------------------------------------
// The rules themselves are tested: a check that cannot fail checks nothing.

#[test]
fn a_crossed_arrow_is_named_with_its_place() {
    let text = "//! A mailbox.\n\
                use std::time::{Duration, Instant};\n\
                use crate::{delivery::ids::PingId, runtime::Handle};\n\
                use super::super::ports::Clock;\n\
                fn f() { let t = tokio::spawn(async {}); }\n\
                use bellwire_protocol::Frame;\n";
    assert_eq!(
        crossed_arrows("server/src/delivery/mailbox/expiry.rs", text),
        [
            "server/src/delivery/mailbox/expiry.rs:2: delivery -> std::time::Instant \
             (std::time::Instant): delivery must not name it",
            "server/src/delivery/mailbox/expiry.rs:3: delivery -> runtime (crate::runtime::Handle): \
             delivery knows only itself",
            "server/src/delivery/mailbox/expiry.rs:5: delivery -> tokio (tokio::spawn): delivery \
             must not name it",
            "server/src/delivery/mailbox/expiry.rs:6: delivery -> bellwire_protocol \
             (bellwire_protocol::Frame): of the workspace it knows only itself",
        ]
    );
    // One `super` more leaves the room.
    let out = "use super::super::super::ports::Clock;";
    assert_eq!(
        crossed_arrows("server/src/delivery/mailbox/expiry.rs", out).len(),
        1
    );
}

#[test]
fn an_arrow_that_points_inward_is_not_named() {
    let text = "use crate::delivery::{DeviceId, Now};\nuse crate::ports::Store;\nuse super::Handle;\n\
                use self::inner::X;\nuse std::time::Instant;\nuse tokio::sync::mpsc;";
    assert_eq!(
        crossed_arrows("server/src/runtime/shard.rs", text),
        Vec::<String>::new()
    );
}

#[test]
fn what_is_hidden_from_a_plain_search_is_found() {
    let crossing = |path: &str, text: &str| crossed_arrows(path, text).len();
    for text in [
        "use std::time as t;",
        "use std::{fs, fmt};",
        "use std::{io::{self, Write}, net::*};",
        "use std::*;",
        "use ::tokio::time::sleep;",
        "use crate::*;",
        "pub(crate) use crate::store::Log as L;",
        "fn f(x: &'static crate::store::Log) {}",
        "#[tokio::main] async fn f() {}",
        "const C: char = '\"'; use tokio::task;",
        "const S: &str = r#\"a \" b\"#; use tokio::task;",
        "/* a /* nested */ comment */ use tokio::task;",
        "#[cfg(not(test))] use tokio::task;",
        "#[cfg(test)] mod tests { use tokio::a; } use tokio::task;",
        "#[cfg(test)] use tokio::a::{b, c}; use tokio::task;",
    ] {
        assert_eq!(crossing("server/src/delivery/mod.rs", text), 1, "{text}");
    }
    for (path, text) in [
        ("server/src/http/pings.rs", "use sled::Db;"),
        ("server/src/http/pings.rs", "use bellwire_client::Device;"),
        ("server/src/cli/device.rs", "use bellwire_client::Device;"),
        ("server/src/transport/link.rs", "use crate::store::Log;"),
        ("server/src/config/mod.rs", "use crate::delivery::Now;"),
        ("server/src/somewhere.rs", "//! A room without a rule."),
    ] {
        assert_eq!(crossing(path, text), 1, "{path}: {text}");
    }
}

#[test]
fn comments_strings_and_tests_cross_nothing() {
    for text in [
        "// use tokio::task;",
        "/// See [`crate::store::Log`].\nfn f() {}",
        "/* use tokio::task; */",
        "const S: &str = \"use tokio::task;\";",
        "const S: &[u8] = br##\"use tokio::task; \"# \"##;",
        "#[cfg(test)]\nmod tests {\n    use tokio::task;\n    fn f() { crate::store::x(); }\n}",
        "#[cfg(test)]\n#[path = \"t.rs\"]\nmod tests;",
        "#[cfg(all(test, unix))] fn f(a: [u8; 2]) -> u8 { tokio::x() }",
        "fn f<'a>(tokio: &'a str) -> &'a str { tokio }",
        "use std::time::Duration;",
        "use std::{collections::HashMap, fmt};",
        "use bytes::Bytes;",
    ] {
        assert_eq!(
            crossed_arrows("server/src/delivery/x.rs", text),
            Vec::<String>::new(),
            "{text}"
        );
    }
    for (path, text) in [
        ("server/src/store/engine/sled.rs", "use sled::Db;"),
        (
            "server/src/demo/mod.rs",
            "use bellwire_client::Device;\nuse crate::store::Log;",
        ),
        ("server/src/main.rs", "use bellwire_server::store::Log;"),
    ] {
        assert_eq!(crossed_arrows(path, text), Vec::<String>::new(), "{path}");
    }
}

#[test]
fn reading_the_clock_or_rolling_dice_is_found_however_it_is_written() {
    for text in [
        "let now = std::time::Instant::now();",
        "let now = Instant::now();",
        "let now = tokio::time::Instant::now();",
        "x.unwrap_or_else(SystemTime::now)",
        "use rand::rng;",
        "let r = rand::thread_rng();",
    ] {
        assert_eq!(
            time_and_chance("server/src/http/x.rs", text).len(),
            1,
            "{text}"
        );
    }
    for text in [
        "let now = clock.now();",
        "// Instant::now()",
        "let d = Instant::checked_add;",
    ] {
        assert_eq!(
            time_and_chance("server/src/http/x.rs", text),
            Vec::<String>::new(),
            "{text}"
        );
    }
    assert_eq!(
        impurities("protocol/src/x.rs", "use std::net::IpAddr;").len(),
        1
    );
    assert_eq!(
        impurities("protocol/src/x.rs", "use bellwire_server::x;").len(),
        1
    );
}

#[test]
fn dependencies_are_read_in_every_form_that_cargo_knows() {
    let manifest = "[package]\nname = \"bellwire-x\"\n[dependencies]\nbellwire-a.workspace = true\n\
                    bellwire-b = { path = \"b\" }\n[dependencies.bellwire-c]\npath = \"c\"\n\
                    [target.'cfg(unix)'.dependencies]\nbellwire-d = \"1\"\n[dev-dependencies]\n\
                    bellwire-e.workspace = true\n[build-dependencies]\nbellwire-f = \"1\"\n";
    let found: Vec<_> = workspace_dependencies(manifest).into_iter().collect();
    assert_eq!(
        found,
        [
            "bellwire-a",
            "bellwire-b",
            "bellwire-c",
            "bellwire-d",
            "bellwire-f"
        ]
    );
}

#[test]
fn untidy_files_and_keys_are_found() {
    let mark = concat!("FIX", "ME");
    assert_eq!(
        untidiness("a.rs", "//! Fine.\nfn f() {}\n"),
        Vec::<String>::new()
    );
    assert_eq!(untidiness("a.rs", "fn f() {}\n").len(), 1);
    assert_eq!(
        untidiness("a.rs", &format!("//! Fine.\n// {mark} later\n")).len(),
        1
    );
    let body = "MIIBVAIBADANBgkqhkiG9w0BAQEFAASCAT4wggE6".repeat(2);
    let (begin, end) = (
        concat!("-----BEGIN PRIV", "ATE KEY-----"),
        "-----END PRIVATE KEY-----",
    );
    for text in [
        format!("{begin}\n{body}\n{end}\n"),
        format!("\"{begin}\\n{body}\\n\""),
    ] {
        assert_eq!(secrets("docs/a.md", &text).len(), 1, "{text}");
    }
    assert_eq!(
        secrets("docs/a.md", &format!("{begin}\n...\n{end}\n")),
        Vec::<String>::new()
    );
    assert_eq!(secrets("tests/data/server.key", "").len(), 1);
}
