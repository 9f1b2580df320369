//! The child's side: connections of one process, each a task, on one thread.

use std::io::BufRead as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bellwire_protocol::{Ack, Carrier, DeviceFrame, KeepAlive, ServerFrame};
use hdrhistogram::Histogram;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{Attached, Counts, Order, Setup, Told};
use crate::child;
use crate::clock;
use crate::device::{Dialer, Link};
use crate::failure::{During, Failure, Outcome};
use crate::fleet::Carriers;
use crate::generator::{Kind, Title, histogram, record, recorded};

/// Highest number that is counted. Bounds the memory of a process.
const NUMBER_MAX: u64 = 1 << 27;

/// Bits of a word of a set.
const WORD: usize = 64;

/// Pause before a device tries again to connect.
const AGAIN_AFTER: Duration = Duration::from_millis(250);

/// Connect devices, started by workloads
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PlayDevices {
    /// Nothing: all it has to know comes over standard input.
    _job: String,
}

/// Runs until the parent is gone.
pub(crate) async fn play() -> Outcome<()> {
    crate::process::raise_file_limit();
    // A thread of its own: nobody waits for it at the end.
    let (heard, mut lines) = mpsc::channel::<String>(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { return };
            if heard.blocking_send(line).is_err() {
                return;
            }
        }
    });
    let Some(setup) = lines.recv().await else {
        return Ok(());
    };
    let setup: Setup = child::job(&setup)?;
    let mut devices = match Devices::new(setup) {
        Ok(devices) => {
            child::say(&Ok::<_, String>(Told::Ready))?;
            devices
        }
        Err(failure) => return child::say(&Err::<Told, _>(failure.to_string())),
    };
    while let Some(line) = lines.recv().await {
        let order: Order = child::job(&line)?;
        let told = devices.obey(&order).await;
        child::say(&told.map_err(|failure| failure.to_string()))?;
    }
    devices.leave().await;
    Ok(())
}

/// Bits that were set, growing with the highest.
#[derive(Default)]
struct Set(Vec<u64>);

impl Set {
    /// `false`: it was in there already.
    fn insert(&mut self, bit: usize) -> bool {
        let (word, bit) = (bit / WORD, 1 << (bit % WORD));
        if word >= self.0.len() {
            self.0.resize((word + 1).max(self.0.len() * 2), 0);
        }
        let fresh = self.0[word] & bit == 0;
        self.0[word] |= bit;
        fresh
    }
}

/// What all devices of this process write down.
struct Book {
    singles: Set,
    fans: Set,
    counts: Counts,
    micros: Histogram<u64>,
    from: u64,
    to: u64,
}

/// A device and what it needs.
struct Devices {
    setup: Arc<Setup>,
    dialer: Dialer,
    book: Arc<Mutex<Book>>,
    links: JoinSet<()>,
    /// Set before all connections are given up, so that nobody takes that for a loss.
    leaving: Arc<AtomicBool>,
}

