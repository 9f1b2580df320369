//! HTTP CONNECT proxies (RFC 9110 section 9.3.6): the only way out of many companies.
//!
//! | file | what |
//! | --- | --- |
//! | `mod` | a proxy as it is written, and the tunnel through it |
//! | [`answer`] | the head of the proxy's answer, within a limit |
//! | [`environment`] | `HTTPS_PROXY` and `NO_PROXY` |
//! | [`fault`] | why a proxy does not let us through |

mod answer;
mod environment;
mod fault;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bellwire_protocol::Secret;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

pub use environment::EnvironmentProxyError;
pub(crate) use environment::{Exceptions, from_environment};
pub use fault::ProxyFault;

use super::{ConnectError, tcp};
use crate::endpoint::Endpoint;
use crate::tls::Tls;
use answer::Answer;

/// How long the proxy may take: name look-up, TCP, TLS, and its answer. Shorter than
/// [`DIAL_TIMEOUT`](super::DIAL_TIMEOUT), so that a proxy that hangs is named as such.
const TUNNEL_TIMEOUT: Duration = Duration::from_secs(8);

/// Greatest length of a proxy's URL in bytes.
const URL_MAX_BYTES: usize = 1_024;

/// A connection to the server, direct or through a proxy, on which the next byte is the server's.
pub(crate) type Pipe = Either<TcpStream, Box<TlsStream<TcpStream>>>;

/// A proxy: `http://host:port`, `http://user:password@host:port`, or the same with `https://` when the proxy itself is spoken
/// to over TLS. Without a port it is 80, or 443. WebSocket passes it, QUIC does not.
///
/// User and password may be percent-encoded, and must be where they hold `@`, `/`, `:` or `%`. Neither `Debug` nor `Display`
/// shows them, and no error repeats them.
#[derive(Clone, PartialEq, Eq)]
pub struct Proxy {
    tls: bool,
    host: String,
    port: u16,
    /// `user:password`, decoded.
    credentials: Option<Secret>,
}

/// Why a text is no proxy. It does not repeat the text, which may hold a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "this is no proxy: {why}. Write http://host:port or http://user:password@host:port (https:// for a proxy that speaks TLS)"
)]
pub struct ParseProxyError {
    why: &'static str,
}

impl ParseProxyError {
    const fn new(why: &'static str) -> Self {
        Self { why }
    }
}

impl FromStr for Proxy {
    type Err = ParseProxyError;

    fn from_str(text: &str) -> Result<Self, ParseProxyError> {
        let wrong = |why| Err(ParseProxyError::new(why));
        if text.len() > URL_MAX_BYTES {
            return wrong("it is too long");
        }
        let (tls, named, rest) = match text.split_once("://") {
            None => (false, false, text),
            Some((scheme, rest)) => match scheme.to_ascii_lowercase().as_str() {
                "http" => (false, true, rest),
                "https" => (true, true, rest),
                "socks4" | "socks4a" | "socks5" | "socks5h" | "socks" => {
                    return wrong("SOCKS is not spoken, only HTTP");
                }
                _ => return wrong("the scheme is neither http nor https"),
            },
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, authority) = match rest.rsplit_once('@') {
            Some((credentials, authority)) => (Some(credentials_of(credentials)?), authority),
            None => (None, rest),
        };
        let has_port = authority
            .rsplit_once(':')
            .is_some_and(|(_, after)| !after.ends_with(']'));
        if !named && !has_port {
            return wrong("neither scheme nor port is there");
        }
        if authority.contains(['/', '?', '#']) {
            return wrong("it has a path");
        }
        let authority = match (has_port, tls) {
            (true, _) => authority.to_owned(),
            (false, false) => format!("{authority}:80"),
            (false, true) => format!("{authority}:443"),
        };
        // The rules for hosts and ports are those of a server.
        let endpoint: Endpoint = authority
            .parse()
            .map_err(|_| ParseProxyError::new("host or port is wrong"))?;
        Ok(Self {
            tls,
            host: endpoint.host().to_owned(),
            port: endpoint.port(),
            credentials,
        })
    }
}

/// `user:password` of a URL, as Basic authentication wants it (RFC 7617 section 2).
fn credentials_of(text: &str) -> Result<Secret, ParseProxyError> {
    let (user, password) = text.split_once(':').unwrap_or((text, ""));
    let (user, password) = (percent_decoded(user)?, percent_decoded(password)?);
    if user.contains(':') {
        return Err(ParseProxyError::new("a user's name must not have a colon"));
    }
    if user
        .chars()
        .chain(password.chars())
        .any(|character| character.is_control())
    {
        return Err(ParseProxyError::new(
            "user or password have control characters",
        ));
    }
    Ok(Secret(format!("{user}:{password}")))
}

fn percent_decoded(text: &str) -> Result<String, ParseProxyError> {
    const WRONG: ParseProxyError =
        ParseProxyError::new("after a % in user or password come two hexadecimal digits of UTF-8");
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
            _ => return Err(WRONG),
        }
    }
    String::from_utf8(bytes).map_err(|_| WRONG)
}

/// Host and port; `https://` in front when TLS is spoken. Never the credentials.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.tls { "https://" } else { "" };
        match self.host.contains(':') {
            true => write!(f, "{scheme}[{}]:{}", self.host, self.port),
            false => write!(f, "{scheme}{}:{}", self.host, self.port),
        }
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Proxy({self})")
    }
}

