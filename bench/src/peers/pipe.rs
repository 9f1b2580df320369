//! A connection with what was read of it and what is to be written, encrypted or not.

use std::net::SocketAddr;

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::failure::{During, Failure, Outcome};
use crate::tls;

/// Room that is made for a read, bytes.
const READ_BYTES: usize = 4 * 1024;

enum Stream {
    Plain(TcpStream),
    Encrypted(Box<TlsStream<TcpStream>>),
}

/// One connection.
pub(super) struct Pipe {
    stream: Stream,
    /// Read and not yet understood.
    pub(super) input: BytesMut,
    /// To be written at the next flush.
    pub(super) output: Vec<u8>,
}

impl Pipe {
    pub(super) async fn open(address: SocketAddr) -> Outcome<Pipe> {
        let tcp = TcpStream::connect(address)
            .await
            .during(format_args!("connect to {address}"))?;
        tcp.set_nodelay(true).during("set an option of a socket")?;
        Ok(Pipe {
            stream: Stream::Plain(tcp),
            input: BytesMut::new(),
            output: Vec::new(),
        })
    }

    /// The same connection with TLS over it from here on.
    pub(super) async fn encrypted(self, connector: &TlsConnector) -> Outcome<Pipe> {
        let Stream::Plain(tcp) = self.stream else {
            return Err(Failure::new("the connection is encrypted already"));
        };
        if !self.input.is_empty() {
            return Err(Failure::new("the server spoke before TLS stood"));
        }
        let stream = tls::over(connector, tcp).await?;
        Ok(Pipe {
            stream: Stream::Encrypted(Box::new(stream)),
            ..self
        })
    }

    /// Reads what is there; waits for it.
    pub(super) async fn fill(&mut self) -> Outcome<()> {
        self.input.reserve(READ_BYTES);
        let read = match &mut self.stream {
            Stream::Plain(stream) => stream.read_buf(&mut self.input).await,
            Stream::Encrypted(stream) => stream.read_buf(&mut self.input).await,
        };
        match read.during("read a connection")? {
            0 => Err(Failure::new("the server closed a connection")),
            _ => Ok(()),
        }
    }

    /// Writes what is to be written, in one go.
    pub(super) async fn flush(&mut self) -> Outcome<()> {
        if self.output.is_empty() {
            return Ok(());
        }
        let written = match &mut self.stream {
            Stream::Plain(stream) => stream.write_all(&self.output).await,
            Stream::Encrypted(stream) => match stream.write_all(&self.output).await {
                Ok(()) => stream.flush().await,
                Err(error) => Err(error),
            },
        };
        self.output.clear();
        written.during("write to a connection")
    }

    /// Writes what is to be written and ends the connection.
    pub(super) async fn end(mut self) -> Outcome<()> {
        self.flush().await?;
        let ended = match &mut self.stream {
            Stream::Plain(stream) => stream.shutdown().await,
            Stream::Encrypted(stream) => stream.shutdown().await,
        };
        // A server that has closed first has heard enough.
        drop(ended);
        Ok(())
    }
}
