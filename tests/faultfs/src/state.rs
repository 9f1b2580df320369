//! The file system itself, without the kernel: what a running system sees, what would survive a loss of power, and what
//! lies between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::time::SystemTime;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use rustix::io::Errno;

use crate::faults::{Fault, Faults, Op, Struck};
use crate::image::{Image, PAGE, SECTOR};

/// The number of the root directory.
pub(crate) const ROOT: u64 = 1;

/// Bytes of unsynced writes above which those of the file with the most become safe by themselves, as the kernel does
/// after a while; what is kept for a loss of power stays bounded.
const WRITE_BACK: usize = 64 << 20;

/// The greatest length of a file: what fits into memory is less.
const MAX_FILE: u64 = 1 << 40;

/// A file system without a limit says that it has so many pages: 1 TiB.
const ROOMY: u64 = 1 << 28;

/// What makes a name safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Names {
    /// The strictest reading of POSIX: only an `fsync` of the directory makes safe what happened to its names, each change
    /// may be lost by itself, and a rename from one directory to another is two changes, of two directories.
    #[default]
    Strict,
    /// As ext4 and XFS do: what happens to names goes through one journal. It is kept up to a moment, a rename is one change
    /// wherever it leads, and any `fsync` of any file or directory makes everything before it safe.
    Journaled,
}

/// Something that would be lost, in part or in whole, if the power went now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsynced {
    /// The file or directory, relative to the mount.
    pub path: String,
    /// Changes since its last sync: writes and lengths of a file, names of a directory.
    pub changes: usize,
    /// Bytes of the writes among them, counted in whole sectors.
    pub bytes: usize,
}

/// What happened so far. Counts what was asked, whether it succeeded or not.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Counters {
    operations: BTreeMap<Op, u64>,
    /// Bytes that programs wrote.
    pub bytes_written: u64,
    /// Losses of power.
    pub cuts: u64,
}

impl Counters {
    /// How often this was asked.
    #[must_use]
    pub fn of(&self, op: Op) -> u64 {
        self.operations.get(&op).copied().unwrap_or(0)
    }
}

/// Who a file belongs to and what may be done with it. Not subject to a loss of power: changes are safe at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Meta {
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) accessed: SystemTime,
    pub(crate) modified: SystemTime,
    pub(crate) changed: SystemTime,
}

impl Meta {
    pub(crate) fn new(mode: u32, uid: u32, gid: u32) -> Meta {
        let now = SystemTime::now();
        Meta {
            mode,
            uid,
            gid,
            accessed: now,
            modified: now,
            changed: now,
        }
    }
}

/// What the kernel is told about a file or directory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stat {
    pub(crate) ino: u64,
    pub(crate) dir: bool,
    pub(crate) size: u64,
    pub(crate) pages: u64,
    pub(crate) links: u32,
    pub(crate) meta: Meta,
}

#[derive(Clone)]
struct Inode {
    meta: Meta,
    node: Node,
    /// Where it was last named; for paths in faults and reports.
    place: (u64, OsString),
    links: u32,
    opens: u64,
    lookups: u64,
}

#[derive(Clone)]
enum Node {
    File(File),
    Dir(Dir),
}

#[derive(Clone, Default)]
struct File {
    current: Image,
    safe: Image,
    pending: Vec<(u64, Change)>,
}

#[derive(Clone, Default)]
struct Dir {
    names: BTreeMap<OsString, u64>,
    safe: BTreeMap<OsString, u64>,
    pending: Vec<(u64, NameChange)>,
}

/// What happened to a file.
#[derive(Clone)]
enum Change {
    /// Whole sectors, as they were in memory after the write: a disk is never given less.
    Write {
        at: u64,
        sectors: Vec<u8>,
    },
    Resize(u64),
    Reserve(u64, u64),
}

