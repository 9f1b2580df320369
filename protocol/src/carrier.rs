//! What carries a session: names that both sides agree on before the first frame.

use crate::codec::Codec;
use crate::frame::KeepAlive;
use crate::limits::{QUIC_KEEP_ALIVE_S, WEBSOCKET_KEEP_ALIVE_S};

/// ALPN of version 1 on QUIC.
pub const ALPN: &[u8] = b"bellwire/1";

/// Path of the WebSocket endpoint: `GET /v1/link`.
pub const LINK_PATH: &str = "/v1/link";

/// WebSocket subprotocol of version 1 in CBOR.
pub const SUBPROTOCOL_CBOR: &str = "bellwire.1.cbor";

/// WebSocket subprotocol of version 1 in JSON.
pub const SUBPROTOCOL_JSON: &str = "bellwire.1.json";

/// What carries a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Carrier {
    /// One bidirectional stream on a QUIC connection.
    Quic,
    /// WebSocket over TLS over TCP.
    WebSocket,
}

impl Carrier {
    /// The lower-case name, for logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Quic => "quic",
            Self::WebSocket => "websocket",
        }
    }

    /// The keep-alive bounds that a server advises on this carrier unless told otherwise.
    pub const fn keep_alive(self) -> KeepAlive {
        let (min_s, max_s) = match self {
            Self::Quic => QUIC_KEEP_ALIVE_S,
            Self::WebSocket => WEBSOCKET_KEEP_ALIVE_S,
        };
        KeepAlive { min_s, max_s }
    }
}

impl KeepAlive {
    /// How long a server bears silence before it drops the link: so many percent of the advised maximum
    /// ([`SILENCE_PERCENT`](crate::limits::SILENCE_PERCENT) unless its operator says otherwise), in milliseconds.
    pub const fn silence_ms(self, percent: u32) -> u64 {
        self.max_s as u64 * 10 * percent as u64
    }
}

/// What the server answers to the subprotocols that a WebSocket client offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    /// How frames are written.
    pub codec: Codec,
    /// What `Sec-WebSocket-Protocol` answers; `None`: the header is left out.
    pub subprotocol: Option<&'static str>,
}

/// Only unknown subprotocols were offered: HTTP 400 with code `unsupported_subprotocol`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "offer the WebSocket subprotocol {SUBPROTOCOL_CBOR} or {SUBPROTOCOL_JSON}, or none for JSON"
)]
pub struct UnsupportedSubprotocol;

/// Chooses the codec of a WebSocket session from the names offered, in all `Sec-WebSocket-Protocol` headers together.
/// None offered: JSON, and none is answered. Both: CBOR.
///
/// # Errors
/// When names were offered and none of them is known.
pub fn negotiate<'a>(
    offered: impl IntoIterator<Item = &'a str>,
) -> Result<Negotiated, UnsupportedSubprotocol> {
    let (mut cbor, mut json, mut any) = (false, false, false);
    for name in offered
        .into_iter()
        .map(str::trim)
        .filter(|name| !name.is_empty())
    {
        any = true;
        cbor |= name == SUBPROTOCOL_CBOR;
        json |= name == SUBPROTOCOL_JSON;
    }
    match (cbor, json, any) {
        (true, _, _) => Ok(Negotiated {
            codec: Codec::Cbor,
            subprotocol: Some(SUBPROTOCOL_CBOR),
        }),
        (false, true, _) => Ok(Negotiated {
            codec: Codec::Json,
            subprotocol: Some(SUBPROTOCOL_JSON),
        }),
        (false, false, false) => Ok(Negotiated {
            codec: Codec::Json,
            subprotocol: None,
        }),
        (false, false, true) => Err(UnsupportedSubprotocol),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cbor_wins_json_is_the_default_and_unknown_names_alone_are_refused() {
        let json = |subprotocol| {
            Ok(Negotiated {
                codec: Codec::Json,
                subprotocol,
            })
        };
        let cbor = Ok(Negotiated {
            codec: Codec::Cbor,
            subprotocol: Some(SUBPROTOCOL_CBOR),
        });
        assert_eq!(negotiate([]), json(None));
        assert_eq!(negotiate([""]), json(None));
        assert_eq!(negotiate(["bellwire.1.json"]), json(Some(SUBPROTOCOL_JSON)));
        assert_eq!(
            negotiate(["chat", " bellwire.1.json "]),
            json(Some(SUBPROTOCOL_JSON))
        );
        assert_eq!(negotiate(["bellwire.1.json", "bellwire.1.cbor"]), cbor);
        assert_eq!(
            negotiate(["bellwire.2.cbor", "chat"]),
            Err(UnsupportedSubprotocol)
        );
    }
}
