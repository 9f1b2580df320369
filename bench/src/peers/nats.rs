//! As much of NATS and of JetStream as a device and a backend need: connect, subscribe, publish into a stream, and
//! acknowledge what a push consumer delivers.

use bytes::{Buf, Bytes, BytesMut};
use serde_json::{Value, json};
use tokio_rustls::TlsConnector;

use super::pipe::Pipe;
use crate::failure::{During, Failure, Outcome};

/// Longest line of the protocol, bytes; the server's first one, about itself, is the longest.
const LINE_MAX_BYTES: usize = 64 * 1024;

/// Longest message that is taken, bytes.
const MESSAGE_MAX_BYTES: usize = 1 << 20;

/// Messages that a consumer may have unacknowledged; the server's own default.
const UNACKNOWLEDGED: u32 = 1_000;

/// Consumers that a stream may have. The server's own default is 1,000, and it takes that for no limit as well.
const CONSUMERS_MAX: u32 = 1_000_000;

/// What a server may say.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Said {
    Info,
    Message {
        subject: Bytes,
        reply: Bytes,
        content: Bytes,
    },
    Ping,
    Pong,
    Ok,
    Error(String),
}

/// A connection to the server.
pub(super) struct Client {
    pipe: Pipe,
    /// Prefix of subjects on which answers come.
    inbox: String,
    next_answer: u64,
}

impl Client {
    /// Introduces itself, over TLS if there is a connector.
    pub(super) async fn connect(
        mut pipe: Pipe,
        tls: Option<&TlsConnector>,
        name: &str,
    ) -> Outcome<Client> {
        // The server speaks first, and TLS begins after that.
        let said = receive(&mut pipe).await?;
        if said != Said::Info {
            return Err(strange("connecting", &said));
        }
        if let Some(tls) = tls {
            pipe = pipe.encrypted(tls).await?;
        }
        let options = json!({
            "verbose": false, "pedantic": false, "echo": false, "headers": false, "protocol": 1,
            "tls_required": tls.is_some(), "name": name, "lang": "bench", "version": "0",
        });
        pipe.output
            .extend_from_slice(format!("CONNECT {options}\r\nPING\r\n").as_bytes());
        pipe.flush().await?;
        let mut client = Client {
            pipe,
            inbox: format!("_INBOX.{name}"),
            next_answer: 0,
        };
        client.settled().await?;
        Ok(client)
    }

    /// Waits for the answer to a PING: everything before it was understood.
    async fn settled(&mut self) -> Outcome<()> {
        loop {
            match receive(&mut self.pipe).await? {
                Said::Pong => return Ok(()),
                Said::Info | Said::Ok => {}
                other @ (Said::Message { .. } | Said::Ping | Said::Error(_)) => {
                    return Err(strange("connecting", &other));
                }
            }
        }
    }

    /// Subscribes; what is there comes from now on.
    pub(super) async fn subscribe(&mut self, subject: &str) -> Outcome<()> {
        self.put_subscription(subject);
        self.pipe.flush().await
    }

    fn put_subscription(&mut self, subject: &str) {
        let line = format!("SUB {subject} 1\r\n");
        self.pipe.output.extend_from_slice(line.as_bytes());
    }

    /// Subscribes to answers of [`Client::put_request`].
    pub(super) async fn expect_answers(&mut self) -> Outcome<()> {
        let subject = format!("{}.*", self.inbox);
        self.put_subscription(&subject);
        self.pipe.output.extend_from_slice(b"PING\r\n");
        self.pipe.flush().await?;
        self.settled().await
    }

    /// Makes the streams: on disk, one copy, and what is acknowledged goes.
    pub(super) async fn make_streams(&mut self, count: usize) -> Outcome<()> {
        for number in 0..count {
            self.make_stream(&format!("pings{number}"), &format!("ping.{number}.*"))
                .await?;
        }
        Ok(())
    }

    async fn make_stream(&mut self, name: &str, subjects: &str) -> Outcome<()> {
        let config = json!({
            "name": name, "subjects": [subjects], "storage": "file", "num_replicas": 1,
            "retention": "workqueue", "discard": "old", "max_msgs": -1, "max_bytes": -1,
            "max_age": 0, "max_consumers": CONSUMERS_MAX,
        });
        self.put_request(
            &format!("$JS.API.STREAM.CREATE.{name}"),
            config.to_string().as_bytes(),
        );
        self.flush().await?;
        self.answered().await.map(|_| ())
    }

