//! As much of MQTT 3.1.1 as a device and a backend need: connect, subscribe, publish and acknowledge at quality of service 1.

use bytes::{Buf, Bytes, BytesMut};

use super::pipe::Pipe;
use crate::failure::{Failure, Outcome};

/// Longest packet that is taken, bytes. What is sent here is a few KiB.
const PACKET_MAX_BYTES: usize = 1 << 20;

/// Highest packet id; 0 is none.
const ID_MAX: u16 = u16::MAX;

/// What a broker may say here.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Packet {
    Connected { session_present: bool, code: u8 },
    Subscribed { code: u8 },
    Message { id: u16, content: Bytes },
    Taken { id: u16 },
    Pong,
}

/// A connection to the broker.
pub(super) struct Client {
    pipe: Pipe,
    next_id: u16,
}

impl Client {
    /// Says who it is. A client that is not `clean` has a session that outlives the connection; the second answer is whether
    /// there was one.
    pub(super) async fn connect(
        mut pipe: Pipe,
        name: &str,
        clean: bool,
    ) -> Outcome<(Client, bool)> {
        let mut body = Vec::new();
        put_text(&mut body, "MQTT");
        body.extend_from_slice(&[4, u8::from(clean) << 1, 0, 0]);
        put_text(&mut body, name);
        put_packet(&mut pipe.output, 0x10, &[&body]);
        pipe.flush().await?;
        let mut client = Client { pipe, next_id: 1 };
        let said = client.receive().await?;
        let Packet::Connected {
            session_present,
            code: 0,
        } = said
        else {
            return Err(strange("connecting", &said));
        };
        Ok((client, session_present))
    }

    /// Subscribes at quality of service 1.
    pub(super) async fn subscribe(&mut self, topic: &str) -> Outcome<()> {
        let mut body = self.id().to_be_bytes().to_vec();
        put_text(&mut body, topic);
        body.push(1);
        put_packet(&mut self.pipe.output, 0x82, &[&body]);
        self.pipe.flush().await?;
        let said = self.receive().await?;
        match said == (Packet::Subscribed { code: 1 }) {
            true => Ok(()),
            false => Err(strange("subscribing", &said)),
        }
    }

    /// Puts a message at quality of service 1 into the output, and answers its id.
    pub(super) fn put_publish(&mut self, topic: &str, content: &[u8]) -> u16 {
        let id = self.id();
        let mut head = Vec::with_capacity(topic.len() + 4);
        put_text(&mut head, topic);
        head.extend_from_slice(&id.to_be_bytes());
        put_packet(&mut self.pipe.output, 0x32, &[&head, content]);
        id
    }

    pub(super) async fn flush(&mut self) -> Outcome<()> {
        self.pipe.flush().await
    }

    /// Waits for the next message that the broker took, and answers its id.
    pub(super) async fn taken(&mut self) -> Outcome<u16> {
        let said = self.receive().await?;
        let Packet::Taken { id } = said else {
            return Err(strange("publishing", &said));
        };
        Ok(id)
    }

    /// Waits for messages, hands on those that are there, and acknowledges each, all in one write.
    pub(super) async fn take(&mut self, each: &mut (dyn FnMut(&[u8]) + Send)) -> Outcome<()> {
        let mut next = Some(self.receive().await?);
        while let Some(packet) = next {
            match packet {
                Packet::Message { id, content } => {
                    each(&content);
                    if id != 0 {
                        put_packet(&mut self.pipe.output, 0x40, &[&id.to_be_bytes()]);
                    }
                }
                Packet::Pong => {}
                other @ (Packet::Connected { .. }
                | Packet::Subscribed { .. }
                | Packet::Taken { .. }) => return Err(strange("listening", &other)),
            }
            next = parse(&mut self.pipe.input)?;
        }
        self.pipe.flush().await
    }

    /// Leaves in good order; a session stays.
    pub(super) async fn leave(mut self) -> Outcome<()> {
        put_packet(&mut self.pipe.output, 0xE0, &[]);
        self.pipe.end().await
    }

    fn id(&mut self) -> u16 {
        let id = self.next_id;
        self.next_id = if id == ID_MAX { 1 } else { id + 1 };
        id
    }

    async fn receive(&mut self) -> Outcome<Packet> {
        loop {
            if let Some(packet) = parse(&mut self.pipe.input)? {
                return Ok(packet);
            }
            self.pipe.fill().await?;
        }
    }
}

fn strange(when: &str, packet: &Packet) -> Failure {
    Failure::new(format!("{when}: the MQTT broker said {packet:?}"))
}