#[derive(Clone)]
enum NameChange {
    Set(OsString, u64),
    Remove(OsString),
    Rename(OsString, OsString, u64),
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<OsString, u64>) {
        match self {
            NameChange::Set(name, ino) => {
                names.insert(name.clone(), *ino);
            }
            NameChange::Remove(name) => {
                names.remove(name);
            }
            NameChange::Rename(from, to, ino) => {
                names.remove(from);
                names.insert(to.clone(), *ino);
            }
        }
    }

    fn names(&self) -> Option<u64> {
        match self {
            NameChange::Set(_, ino) | NameChange::Rename(_, _, ino) => Some(*ino),
            NameChange::Remove(_) => None,
        }
    }
}

/// What a loss of power does to a write.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fate {
    Kept,
    Lost,
    Torn,
}

/// In which way a loss of power chooses.
#[derive(Clone, Copy)]
enum Style {
    Nothing,
    Everything,
    /// The order of the writes, up to one that is torn.
    InOrder(u64),
    /// The other way round: the disk had begun at the end.
    Backwards(u64),
    /// Each by itself: of a hundred, so many are kept and so many torn.
    Scattered(u32, u32),
}

struct Chance {
    rng: StdRng,
    style: Style,
}

impl Chance {
    fn new(seed: u64, first: u64, last: u64) -> Chance {
        let mut rng = StdRng::seed_from_u64(seed);
        let style = match rng.random_range(0..10) {
            0 => Style::Nothing,
            1 => Style::Everything,
            2 | 3 => Style::InOrder(rng.random_range(first..=last)),
            4 => Style::Backwards(rng.random_range(first..=last)),
            5 | 6 => Style::Scattered(10, 20),
            7 | 8 => Style::Scattered(50, 20),
            _ => Style::Scattered(80, 15),
        };
        Chance { rng, style }
    }

    fn scattered(seed: u64) -> Chance {
        Chance {
            rng: StdRng::seed_from_u64(seed),
            style: Style::Scattered(40, 30),
        }
    }

    fn fate(&mut self, order: u64) -> Fate {
        match self.style {
            Style::Nothing => Fate::Lost,
            Style::Everything => Fate::Kept,
            Style::InOrder(until) if order < until => Fate::Kept,
            Style::Backwards(from) if order > from => Fate::Kept,
            Style::InOrder(at) | Style::Backwards(at) if order == at => Fate::Torn,
            Style::InOrder(_) | Style::Backwards(_) => Fate::Lost,
            Style::Scattered(kept, torn) => match self.rng.random_range(0..100) {
                roll if roll < kept => Fate::Kept,
                roll if roll < kept + torn => Fate::Torn,
                _ => Fate::Lost,
            },
        }
    }

    fn coin(&mut self) -> bool {
        self.rng.random_range(0..2) == 0
    }

    /// For what cannot be torn.
    fn stays(&mut self, order: u64) -> bool {
        match self.fate(order) {
            Fate::Kept => true,
            Fate::Lost => false,
            Fate::Torn => self.coin(),
        }
    }
}

impl File {
    /// Everything is safe.
    fn settle(&mut self) {
        for (_, change) in std::mem::take(&mut self.pending) {
            match change {
                Change::Write { at, sectors } => self.safe.write_inside(at, &sectors),
                Change::Resize(size) => self.safe.resize(size),
                Change::Reserve(from, to) => self.safe.reserve(from, to),
            }
        }
    }

    /// Any part of it is. Lengths and reservations are kept up to one of them, sectors each by themselves.
    fn survive(&mut self, chance: &mut Chance) {
        let mut lengths = true;
        for (order, change) in std::mem::take(&mut self.pending) {
            match change {
                Change::Write { at, sectors } => {
                    let fate = chance.fate(order);
                    for (offset, sector) in (at..)
                        .step_by(SECTOR as usize)
                        .zip(sectors.chunks(SECTOR as usize))
                    {
                        if fate == Fate::Kept || fate == Fate::Torn && chance.coin() {
                            self.safe.write_inside(offset, sector);
                        }
                    }
                }
                Change::Resize(size) => {
                    lengths = lengths && chance.stays(order);
                    if lengths {
                        self.safe.resize(size);
                    }
                }
                Change::Reserve(from, to) => {
                    lengths = lengths && chance.stays(order);
                    if lengths {
                        self.safe.reserve(from, to);
                    }
                }
            }
        }
    }

