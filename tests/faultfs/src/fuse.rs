//! From the kernel's questions to the state's answers.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use fuser::{
    FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};
use rustix::io::Errno;

use crate::faults::Op;
use crate::image::PAGE;
use crate::state::{Meta, Stat, State};

/// The kernel keeps nothing: what it does not ask for cannot be lost.
const NEVER: Duration = Duration::ZERO;

/// Files are read and written past the kernel's cache, so that a read can fail and nothing is hidden.
const OPENED: FopenFlags = FopenFlags::FOPEN_DIRECT_IO;

const O_APPEND: i32 = rustix::fs::OFlags::APPEND.bits() as i32;
const KEEP_SIZE: i32 = rustix::fs::FallocateFlags::KEEP_SIZE.bits() as i32;

/// State that handle and sessions share.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// Wakes whoever is delayed when the epoch changes.
    moved: Condvar,
}

impl Shared {
    pub(crate) fn new(state: State) -> Shared {
        Shared {
            state: Mutex::new(state),
            moved: Condvar::new(),
        }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// After a change of the epoch or of the delays.
    pub(crate) fn wake(&self) {
        self.moved.notify_all();
    }

    /// Waits, but not longer than the epoch lasts.
    fn wait(&self, by: Duration, epoch: u64) {
        let until = Instant::now() + by;
        let mut state = self.lock();
        while state.epoch == epoch {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self
                .moved
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// One mount.
pub(crate) struct Session {
    shared: Arc<Shared>,
    epoch: u64,
    listings: Mutex<Listings>,
}

#[derive(Default)]
struct Listings {
    next: u64,
    open: HashMap<u64, Vec<(u64, bool, OsString)>>,
}

fn errno(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.raw_os_error())
}

fn attr(stat: &Stat) -> FileAttr {
    FileAttr {
        ino: INodeNo(stat.ino),
        size: stat.size,
        blocks: stat.pages * (PAGE / 512),
        atime: stat.meta.accessed,
        mtime: stat.meta.modified,
        ctime: stat.meta.changed,
        crtime: stat.meta.changed,
        kind: kind(stat.dir),
        perm: (stat.meta.mode & 0o7777) as u16,
        nlink: stat.links,
        uid: stat.meta.uid,
        gid: stat.meta.gid,
        rdev: 0,
        blksize: PAGE as u32,
        flags: 0,
    }
}

fn kind(dir: bool) -> FileType {
    if dir {
        FileType::Directory
    } else {
        FileType::RegularFile
    }
}

impl Session {
    pub(crate) fn new(shared: Arc<Shared>, epoch: u64) -> Session {
        Session {
            shared,
            epoch,
            listings: Mutex::default(),
        }
    }

    /// The state, as long as this mount is the living one.
    fn state(&self) -> Result<MutexGuard<'_, State>, Errno> {
        living(&self.shared, self.epoch)
    }

    fn ask<T>(&self, ask: impl FnOnce(&mut State) -> Result<T, Errno>) -> Result<T, Errno> {
        asked(&self.shared, self.epoch, ask)
    }

    /// Does `work` and hands over what comes of it; a delayed one on a thread of its own, so that nobody else waits.
    fn slowly<T: 'static>(
        &self,
        op: Op,
        ino: u64,
        work: impl FnOnce(&mut State) -> Result<T, Errno> + Send + 'static,
        then: impl FnOnce(Result<T, Errno>) + Send + 'static,
    ) {
        let delay = self
            .state()
            .ok()
            .and_then(|state| state.faults.delay_of(op, || state.path(ino)));
        let Some(delay) = delay else {
            then(self.ask(work));
            return;
        };
        let (shared, epoch) = (Arc::clone(&self.shared), self.epoch);
        std::thread::spawn(move || {
            shared.wait(delay, epoch);
            then(asked(&shared, epoch, work));
        });
    }

    fn listings(&self) -> MutexGuard<'_, Listings> {
        self.listings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn living(shared: &Shared, epoch: u64) -> Result<MutexGuard<'_, State>, Errno> {
    let state = shared.lock();
    if state.epoch == epoch {
        Ok(state)
    } else {
        Err(Errno::IO)
    }
}

fn asked<T>(
    shared: &Shared,
    epoch: u64,
    ask: impl FnOnce(&mut State) -> Result<T, Errno>,
) -> Result<T, Errno> {
    let mut state = living(shared, epoch)?;
    let answer = ask(&mut state);
    if state.epoch != epoch {
        // It was the one before which the power went.
        shared.wake();
    }
    answer
}

fn time(time: TimeOrNow) -> SystemTime {
    match time {
        TimeOrNow::SpecificTime(time) => time,
        TimeOrNow::Now => SystemTime::now(),
    }
}

impl Filesystem for Session {
    fn init(&mut self, _req: &Request, _config: &mut KernelConfig) -> io::Result<()> {
        Ok(())
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.ask(|state| state.lookup(parent.0, name)) {
            Ok(stat) => reply.entry(&NEVER, &attr(&stat), Generation(0)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        if let Ok(mut state) = self.state() {
            state.forget(ino.0, nlookup);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.ask(|state| state.stat(ino.0)) {
            Ok(stat) => reply.attr(&NEVER, &attr(&stat)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let done = self.ask(|state| {
            if let Some(size) = size {
                state.truncate(ino.0, size)?;
            }
            state.change_meta(ino.0, |meta| {
                meta.mode = mode.unwrap_or(meta.mode) & 0o7777;
                meta.uid = uid.unwrap_or(meta.uid);
                meta.gid = gid.unwrap_or(meta.gid);
                meta.accessed = atime.map_or(meta.accessed, time);
                meta.modified = mtime.map_or(meta.modified, time);
            })?;
            state.stat(ino.0)
        });
        match done {
            Ok(stat) => reply.attr(&NEVER, &attr(&stat)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let meta = Meta::new(mode & 0o7777, req.uid(), req.gid());
        match self.ask(|state| state.make(parent.0, name, true, meta, false)) {
            Ok(stat) => reply.entry(&NEVER, &attr(&stat), Generation(0)),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.ask(|state| state.remove(parent.0, name, false)), reply);
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        answer(self.ask(|state| state.remove(parent.0, name, true)), reply);
    }

    fn rename(
        &self,
        _req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let replace = !flags.contains(RenameFlags::RENAME_NOREPLACE);
        if !RenameFlags::RENAME_NOREPLACE.contains(flags) {
            reply.error(fuser::Errno::EINVAL);
            return;
        }
        answer(
            self.ask(|state| state.rename(parent.0, name, newparent.0, newname, replace)),
            reply,
        );
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.ask(|state| state.open(ino.0)) {
            Ok(()) => reply.opened(FileHandle(0), OPENED),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let meta = Meta::new(mode & 0o7777, req.uid(), req.gid());
        match self.ask(|state| state.make(parent.0, name, false, meta, true)) {
            Ok(stat) => {
                reply.created(&NEVER, &attr(&stat), Generation(0), FileHandle(0), OPENED);
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.slowly(
            Op::Read,
            ino.0,
            move |state| state.read(ino.0, offset, u64::from(size)),
            move |read| match read {
                Ok(data) => reply.data(&data),
                Err(error) => reply.error(errno(error)),
            },
        );
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let append = flags.0 & O_APPEND != 0;
        let data = data.to_vec();
        self.slowly(
            Op::Write,
            ino.0,
            move |state| state.write(ino.0, offset, &data, append),
            move |written| match written {
                // One request carries 16 MiB at most.
                Ok(bytes) => reply.written(bytes as u32),
                Err(error) => reply.error(errno(error)),
            },
        );
    }

    // `flush` stays unanswered on purpose (`ENOSYS`): the kernel then never asks again at a `close`, and so no process that ends
    // with open files waits for a file system that it served itself.

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Ok(mut state) = self.state() {
            state.release(ino.0);
        }
        reply.ok();
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.slowly(
            Op::Sync,
            ino.0,
            move |state| state.sync(ino.0),
            move |done| answer(done, reply),
        );
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.ask(|state| state.list(ino.0)) {
            Ok(list) => {
                let mut listings = self.listings();
                listings.next += 1;
                let handle = listings.next;
                listings.open.insert(handle, list);
                reply.opened(FileHandle(handle), FopenFlags::empty());
            }
            Err(error) => reply.error(errno(error)),
        }
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        // One listing is one moment, so that nothing is left out while names come and go; from the start it is read anew.
        let list = match self.ask(|state| state.list(ino.0)) {
            Ok(list) => list,
            Err(error) => {
                reply.error(errno(error));
                return;
            }
        };
        let mut listings = self.listings();
        let open = listings.open.entry(fh.0).or_default();
        if offset == 0 {
            *open = list;
        }
        for (index, (ino, dir, name)) in open.iter().enumerate().skip(offset as usize) {
            if reply.add(INodeNo(*ino), index as u64 + 1, kind(*dir), name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.listings().open.remove(&fh.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.slowly(
            Op::SyncDir,
            ino.0,
            move |state| state.sync_dir(ino.0),
            move |done| answer(done, reply),
        );
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        match self.ask(|state| Ok(state.room())) {
            Ok((all, free)) => reply.statfs(
                all,
                free,
                free,
                1 << 20,
                1 << 20,
                PAGE as u32,
                255,
                PAGE as u32,
            ),
            Err(error) => reply.error(errno(error)),
        }
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        if mode & !KEEP_SIZE != 0 {
            reply.error(fuser::Errno::EOPNOTSUPP);
            return;
        }
        let keep_size = mode & KEEP_SIZE != 0;
        answer(
            self.ask(|state| state.allocate(ino.0, offset, length, keep_size)),
            reply,
        );
    }
}

fn answer(done: Result<(), Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(error) => reply.error(errno(error)),
    }
}