fn put_text(into: &mut Vec<u8>, text: &str) {
    // Names and topics here are a few bytes long.
    into.extend_from_slice(&(text.len() as u16).to_be_bytes());
    into.extend_from_slice(text.as_bytes());
}

fn put_packet(into: &mut Vec<u8>, kind: u8, parts: &[&[u8]]) {
    into.push(kind);
    let mut length: usize = parts.iter().map(|part| part.len()).sum();
    loop {
        let digit = (length % 128) as u8;
        length /= 128;
        into.push(digit | if length > 0 { 0x80 } else { 0 });
        if length == 0 {
            break;
        }
    }
    for part in parts {
        into.extend_from_slice(part);
    }
}

/// The packet at the start of `input`, if all of it is there.
fn parse(input: &mut BytesMut) -> Outcome<Option<Packet>> {
    let mut length = 0usize;
    let mut header = 1;
    loop {
        let Some(&digit) = input.get(header) else {
            return Ok(None);
        };
        length |= usize::from(digit & 0x7F) << (7 * (header - 1));
        header += 1;
        if digit & 0x80 == 0 {
            break;
        }
        if header > 4 {
            return Err(Failure::new("an MQTT packet has no length"));
        }
    }
    if length > PACKET_MAX_BYTES {
        return Err(Failure::new(format!(
            "an MQTT packet is {length} bytes long"
        )));
    }
    if input.len() < header + length {
        return Ok(None);
    }
    let kind = input[0];
    input.advance(header);
    let mut body = input.split_to(length).freeze();
    let short = || Failure::new(format!("an MQTT packet of kind {kind:#x} is too short"));
    let number = |body: &mut Bytes| body.try_get_u16().map_err(|_| short());
    Ok(Some(match kind >> 4 {
        2 => {
            let flags = number(&mut body)?;
            Packet::Connected {
                session_present: flags & 0x100 != 0,
                code: flags as u8,
            }
        }
        3 => {
            let topic = usize::from(number(&mut body)?);
            if body.len() < topic {
                return Err(short());
            }
            body.advance(topic);
            let id = match kind & 0x06 {
                0 => 0,
                _ => number(&mut body)?,
            };
            Packet::Message { id, content: body }
        }
        4 => Packet::Taken {
            id: number(&mut body)?,
        },
        9 => {
            number(&mut body)?;
            Packet::Subscribed {
                code: body.try_get_u8().map_err(|_| short())?,
            }
        }
        13 => Packet::Pong,
        _ => {
            return Err(Failure::new(format!(
                "the MQTT broker sent a packet of kind {kind:#x}"
            )));
        }
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_message_is_read_however_it_is_cut() {
        let mut bytes = Vec::new();
        let content = vec![b'x'; 300];
        put_packet(&mut bytes, 0x32, &[&[0, 2, b'a', b'b', 1, 2], &content]);
        put_packet(&mut bytes, 0x40, &[&[3, 4]]);
        for cut in 0..bytes.len() {
            let mut input = BytesMut::from(&bytes[..cut]);
            let mut found = Vec::new();
            while let Some(packet) = parse(&mut input).unwrap() {
                found.push(packet);
            }
            input.extend_from_slice(&bytes[cut..]);
            while let Some(packet) = parse(&mut input).unwrap() {
                found.push(packet);
            }
            let message = Packet::Message {
                id: 0x102,
                content: content.clone().into(),
            };
            assert_eq!(found, [message, Packet::Taken { id: 0x304 }]);
        }
    }

    #[test]
    fn lengths_take_as_many_digits_as_they_need() {
        for (length, header) in [
            (0, vec![0x30, 0]),
            (127, vec![0x30, 127]),
            (128, vec![0x30, 0x80, 1]),
            (16_384, vec![0x30, 0x80, 0x80, 1]),
        ] {
            let mut bytes = Vec::new();
            put_packet(&mut bytes, 0x30, &[&vec![0; length]]);
            assert_eq!(bytes[..header.len()], header);
            assert_eq!(bytes.len(), header.len() + length);
        }
        let mut endless = BytesMut::from(&[0x30, 0xFF, 0xFF, 0xFF, 0xFF, 1][..]);
        assert!(parse(&mut endless).is_err());
    }

    #[test]
    fn a_packet_that_is_too_short_is_refused() {
        for bytes in [
            &[0x20, 1, 0][..],
            &[0x32, 3, 0, 9, b'a'],
            &[0x40, 0],
            &[0xF0, 0],
        ] {
            assert!(parse(&mut BytesMut::from(bytes)).is_err(), "{bytes:?}");
        }
    }
}
