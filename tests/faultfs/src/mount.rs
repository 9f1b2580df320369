//! The handle of a mounted file system.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use fuser::BackgroundSession;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::faults::{Fault, Op};
use crate::fuse::{Session, Shared};
use crate::state::{Counters, Names, State, Unsynced};

/// The type that the system shows for it; programs see a `fuse` file system.
const TYPE: &str = "fuse.faultfs";
/// Begins the name of the device that the system shows; the process that serves it follows.
const SOURCE: &str = "faultfs-of-";
/// A file system of a fixed size.
const SMALL: &str = "tmpfs";
const MAY_NOT_MOUNT: &str = "mounting is not allowed: run the tests as root, in a container with `--cap-add SYS_ADMIN` and no \
                             profile that forbids `mount`";
/// How long a mount that is given up may take to end its threads.
const ENDING: Duration = Duration::from_secs(5);
/// How often a disk is filled anew while somebody else takes room.
const FILL_ATTEMPTS: usize = 100;

/// How a [`FaultFs`] begins.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What makes names safe. Default [`Names::Strict`].
    pub names: Names,
    /// Bytes that fit, in pages of 4 KiB. Default: no limit.
    pub capacity: Option<u64>,
}

/// A file system in memory, mounted for real, that does what it is told to go wrong.
///
/// It belongs to the process that made it and ends with it: dropped, it is unmounted at once, even while files are open, and
/// they give errors from then on. What a killed process left mounted is removed by the next one.
pub struct FaultFs {
    shared: Arc<Shared>,
    point: PathBuf,
    /// Whether the mount point was made for this.
    made: bool,
    session: Mutex<Option<BackgroundSession>>,
}

impl FaultFs {
    /// An empty file system that does everything right, mounted at a directory of its own.
    ///
    /// # Errors
    ///
    /// When it cannot be mounted; the text says what is missing.
    pub fn new(options: &Options) -> io::Result<FaultFs> {
        let point = own_point()?;
        let made = Self::begin(point.clone(), true, options);
        if made.is_err() {
            let _removed = fs::remove_dir(&point);
        }
        made
    }

    /// The same at a directory that is there.
    ///
    /// # Errors
    ///
    /// As [`FaultFs::new`].
    pub fn at(point: &Path, options: &Options) -> io::Result<FaultFs> {
        Self::begin(point.canonicalize()?, false, options)
    }

    fn begin(point: PathBuf, made: bool, options: &Options) -> io::Result<FaultFs> {
        remove_orphans();
        let shared = Arc::new(Shared::new(State::new(options.names, options.capacity)));
        let fs = FaultFs {
            shared,
            point,
            made,
            session: Mutex::new(None),
        };
        fs.mount()?;
        Ok(fs)
    }