    fn pending_bytes(&self) -> usize {
        self.pending
            .iter()
            .map(|(_, change)| match change {
                Change::Write { sectors, .. } => sectors.len(),
                Change::Resize(_) | Change::Reserve(..) => 0,
            })
            .sum()
    }
}

/// All files and directories.
#[derive(Clone)]
pub(crate) struct State {
    inodes: BTreeMap<u64, Inode>,
    next_ino: u64,
    /// Numbers everything that is not safe, in the order in which it happened.
    order: u64,
    names: Names,
    /// Bytes of writes that are kept for a loss of power.
    pending_bytes: usize,
    capacity: Option<u64>,
    liar: bool,
    failed_syncs: u64,
    /// Goes up with every mount and every loss of power; who has an older one is of a system that is gone.
    pub(crate) epoch: u64,
    pub(crate) faults: Faults,
    pub(crate) counters: Counters,
}

impl State {
    pub(crate) fn new(names: Names, capacity: Option<u64>) -> State {
        let root = Inode {
            meta: Meta::new(0o755, 0, 0),
            node: Node::Dir(Dir::default()),
            place: (ROOT, OsString::new()),
            links: 1,
            opens: 0,
            lookups: 0,
        };
        State {
            inodes: BTreeMap::from([(ROOT, root)]),
            next_ino: ROOT + 1,
            order: 1,
            names,
            pending_bytes: 0,
            capacity,
            liar: false,
            failed_syncs: 0,
            epoch: 0,
            faults: Faults::default(),
            counters: Counters::default(),
        }
    }

    // ---- What can be told -------------------------------------------------------------------------

    pub(crate) fn set_capacity(&mut self, bytes: Option<u64>) {
        self.capacity = bytes;
    }

    pub(crate) fn set_liar(&mut self, liar: bool) {
        self.liar = liar;
    }

    pub(crate) fn fail(&mut self, fault: Fault) {
        self.faults.add(fault);
    }

    /// Pages of everything that is named or open.
    fn used_pages(&self) -> u64 {
        self.inodes
            .values()
            .filter(|inode| inode.links > 0 || inode.opens > 0)
            .map(|inode| match &inode.node {
                Node::File(file) => file.current.pages(),
                Node::Dir(_) => 0,
            })
            .sum()
    }

    pub(crate) fn used(&self) -> u64 {
        self.used_pages() * PAGE
    }

    /// All pages and the free ones.
    pub(crate) fn room(&self) -> (u64, u64) {
        let all = self.capacity.map_or(ROOMY, |bytes| bytes / PAGE);
        (all, all.saturating_sub(self.used_pages()))
    }

    pub(crate) fn unsynced(&self) -> Vec<Unsynced> {
        let mut list = Vec::new();
        for (ino, inode) in &self.inodes {
            let (changes, bytes) = match &inode.node {
                Node::File(file) => (file.pending.len(), file.pending_bytes()),
                Node::Dir(dir) => (dir.pending.len(), 0),
            };
            if changes > 0 {
                let path = self.path(*ino);
                list.push(Unsynced {
                    path,
                    changes,
                    bytes,
                });
            }
        }
        list
    }

    /// Where a file or directory is, or was last; the root is empty.
    pub(crate) fn path(&self, ino: u64) -> String {
        let mut parts = Vec::new();
        let mut at = ino;
        while at != ROOT {
            let Some(inode) = self.inodes.get(&at) else {
                break;
            };
            parts.push(inode.place.1.to_string_lossy().into_owned());
            at = inode.place.0;
        }
        parts.reverse();
        parts.join("/")
    }

    pub(crate) fn path_in(&self, parent: u64, name: &OsStr) -> String {
        let parent = self.path(parent);
        let name = name.to_string_lossy();
        if parent.is_empty() {
            name.into_owned()
        } else {
            format!("{parent}/{name}")
        }
    }

    // ---- The loss of power ------------------------------------------------------------------------