    /// Puts a request for a device's durable consumer into the output.
    pub(super) fn put_consumer(&mut self, device: usize, streams: usize) {
        let stream = format!("pings{}", device % streams);
        let config = json!({
            "stream_name": stream,
            "config": {
                "durable_name": format!("d{device}"), "deliver_subject": delivered_to(device),
                "filter_subject": pinged_by(device, streams), "ack_policy": "explicit", "deliver_policy": "all",
                "replay_policy": "instant", "max_ack_pending": UNACKNOWLEDGED,
            },
        });
        self.put_request(
            &format!("$JS.API.CONSUMER.DURABLE.CREATE.{stream}.d{device}"),
            config.to_string().as_bytes(),
        );
    }

    /// Puts a message into the output that will be answered, and answers by what number.
    pub(super) fn put_request(&mut self, subject: &str, content: &[u8]) -> u64 {
        let number = self.next_answer;
        self.next_answer += 1;
        let head = format!(
            "PUB {subject} {}.{number} {}\r\n",
            self.inbox,
            content.len()
        );
        self.pipe.output.extend_from_slice(head.as_bytes());
        self.pipe.output.extend_from_slice(content);
        self.pipe.output.extend_from_slice(b"\r\n");
        number
    }

    pub(super) async fn flush(&mut self) -> Outcome<()> {
        self.pipe.flush().await
    }

    /// Waits for the next answer of JetStream, which must be a good one, and answers its number.
    pub(super) async fn answered(&mut self) -> Outcome<u64> {
        loop {
            match receive(&mut self.pipe).await? {
                Said::Message {
                    subject, content, ..
                } => {
                    // A whole look at each answer would cost the generator more than the message did.
                    if content.windows(ERROR.len()).any(|part| part == ERROR) {
                        let value: Value = serde_json::from_slice(&content).unwrap_or_default();
                        return Err(Failure::new(format!(
                            "JetStream answered {}",
                            value["error"]
                        )));
                    }
                    let number = subject.rsplit(|byte| *byte == b'.').next();
                    return number
                        .and_then(|digits| std::str::from_utf8(digits).ok()?.parse().ok())
                        .ok_or_else(|| Failure::new("an answer of JetStream has no number"));
                }
                Said::Ping => self.pong().await?,
                Said::Info | Said::Ok | Said::Pong => {}
                other @ Said::Error(_) => return Err(strange("asking", &other)),
            }
        }
    }

    /// Waits for messages, hands on those that are there, and acknowledges each, all in one write.
    pub(super) async fn take(&mut self, each: &mut (dyn FnMut(&[u8]) + Send)) -> Outcome<()> {
        let mut next = Some(receive(&mut self.pipe).await?);
        while let Some(said) = next {
            match said {
                Said::Message { reply, content, .. } => {
                    each(&content);
                    let output = &mut self.pipe.output;
                    output.extend_from_slice(b"PUB ");
                    output.extend_from_slice(&reply);
                    output.extend_from_slice(b" 4\r\n+ACK\r\n");
                }
                Said::Ping => self.pipe.output.extend_from_slice(b"PONG\r\n"),
                Said::Info | Said::Ok | Said::Pong => {}
                other @ Said::Error(_) => return Err(strange("listening", &other)),
            }
            next = parse(&mut self.pipe.input)?;
        }
        self.pipe.flush().await
    }

    async fn pong(&mut self) -> Outcome<()> {
        self.pipe.output.extend_from_slice(b"PONG\r\n");
        self.pipe.flush().await
    }
}

/// What an answer of JetStream has that says no.
const ERROR: &[u8] = b"\"error\":";

/// The subject of a device's pings. Devices take the streams in turn.
pub(super) fn pinged_by(device: usize, streams: usize) -> String {
    format!("ping.{}.{device}", device % streams)
}

/// The subject on which a device gets them.
pub(super) fn delivered_to(device: usize) -> String {
    format!("device.{device}")
}

fn strange(when: &str, said: &Said) -> Failure {
    Failure::new(format!("{when}: the NATS server said {said:?}"))
}

