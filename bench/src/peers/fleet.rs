//! Devices and backends of all peers behind one face, so that one generator measures all of them alike.

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;

use bellwire_protocol::{Ack, Carrier, DeviceFrame, ServerFrame};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::broker::{Peer, Target};
use super::pipe::Pipe;
use super::{mqtt, nats};
use crate::api::{self, Connection, Registered};
use crate::device::{Dialer, Link};
use crate::failure::{During, Failure, Outcome};
use crate::progress::Progress;
use crate::tls;

/// Digits of the number that each message begins with.
pub(super) const NUMBER_DIGITS: usize = 12;

/// Consumers asked for and not yet answered.
const CONSUMERS_AT_ONCE: usize = 64;

/// What the answer to a line of a batch has that was accepted.
const ACCEPTED: &[u8] = b"\"status\":202";

/// Runs `count` steps, at most `at_once` at a time.
pub(super) async fn many<F, T>(
    count: usize,
    at_once: usize,
    step: impl Fn(usize) -> F,
) -> Outcome<Vec<T>>
where
    F: Future<Output = Outcome<T>> + Send + 'static,
    T: Send + 'static,
{
    let places = Arc::new(Semaphore::new(at_once.max(1)));
    let mut tasks = JoinSet::new();
    let mut done = Vec::with_capacity(count);
    for number in 0..count {
        let place = Arc::clone(&places)
            .acquire_owned()
            .await
            .during("wait for a place")?;
        let work = step(number);
        tasks.spawn(async move {
            let done = work.await;
            drop(place);
            done
        });
        while let Some(finished) = tasks.try_join_next() {
            done.push(finished.during("run a step")??);
        }
    }
    while let Some(finished) = tasks.join_next().await {
        done.push(finished.during("run a step")??);
    }
    Ok(done)
}

/// All devices of a run.
#[derive(Clone)]
pub(super) enum Fleet {
    Bellwire {
        dialer: Dialer,
        devices: Arc<[Registered]>,
    },
    Mosquitto {
        address: SocketAddr,
        connector: TlsConnector,
    },
    Nats {
        address: SocketAddr,
        connector: TlsConnector,
    },
}

impl Fleet {
    /// Makes `count` devices that are known and away: registered, with a session, with a durable consumer.
    pub(super) async fn prepare(target: &Target, count: usize, at_once: usize) -> Outcome<Fleet> {
        let authority = target.authority.as_bytes();
        let address = target.devices;
        let connector = TlsConnector::from(Arc::new(tls::client(authority)?));
        match target.peer {
            Peer::Bellwire => {
                let progress = Progress::new(true);
                let devices =
                    crate::fleet::register(target.backends, &target.key, count, progress).await?;
                Ok(Fleet::Bellwire {
                    dialer: Dialer::new(
                        address,
                        authority,
                        true,
                        false,
                        Ipv4Addr::LOCALHOST.into(),
                    )?,
                    devices: devices.into(),
                })
            }
            Peer::Mosquitto => {
                many(count, at_once, |number| {
                    let connector = connector.clone();
                    async move {
                        let pipe = Pipe::open(address).await?.encrypted(&connector).await?;
                        let name = format!("d{number}");
                        let (mut client, _) = mqtt::Client::connect(pipe, &name, false).await?;
                        client.subscribe(&topic(number)).await?;
                        client.leave().await
                    }
                })
                .await?;
                Ok(Fleet::Mosquitto { address, connector })
            }
            Peer::Nats => {
                let pipe = Pipe::open(target.backends).await?;
                let mut client = nats::Client::connect(pipe, None, "maker").await?;
                client.expect_answers().await?;
                client.make_streams(target.streams).await?;
                for first in (0..count).step_by(CONSUMERS_AT_ONCE) {
                    let some = first..count.min(first + CONSUMERS_AT_ONCE);
                    for device in some.clone() {
                        client.put_consumer(device, target.streams);
                    }
                    client.flush().await?;
                    for _ in some {
                        client.answered().await?;
                    }
                }
                Ok(Fleet::Nats { address, connector })
            }
        }
    }

