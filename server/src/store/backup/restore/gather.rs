//! What was erased, from everywhere it may be noted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use bytes::Bytes;

use super::{ErasureSource, RestoreError, io_at};
use crate::ports::{Erased, Erasure};
use crate::store::backup::erasures;
use crate::store::backup::read::{Parser, Piece};
use crate::store::log::disk::{Disk, RealDisk};
use crate::store::log::segment::{self, Header};
use crate::store::log::{SET_ASIDE, frame};
use crate::store::snapshot::{self, SnapshotError};
use crate::store::write::{self, Write};
use crate::store::{keys, record};

/// What was erased, from everywhere, and the highest run that was met on the way.
#[derive(Default)]
pub(super) struct Gathered {
    pub(super) erasures: BTreeMap<Erased, Erasure>,
    pub(super) run: u32,
    pub(super) sources: Vec<ErasureSource>,
}

impl Gathered {
    fn add(&mut self, erasure: Erasure) {
        let known = self.erasures.entry(erasure.what).or_insert(erasure);
        *known = erasures::merged(*known, erasure);
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> bool {
        if key == keys::RUN {
            let run = record::number(key, value).unwrap_or(0);
            self.run = self.run.max(u32::try_from(run).unwrap_or(u32::MAX));
        }
        match erasures::of_entry(key, value) {
            Some(erasure) => {
                self.add(erasure);
                true
            }
            None => false,
        }
    }

    fn source(&mut self, path: &Path, found: u64, trouble: Option<String>) {
        self.sources.push(ErasureSource {
            path: path.to_owned(),
            found,
            trouble,
        });
    }

    /// A file of erasures, a backup or a data directory.
    pub(super) fn of_path(&mut self, path: &Path) -> Result<(), RestoreError> {
        let bad = |why: String| RestoreError::Erasures {
            path: path.to_owned(),
            why,
        };
        if path.is_dir() {
            return self.of_directory(path, true);
        }
        let mut file = File::open(path).map_err(|error| bad(error.to_string()))?;
        let mut head = [0; 8];
        file.read_exact(&mut head)
            .map_err(|_| bad("it is neither a file of erasures nor a backup".to_owned()))?;
        if erasures::is_one(&head) {
            return self.of_file(path).map_err(|error| bad(error.to_string()));
        }
        if head != crate::store::backup::MAGIC {
            return Err(bad(
                "it is neither a file of erasures nor a backup".to_owned()
            ));
        }
        let file = File::open(path).map_err(|error| bad(error.to_string()))?;
        self.of_backup(path, file);
        Ok(())
    }

    fn of_file(&mut self, path: &Path) -> io::Result<()> {
        let (dir, name) = (
            path.parent().unwrap_or(Path::new(".")),
            path.file_name().and_then(|name| name.to_str()),
        );
        let name = name.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let file = RealDisk::new(dir).open_to_read(name)?;
        let held = erasures::read(&*file, &mut |erasure| self.add(erasure))?;
        let trouble =
            (held.damaged > 0).then(|| format!("{} records in it cannot be read", held.damaged));
        self.source(path, held.erasures, trouble);
        Ok(())
    }

    /// As much of a backup as can be read.
    fn of_backup(&mut self, path: &Path, mut file: File) {
        let mut found = 0;
        let mut parser = Parser::new();
        let mut buffer = vec![0; 256 << 10];
        let trouble = loop {
            match file.read(&mut buffer) {
                Ok(0) => break parser.finish().err().map(|fault| fault.to_string()),
                Ok(count) => {
                    let fed = parser.feed(&buffer[..count], &mut |piece| {
                        match piece {
                            Piece::Head(head) => self.run = self.run.max(head.run),
                            Piece::Entry(key, value) => found += u64::from(self.put(key, value)),
                            Piece::Frame(_, _, writes) => found += self.writes(writes),
                        }
                        Ok(())
                    });
                    if let Err(fault) = fed {
                        break Some(fault.to_string());
                    }
                }
                Err(error) => break Some(error.to_string()),
            }
        };
        self.source(path, found, trouble);
    }

    fn writes(&mut self, writes: &[Write]) -> u64 {
        let mut found = 0;
        for write in writes {
            if let Write::Put { key, value } = write {
                found += u64::from(self.put(key, value));
            }
        }
        found
    }

    /// As much of a data directory, or of a directory of backups, as can be read: its snapshots and its log have every
    /// erasure, whatever became of its engine.
    pub(super) fn of_directory(&mut self, dir: &Path, named: bool) -> Result<(), RestoreError> {
        let disk = RealDisk::new(dir);
        let mut troubles: Vec<String> = Vec::new();
        let mut found = 0;
        let mut seen = false;
        for name in disk.list(snapshot::DIR).unwrap_or_default() {
            if !name.ends_with(".snap") {
                continue;
            }
            seen = true;
            let read = disk
                .open_to_read(&format!("{}/{name}", snapshot::DIR))
                .map_err(SnapshotError::Io)
                .and_then(|file| {
                    snapshot::parse(&*file, None, &mut |key, value| {
                        found += u64::from(self.put(key, value));
                        Ok(())
                    })
                });
            if let Err(error) = read {
                troubles.push(format!("{name}: {error}"));
            }
        }
        for place in [segment::DIR, SET_ASIDE] {
            for name in disk.list(place).unwrap_or_default() {
                if !name.ends_with(".seg") {
                    continue;
                }
                seen = true;
                match self.of_segment(&disk, &format!("{place}/{name}")) {
                    Ok((count, trouble)) => {
                        found += count;
                        troubles.extend(trouble.map(|why| format!("{name}: {why}")));
                    }
                    Err(error) => troubles.push(format!("{name}: {error}")),
                }
            }
        }
        if seen {
            let trouble = (!troubles.is_empty()).then(|| troubles.join("; "));
            self.source(dir, found, trouble);
        }
        let file = dir.join(erasures::FILE);
        if file.is_file() {
            self.of_file(&file).map_err(io_at(&file))?;
        } else if named && !seen {
            return Err(RestoreError::Erasures {
                path: dir.to_owned(),
                why: "it is no data directory and has no file of erasures".to_owned(),
            });
        }
        Ok(())
    }

    /// Every frame of a segment that can be read, past any damage.
    fn of_segment(&mut self, disk: &RealDisk, name: &str) -> io::Result<(u64, Option<String>)> {
        let file = disk.open_to_read(name)?;
        let length = usize::try_from(file.length()?).map_err(io::Error::other)?;
        let mut data = vec![0; length];
        file.read_at(&mut data, 0)?;
        let data = Bytes::from(data);
        let Ok(header) = Header::decode(&data) else {
            return Ok((0, Some("its header cannot be read".to_owned())));
        };
        let scan = frame::scan(
            &data,
            segment::HEADER as usize,
            header.seed(),
            header.first_frame,
            u64::MAX,
        );
        let mut found = 0;
        let mut undecodable = 0;
        for frame in &scan.frames {
            match write::decode(&data.slice(frame.payload.clone())) {
                Ok(writes) => found += self.writes(&writes),
                Err(_) => undecodable += 1,
            }
        }
        let missing: u64 = scan.gaps.iter().map(|gap| gap.end - gap.start).sum();
        let trouble = (missing + undecodable > 0)
            .then(|| format!("{} frames cannot be read", missing + undecodable));
        Ok((found, trouble))
    }
}
