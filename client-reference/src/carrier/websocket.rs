//! WebSocket over TLS: one message is one frame.

use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec, DecodeError, SUBPROTOCOL_CBOR, SUBPROTOCOL_JSON};
use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use http::HeaderValue;
use http::header::SEC_WEBSOCKET_PROTOCOL;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::error::CapacityError;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message, Utf8Bytes};

use super::proxy::Pipe;
use super::{ConnectError, LinkEnd, Received};
use crate::endpoint::Endpoint;
use crate::tls::Tls;

/// Bytes read at a time. A small device needs no more; larger frames take several reads.
const READ_BUFFER_BYTES: usize = 8 * 1024;

/// Bytes gathered before they are written without an explicit flush.
const WRITE_BUFFER_BYTES: usize = 4 * 1024;

/// Most bytes that wait to be written: many frames of the largest size.
const WRITE_BUFFER_MAX_BYTES: usize = 256 * 1024;

/// Most bytes of a refusal that are searched for our code.
const REFUSAL_MAX_BYTES: usize = 8 * 1024;

#[derive(Debug)]
pub(super) struct WebSocketLink {
    stream: WebSocketStream<TlsStream<Pipe>>,
    end: Option<LinkEnd>,
}

/// TLS on a connection that stands.
pub(super) async fn secure(
    server: &Endpoint,
    stream: Pipe,
    tls: &Tls,
) -> Result<TlsStream<Pipe>, ConnectError> {
    let host = server.host();
    let name = server
        .server_name()
        .ok_or_else(|| ConnectError::WebSocket {
            host: host.to_owned(),
            detail: "the host is no name".to_owned(),
        })?;
    let secured = TlsConnector::from(tls.tcp.clone())
        .connect(name, stream)
        .await;
    secured.map_err(|error| ConnectError::handshake(Carrier::WebSocket, host, error.to_string()))
}

/// The WebSocket handshake.
pub(super) async fn upgrade(
    server: &Endpoint,
    stream: TlsStream<Pipe>,
    codec: Codec,
) -> Result<WebSocketLink, ConnectError> {
    let host = server.host();
    let broken = |detail: String| ConnectError::WebSocket {
        host: host.to_owned(),
        detail,
    };
    let url = format!("wss://{}{}", server.authority(), server.path());
    let mut request = url
        .into_client_request()
        .map_err(|error| broken(error.to_string()))?;
    let subprotocol = match codec {
        Codec::Cbor => SUBPROTOCOL_CBOR,
        Codec::Json => SUBPROTOCOL_JSON,
    };
    request.headers_mut().insert(
        SEC_WEBSOCKET_PROTOCOL,
        HeaderValue::from_static(subprotocol),
    );
    let limit = codec.server_frame_max_bytes();
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        .max_write_buffer_size(WRITE_BUFFER_MAX_BYTES)
        .max_message_size(Some(limit))
        .max_frame_size(Some(limit));
    match tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await {
        Ok((stream, _)) => Ok(WebSocketLink { stream, end: None }),
        Err(Error::Http(response)) => Err(ConnectError::Upgrade {
            host: host.to_owned(),
            status: response.status().as_u16(),
            code: response.body().as_deref().and_then(code_in),
        }),
        Err(error) => Err(broken(error.to_string())),
    }
}

/// Our code in a problem document (RFC 9457).
fn code_in(body: &[u8]) -> Option<Code> {
    #[derive(serde::Deserialize)]
    struct Problem {
        code: String,
    }
    let problem: Problem =
        serde_json::from_slice(body.get(..body.len().min(REFUSAL_MAX_BYTES))?).ok()?;
    Code::from_name(&problem.code)
}

impl WebSocketLink {
    pub(super) async fn receive(&mut self, codec: Codec) -> Result<Received, LinkEnd> {
        loop {
            if let Some(end) = &self.end {
                return Err(end.clone());
            }
            let received = match self.stream.next().await {
                Some(Ok(Message::Text(text))) => kind(codec == Codec::Json, text.into()),
                Some(Ok(Message::Binary(bytes))) => kind(codec == Codec::Cbor, bytes),
                Some(Ok(Message::Close(frame))) => {
                    self.end = Some(closed(frame.as_ref()));
                    continue;
                }
                // The library answers pings by itself.
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => continue,
                Some(Err(Error::Capacity(CapacityError::MessageTooLong { size, max_size }))) => {
                    Err(DecodeError::TooLarge {
                        len: size as u64,
                        limit: max_size as u64,
                    })
                }
                Some(Err(error)) => {
                    self.end = Some(LinkEnd::new(None, error.to_string()));
                    continue;
                }
                None => {
                    self.end = Some(LinkEnd::new(None, "the connection ended"));
                    continue;
                }
            };
            return Ok(received);
        }
    }

    pub(super) async fn feed(&mut self, frame: Vec<u8>, codec: Codec) -> Result<(), LinkEnd> {
        let message = match codec {
            Codec::Cbor => Message::Binary(frame.into()),
            Codec::Json => match Utf8Bytes::try_from(Bytes::from(frame)) {
                Ok(text) => Message::Text(text),
                Err(_) => return Err(LinkEnd::new(None, "a text message must be UTF-8")),
            },
        };
        self.stream
            .feed(message)
            .await
            .map_err(|error| self.failed(&error))
    }

    pub(super) async fn flush(&mut self) -> Result<(), LinkEnd> {
        self.stream
            .flush()
            .await
            .map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &Error) -> LinkEnd {
        self.end
            .clone()
            .unwrap_or_else(|| LinkEnd::new(None, error.to_string()))
    }

    pub(super) async fn close(mut self, code: Code, farewell: Duration) -> Option<Code> {
        let answer = tokio::time::timeout(farewell, async {
            if self.end.is_none() {
                let number = code.websocket_close().unwrap_or(1000);
                let frame = CloseFrame {
                    code: number.into(),
                    reason: Utf8Bytes::from_static(code.name()),
                };
                let _ = self.stream.close(Some(frame)).await;
            }
            loop {
                // Whatever still comes is not read any more.
                if let Err(end) = self.receive(Codec::Json).await {
                    return end.code;
                }
            }
        });
        answer.await.ok().flatten()
    }
}

fn kind(right: bool, bytes: Bytes) -> Received {
    match right {
        true => Ok(bytes),
        false => Err(DecodeError::WrongMessageKind),
    }
}

fn closed(frame: Option<&CloseFrame>) -> LinkEnd {
    match frame {
        Some(frame) => {
            let number = u16::from(frame.code);
            let detail = match frame.reason.is_empty() {
                true => format!("closed by the server with {number}"),
                false => format!("closed by the server with {number} ({})", frame.reason),
            };
            LinkEnd::new(Code::from_websocket_close(number), detail)
        }
        None => LinkEnd::new(None, "closed by the server"),
    }
}