    /// Connects one of them.
    pub(super) async fn attach(&self, number: usize) -> Outcome<Device> {
        match self {
            Fleet::Bellwire { dialer, devices } => {
                let attached = dialer.attach(Carrier::WebSocket, &devices[number]);
                Ok(Device::Bellwire(Box::new(attached.await?.0)))
            }
            Fleet::Mosquitto { address, connector } => {
                let pipe = Pipe::open(*address).await?.encrypted(connector).await?;
                let name = format!("d{number}");
                let (client, known) = mqtt::Client::connect(pipe, &name, false).await?;
                match known {
                    true => Ok(Device::Mosquitto(Box::new(client))),
                    false => Err(Failure::new(format!("the session of {name} is gone"))),
                }
            }
            Fleet::Nats { address, connector } => {
                let pipe = Pipe::open(*address).await?;
                let name = format!("d{number}");
                let mut client = nats::Client::connect(pipe, Some(connector), &name).await?;
                client.subscribe(&nats::delivered_to(number)).await?;
                Ok(Device::Nats(Box::new(client)))
            }
        }
    }

    /// Connects a backend.
    pub(super) async fn backend(&self, target: &Target, number: usize) -> Outcome<Backend> {
        let address = target.backends;
        let name = format!("p{number}");
        Ok(match self {
            Fleet::Bellwire { devices, .. } => Backend::Bellwire {
                connection: Connection::open(address).await?,
                host: address,
                key: target.key.clone(),
                devices: Arc::clone(devices),
            },
            Fleet::Mosquitto { .. } => {
                let pipe = Pipe::open(address).await?;
                let (client, _) = mqtt::Client::connect(pipe, &name, true).await?;
                Backend::Mosquitto(Box::new(client))
            }
            Fleet::Nats { .. } => {
                let pipe = Pipe::open(address).await?;
                let mut client = nats::Client::connect(pipe, None, &name).await?;
                client.expect_answers().await?;
                Backend::Nats(Box::new(client), target.streams)
            }
        })
    }
}

/// The MQTT topic of a device's messages.
fn topic(device: usize) -> String {
    format!("ping/{device}")
}

/// A device that is connected.
pub(super) enum Device {
    Bellwire(Box<Link>),
    Mosquitto(Box<mqtt::Client>),
    Nats(Box<nats::Client>),
}

impl Device {
    /// Waits for messages, hands on those that are there, and acknowledges them, all in one write.
    pub(super) async fn take(&mut self, each: &mut (dyn FnMut(&[u8]) + Send)) -> Outcome<()> {
        let link = match self {
            Device::Bellwire(link) => link,
            Device::Mosquitto(client) => return client.take(each).await,
            Device::Nats(client) => return client.take(each).await,
        };
        let mut last = None;
        let mut next = Some(link.receive().await);
        while let Some(frame) = next {
            match frame? {
                ServerFrame::Notify(notify) => {
                    each(
                        notify
                            .content
                            .title
                            .as_deref()
                            .unwrap_or_default()
                            .as_bytes(),
                    );
                    last = Some(notify.seq);
                }
                ServerFrame::Pong | ServerFrame::Withdraw(_) | ServerFrame::Subscribed(_) => {}
                frame @ (ServerFrame::Welcome(_)
                | ServerFrame::Goaway(_)
                | ServerFrame::Error(_)) => {
                    return Err(Failure::new(format!("the server said {frame:?}")));
                }
            }
            next = link.receive_ready();
        }
        match last {
            Some(seq) => link.send(&DeviceFrame::Ack(Ack::UpTo(seq))).await,
            None => Ok(()),
        }
    }
}

