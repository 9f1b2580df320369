//! HTTP CONNECT proxies (RFC 9110 section 9.3.6): the only way out of many companies.

use std::fmt;
use std::str::FromStr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{ConnectError, tcp};
use crate::endpoint::Endpoint;

/// Most bytes of the proxy's answer.
const ANSWER_MAX_BYTES: usize = 8 * 1024;

/// A proxy: `http://host:port` or `http://user:password@host:port`. WebSocket passes it, QUIC does not.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    host: String,
    port: u16,
    credentials: Option<String>,
}

/// Why a text is no proxy. It does not repeat the text, which may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a proxy is written http://host:port or http://user:password@host:port")]
pub struct ParseProxyError;

impl FromStr for Proxy {
    type Err = ParseProxyError;

    fn from_str(text: &str) -> Result<Self, ParseProxyError> {
        let rest = text.strip_prefix("http://").unwrap_or(text);
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, authority) = match rest.rsplit_once('@') {
            Some((credentials, authority)) => (Some(percent_decoded(credentials)?), authority),
            None => (None, rest),
        };
        // The rules for hosts and ports are those of a server.
        if !authority.contains(':') || authority.contains("://") {
            return Err(ParseProxyError);
        }
        let endpoint: Endpoint = authority.parse().map_err(|_| ParseProxyError)?;
        Ok(Self {
            host: endpoint.host().to_owned(),
            port: endpoint.port(),
            credentials,
        })
    }
}

fn percent_decoded(text: &str) -> Result<String, ParseProxyError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next(), rest.next()]
            .map(|digit| digit.and_then(|digit| (digit as char).to_digit(16)));
        match digits {
            // Two hexadecimal digits make at most 255.
            [Some(high), Some(low)] => bytes.push((high * 16 + low) as u8),
            _ => return Err(ParseProxyError),
        }
    }
    String::from_utf8(bytes).map_err(|_| ParseProxyError)
}

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

impl Proxy {
    /// A connection through the proxy, on which the next byte is the server's.
    pub(super) async fn tunnel(&self, server: &Endpoint) -> Result<TcpStream, ConnectError> {
        let failed = |detail: String| ConnectError::Proxy {
            proxy: self.to_string(),
            detail,
        };
        let mut stream = tcp(&self.host, self.port).await?;
        let authority = server.authority();
        let mut request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n");
        if let Some(credentials) = &self.credentials {
            request.push_str("Proxy-Authorization: Basic ");
            request.push_str(&base64(credentials.as_bytes()));
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        let asked = stream.write_all(request.as_bytes()).await;
        asked.map_err(|error| failed(error.to_string()))?;

        // Byte by byte, so that nothing of the server's is swallowed; it happens once per connection.
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            if answer.len() == ANSWER_MAX_BYTES {
                return Err(failed("its answer is too long".to_owned()));
            }
            match stream.read_u8().await {
                Ok(byte) => answer.push(byte),
                Err(error) => return Err(failed(error.to_string())),
            }
        }
        match status(&answer) {
            Some(200..=299) => Ok(stream),
            Some(407) => Err(failed("it wants credentials (HTTP 407)".to_owned())),
            Some(status) => Err(failed(format!("HTTP {status}"))),
            None => Err(failed("it does not speak HTTP".to_owned())),
        }
    }
}

fn status(answer: &[u8]) -> Option<u16> {
    let line = std::str::from_utf8(answer).ok()?.lines().next()?;
    let mut words = line.split(' ');
    words
        .next()
        .filter(|version| version.starts_with("HTTP/1."))?;
    words.next()?.parse().ok()
}

/// Padded standard base64 (RFC 4648 section 4), for one short header.
fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk
            .iter()
            .fold(0u32, |bits, &byte| bits << 8 | u32::from(byte))
            << (8 * (3 - chunk.len()));
        for place in 0..4 {
            match place <= chunk.len() {
                true => text.push(ALPHABET[(bits >> (18 - 6 * place) & 63) as usize] as char),
                false => text.push('='),
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn proxies_are_read_and_passwords_are_not_shown() {
        let proxy: Proxy = "http://ann:s%40crt@proxy.example.org:3128/"
            .parse()
            .unwrap();
        assert_eq!(
            (proxy.host.as_str(), proxy.port),
            ("proxy.example.org", 3128)
        );
        assert_eq!(proxy.credentials.as_deref(), Some("ann:s@crt"));
        assert_eq!(
            format!("{proxy:?} {proxy}"),
            "Proxy(proxy.example.org:3128) proxy.example.org:3128"
        );
        assert_eq!("10.0.0.1:8080".parse::<Proxy>().unwrap().credentials, None);
        for wrong in [
            "",
            "proxy",
            "https://proxy:1",
            "http://a%zz@proxy:1",
            "http://proxy:x",
        ] {
            assert_eq!(wrong.parse::<Proxy>(), Err(ParseProxyError), "{wrong}");
        }
    }

    #[test]
    fn base64_is_that_of_rfc_4648() {
        let vectors = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
        ];
        for (plain, coded) in vectors {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn a_status_line_is_read_and_rubbish_is_not() {
        assert_eq!(
            status(b"HTTP/1.1 200 Connection established\r\n\r\n"),
            Some(200)
        );
        assert_eq!(
            status(b"HTTP/1.0 407 Proxy Authentication Required\r\n\r\n"),
            Some(407)
        );
        assert_eq!(status(b"SSH-2.0-x\r\n\r\n"), None);
        assert_eq!(status(b"\xff\r\n\r\n"), None);
    }
}