    /// The power goes: of what was not synced, any part stays, chosen by `seed`.
    pub(crate) fn cut(&mut self, seed: u64) {
        let orders: Vec<u64> = self
            .inodes
            .values()
            .flat_map(|inode| match &inode.node {
                Node::File(file) => file.pending.iter().map(|(order, _)| *order).collect(),
                Node::Dir(dir) => dir
                    .pending
                    .iter()
                    .map(|(order, _)| *order)
                    .collect::<Vec<_>>(),
            })
            .collect();
        let first = orders.iter().min().copied().unwrap_or(0);
        let last = orders.iter().max().copied().unwrap_or(0);
        self.cut_by(Chance::new(seed, first, last));
    }

    /// The power goes, and nothing stays that was not synced.
    pub(crate) fn cut_all(&mut self) {
        self.cut_by(Chance {
            rng: StdRng::seed_from_u64(0),
            style: Style::Nothing,
        });
    }

    fn cut_by(&mut self, mut chance: Chance) {
        for inode in self.inodes.values_mut() {
            if let Node::File(file) = &mut inode.node {
                file.survive(&mut chance);
                file.current = file.safe.clone();
            }
        }
        self.cut_names(&mut chance);
        self.pending_bytes = 0;
        self.counters.cuts += 1;
        self.faults.clear();
        self.restart();
        self.find_links();
    }

    fn cut_names(&mut self, chance: &mut Chance) {
        // The journal is written in order, so it ends at the first change that is not kept.
        let mut end = u64::MAX;
        if self.names == Names::Journaled {
            let orders: BTreeSet<u64> = self
                .inodes
                .values()
                .filter_map(|inode| match &inode.node {
                    Node::Dir(dir) => Some(dir.pending.iter().map(|(order, _)| *order)),
                    Node::File(_) => None,
                })
                .flatten()
                .collect();
            end = orders
                .into_iter()
                .find(|order| !chance.stays(*order))
                .unwrap_or(u64::MAX);
        }
        for inode in self.inodes.values_mut() {
            if let Node::Dir(dir) = &mut inode.node {
                for (order, change) in std::mem::take(&mut dir.pending) {
                    let stays = match self.names {
                        Names::Strict => chance.stays(order),
                        Names::Journaled => order < end,
                    };
                    if stays {
                        change.apply(&mut dir.safe);
                    }
                }
            }
        }
    }

    /// The system starts on what is safe: nothing is open, and what no name leads to is gone.
    fn find_links(&mut self) {
        let mut found: BTreeMap<u64, (u32, (u64, OsString))> = BTreeMap::new();
        let mut ahead = vec![ROOT];
        let mut doubled = Vec::new();
        while let Some(at) = ahead.pop() {
            let Some(Inode {
                node: Node::Dir(dir),
                ..
            }) = self.inodes.get(&at)
            else {
                continue;
            };
            for (name, ino) in &dir.safe {
                let is_dir = match self.inodes.get(ino) {
                    Some(inode) => matches!(inode.node, Node::Dir(_)),
                    None => continue,
                };
                let entry = found.entry(*ino).or_insert((0, (at, name.clone())));
                entry.0 += 1;
                if is_dir && entry.0 > 1 {
                    // Moved, and only half of the move is safe: a directory is in one place.
                    entry.0 = 1;
                    doubled.push((at, name.clone()));
                } else if is_dir {
                    ahead.push(*ino);
                }
            }
        }
        for (at, name) in doubled {
            if let Some(Inode {
                node: Node::Dir(dir),
                ..
            }) = self.inodes.get_mut(&at)
            {
                dir.safe.remove(&name);
            }
        }
        self.inodes
            .retain(|ino, _| *ino == ROOT || found.contains_key(ino));
        for (ino, inode) in &mut self.inodes {
            if let Some((links, place)) = found.remove(ino) {
                inode.links = links;
                inode.place = place;
            }
            if let Node::Dir(dir) = &mut inode.node {
                dir.names = dir.safe.clone();
            }
        }
    }

    /// Another system takes over: nothing is open any more.
    pub(crate) fn restart(&mut self) {
        self.epoch += 1;
        for inode in self.inodes.values_mut() {
            inode.opens = 0;
            inode.lookups = 0;
        }
        self.collect();
    }

