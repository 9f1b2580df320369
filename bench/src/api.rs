//! The HTTP API as a backend with keep-alive connections sees it.
//!
//! Requests are written from bytes that are ready, and of an answer only the status and the length of its body are read.
//! The generator shares the machine with the server, so what it does not do itself is the server's to use.

use std::net::SocketAddr;
use std::time::Duration;

use bellwire_protocol::Id;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::failure::{During, Failure, Outcome};

/// Longest wait for an answer. A server that needs longer is stuck.
const ANSWER_MAX: Duration = Duration::from_secs(60);

/// Largest answer that is read, in bytes. `/metrics` is the largest that is asked for.
pub(crate) const ANSWER_MAX_BYTES: usize = 4 * 1024 * 1024;

/// Headers of an answer.
const HEADERS_MAX: usize = 64;

/// One keep-alive connection.
pub(crate) struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
}

/// An answer; its body stands in the connection's buffer until the next request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Where its body starts and ends.
    pub(crate) body: (usize, usize),
}

impl Connection {
    pub(crate) async fn open(address: SocketAddr) -> Outcome<Connection> {
        let stream = TcpStream::connect(address)
            .await
            .during(format_args!("connect to the API at {address}"))?;
        stream
            .set_nodelay(true)
            .during("set an option of a socket")?;
        Ok(Connection {
            stream,
            buffer: Vec::with_capacity(4096),
        })
    }

    /// Sends one whole request and reads its answer.
    pub(crate) async fn exchange(&mut self, request: &[u8]) -> Outcome<Answer> {
        let exchange = async {
            self.stream
                .write_all(request)
                .await
                .during("send a request")?;
            self.read_answer().await
        };
        timeout(ANSWER_MAX, exchange)
            .await
            .map_err(|_| Failure::new("the API did not answer within 60 s"))?
    }

    /// Sends a batch and hands on the lines of its answer as they come. An answer that is none of a batch is given whole.
    pub(crate) async fn exchange_lines(
        &mut self,
        request: &[u8],
        take: &mut impl FnMut(&[u8]),
    ) -> Outcome<Option<Answer>> {
        let exchange = async {
            self.stream
                .write_all(request)
                .await
                .during("send a request")?;
            self.buffer.clear();
            let mut lines = Lines::default();
            let mut begun = false;
            loop {
                let read = self
                    .stream
                    .read_buf(&mut self.buffer)
                    .await
                    .during("read an answer")?;
                if read == 0 {
                    return Err(Failure::new(
                        "the API closed the connection within an answer",
                    ));
                }
                if !begun {
                    match chunks_at(&self.buffer)? {
                        Some(at) => {
                            begun = true;
                            self.buffer.drain(..at);
                        }
                        // No chunks, or not the whole head.
                        None => {
                            if let Ok(Some(answer)) = parse(&self.buffer) {
                                return Ok(Some(answer));
                            }
                            continue;
                        }
                    }
                }
                let (used, ended) = lines.feed(&self.buffer, take)?;
                self.buffer.drain(..used);
                if ended {
                    return Ok(None);
                }
            }
        };
        timeout(ANSWER_MAX, exchange)
            .await
            .map_err(|_| Failure::new("the API did not answer within 60 s"))?
    }

    async fn read_answer(&mut self) -> Outcome<Answer> {
        self.buffer.clear();
        loop {
            let read = self
                .stream
                .read_buf(&mut self.buffer)
                .await
                .during("read an answer")?;
            if read == 0 {
                return Err(Failure::new(
                    "the API closed the connection instead of answering",
                ));
            }
            if let Some(answer) = parse(&self.buffer)? {
                return Ok(answer);
            }
            if self.buffer.len() > ANSWER_MAX_BYTES {
                return Err(Failure::new("an answer of the API is larger than 4 MiB"));
            }
        }
    }

