//! The device port: what carries the links between devices and their mailboxes.
//!
//! Read in this order: [`Link`](link::Link) is what both carriers share, with the [`Outbox`](outbox::Outbox) that the
//! runtime writes to and the [`Wheel`](wheel::Wheel) that notices silence; `websocket` (with `messages` on `wire` on
//! `secure`) and `quic` bring frames to it; `listen` opens the port and lets connections in, as far as `admission` has
//! room and as fast as `pace` gives turns, also those that a load balancer brings without TLS (`proxy`); `tls` is
//! the only place that configures TLS.
//!
//! Decides nothing about notifications, and knows nothing of the store or HTTP. What it answers to peers that
//! misbehave is listed in docs/abuse.md, each line with its test.

mod admission;
mod door;
mod http_head;
mod link;
mod listen;
mod messages;
mod meters;
mod outbox;
mod outgoing;
mod pace;
mod proxy;
mod quic;
mod secure;
mod tls;
mod websocket;
mod wheel;
mod wire;

pub use door::Door;
pub use listen::{Knocking, Transport, TransportError, TransportSettings};
pub use tls::{PemSource, Prepared, Suites, TlsError, TlsSettings};

#[cfg(test)]
mod testing {
    #![allow(clippy::unwrap_used)]
    use super::{PemSource, Suites, TlsSettings};
    use bellwire_certs::{DevAuthority, SanName, Validity};

    /// A fresh certificate for `localhost`.
    pub(crate) fn tls() -> TlsSettings {
        tls_and_root().0
    }

    /// The same, and the certificate in PEM of the authority that vouches for it.
    pub(crate) fn tls_and_root() -> (TlsSettings, String) {
        tls_for(&["localhost".parse().unwrap()])
    }

    /// The same with a certificate of more than 10 KB.
    pub(crate) fn long_tls_and_root() -> (TlsSettings, String) {
        let mut names: Vec<SanName> = vec!["localhost".parse().unwrap()];
        let labels = ["long"; 3].map(|label| label.repeat(15)).join(".");
        names.extend((0..60).map(|number| format!("n{number}.{labels}").parse().unwrap()));
        tls_for(&names)
    }

    fn tls_for(names: &[SanName]) -> (TlsSettings, String) {
        let now = time::OffsetDateTime::now_utc();
        let authority = DevAuthority::generate("test", Validity::authority(now).unwrap()).unwrap();
        let issued = authority
            .server(names, Validity::leaf(now).unwrap())
            .unwrap();
        let settings = TlsSettings {
            chain: PemSource::Text(issued.chain_pem.as_bytes().to_vec()),
            key: PemSource::Text(issued.key_pem.as_bytes().to_vec()),
            suites: Suites::All,
        };
        (settings, authority.certificate_pem().to_owned())
    }

    /// A WebSocket frame as a client sends it.
    pub(crate) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [0x9a, 0x03, 0xff, 0x40];
        let mut bytes = vec![first];
        match payload.len() {
            length @ 0..=125 => bytes.push(0x80 | length as u8),
            length @ 126..=0xffff => {
                bytes.push(0x80 | 126);
                bytes.extend((length as u16).to_be_bytes());
            }
            length => {
                bytes.push(0x80 | 127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend(mask);
        bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(b, m)| b ^ m));
        bytes
    }
}
