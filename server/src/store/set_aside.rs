//! What cannot be used and is not thrown away: records that cannot be read, counted, told once, and kept as files; and the
//! note that a start leaves beside what it sets aside.
//!
//! A start that goes on from before a place in the log uses numbers of frames a second time. The note says from which number on,
//! so that whoever puts the pieces together later knows which of two frames of one number is the older:
//!
//! ```text
//! bellwire-aside 1 <number of the first frame after this start> <CRC-32C of all before it, hex>
//! what happened, in words
//! ```

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::log::SET_ASIDE;
use super::log::disk::Disk;
use super::record::Fault;

/// Most records of one run that are told and kept one by one. Beyond that the disk is the news, not the record.
const KEPT_MAX: usize = 10_000;

/// What was set aside in this run.
pub(super) struct SetAside {
    disk: Arc<dyn Disk>,
    run: u32,
    /// Files of a run of the same number that are there: numbers of runs come again after a start that had to go back.
    before: usize,
    seen: Mutex<HashSet<Vec<u8>>>,
    count: AtomicU64,
}

impl SetAside {
    pub(super) fn new(disk: Arc<dyn Disk>, run: u32) -> SetAside {
        let prefix = format!("record-run{run}-");
        let before = match disk.list(SET_ASIDE) {
            Ok(files) => files
                .iter()
                .filter_map(|file| {
                    let number = file.strip_prefix(&prefix)?.strip_suffix(".bin")?;
                    number.parse::<usize>().ok()
                })
                .max()
                .unwrap_or(0),
            Err(error) => {
                tracing::warn!(%error, "what was set aside before cannot be seen");
                0
            }
        };
        SetAside {
            disk,
            run,
            before,
            seen: Mutex::new(HashSet::new()),
            count: AtomicU64::new(0),
        }
    }

    /// Records of this run that were set aside.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Sets a record aside, the first time it is met. The file holds the length of the key (4 bytes, little endian),
    /// the key and the value. Nothing of the value is logged.
    pub(super) fn record(&self, key: &[u8], value: &[u8], fault: Fault) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= KEPT_MAX || !seen.insert(key.to_vec()) {
            return;
        }
        let number = self.before + seen.len();
        drop(seen);
        self.count.fetch_add(1, Ordering::Relaxed);
        let name = format!("{SET_ASIDE}/record-run{}-{number:05}.bin", self.run);
        let room = key.first().map_or('?', |byte| char::from(*byte));
        tracing::error!(%fault, %room, file = name, "a record cannot be read and was set aside");
        let mut content = Vec::with_capacity(4 + key.len() + value.len());
        content.extend_from_slice(&u32::try_from(key.len()).unwrap_or(u32::MAX).to_le_bytes());
        content.extend_from_slice(key);
        content.extend_from_slice(value);
        let kept = self
            .disk
            .make_dir(SET_ASIDE)
            .and_then(|()| self.disk.create(&name))
            .and_then(|file| {
                file.write_at(&content, 0)?;
                file.sync()
            })
            .and_then(|()| self.disk.sync_dir(SET_ASIDE));
        if let Err(error) = kept {
            tracing::error!(%error, file = name, "the record could not be kept as a file");
        }
    }
}

const NOTE_MAGIC: &str = "bellwire-aside";
const NOTE_VERSION: u32 = 1;

/// A stamp that nothing under `set-aside/` has: two starts within one second set aside under names of their own.
pub(super) fn free_stamp(disk: &dyn Disk, stamp: &str) -> io::Result<String> {
    let taken = disk.list(SET_ASIDE)?;
    let mut free = stamp.to_owned();
    let mut again = 1;
    while taken
        .iter()
        .any(|name| stamp_of(name) == Some(free.as_str()))
    {
        again += 1;
        free = format!("{stamp}-{again}");
    }
    Ok(free)
}

/// A name under `set-aside/` that nothing has: numbers of frames and segments come again after a start that had to go back.
pub(in crate::store) fn free_name(disk: &dyn Disk, stem: &str, end: &str) -> io::Result<String> {
    disk.make_dir(SET_ASIDE)?;
    let name = unused(stem, &format!(".{end}"), &disk.list(SET_ASIDE)?);
    Ok(format!("{SET_ASIDE}/{name}"))
}

/// A name that is not taken: as it is, or with a number before its end.
pub(in crate::store) fn unused(stem: &str, end: &str, taken: &[String]) -> String {
    let mut name = format!("{stem}{end}");
    let mut again = 1;
    while taken.contains(&name) {
        again += 1;
        name = format!("{stem}-{again}{end}");
    }
    name
}

/// Writes the note of a start: it goes on with frame `next`, without what `words` tell of.
pub(super) fn write_note(
    disk: &dyn Disk,
    stamp: &str,
    next: u64,
    words: &[String],
) -> io::Result<()> {
    let head = format!("{NOTE_MAGIC} {NOTE_VERSION} {next}");
    let mut text = format!("{head} {:08x}\n", crc32c::crc32c(head.as_bytes()));
    for line in words {
        text.push_str(line);
        text.push('\n');
    }
    disk.make_dir(SET_ASIDE)?;
    let (temporary, name) = (
        format!("{SET_ASIDE}/note.tmp"),
        format!("{SET_ASIDE}/{stamp}.txt"),
    );
    let file = disk.create(&temporary)?;
    file.write_at(text.as_bytes(), 0)?;
    file.sync()?;
    disk.rename(&temporary, &name)?;
    disk.sync_dir(SET_ASIDE)
}

/// Where the log went on, as a note says. `None`: it is none, or of a later version.
pub(super) fn cut_of(text: &str) -> Option<u64> {
    let (head, sum) = text.lines().next()?.rsplit_once(' ')?;
    if u32::from_str_radix(sum, 16).ok()? != crc32c::crc32c(head.as_bytes()) {
        return None;
    }
    let mut words = head.split(' ');
    if words.next()? != NOTE_MAGIC || words.next()?.parse::<u32>().ok()? != NOTE_VERSION {
        return None;
    }
    words.next()?.parse().ok()
}

/// The stamp in the name of a segment or note that was set aside, with or without the directory.
pub(super) fn stamp_of(file: &str) -> Option<&str> {
    let name = file.rsplit('/').next()?;
    name.strip_suffix(".txt")
        .or_else(|| Some(name.strip_suffix(".seg")?.rsplit_once('-')?.0))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_note_says_where_the_log_went_on_and_notices_damage() {
        let disk = Arc::new(crate::store::testing::MemoryDisk::new());
        write_note(&*disk, "20261121T085913Z", 41, &["why".to_owned()]).unwrap();
        let file = disk.open("set-aside/20261121T085913Z.txt").unwrap();
        let mut bytes = vec![0; file.length().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert_eq!(cut_of(&text), Some(41));
        assert_eq!(cut_of(&text.replace(" 41 ", " 42 ")), None);
        assert_eq!(cut_of("something else"), None);
    }

    #[test]
    fn a_stamp_is_used_once() {
        let disk = Arc::new(crate::store::testing::MemoryDisk::new());
        let stamp = |n: u32| match n {
            1 => "20261121T085913Z".to_owned(),
            n => format!("20261121T085913Z-{n}"),
        };
        for n in 1..4 {
            let free = free_stamp(&*disk, "20261121T085913Z").unwrap();
            assert_eq!(free, stamp(n));
            disk.create(&format!("set-aside/{free}-0000000007.seg"))
                .unwrap();
        }
        assert_eq!(
            stamp_of("set-aside/20261121T085913Z-2-0000000007.seg"),
            Some("20261121T085913Z-2")
        );
    }
}