/// A backend that is connected.
pub(super) enum Backend {
    Bellwire {
        connection: Connection,
        host: SocketAddr,
        key: String,
        devices: Arc<[Registered]>,
    },
    Mosquitto(Box<mqtt::Client>),
    Nats(Box<nats::Client>, usize),
}

impl Backend {
    /// Publishes these numbers in one write, each to its device in turn, and waits until all are answered. `text` is the content
    /// behind the number.
    pub(super) async fn publish(
        &mut self,
        numbers: Range<usize>,
        devices: usize,
        text: &str,
        answered: &(dyn Fn(usize) + Sync),
    ) -> Outcome<()> {
        match self {
            Backend::Bellwire {
                connection,
                host,
                key,
                devices,
            } => {
                let line = |number: usize| {
                    let device = devices[number % devices.len()].device.text();
                    let device = String::from_utf8_lossy(&device).into_owned();
                    format!(
                        r#"{{"to":{{"device":"{device}"}},"title":"{number:0digits$}","body":"{text}"}}"#,
                        digits = NUMBER_DIGITS
                    )
                };
                let refused = |answer: &[u8]| {
                    Failure::new(format!(
                        "a ping was refused: {}",
                        String::from_utf8_lossy(answer)
                    ))
                };
                if numbers.len() == 1 {
                    let (request, _) = api::post("/v1/pings", *host, key, &line(numbers.start));
                    let answer = connection.exchange(&request).await?;
                    if answer.status != 202 {
                        return Err(refused(connection.body(answer)));
                    }
                    answered(numbers.start);
                    return Ok(());
                }
                let mut lines = String::new();
                for number in numbers.clone() {
                    lines.push_str(&line(number));
                    lines.push('\n');
                }
                let kind = "application/x-ndjson";
                let (request, _) = api::post_as(kind, "/v1/pings/batch", *host, key, &lines);
                let mut place = numbers.clone();
                let mut bad = None;
                let mut take = |line: &[u8]| match place.next() {
                    Some(number) if line.windows(ACCEPTED.len()).any(|part| part == ACCEPTED) => {
                        answered(number);
                    }
                    Some(_) | None => bad = Some(refused(line)),
                };
                let answer = connection.exchange_lines(&request, &mut take).await?;
                if let Some(answer) = answer {
                    return Err(refused(connection.body(answer)));
                }
                match bad {
                    Some(failure) => Err(failure),
                    None if place.is_empty() => Ok(()),
                    None => Err(Failure::new("a batch has too few answers")),
                }
            }
            Backend::Mosquitto(client) => {
                let mut waiting = Vec::with_capacity(numbers.len());
                for number in numbers {
                    let content = format!("{number:0NUMBER_DIGITS$}{text}");
                    let topic = topic(number % devices);
                    waiting.push((client.put_publish(&topic, content.as_bytes()), number));
                }
                client.flush().await?;
                while !waiting.is_empty() {
                    let id = client.taken().await?;
                    let place = waiting.iter().position(|(waits, _)| *waits == id);
                    let place = place.ok_or_else(|| {
                        Failure::new("the MQTT broker took a message that was not sent")
                    })?;
                    answered(waiting.swap_remove(place).1);
                }
                Ok(())
            }
            Backend::Nats(client, streams) => {
                let mut waiting = Vec::with_capacity(numbers.len());
                for number in numbers {
                    let content = format!("{number:0NUMBER_DIGITS$}{text}");
                    let subject = nats::pinged_by(number % devices, *streams);
                    waiting.push((client.put_request(&subject, content.as_bytes()), number));
                }
                client.flush().await?;
                while !waiting.is_empty() {
                    let answer = client.answered().await?;
                    let place = waiting.iter().position(|(waits, _)| *waits == answer);
                    let place = place.ok_or_else(|| {
                        Failure::new("JetStream took a message that was not sent")
                    })?;
                    answered(waiting.swap_remove(place).1);
                }
                Ok(())
            }
        }
    }
}
