//! What goes wrong in a run, each a named parameter, all derived from the seed.

use rand::Rng;
use rand::rngs::StdRng;

/// The world of one seed.
#[derive(Debug, Clone)]
pub struct Faults {
    /// Devices.
    pub devices: usize,
    /// Shards of the server.
    pub shards: usize,
    /// Pings in the run.
    pub pings: usize,
    /// How long things go wrong, seconds; then everything heals.
    pub trouble_s: u64,
    /// Times the server's process is killed.
    pub server_kills: u32,
    /// Times the server's machine loses power: what was not synced is forgotten or torn.
    pub power_cuts: u32,
    /// Times a client's process is killed.
    pub client_kills: u32,
    /// Times a link is cut, at any byte.
    pub link_cuts: u32,
    /// Times a link falls silent and neither side is told.
    pub half_opens: u32,
    /// Longest time that a device's app takes for one notification, milliseconds.
    pub app_ms: u64,
    /// Longest way of a byte from one side to the other, milliseconds.
    pub delay_ms: u64,
    /// Longest sync of the server's disk, milliseconds.
    pub sync_ms: u64,
    /// Longest read of the server's disk, milliseconds.
    pub read_ms: u64,
    /// Frames cut into pieces on the way.
    pub pieces: bool,
    /// The server's disk has no room for a while.
    pub disk_full: bool,
    /// A sync fails once; the server is restarted.
    pub failed_sync: bool,
    /// A write fails once; the server is restarted.
    pub failed_write: bool,
    /// Share of reads that fail.
    pub failing_reads: f64,
    /// Wall clock of the server after a restart, seconds to either side.
    pub clock_jump_s: u64,
    /// Share of pings that come with many others at once.
    pub bursts: f64,
    /// Share of pings with a replacement key.
    pub collapse: f64,
    /// Most notifications in a mailbox.
    pub mailbox: u32,
    /// Most bytes in a mailbox.
    pub mailbox_bytes: u64,
    /// Full mailboxes refuse.
    pub refuse: bool,
    /// Window that devices ask for.
    pub window: u16,
    /// Share of pings that are revoked.
    pub revokes: f64,
    /// A device is wiped.
    pub wipe: bool,
    /// Share of pings with TTL 0.
    pub ttl_zero: f64,
    /// Share of pings with a life of seconds.
    pub short_lives: f64,
    /// Share of pings to several devices.
    pub shared: f64,
    /// The publisher repeats what was not answered, under the same id.
    pub retries: bool,
    /// Share of notifications that the app declines.
    pub declines: f64,
    /// Some devices want only what is urgent.
    pub picky: bool,
    /// Rows are held back from the disk.
    pub defer: bool,
    /// Frames that the engine stays behind the log.
    pub lag_frames: usize,
    /// Snapshots are taken now and then.
    pub snapshots: bool,
}

impl Faults {
    /// The world of a seed. About half of the faults are on, so that each is seen with and without every other.
    #[must_use]
    pub fn draw(random: &mut StdRng) -> Faults {
        let mut on = |chance: f64| random.random_bool(chance);
        let (kills, cuts, clients, links, halves) = (on(0.4), on(0.4), on(0.4), on(0.6), on(0.3));
        let (slow_app, slow_net, slow_sync, slow_read) = (on(0.3), on(0.3), on(0.3), on(0.3));
        let (pieces, disk_full, failed_sync, failed_write) = (on(0.5), on(0.2), on(0.1), on(0.05));
        let (bad_reads, jump, bursts, collapse) = (on(0.15), on(0.3), on(0.4), on(0.4));
        let (tiny, tiny_bytes, refuse, tiny_window) = (on(0.3), on(0.2), on(0.1), on(0.4));
        let (revokes, wipe, zero, short) = (on(0.3), on(0.1), on(0.2), on(0.3));
        let (shared, retries, declines, picky) = (on(0.4), on(0.5), on(0.2), on(0.15));
        let (defer, lag, snapshots) = (on(0.6), on(0.4), on(0.2));
        let mut up_to = |is_on: bool, most: u32| {
            if is_on {
                random.random_range(1..=most)
            } else {
                0
            }
        };
        let (server_kills, power_cuts) = (up_to(kills, 3), up_to(cuts, 3));
        let (client_kills, link_cuts, half_opens) =
            (up_to(clients, 4), up_to(links, 6), up_to(halves, 2));
        let share = |is_on: bool, share: f64| if is_on { share } else { 0.0 };
        Faults {
            devices: random.random_range(1..=3),
            shards: random.random_range(1..=2),
            pings: random.random_range(3..=40),
            trouble_s: random.random_range(5..=60),
            server_kills,
            power_cuts,
            client_kills,
            link_cuts,
            half_opens,
            app_ms: if slow_app { 3_000 } else { 10 },
            delay_ms: if slow_net { 400 } else { 10 },
            sync_ms: if slow_sync { 300 } else { 5 },
            read_ms: if slow_read { 300 } else { 3 },
            pieces,
            disk_full,
            failed_sync,
            failed_write,
            failing_reads: share(bad_reads, 0.2),
            clock_jump_s: if jump { 20 } else { 0 },
            bursts: share(bursts, 0.3),
            collapse: share(collapse, 0.5),
            mailbox: if tiny {
                random.random_range(1..=5)
            } else {
                1_000
            },
            mailbox_bytes: if tiny_bytes {
                random.random_range(60..=300)
            } else {
                1 << 20
            },
            refuse,
            window: if tiny_window {
                random.random_range(1..=3)
            } else {
                32
            },
            revokes: share(revokes, 0.2),
            wipe,
            ttl_zero: share(zero, 0.2),
            short_lives: share(short, 0.4),
            shared: share(shared, 0.3),
            retries,
            declines: share(declines, 0.1),
            picky,
            defer,
            lag_frames: if lag { random.random_range(1..=8) } else { 0 },
            snapshots,
        }
    }
}