    fn session(&self) -> MutexGuard<'_, Option<BackgroundSession>> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mount(&self) -> io::Result<()> {
        let fuse = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| match error {
                Errno::NOENT | Errno::NODEV | Errno::NXIO => refused(
                    error,
                    "there is no /dev/fuse: load the kernel's module (`modprobe fuse`), or give the container the device \
                     (`--device /dev/fuse`)",
                ),
                _ => refused(
                    error,
                    "/dev/fuse cannot be opened: run the tests as root, in a container with `--device /dev/fuse`",
                ),
            })?;
        let data = format!(
            "fd={},rootmode=40755,user_id={},group_id={},default_permissions",
            std::os::fd::AsRawFd::as_raw_fd(&fuse.as_fd()),
            rustix::process::getuid().as_raw(),
            rustix::process::getgid().as_raw(),
        );
        let data = CString::new(data)?;
        rustix::mount::mount(
            format!("{SOURCE}{}", std::process::id()),
            &self.point,
            TYPE,
            MountFlags::NODEV | MountFlags::NOSUID,
            data.as_c_str(),
        )
        .map_err(|error| refused(error, MAY_NOT_MOUNT))?;
        let epoch = {
            let mut state = self.shared.lock();
            state.restart();
            state.epoch
        };
        let mut config = fuser::Config::default();
        config.n_threads = Some(2);
        let begun = fuser::Session::from_fd(
            Session::new(Arc::clone(&self.shared), epoch),
            fuse,
            fuser::SessionACL::Owner,
            config,
        )
        .and_then(fuser::Session::spawn);
        match begun {
            Ok(session) => *self.session() = Some(session),
            Err(error) => {
                self.unmount();
                return Err(error);
            }
        }
        self.teach()
    }

    /// Lets the kernel learn by one `close` that nothing needs to be flushed: see `flush` in the session.
    fn teach(&self) -> io::Result<()> {
        let before = self.shared.lock().clone();
        drop(fs::File::create(self.point.join(".faultfs"))?);
        self.shared.lock().forget_since(before);
        Ok(())
    }

    /// Ends the mount, whoever uses it.
    fn unmount(&self) {
        let session = self.session().take();
        // Forced: whoever waits gets an error. Detached: whoever has something open does not hold it.
        let _gone = rustix::mount::unmount(&self.point, UnmountFlags::FORCE | UnmountFlags::DETACH);
        if let Some(session) = session {
            let give_up = Instant::now() + ENDING;
            while !session.guard.is_finished() && Instant::now() < give_up {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.point
    }

    // ---- Trouble ----------------------------------------------------------------------------------

    /// The power goes. What was synced stays; of the rest each write may be kept, lost or torn between two sectors of 512
    /// bytes, in any order, and so may each change of a name, all chosen by `seed`. From now on everything fails with `EIO`
    /// until [`FaultFs::power_on`]. Waiting faults and delays are forgotten.
    pub fn power_cut(&self, seed: u64) {
        self.shared.lock().cut(seed);
        self.shared.wake();
    }

    /// The same without luck: nothing stays of what was not synced.
    pub fn power_cut_without_luck(&self) {
        self.shared.lock().cut_all();
        self.shared.wake();
    }

    /// As the end of every process that uses it: everything fails with `EIO` until [`FaultFs::power_on`], and nothing is lost.
    /// For what cannot be killed, because it runs in this process.
    pub fn disconnect(&self) {
        self.shared.lock().restart();
        self.shared.wake();
    }

    /// The next system starts on what is there: the old mount is ended, files that are still open there give errors for good,
    /// and the survivors are mounted in the same place. Without a [`FaultFs::power_cut`] before it, everything written is
    /// there, synced or not, as after the end of a process.
    ///
    /// End whoever used the old mount first: what he does by path from now on, he does here.
    ///
    /// # Errors
    ///
    /// When it cannot be mounted again.
    pub fn power_on(&self) -> io::Result<()> {
        {
            let mut state = self.shared.lock();
            state.restart();
        }
        self.shared.wake();
        self.unmount();
        self.mount()
    }

    /// An operation fails from now on as described. Several may wait; each counts for itself.
    pub fn fail(&self, fault: Fault) {
        self.shared.lock().fail(fault);
    }

    /// The operation after `after` more of this kind fails, once.
    pub fn fail_next(&self, op: Op, errno: Errno, after: u64) {
        self.fail(Fault::new(op, errno).after(after));
    }

    /// How many faults have not struck to the end yet.
    #[must_use]
    pub fn faults_waiting(&self) -> usize {
        self.shared.lock().faults.waiting()
    }

    /// No fault and no delay waits any more.
    pub fn clear_faults(&self) {
        self.shared.lock().faults.clear();
    }

    /// Every read, write or sync of a file, or sync of a directory, takes so much longer; zero ends it. A sync makes safe what was
    /// written until its end. Whoever waits when the power goes gets an error.
    pub fn delay(&self, op: Op, by: Duration) {
        self.shared.lock().faults.delay(op, by, None);
    }

    /// The same for paths that contain `part`. There is one delay for each operation.
    pub fn delay_on(&self, op: Op, by: Duration, part: &str) {
        self.shared.lock().faults.delay(op, by, Some(part));
    }

    /// Limits what fits, bytes; `None`: no limit. Writes beyond it are cut short and then fail with `ENOSPC`, reservations fail,
    /// and `statfs` tells the truth.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.shared.lock().set_capacity(bytes);
    }

    /// Full as it is: nothing fits any more.
    pub fn fill(&self) {
        let mut state = self.shared.lock();
        let used = state.used();
        state.set_capacity(Some(used));
    }

    /// Whether syncs say yes and do nothing, as a disk with a cache that forgets.
    pub fn set_liar(&self, liar: bool) {
        self.shared.lock().set_liar(liar);
    }

    /// Makes everything safe that was written so far, without anybody having asked for it: what came before a test began is
    /// none of its business.
    pub fn settle(&self) {
        self.shared.lock().settle_everything();
    }

    // ---- What happened ----------------------------------------------------------------------------

    /// Bytes that files take, in whole pages, those that are open without a name included.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.shared.lock().used()
    }

    /// How often what was asked.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.lock().counters.clone()
    }

    /// What would be lost, in part or in whole, if the power went now.
    #[must_use]
    pub fn unsynced(&self) -> Vec<Unsynced> {
        self.shared.lock().unsynced()
    }
}

