//! A way between a device and the server that can be told to hold back what the device says.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Bytes that are passed on at a time.
const PIECE: usize = 4096;

/// A TCP proxy with an address that stays, whichever server is behind it.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    target: Mutex<Option<SocketAddr>>,
    /// Bytes from the server after which nothing of the device passes any more.
    limit: watch::Sender<Option<u64>>,
}

impl Proxy {
    /// A proxy with nothing behind it: connections are closed at once.
    ///
    /// # Panics
    ///
    /// When it cannot listen.
    pub async fn start() -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0")
            .await
            .expect("a free port can be had");
        let address = listener.local_addr().expect("it is bound");
        let shared = Arc::new(Shared {
            target: Mutex::new(None),
            limit: watch::channel(None).0,
        });
        let serving = Arc::clone(&shared);
        tokio::spawn(async move {
            while let Ok((device, _)) = listener.accept().await {
                tokio::spawn(pass(device, Arc::clone(&serving)));
            }
        });
        Proxy { address, shared }
    }

    /// Where devices connect.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// New connections lead to this server from now on.
    pub fn lead_to(&self, server: SocketAddr) {
        *self
            .shared
            .target
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some(server);
    }

    /// Once the server has sent so many bytes on a connection, nothing of what the device says there passes any more. `None`:
    /// everything passes, also what was held back on connections that still stand.
    pub fn hold_after(&self, bytes: Option<u64>) {
        self.shared.limit.send_replace(bytes);
    }
}

async fn pass(device: TcpStream, shared: Arc<Shared>) {
    let target = *shared.target.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(target) = target else {
        return;
    };
    let Ok(server) = TcpStream::connect(target).await else {
        return;
    };
    let (from_device, to_device) = device.into_split();
    let (from_server, to_server) = server.into_split();
    let (told, heard) = watch::channel(0);
    // The end of either direction is the end of both.
    tokio::select! {
        () = down(from_server, to_device, told) => {}
        () = up(from_device, to_server, heard, shared.limit.subscribe()) => {}
    }
}

async fn down(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, told: watch::Sender<u64>) {
    let mut piece = [0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        told.send_modify(|bytes| *bytes += length as u64);
        if to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}

async fn up(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    heard: watch::Receiver<u64>,
    mut limit: watch::Receiver<Option<u64>>,
) {
    let mut piece = [0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut piece).await {
        let passes = limit
            .wait_for(|limit| limit.is_none_or(|limit| *heard.borrow() < limit))
            .await
            .is_ok();
        if !passes || to.write_all(&piece[..length]).await.is_err() {
            return;
        }
    }
}