async fn receive(pipe: &mut Pipe) -> Outcome<Said> {
    loop {
        if let Some(said) = parse(&mut pipe.input)? {
            return Ok(said);
        }
        pipe.fill().await?;
    }
}

/// What stands at the start of `input`, if all of it is there.
fn parse(input: &mut BytesMut) -> Outcome<Option<Said>> {
    let Some(end) = input.windows(2).position(|two| two == b"\r\n") else {
        if input.len() > LINE_MAX_BYTES {
            return Err(Failure::new("a line of the NATS server has no end"));
        }
        return Ok(None);
    };
    let line = &input[..end];
    let plain = match line.split(|byte| *byte == b' ').next().unwrap_or_default() {
        b"MSG" => None,
        b"INFO" => Some(Said::Info),
        b"PING" => Some(Said::Ping),
        b"PONG" => Some(Said::Pong),
        b"+OK" => Some(Said::Ok),
        b"-ERR" => Some(Said::Error(String::from_utf8_lossy(line).into_owned())),
        _ => {
            return Err(Failure::new(format!(
                "the NATS server said {}",
                String::from_utf8_lossy(line)
            )));
        }
    };
    if let Some(said) = plain {
        input.advance(end + 2);
        return Ok(Some(said));
    }
    let text = std::str::from_utf8(line).during("understand the NATS server")?;
    let mut words = text.split(' ').skip(1);
    let (subject, _, third, fourth) = (words.next(), words.next(), words.next(), words.next());
    let (reply, size) = match (third, fourth) {
        (Some(reply), Some(size)) => (reply, size),
        (Some(size), None) => ("", size),
        (None, _) => return Err(Failure::new(format!("the NATS server said {text}"))),
    };
    let subject = subject.unwrap_or_default();
    let size: usize = size.parse().during("understand the NATS server")?;
    if size > MESSAGE_MAX_BYTES {
        return Err(Failure::new(format!("a NATS message is {size} bytes long")));
    }
    let whole = end + 2 + size + 2;
    if input.len() < whole {
        return Ok(None);
    }
    let start = |part: &str| part.as_ptr() as usize - text.as_ptr() as usize;
    let (subject_at, reply_at) = (
        start(subject),
        if reply.is_empty() { 0 } else { start(reply) },
    );
    let (subject_len, reply_len) = (subject.len(), reply.len());
    let message = input.split_to(whole).freeze();
    Ok(Some(Said::Message {
        subject: message.slice(subject_at..subject_at + subject_len),
        reply: message.slice(reply_at..reply_at + reply_len),
        content: message.slice(end + 2..end + 2 + size),
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn messages_are_read_however_they_are_cut() {
        let bytes =
            b"INFO {\"a\":1}\r\nMSG device.7 1 $JS.ACK.x 5\r\na\r\nbc\r\nPING\r\nMSG b 1 0\r\n\r\n";
        for cut in 0..bytes.len() {
            let mut input = BytesMut::from(&bytes[..cut]);
            let mut found = Vec::new();
            while let Some(said) = parse(&mut input).unwrap() {
                found.push(said);
            }
            input.extend_from_slice(&bytes[cut..]);
            while let Some(said) = parse(&mut input).unwrap() {
                found.push(said);
            }
            let message =
                |subject: &'static str, reply: &'static str, content: &'static str| Said::Message {
                    subject: subject.into(),
                    reply: reply.into(),
                    content: content.into(),
                };
            assert_eq!(
                found,
                [
                    Said::Info,
                    message("device.7", "$JS.ACK.x", "a\r\nbc"),
                    Said::Ping,
                    message("b", "", ""),
                ]
            );
        }
    }

    #[test]
    fn what_is_not_understood_is_an_error() {
        for bytes in [
            "HMSG a 1 2 3\r\n",
            "MSG\r\n",
            "MSG a 1 x\r\n",
            "MSG a 1 9999999999\r\n",
        ] {
            assert!(parse(&mut BytesMut::from(bytes)).is_err(), "{bytes}");
        }
        let said = parse(&mut BytesMut::from("-ERR 'no'\r\n")).unwrap();
        assert_eq!(said, Some(Said::Error("-ERR 'no'".to_owned())));
    }
}