    /// As it was `before`, but for the numbers that were given since: nobody asked for what happened.
    pub(crate) fn forget_since(&mut self, before: State) {
        let (next_ino, epoch) = (self.next_ino, self.epoch);
        *self = before;
        self.next_ino = next_ino;
        self.epoch = epoch;
    }

    /// Forgets what nobody can reach, now or after a loss of power.
    fn collect(&mut self) {
        loop {
            let free: BTreeSet<u64> = self
                .inodes
                .iter()
                .filter(|(_, inode)| inode.links == 0 && inode.opens == 0 && inode.lookups == 0)
                .map(|(ino, _)| *ino)
                .collect();
            if free.is_empty() {
                return;
            }
            let mut reached = BTreeSet::new();
            for inode in self.inodes.values() {
                if let Node::Dir(dir) = &inode.node {
                    reached.extend(dir.safe.values().copied());
                    reached.extend(dir.pending.iter().filter_map(|(_, change)| change.names()));
                }
            }
            let gone: Vec<u64> = free.difference(&reached).copied().collect();
            if gone.is_empty() {
                return;
            }
            for ino in gone {
                if let Some(Inode {
                    node: Node::File(file),
                    ..
                }) = self.inodes.remove(&ino)
                {
                    self.pending_bytes -= file.pending_bytes();
                }
            }
        }
    }

    // ---- What the kernel asks ---------------------------------------------------------------------

    /// Counts an operation on something that is there, and lets it fail if it shall.
    fn ask(&mut self, op: Op, ino: u64) -> Result<(), Errno> {
        let path = self.path(ino);
        self.strike(op, path)
    }

    fn ask_in(&mut self, op: Op, parent: u64, name: &OsStr) -> Result<(), Errno> {
        let path = self.path_in(parent, name);
        self.strike(op, path)
    }

    fn strike(&mut self, op: Op, path: String) -> Result<(), Errno> {
        *self.counters.operations.entry(op).or_default() += 1;
        match self.faults.strike(op, || path) {
            Ok(()) => Ok(()),
            Err(Struck::Fails(errno)) => Err(errno),
            Err(Struck::Cut(seed)) => {
                self.cut(seed);
                Err(Errno::IO)
            }
        }
    }

    fn next_order(&mut self) -> u64 {
        self.order += 1;
        self.order
    }

    fn inode(&self, ino: u64) -> Result<&Inode, Errno> {
        self.inodes.get(&ino).ok_or(Errno::STALE)
    }

    fn inode_mut(&mut self, ino: u64) -> Result<&mut Inode, Errno> {
        self.inodes.get_mut(&ino).ok_or(Errno::STALE)
    }

    fn dir(&self, ino: u64) -> Result<&Dir, Errno> {
        match &self.inode(ino)?.node {
            Node::Dir(dir) => Ok(dir),
            Node::File(_) => Err(Errno::NOTDIR),
        }
    }

    fn dir_mut(&mut self, ino: u64) -> Result<&mut Dir, Errno> {
        match &mut self.inode_mut(ino)?.node {
            Node::Dir(dir) => Ok(dir),
            Node::File(_) => Err(Errno::NOTDIR),
        }
    }

    fn file(&self, ino: u64) -> Result<&File, Errno> {
        match &self.inode(ino)?.node {
            Node::File(file) => Ok(file),
            Node::Dir(_) => Err(Errno::ISDIR),
        }
    }

    fn file_mut(&mut self, ino: u64) -> Result<&mut File, Errno> {
        match &mut self.inode_mut(ino)?.node {
            Node::File(file) => Ok(file),
            Node::Dir(_) => Err(Errno::ISDIR),
        }
    }

    pub(crate) fn stat(&self, ino: u64) -> Result<Stat, Errno> {
        let inode = self.inode(ino)?;
        let (dir, size, pages, links) = match &inode.node {
            Node::File(file) => (
                false,
                file.current.size(),
                file.current.pages(),
                inode.links,
            ),
            Node::Dir(dir) => (true, dir.names.len() as u64, 0, 2),
        };
        Ok(Stat {
            ino,
            dir,
            size,
            pages,
            links,
            meta: inode.meta,
        })
    }