    pub(crate) fn body(&self, answer: Answer) -> &[u8] {
        &self.buffer[answer.body.0..answer.body.1]
    }
}

/// The answer at the start of `bytes`, if all of it is there.
pub(crate) fn parse(bytes: &[u8]) -> Outcome<Option<Answer>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(bytes).during("understand an answer")?;
    let httparse::Status::Complete(start) = parsed else {
        return Ok(None);
    };
    let status = response.code.unwrap_or_default();
    let length = response
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.trim().parse().ok());
    let length: usize = match length {
        Some(length) => length,
        None if status == 204 => 0,
        None => {
            return Err(Failure::new(
                "an answer of the API does not state its length",
            ));
        }
    };
    let end = start.saturating_add(length);
    Ok((bytes.len() >= end).then_some(Answer {
        status,
        body: (start, end),
    }))
}

/// Where the chunks of an answer start, once its head is there and says that there are some.
pub(crate) fn chunks_at(bytes: &[u8]) -> Outcome<Option<usize>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let parsed = response.parse(bytes).during("understand an answer")?;
    let httparse::Status::Complete(start) = parsed else {
        return Ok(None);
    };
    let chunked = response.headers.iter().any(|header| {
        header.name.eq_ignore_ascii_case("transfer-encoding")
            && header.value.eq_ignore_ascii_case(b"chunked")
    });
    Ok(chunked.then_some(start))
}

/// Lines out of chunks.
#[derive(Default)]
pub(crate) struct Lines {
    text: Vec<u8>,
}

impl Lines {
    /// Reads the whole chunks at the start of `bytes` and hands on the whole lines in them. Says how many bytes they were,
    /// and whether that was the last chunk.
    pub(crate) fn feed(
        &mut self,
        bytes: &[u8],
        take: &mut impl FnMut(&[u8]),
    ) -> Outcome<(usize, bool)> {
        let mut at = 0;
        let mut ended = false;
        while !ended {
            let rest = &bytes[at..];
            let Some(end) = rest.windows(2).position(|two| two == b"\r\n") else {
                break;
            };
            let size = std::str::from_utf8(&rest[..end])
                .ok()
                .and_then(|digits| usize::from_str_radix(digits, 16).ok())
                .filter(|size| *size <= ANSWER_MAX_BYTES)
                .ok_or_else(|| Failure::new("a chunk of an answer has no size"))?;
            let start = end + 2;
            if rest.len() < start + size + 2 {
                break;
            }
            self.text.extend_from_slice(&rest[start..start + size]);
            at += start + size + 2;
            ended = size == 0;
        }
        let mut from = 0;
        while let Some(length) = self.text[from..].iter().position(|byte| *byte == b'\n') {
            take(&self.text[from..from + length]);
            from += length + 1;
        }
        self.text.drain(..from);
        Ok((at, ended))
    }
}

/// A whole request with a body in JSON, and where its body starts.
pub(crate) fn post(path: &str, host: SocketAddr, key: &str, body: &str) -> (Vec<u8>, usize) {
    post_as("application/json", path, host, key, body)
}

/// The same with a body of another kind.
pub(crate) fn post_as(
    kind: &str,
    path: &str,
    host: SocketAddr,
    key: &str,
    body: &str,
) -> (Vec<u8>, usize) {
    request("POST", kind, path, host, key, body)
}

/// The same of another method.
pub(crate) fn request(
    method: &str,
    kind: &str,
    path: &str,
    host: SocketAddr,
    key: &str,
    body: &str,
) -> (Vec<u8>, usize) {
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {key}\r\n\
         Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    let start = request.len();
    request.extend_from_slice(body.as_bytes());
    (request, start)
}

/// A device as it was registered.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Registered {
    pub(crate) device: Id,
    pub(crate) secret: String,
}