impl Proxy {
    /// A connection through the proxy. `tls` says whom to trust when the proxy speaks TLS.
    pub(super) async fn tunnel(&self, server: &Endpoint, tls: &Tls) -> Result<Pipe, ConnectError> {
        let tunnelling = async {
            let mut pipe = self.connect(tls).await?;
            self.ask(&mut pipe, server).await?;
            Ok(pipe)
        };
        let tunnelled = tokio::time::timeout(TUNNEL_TIMEOUT, tunnelling).await;
        tunnelled
            .unwrap_or(Err(ProxyFault::Timeout))
            .map_err(|fault| ConnectError::Proxy {
                proxy: self.to_string(),
                fault,
            })
    }

    async fn connect(&self, tls: &Tls) -> Result<Pipe, ProxyFault> {
        let stream = tcp(&self.host, self.port)
            .await
            .map_err(ProxyFault::from_tcp)?;
        if !self.tls {
            return Ok(Either::Left(stream));
        }
        let name = rustls_pki_types::ServerName::try_from(self.host.clone());
        let name = name.map_err(|error| ProxyFault::Tls {
            detail: error.to_string(),
        })?;
        let secured = TlsConnector::from(tls.proxy.clone())
            .connect(name, stream)
            .await;
        match secured {
            Ok(stream) => Ok(Either::Right(Box::new(stream))),
            Err(error) => Err(ProxyFault::from_tls(&error.to_string())),
        }
    }

    async fn ask(
        &self,
        pipe: &mut (impl AsyncRead + AsyncWrite + Unpin),
        server: &Endpoint,
    ) -> Result<(), ProxyFault> {
        let broken = |source| ProxyFault::Broken { source };
        let authority = server.authority();
        let mut request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n");
        if let Some(credentials) = &self.credentials {
            request.push_str("Proxy-Authorization: Basic ");
            request.push_str(&base64(credentials.expose().as_bytes()));
            request.push_str("\r\n");
        }
        request.push_str("\r\n");
        pipe.write_all(request.as_bytes()).await.map_err(broken)?;
        pipe.flush().await.map_err(broken)?;

        let mut answer = Answer::default();
        loop {
            let space = answer.space();
            if space.is_empty() {
                return Err(ProxyFault::AnswerTooLong);
            }
            let read = pipe.read(space).await.map_err(broken)?;
            if read == 0 {
                return Err(ProxyFault::Ended);
            }
            if let Some(decided) = answer.take(read, self.credentials.is_some()) {
                return decided;
            }
        }
    }
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

    fn shown(text: &str) -> String {
        let proxy: Proxy = text.parse().unwrap();
        format!(
            "{} {} {} {:?}",
            proxy.tls,
            proxy.host,
            proxy.port,
            proxy.credentials.as_ref().map(Secret::expose)
        )
    }

    #[test]
    fn proxies_are_read_in_every_form() {
        for (text, expected) in [
            (
                "http://ann:s%40crt@proxy.example.org:3128/",
                "false proxy.example.org 3128 Some(\"ann:s@crt\")",
            ),
            (
                "HTTPS://proxy.example.org",
                "true proxy.example.org 443 None",
            ),
            ("http://proxy", "false proxy 80 None"),
            ("10.0.0.1:8080", "false 10.0.0.1 8080 None"),
            ("http://[2001:db8::1]:3128", "false 2001:db8::1 3128 None"),
            ("https://[2001:db8::1]", "true 2001:db8::1 443 None"),
            ("http://ann@proxy:1", "false proxy 1 Some(\"ann:\")"),
            (
                "http://ann:a:b@c@proxy:1",
                "false proxy 1 Some(\"ann:a:b@c\")",
            ),
        ] {
            assert_eq!(shown(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_proxy_is_refused_with_a_reason_and_without_the_text() {
        for (text, why) in [
            ("", "neither scheme"),
            ("s3cret", "neither scheme"),
            ("socks5://s3cret@proxy:1", "SOCKS"),
            ("ftp://s3cret@proxy:1", "scheme"),
            ("http://s3cret%zz@proxy:1", "two hexadecimal"),
            ("http://s3cret%0d%0aX:@proxy:1", "control"),
            ("http://s3cret%3ax:y@proxy:1", "colon"),
            ("http://s3cret@proxy:x", "host or port"),
            ("http://s3cret@proxy:1/path", "path"),
            ("http://s3cret@", "host or port"),
        ] {
            let error = text.parse::<Proxy>().unwrap_err().to_string();
            assert!(
                error.contains(why) && !error.contains("s3cret"),
                "{text}: {error}"
            );
        }
        assert!("x".repeat(2_000).parse::<Proxy>().is_err());
    }

    #[test]
    fn credentials_are_not_shown() {
        let proxy: Proxy = "http://ann:s3cret@proxy:3128".parse().unwrap();
        assert_eq!(format!("{proxy:?} {proxy}"), "Proxy(proxy:3128) proxy:3128");
        let proxy: Proxy = "https://ann:s3cret@[::1]:3128".parse().unwrap();
        assert_eq!(proxy.to_string(), "https://[::1]:3128");
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
}
