//! The one HTTP request that the device port understands: the WebSocket upgrade of `GET /v1/link` (RFC 6455 section 4).
//!
//! Everything else gets one short answer that says what is spoken here, and the connection ends. Parsing is a plain
//! function over bytes, so that it can be fuzzed; it never looks past the head.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bellwire_protocol::{Code, LINK_PATH, Negotiated, negotiate};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// Longest head that is read, in bytes. Clients and proxies stay below 2 KiB.
pub(crate) const HEAD_MAX_BYTES: usize = 8 * 1024;

/// Most header fields that are read.
const FIELDS_MAX: usize = 64;

/// Length of the decoded `Sec-WebSocket-Key` (RFC 6455 section 4.1).
const KEY_BYTES: usize = 16;

/// A head that asks for what we have.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Upgrade {
    /// What `Sec-WebSocket-Accept` answers.
    accept: String,
    /// Codec and subprotocol.
    pub(crate) negotiated: Negotiated,
}

/// What the bytes so far mean.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Head {
    /// More bytes are needed.
    Partial,
    /// A good request; the head is so many bytes long, and what follows are frames.
    Upgrade(Upgrade, usize),
    /// Anything else.
    Refused(Refused),
}

/// Why a request gets no link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Not HTTP/1.
    Malformed,
    /// The head is longer than [`HEAD_MAX_BYTES`] or has too many fields.
    TooLarge,
    /// Another path or method.
    NotADeviceEndpoint,
    /// The right path, but no request for WebSocket.
    NoUpgrade,
    /// Another version of WebSocket than 13.
    WrongVersion,
    /// `Sec-WebSocket-Key` is missing, repeated, or not 16 bytes in base64.
    BadKey,
    /// Only unknown subprotocols were offered.
    UnsupportedSubprotocol,
    /// Plain HTTP where TLS is expected.
    TlsRequired,
}

/// Reads a request head.
pub(crate) fn parse(bytes: &[u8]) -> Head {
    let mut fields = [httparse::EMPTY_HEADER; FIELDS_MAX];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length <= HEAD_MAX_BYTES => {
            match upgrade(&request) {
                Ok(upgrade) => Head::Upgrade(upgrade, length),
                Err(refused) => Head::Refused(refused),
            }
        }
        Ok(httparse::Status::Complete(_)) => Head::Refused(Refused::TooLarge),
        Ok(httparse::Status::Partial) if bytes.len() < HEAD_MAX_BYTES => Head::Partial,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            Head::Refused(Refused::TooLarge)
        }
        Err(_) => Head::Refused(Refused::Malformed),
    }
}

fn upgrade(request: &httparse::Request<'_, '_>) -> Result<Upgrade, Refused> {
    let path = request.path.unwrap_or_default();
    let path = path.split_once('?').map_or(path, |(path, _)| path);
    if request.method != Some("GET") || path != LINK_PATH {
        return Err(Refused::NotADeviceEndpoint);
    }
    let asked = lists(request, "upgrade", "websocket") && lists(request, "connection", "upgrade");
    if request.version != Some(1) || !asked {
        return Err(Refused::NoUpgrade);
    }
    let mut versions = values(request, "sec-websocket-version");
    if versions.next() != Some("13") || versions.next().is_some() {
        return Err(Refused::WrongVersion);
    }
    let mut keys = values(request, "sec-websocket-key");
    let (Some(key), None) = (keys.next(), keys.next()) else {
        return Err(Refused::BadKey);
    };
    if STANDARD.decode(key).map(|key| key.len()) != Ok(KEY_BYTES) {
        return Err(Refused::BadKey);
    }
    let offered = values(request, "sec-websocket-protocol").flat_map(|value| value.split(','));
    let negotiated = negotiate(offered).map_err(|_| Refused::UnsupportedSubprotocol)?;
    Ok(Upgrade {
        accept: derive_accept_key(key.as_bytes()),
        negotiated,
    })
}

/// The values of a field, line by line. Values that are not text are no values.
fn values<'r>(
    request: &'r httparse::Request<'_, '_>,
    name: &'r str,
) -> impl Iterator<Item = &'r str> {
    request
        .headers
        .iter()
        .filter(move |field| field.name.eq_ignore_ascii_case(name))
        .filter_map(|field| str::from_utf8(field.value).ok())
        .map(str::trim)
}

/// Whether a field that is a list names this token.
fn lists(request: &httparse::Request<'_, '_>, name: &str, token: &str) -> bool {
    values(request, name)
        .flat_map(|value| value.split(','))
        .any(|item| item.trim().eq_ignore_ascii_case(token))
}