/// Registers one device.
pub(crate) async fn register(
    connection: &mut Connection,
    host: SocketAddr,
    key: &str,
    user: &str,
) -> Outcome<Registered> {
    let (request, _) = post(
        "/v1/devices",
        host,
        key,
        &format!("{{\"user\":\"{user}\"}}"),
    );
    let answer = connection.exchange(&request).await?;
    let body = connection.body(answer);
    if answer.status != 201 {
        return Err(Failure::new(format!(
            "registering a device was answered by {}: {}",
            answer.status,
            String::from_utf8_lossy(body)
        )));
    }
    serde_json::from_slice(body).during("understand a registered device")
}

/// The server's metrics at one moment.
pub(crate) struct Metrics(String);

impl Metrics {
    pub(crate) async fn read(operations: SocketAddr) -> Outcome<Metrics> {
        let mut connection = Connection::open(operations).await?;
        let request = format!("GET /metrics HTTP/1.1\r\nHost: {operations}\r\n\r\n");
        let answer = connection.exchange(request.as_bytes()).await?;
        if answer.status != 200 {
            return Err(Failure::new(format!("/metrics answered {}", answer.status)));
        }
        let text = String::from_utf8_lossy(connection.body(answer)).into_owned();
        Ok(Metrics(text))
    }

    /// The sum of a metric over all label sets that contain `label`, such as `outcome="expired"`; empty means all.
    pub(crate) fn sum(&self, name: &str, label: &str) -> f64 {
        self.0
            .lines()
            .filter_map(|line| {
                let rest = line.strip_prefix(name)?;
                let (labels, value) = match rest.strip_prefix('{') {
                    Some(rest) => rest.rsplit_once('}')?,
                    None if rest.starts_with(' ') => ("", rest),
                    None => return None,
                };
                let value: f64 = value.split_whitespace().next()?.parse().ok()?;
                labels.contains(label).then_some(value)
            })
            .sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn an_answer_is_complete_when_its_body_is() {
        let whole = b"HTTP/1.1 202 Accepted\r\nContent-Length: 3\r\n\r\nabc";
        for cut in 0..whole.len() {
            assert!(parse(&whole[..cut]).unwrap().is_none());
        }
        let answer = parse(whole).unwrap().unwrap();
        assert_eq!(answer.status, 202);
        assert_eq!(&whole[answer.body.0..answer.body.1], b"abc");
        assert!(parse(b"HTTP/1.1 200 OK\r\n\r\n").is_err());
    }

    #[test]
    fn lines_come_out_of_chunks_however_they_are_cut() {
        let head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(chunks_at(head).unwrap(), Some(head.len()));
        assert_eq!(chunks_at(&head[..20]).unwrap(), None);
        let whole = b"4\r\none\n\r\n3\r\ntwo\r\n1\r\n\n\r\n0\r\n\r\n";
        for cut in 0..whole.len() {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            let mut take = |line: &[u8]| found.push(String::from_utf8_lossy(line).into_owned());
            let (used, ended) = lines.feed(&whole[..cut], &mut take).unwrap();
            assert!(!ended);
            let rest = lines.feed(&whole[used..], &mut take).unwrap();
            assert_eq!(rest, (whole.len() - used, true));
            assert_eq!(found, ["one", "two"]);
        }
        assert!(Lines::default().feed(b"x\r\n", &mut |_| {}).is_err());
    }

    #[test]
    fn metrics_are_summed_by_whole_name_and_label() {
        let metrics = Metrics(
            "# HELP a_total x\na_total{app=\"d\",outcome=\"expired\"} 2\na_total{app=\"d\",outcome=\"revoked\"} 3\n\
             a_total_more 9\nb 4.5\n"
                .to_owned(),
        );
        assert_eq!(metrics.sum("a_total", ""), 5.0);
        assert_eq!(metrics.sum("a_total", "outcome=\"expired\""), 2.0);
        assert_eq!(metrics.sum("b", ""), 4.5);
        assert_eq!(metrics.sum("c", ""), 0.0);
    }
}
