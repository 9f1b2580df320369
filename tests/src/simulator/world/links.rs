//! What arrives on links.

use super::*;

impl World {
    pub(super) fn arrive(&mut self, id: u64, way: Way) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let Some(piece) = conn.arrive(way) else {
            return;
        };
        let (device, life, run) = (conn.device, conn.life, conn.run);
        let (carrier, codec) = (conn.carrier, conn.codec);
        let alive = match way {
            Way::Up => conn.server && self.house.as_ref().is_some_and(|house| house.run == run),
            Way::Down => conn.client && self.devices[device].life == life,
        };
        if !alive {
            return;
        }
        match (way, piece) {
            (Way::Up, Piece::Bytes(bytes)) => self.server_hears(id, carrier, codec, &bytes),
            (Way::Down, Piece::Bytes(bytes)) => {
                self.client_hears(id, device, carrier, codec, &bytes);
            }
            (Way::Up, Piece::Close(_) | Piece::Broken) => {
                self.detach(id);
                if let Some(house) = &mut self.house {
                    house.links.remove(&id);
                }
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.server = false;
                }
                self.forget_conn(id);
            }
            (Way::Down, Piece::Close(code)) => self.client_closed(id, device, Some(code)),
            (Way::Down, Piece::Broken) => self.client_closed(id, device, None),
        }
    }

    pub(super) fn server_hears(&mut self, id: u64, carrier: Carrier, codec: Codec, bytes: &[u8]) {
        let mut first = true;
        loop {
            let Some(link) = self
                .house
                .as_mut()
                .and_then(|house| house.links.get_mut(&id))
            else {
                return;
            };
            link.heard_us = self.now_us;
            let decoded = match carrier {
                Carrier::Messages if first => codec.decode_device(bytes),
                Carrier::Messages => return,
                Carrier::Stream => {
                    if first {
                        link.reader.push(bytes);
                    }
                    match link.reader.pull() {
                        Ok(Some(frame)) => codec.decode_device(&frame),
                        Ok(None) => return,
                        Err(error) => Err(error),
                    }
                }
            };
            first = false;
            if let Err(error) = &decoded {
                self.ledger
                    .object(format!("the server cannot read a frame: {error}"));
            }
            self.drive(id, |session, actions| {
                session.handle_decoded(decoded, actions);
            });
        }
    }
}