fn open(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    // What a task that panicked left is counts, and no worse than none.
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Devices {
    fn new(setup: Setup) -> Outcome<Devices> {
        let dialer = Dialer::new(
            setup.address,
            setup.authority.as_bytes(),
            setup.bellwire,
            setup.resume,
            setup.source,
        )?;
        let dialer = match setup.carriers {
            Carriers::Plain => dialer.plain(),
            Carriers::Both | Carriers::Quic | Carriers::Websocket => dialer,
        };
        Ok(Devices {
            setup: Arc::new(setup),
            dialer,
            book: Arc::new(Mutex::new(Book {
                singles: Set::default(),
                fans: Set::default(),
                counts: Counts::default(),
                micros: histogram(),
                from: 0,
                to: 0,
            })),
            links: JoinSet::new(),
            leaving: Arc::default(),
        })
    }

    fn count(&self) -> usize {
        self.setup.devices.len() + self.setup.strangers
    }

    async fn obey(&mut self, order: &Order) -> Outcome<Told> {
        Ok(match *order {
            Order::Attach { at_once, again } => Told::Attached(self.attach(at_once, again).await?),
            Order::Leave => {
                self.leave().await;
                Told::Ready
            }
            Order::Cycle { count, at_once } => Told::Attached(self.cycle(count, at_once).await?),
            Order::Watch { from, to } => {
                let mut book = open(&self.book);
                (book.from, book.to) = (from, to);
                book.micros = histogram();
                Told::Ready
            }
            Order::Count => Told::Counts(open(&self.book).counts.clone()),
            Order::Latency => Told::Latency(recorded(&open(&self.book).micros)),
        })
    }

    async fn leave(&mut self) {
        self.leaving.store(true, Ordering::Relaxed);
        self.links.shutdown().await;
        self.leaving = Arc::default();
        open(&self.book).counts.attached = 0;
        self.dialer.farewell().await;
    }

    async fn attach(&mut self, at_once: usize, again: bool) -> Outcome<Attached> {
        let started = Instant::now();
        let places = Arc::new(Semaphore::new(at_once.max(1)));
        let mut connecting = JoinSet::new();
        let mut whole = Attached::default();
        for slot in 0..self.count() {
            let place = Arc::clone(&places)
                .acquire_owned()
                .await
                .during("wait for a place")?;
            let (setup, dialer) = (Arc::clone(&self.setup), self.dialer.clone());
            connecting.spawn(async move {
                let mut tries = 0;
                let link = loop {
                    match connect(&setup, &dialer, slot).await {
                        Err(_) if again => {
                            tries += 1;
                            sleep(AGAIN_AFTER).await;
                        }
                        done => break done,
                    }
                };
                drop(place);
                link.map(|(link, keep_alive)| (slot, link, keep_alive, tries))
            });
            while let Some(done) = connecting.try_join_next() {
                self.hold(done.during("connect")??, &mut whole);
            }
        }
        while let Some(done) = connecting.join_next().await {
            self.hold(done.during("connect")??, &mut whole);
        }
        whole.seconds = started.elapsed().as_secs_f64();
        Ok(whole)
    }

    /// Lets a device that is connected listen in a task of its own.
    fn hold(
        &mut self,
        (slot, link, keep_alive, tries): (usize, Link, Option<KeepAlive>, u64),
        whole: &mut Attached,
    ) {
        whole.connections += 1;
        whole.resumed += u64::from(link.is_resumed());
        whole.again += tries;
        let (setup, book) = (Arc::clone(&self.setup), Arc::clone(&self.book));
        let leaving = Arc::clone(&self.leaving);
        open(&book).counts.attached += 1;
        self.links.spawn(async move {
            let why = listen(link, keep_alive, &setup, slot, &book).await;
            if leaving.load(Ordering::Relaxed) {
                return;
            }
            let counts = &mut open(&book).counts;
            counts.attached -= 1;
            counts.lost += 1;
            counts.first_loss.get_or_insert(why.to_string());
        });
    }

    async fn cycle(&mut self, count: usize, at_once: usize) -> Outcome<Attached> {
        let started = Instant::now();
        let mut workers = JoinSet::new();
        let workers_count = at_once.min(self.count()).max(1);
        for worker in 0..workers_count {
            let (setup, dialer) = (Arc::clone(&self.setup), self.dialer.for_one()?);
            let devices = self.count();
            workers.spawn(async move {
                let mut whole = Attached::default();
                let mut slot = worker;
                for _ in (worker..count).step_by(workers_count) {
                    let tickets = dialer.tickets();
                    let (link, _) = connect(&setup, &dialer, slot).await?;
                    whole.connections += 1;
                    whole.resumed += u64::from(link.is_resumed());
                    dialer.ticket_after(tickets).await;
                    drop(link);
                    slot += workers_count;
                    if slot >= devices {
                        slot = worker;
                    }
                }
                Ok::<_, Failure>(whole)
            });
        }
        let mut whole = Attached::default();
        while let Some(done) = workers.join_next().await {
            let one = done.during("connect")??;
            whole.connections += one.connections;
            whole.resumed += one.resumed;
        }
        whole.seconds = started.elapsed().as_secs_f64();
        Ok(whole)
    }
}

async fn connect(
    setup: &Setup,
    dialer: &Dialer,
    slot: usize,
) -> Outcome<(Link, Option<KeepAlive>)> {
    let carrier: Carrier = setup.carriers.of(setup.first + slot);
    match setup.devices.get(slot) {
        Some(device) => {
            let (link, keep_alive) = dialer.attach(carrier, device).await?;
            Ok((link, Some(keep_alive)))
        }
        None => {
            let mut link = dialer.connect(carrier).await?;
            // QUIC shows a stream to the other side with its first byte.
            link.send_bytes(&[0]).await?;
            Ok((link, None))
        }
    }
}

/// A device: takes what comes and acknowledges it, what came together by one frame, and gives a sign of life when it is due.
async fn listen(
    mut link: Link,
    keep_alive: Option<KeepAlive>,
    setup: &Setup,
    slot: usize,
    book: &Mutex<Book>,
) -> Failure {
    let every = keep_alive.map_or(Duration::from_secs(3_600), |bounds| {
        Duration::from_secs(u64::from(bounds.max_s) * 3 / 4)
    });
    loop {
        let mut next = match timeout(every, link.receive()).await {
            Ok(frame) => Some(frame),
            Err(_) if keep_alive.is_none() => continue,
            Err(_) => match link.send(&DeviceFrame::Ping).await {
                Ok(()) => continue,
                Err(failure) => return failure,
            },
        };
        let mut last = None;
        while let Some(frame) = next {
            match frame {
                Ok(ServerFrame::Notify(notify)) => {
                    let title = notify.content.title.as_deref().and_then(Title::read);
                    open(book).arrival(setup, slot, title, notify.redelivered);
                    last = Some(notify.seq);
                }
                Ok(ServerFrame::Pong | ServerFrame::Withdraw(_) | ServerFrame::Subscribed(_)) => {}
                Ok(
                    frame @ (ServerFrame::Welcome(_)
                    | ServerFrame::Goaway(_)
                    | ServerFrame::Error(_)),
                ) => return Failure::new(format!("the server said {frame:?}")),
                Err(failure) => return failure,
            }
            next = link.receive_ready();
        }
        if let Some(seq) = last
            && let Err(failure) = link.send(&DeviceFrame::Ack(Ack::UpTo(seq))).await
        {
            return failure;
        }
    }
}

impl Book {
    fn arrival(&mut self, setup: &Setup, slot: usize, title: Option<Title>, redelivered: bool) {
        let Some(title) = title.filter(|title| title.number < NUMBER_MAX) else {
            self.counts.strange += 1;
            return;
        };
        let number = title.number as usize;
        let fresh = match title.kind {
            Kind::Single if number % setup.total != setup.first + slot => {
                self.counts.strange += 1;
                return;
            }
            Kind::Single => self.singles.insert(number),
            Kind::Fan => self.fans.insert(number * setup.devices.len() + slot),
        };
        if fresh {
            self.counts.arrived += 1;
            if (self.from..self.to).contains(&title.due) {
                record(&mut self.micros, clock::now().saturating_sub(title.due));
            }
        } else if redelivered {
            self.counts.redelivered += 1;
        } else {
            self.counts.doubled += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::net::Ipv4Addr;

    use super::*;
    use crate::api::Registered;

    #[test]
    fn arrivals_are_told_apart() {
        let setup = Setup {
            address: "127.0.0.1:1".parse().unwrap(),
            authority: String::new(),
            carriers: Carriers::Quic,
            bellwire: true,
            source: Ipv4Addr::LOCALHOST.into(),
            resume: false,
            total: 10,
            first: 5,
            devices: vec![
                Registered {
                    device: bellwire_protocol::Id([1; 16]),
                    secret: String::new(),
                };
                5
            ],
            strangers: 0,
        };
        let mut book = Book {
            singles: Set::default(),
            fans: Set::default(),
            counts: Counts::default(),
            micros: histogram(),
            from: 10,
            to: 20,
        };
        let title = |kind, number, due| Some(Title { kind, number, due });
        // The seventh of ten devices, and the third of this process.
        book.arrival(&setup, 2, title(Kind::Single, 27, 15), false);
        book.arrival(&setup, 2, title(Kind::Single, 27, 15), true);
        book.arrival(&setup, 2, title(Kind::Single, 27, 15), false);
        book.arrival(&setup, 2, title(Kind::Single, 28, 15), false);
        book.arrival(&setup, 2, None, false);
        book.arrival(&setup, 2, title(Kind::Fan, 27, 25), false);
        book.arrival(&setup, 3, title(Kind::Fan, 27, 25), false);
        book.arrival(&setup, 3, title(Kind::Fan, 27, 25), false);
        assert_eq!(book.counts.arrived, 3);
        assert_eq!(book.counts.redelivered, 1);
        assert_eq!(book.counts.doubled, 2);
        assert_eq!(book.counts.strange, 2);
        assert_eq!(book.micros.len(), 1);
    }

    #[test]
    fn a_set_remembers() {
        let mut set = Set::default();
        for bit in [0, 63, 64, 100_000] {
            assert!(set.insert(bit));
            assert!(!set.insert(bit));
        }
        assert!(set.insert(99_999));
    }
}