impl Upgrade {
    /// The answer that opens the link.
    pub(crate) fn answer(&self) -> String {
        let Upgrade { accept, negotiated } = self;
        let subprotocol = negotiated
            .subprotocol
            .map(|name| format!("Sec-WebSocket-Protocol: {name}\r\n"))
            .unwrap_or_default();
        format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {accept}\r\n{subprotocol}\r\n"
        )
    }
}

impl Refused {
    /// The code that names it.
    pub(crate) fn code(self) -> Code {
        match self {
            Refused::Malformed | Refused::TooLarge | Refused::BadKey => Code::Malformed,
            Refused::NotADeviceEndpoint => Code::NotADeviceEndpoint,
            Refused::NoUpgrade | Refused::WrongVersion => Code::UnsupportedVersion,
            Refused::UnsupportedSubprotocol => Code::UnsupportedSubprotocol,
            Refused::TlsRequired => Code::TlsRequired,
        }
    }

    fn detail(self) -> &'static str {
        match self {
            Refused::Malformed => "This is not an HTTP/1.1 request.",
            Refused::TooLarge => {
                "The request head is larger than 8 KiB or has more than 64 fields."
            }
            Refused::NotADeviceEndpoint => {
                "This port is for devices and knows GET /v1/link only; the API is on another port."
            }
            Refused::NoUpgrade => {
                "GET /v1/link opens a WebSocket: send Connection: Upgrade and Upgrade: websocket over HTTP/1.1."
            }
            Refused::WrongVersion => "WebSocket version 13 (RFC 6455) is spoken here.",
            Refused::BadKey => "Sec-WebSocket-Key must be given once, 16 bytes in base64.",
            Refused::UnsupportedSubprotocol => {
                "Offer bellwire.1.cbor or bellwire.1.json, or no subprotocol for JSON."
            }
            Refused::TlsRequired => "This port expects TLS: use wss.",
        }
    }

    /// The answer that ends the connection: `application/problem+json` (RFC 9457).
    pub(crate) fn answer(self) -> String {
        let code = self.code();
        let status = code.http_status().unwrap_or(400);
        let reason = match status {
            404 => "Not Found",
            426 => "Upgrade Required",
            _ => "Bad Request",
        };
        let upgrade = match self {
            Refused::NoUpgrade => "Upgrade: websocket\r\n",
            Refused::WrongVersion => "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n",
            Refused::Malformed
            | Refused::TooLarge
            | Refused::NotADeviceEndpoint
            | Refused::BadKey
            | Refused::UnsupportedSubprotocol
            | Refused::TlsRequired => "",
        };
        // RFC 9110 section 7.8: `Upgrade` is named in `Connection`.
        let connection = if upgrade.is_empty() {
            "close"
        } else {
            "upgrade, close"
        };
        let body = serde_json::json!({
            "type": "about:blank",
            "title": reason,
            "status": status,
            "code": code.name(),
            "detail": self.detail(),
        })
        .to_string();
        format!(
            "HTTP/1.1 {status} {reason}\r\nContent-Type: application/problem+json\r\n\
             Content-Length: {length}\r\nConnection: {connection}\r\n{upgrade}\r\n{body}",
            length = body.len(),
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]
    use super::*;
    use bellwire_protocol::Codec;
    use proptest::prelude::*;

    /// The example of RFC 6455 section 1.3, asking for our path.
    const GOOD: &str = "GET /v1/link HTTP/1.1\r\nHost: push.example\r\nUpgrade: websocket\r\n\
        Connection: keep-alive, Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
        Sec-WebSocket-Version: 13\r\n\r\n";

    fn with(change: impl FnOnce(String) -> String) -> Head {
        parse(change(GOOD.to_owned()).as_bytes())
    }

    #[test]
    fn the_example_of_the_rfc_is_answered_as_it_says() {
        let Head::Upgrade(upgrade, length) = parse(GOOD.as_bytes()) else {
            panic!("an upgrade")
        };
        assert_eq!(length, GOOD.len());
        assert_eq!(
            upgrade.answer(),
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
        );
    }

    #[test]
    fn subprotocols_are_chosen_over_all_their_lines() {
        let offering = |lines: &str| {
            let lines = lines.to_owned();
            match with(|good| good.replace("\r\n\r\n", &format!("\r\n{lines}\r\n\r\n"))) {
                Head::Upgrade(upgrade, _) => Ok((upgrade.negotiated.codec, upgrade.answer())),
                other => Err(other),
            }
        };
        let (codec, answer) = offering("X-Other: 1").unwrap();
        assert_eq!(codec, Codec::Json);
        assert!(!answer.contains("Sec-WebSocket-Protocol"));
        let (codec, answer) =
            offering("Sec-WebSocket-Protocol: chat, bellwire.1.json\r\nSec-WebSocket-Protocol: bellwire.1.cbor")
                .unwrap();
        assert_eq!(codec, Codec::Cbor);
        assert!(answer.contains("\r\nSec-WebSocket-Protocol: bellwire.1.cbor\r\n"));
        assert_eq!(
            offering("Sec-WebSocket-Protocol: chat").unwrap_err(),
            Head::Refused(Refused::UnsupportedSubprotocol)
        );
    }

    #[test]
    fn whatever_is_wrong_has_its_answer() {
        let refused = |change: fn(String) -> String| match with(change) {
            Head::Refused(refused) => {
                let answer = refused.answer();
                let (head, body) = answer.split_once("\r\n\r\n").unwrap();
                let body: serde_json::Value = serde_json::from_str(body).unwrap();
                assert_eq!(body["code"], refused.code().name());
                let status = body["status"].to_string();
                assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{head}");
                (refused, status)
            }
            other => panic!("{other:?}"),
        };
        let is = |refused: Refused, status: &str| (refused, status.to_owned());
        assert_eq!(
            refused(|good| good.replace("/v1/link", "/v1/pings")),
            is(Refused::NotADeviceEndpoint, "404")
        );
        assert_eq!(
            refused(|good| good.replace("GET", "POST")),
            is(Refused::NotADeviceEndpoint, "404")
        );
        assert_eq!(
            refused(|good| good.replace("Upgrade: websocket", "Upgrade: h2c")),
            is(Refused::NoUpgrade, "426")
        );
        assert_eq!(
            refused(|good| good.replace("HTTP/1.1", "HTTP/1.0")),
            is(Refused::NoUpgrade, "426")
        );
        assert_eq!(
            refused(|good| good.replace("Version: 13", "Version: 8")),
            is(Refused::WrongVersion, "426")
        );
        assert_eq!(
            refused(|good| good.replace("dGhlIHNhbXBsZSBub25jZQ==", "c2hvcnQ=")),
            is(Refused::BadKey, "400")
        );
        assert_eq!(
            refused(|_| "SSH-2.0-OpenSSH_9.9\r\n\r\n".into()),
            is(Refused::Malformed, "400")
        );
        assert_eq!(
            refused(|good| good.replace("\r\n\r\n", &"\r\nX: y".repeat(80))),
            is(Refused::TooLarge, "400")
        );
        assert_eq!(
            refused(|good| good.replace("push.example", &"x".repeat(HEAD_MAX_BYTES))),
            is(Refused::TooLarge, "400")
        );
        assert!(
            Refused::WrongVersion
                .answer()
                .contains("\r\nSec-WebSocket-Version: 13\r\n")
        );
        assert!(
            Refused::NoUpgrade
                .answer()
                .contains("\r\nUpgrade: websocket\r\n")
        );
    }

    #[test]
    fn a_query_and_what_follows_the_head_change_nothing() {
        let text = GOOD.replace("/v1/link ", "/v1/link?via=test ") + "frames";
        let Head::Upgrade(_, length) = parse(text.as_bytes()) else {
            panic!("an upgrade")
        };
        assert_eq!(&text[length..], "frames");
    }

    /// The fuzz body: whatever comes, it neither panics nor changes its mind when more bytes arrive.
    fn fuzz_head(bytes: &[u8]) {
        let whole = parse(bytes);
        if let Head::Upgrade(_, length) = &whole {
            assert!(*length <= bytes.len() && *length <= HEAD_MAX_BYTES);
            assert_eq!(parse(&bytes[..*length]), whole);
            assert_eq!(parse(&bytes[..*length - 1]), Head::Partial);
        }
        if let Head::Partial = whole {
            assert!(bytes.len() < HEAD_MAX_BYTES);
        }
    }

    #[test]
    fn the_corpus_does_no_harm() {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src/transport/corpus/http_head"
        );
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            fuzz_head(&std::fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count >= 8, "the corpus is there");
    }

    proptest! {
        #[test]
        fn random_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            fuzz_head(&bytes);
        }

        #[test]
        fn a_damaged_request_does_no_harm(at in 0..GOOD.len(), byte: u8, cut in 0..GOOD.len()) {
            let mut bytes = GOOD.as_bytes().to_vec();
            bytes[at] = byte;
            fuzz_head(&bytes);
            bytes.truncate(cut);
            fuzz_head(&bytes);
        }
    }
}