impl FaultFs {
    /// Unmounts it for good, as a drop does. What is open gives errors.
    pub fn end(&self) {
        self.shared.lock().restart();
        self.shared.wake();
        self.unmount();
        if self.made {
            let _removed = fs::remove_dir(&self.point);
        }
    }
}

impl Drop for FaultFs {
    fn drop(&mut self) {
        self.end();
    }
}

/// A real file system of a fixed size, in memory (tmpfs): what happens when it is full is the kernel's own. Unmounted when
/// dropped, even while files are open.
pub struct SmallDisk {
    point: PathBuf,
}

impl SmallDisk {
    /// An empty one that holds so many bytes, mounted at a directory of its own.
    ///
    /// # Errors
    ///
    /// When it cannot be mounted; the text says what is missing.
    pub fn new(bytes: u64) -> io::Result<SmallDisk> {
        remove_orphans();
        let point = own_point()?;
        let size = CString::new(format!("size={bytes},mode=0700"))?;
        let mounted = rustix::mount::mount(
            format!("{SOURCE}{}", std::process::id()),
            &point,
            SMALL,
            MountFlags::NODEV | MountFlags::NOSUID,
            size.as_c_str(),
        );
        let disk = SmallDisk { point };
        mounted.map_err(|error| refused(error, MAY_NOT_MOUNT))?;
        Ok(disk)
    }

    /// Where it is mounted.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.point
    }

    /// Free bytes.
    ///
    /// # Errors
    ///
    /// When the system does not say.
    pub fn free(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.point)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Somebody else's file takes all room but so many bytes. Answers its path.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn fill_but(&self, bytes: u64) -> io::Result<PathBuf> {
        let path = self.point.join("a-strangers-file");
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)?;
        // Whoever else writes may take room between the look and the taking.
        for _ in 0..FILL_ATTEMPTS {
            let length = file.metadata()?.len() + self.free()?.saturating_sub(bytes);
            match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length) {
                Err(Errno::NOSPC) => {}
                other => {
                    other?;
                    return Ok(path);
                }
            }
        }
        Err(Errno::NOSPC.into())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _gone = rustix::mount::unmount(&self.point, UnmountFlags::DETACH);
        let _removed = fs::remove_dir(&self.point);
    }
}

/// A fresh directory to mount at.
fn own_point() -> io::Result<PathBuf> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("bellwire-faultfs-{}-{number}", std::process::id());
    let point = std::env::temp_dir().join(name);
    fs::DirBuilder::new().mode(0o700).create(&point)?;
    Ok(point)
}

fn refused(error: Errno, what_to_do: &str) -> io::Error {
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{what_to_do} ({error})"))
}

/// Unmounts what processes left behind that are gone: their mounts answer nobody any more.
fn remove_orphans() {
    let Ok(mounts) = fs::read_to_string("/proc/self/mounts") else {
        return;
    };
    for line in mounts.lines() {
        let mut fields = line.split(' ');
        let (Some(source), Some(point), Some(TYPE | SMALL)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let Some(pid) = source.strip_prefix(SOURCE) else {
            continue;
        };
        if !Path::new("/proc").join(pid).exists() {
            let _gone = rustix::mount::unmount(point, UnmountFlags::FORCE | UnmountFlags::DETACH);
            let _removed = fs::remove_dir(point);
        }
    }
}