    /// Finds a name; the kernel holds what it finds until it [forgets](State::forget) it.
    pub(crate) fn lookup(&mut self, parent: u64, name: &OsStr) -> Result<Stat, Errno> {
        let ino = *self.dir(parent)?.names.get(name).ok_or(Errno::NOENT)?;
        self.inode_mut(ino)?.lookups += 1;
        self.stat(ino)
    }

    pub(crate) fn forget(&mut self, ino: u64, lookups: u64) {
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.lookups = inode.lookups.saturating_sub(lookups);
            if inode.links == 0 {
                self.collect();
            }
        }
    }

    pub(crate) fn open(&mut self, ino: u64) -> Result<(), Errno> {
        self.ask(Op::Open, ino)?;
        self.inode_mut(ino)?.opens += 1;
        Ok(())
    }

    pub(crate) fn release(&mut self, ino: u64) {
        if let Some(inode) = self.inodes.get_mut(&ino) {
            inode.opens = inode.opens.saturating_sub(1);
            if inode.links == 0 {
                self.collect();
            }
        }
    }

    /// Makes a file or directory. A file that is `opened` is open and held.
    pub(crate) fn make(
        &mut self,
        parent: u64,
        name: &OsStr,
        dir: bool,
        meta: Meta,
        opened: bool,
    ) -> Result<Stat, Errno> {
        let op = if dir { Op::MakeDir } else { Op::Create };
        self.ask_in(op, parent, name)?;
        if self.inode(parent)?.links == 0 {
            return Err(Errno::NOENT);
        }
        if self.dir(parent)?.names.contains_key(name) {
            return Err(Errno::EXIST);
        }
        let ino = self.next_ino;
        self.next_ino += 1;
        let node = if dir {
            Node::Dir(Dir::default())
        } else {
            Node::File(File::default())
        };
        let inode = Inode {
            meta,
            node,
            place: (parent, name.to_owned()),
            links: 1,
            opens: u64::from(opened),
            lookups: 1,
        };
        self.inodes.insert(ino, inode);
        self.change_name(parent, NameChange::Set(name.to_owned(), ino))?;
        self.stat(ino)
    }

    fn change_name(&mut self, parent: u64, change: NameChange) -> Result<(), Errno> {
        let order = self.next_order();
        self.change_name_at(parent, change, order)
    }

    fn change_name_at(&mut self, parent: u64, change: NameChange, order: u64) -> Result<(), Errno> {
        let inode = self.inode_mut(parent)?;
        inode.meta.modified = SystemTime::now();
        let dir = self.dir_mut(parent)?;
        change.apply(&mut dir.names);
        dir.pending.push((order, change));
        Ok(())
    }

    /// Removes a file, or an empty directory.
    pub(crate) fn remove(&mut self, parent: u64, name: &OsStr, dir: bool) -> Result<(), Errno> {
        self.ask_in(Op::Unlink, parent, name)?;
        let ino = *self.dir(parent)?.names.get(name).ok_or(Errno::NOENT)?;
        match (&self.inode(ino)?.node, dir) {
            (Node::Dir(inside), true) if !inside.names.is_empty() => {
                return Err(Errno::NOTEMPTY);
            }
            (Node::Dir(_), true) | (Node::File(_), false) => {}
            (Node::Dir(_), false) => return Err(Errno::ISDIR),
            (Node::File(_), true) => return Err(Errno::NOTDIR),
        }
        self.change_name(parent, NameChange::Remove(name.to_owned()))?;
        self.inode_mut(ino)?.links -= 1;
        self.collect();
        Ok(())
    }

    pub(crate) fn rename(
        &mut self,
        parent: u64,
        name: &OsStr,
        new_parent: u64,
        new_name: &OsStr,
        replace: bool,
    ) -> Result<(), Errno> {
        self.ask_in(Op::Rename, parent, name)?;
        let ino = *self.dir(parent)?.names.get(name).ok_or(Errno::NOENT)?;
        let replaced = self.dir(new_parent)?.names.get(new_name).copied();
        if let Some(target) = replaced {
            if !replace {
                return Err(Errno::EXIST);
            }
            if target == ino {
                return Ok(());
            }
            match (&self.inode(ino)?.node, &self.inode(target)?.node) {
                (Node::Dir(_), Node::Dir(inside)) if !inside.names.is_empty() => {
                    return Err(Errno::NOTEMPTY);
                }
                (Node::Dir(_), Node::Dir(_)) | (Node::File(_), Node::File(_)) => {}
                (Node::Dir(_), Node::File(_)) => return Err(Errno::NOTDIR),
                (Node::File(_), Node::Dir(_)) => return Err(Errno::ISDIR),
            }
        }
        let order = self.next_order();
        if parent == new_parent {
            let change = NameChange::Rename(name.to_owned(), new_name.to_owned(), ino);
            self.change_name_at(parent, change, order)?;
        } else {
            self.change_name_at(parent, NameChange::Remove(name.to_owned()), order)?;
            self.change_name_at(new_parent, NameChange::Set(new_name.to_owned(), ino), order)?;
        }
        self.inode_mut(ino)?.place = (new_parent, new_name.to_owned());
        if let Some(target) = replaced {
            self.inode_mut(target)?.links -= 1;
            self.collect();
        }
        Ok(())
    }

    /// What is in a directory: number, whether it is a directory, name. Sorted.
    pub(crate) fn list(&self, ino: u64) -> Result<Vec<(u64, bool, OsString)>, Errno> {
        let mut list = vec![(ino, true, ".".into()), (ino, true, "..".into())];
        for (name, at) in &self.dir(ino)?.names {
            let dir = matches!(self.inode(*at)?.node, Node::Dir(_));
            list.push((*at, dir, name.clone()));
        }
        Ok(list)
    }

    pub(crate) fn read(&mut self, ino: u64, offset: u64, length: u64) -> Result<Vec<u8>, Errno> {
        self.ask(Op::Read, ino)?;
        Ok(self.file(ino)?.current.read(offset, length))
    }

    /// Writes as much as there is room for, and says how much that was.
    pub(crate) fn write(
        &mut self,
        ino: u64,
        offset: u64,
        data: &[u8],
        append: bool,
    ) -> Result<usize, Errno> {
        let epoch = self.epoch;
        let verdict = self.ask(Op::Write, ino);
        if self.epoch != epoch {
            return Err(Errno::IO);
        }
        let (_, free) = self.room();
        let file = self.file_mut(ino)?;
        let offset = if append { file.current.size() } else { offset };
        let mut length = data.len() as u64;
        if offset.saturating_add(length) > MAX_FILE {
            return Err(Errno::FBIG);
        }
        if verdict.is_err() {
            length /= 2;
        }
        let mut end = offset + length;
        while file.current.missing(offset, end) > free {
            // Up to a page's beginning, then page by page.
            end = (end - 1) / PAGE * PAGE;
            if end <= offset {
                return Err(verdict.err().unwrap_or(Errno::NOSPC));
            }
        }
        let data = &data[..(end - offset) as usize];
        if data.is_empty() {
            return verdict.map(|()| 0);
        }
        let before = file.current.size();
        file.current.write(offset, data);
        let after = file.current.size();
        let at = offset / SECTOR * SECTOR;
        let sectors = file.current.raw(at, end.next_multiple_of(SECTOR));
        if after > before {
            self.change(ino, Change::Resize(after))?;
        }
        self.pending_bytes += sectors.len();
        self.change(ino, Change::Write { at, sectors })?;
        self.counters.bytes_written += data.len() as u64;
        self.inode_mut(ino)?.meta.modified = SystemTime::now();
        self.write_back();
        verdict.map(|()| data.len())
    }

    fn change(&mut self, ino: u64, change: Change) -> Result<(), Errno> {
        let order = self.next_order();
        self.file_mut(ino)?.pending.push((order, change));
        Ok(())
    }

    fn write_back(&mut self) {
        while self.pending_bytes > WRITE_BACK {
            let most = self
                .inodes
                .values_mut()
                .filter_map(|inode| match &mut inode.node {
                    Node::File(file) => Some(file),
                    Node::Dir(_) => None,
                })
                .max_by_key(|file| file.pending_bytes());
            let Some(file) = most else {
                return;
            };
            self.pending_bytes -= file.pending_bytes();
            file.settle();
        }
    }

    pub(crate) fn truncate(&mut self, ino: u64, size: u64) -> Result<(), Errno> {
        self.ask(Op::Truncate, ino)?;
        if size > MAX_FILE {
            return Err(Errno::FBIG);
        }
        let file = self.file_mut(ino)?;
        if file.current.size() != size {
            file.current.resize(size);
            self.change(ino, Change::Resize(size))?;
        }
        self.inode_mut(ino)?.meta.modified = SystemTime::now();
        Ok(())
    }

    /// Reserves `length` bytes from `offset` on; the file grows if need be, unless it keeps its size.
    pub(crate) fn allocate(
        &mut self,
        ino: u64,
        offset: u64,
        length: u64,
        keep_size: bool,
    ) -> Result<(), Errno> {
        self.ask(Op::Allocate, ino)?;
        let (_, free) = self.room();
        let file = self.file_mut(ino)?;
        let end = offset.saturating_add(length);
        if end > MAX_FILE {
            return Err(Errno::FBIG);
        }
        if file.current.missing(offset, end) > free {
            return Err(Errno::NOSPC);
        }
        file.current.reserve(offset, end);
        let grows = end > file.current.size() && !keep_size;
        if grows {
            file.current.resize(end);
            self.change(ino, Change::Resize(end))?;
        }
        self.change(ino, Change::Reserve(offset, end))
    }

    pub(crate) fn sync(&mut self, ino: u64) -> Result<(), Errno> {
        let epoch = self.epoch;
        let verdict = self.ask(Op::Sync, ino);
        if self.epoch != epoch {
            return Err(Errno::IO);
        }
        if verdict.is_err() {
            self.failed_syncs += 1;
        }
        let (failed_syncs, liar) = (self.failed_syncs, self.liar);
        let file = self.file_mut(ino)?;
        let bytes = file.pending_bytes();
        match verdict {
            Ok(()) if liar => return Ok(()),
            Ok(()) => file.settle(),
            // Any part of it was written, and nobody will try the rest again.
            Err(_) => file.survive(&mut Chance::scattered(failed_syncs)),
        }
        self.pending_bytes -= bytes;
        if verdict.is_ok() && self.names == Names::Journaled {
            self.commit_names();
        }
        verdict
    }

    pub(crate) fn sync_dir(&mut self, ino: u64) -> Result<(), Errno> {
        self.ask(Op::SyncDir, ino)?;
        if self.liar {
            return Ok(());
        }
        match self.names {
            Names::Journaled => self.commit_names(),
            Names::Strict => {
                let dir = self.dir_mut(ino)?;
                for (_, change) in std::mem::take(&mut dir.pending) {
                    change.apply(&mut dir.safe);
                }
            }
        }
        self.collect();
        Ok(())
    }

    fn commit_names(&mut self) {
        for inode in self.inodes.values_mut() {
            if let Node::Dir(dir) = &mut inode.node {
                dir.pending.clear();
                dir.safe = dir.names.clone();
            }
        }
        self.collect();
    }

    /// Changes what is known about a file.
    pub(crate) fn change_meta(
        &mut self,
        ino: u64,
        change: impl FnOnce(&mut Meta),
    ) -> Result<(), Errno> {
        let meta = &mut self.inode_mut(ino)?.meta;
        change(meta);
        meta.changed = SystemTime::now();
        Ok(())
    }

    /// Keeps what is there now out of every loss of power.
    pub(crate) fn settle_everything(&mut self) {
        for inode in self.inodes.values_mut() {
            match &mut inode.node {
                Node::File(file) => file.settle(),
                Node::Dir(dir) => {
                    dir.pending.clear();
                    dir.safe = dir.names.clone();
                }
            }
        }
        self.pending_bytes = 0;
        self.collect();
    }
}

#[cfg(test)]
mod tests;
