//! Segments of the log, read to their end: also what lies behind a bad place.

use std::fmt;
use std::io;

use bytes::Bytes;
use data_encoding::HEXLOWER;
use serde::Serialize;

use super::Range;
use crate::store::log::disk::Disk;
use crate::store::log::frame::{self, End, Found};
use crate::store::log::segment::{self, BadHeader, Header};

/// A segment of the log.
#[derive(Debug, Clone, Serialize)]
pub struct SegmentSeen {
    /// Its file, below the data directory.
    pub file: String,
    /// Its number, by its name or by its head.
    pub number: Option<u64>,
    /// Size of the file.
    pub bytes: u64,
    /// Where its last frame ends.
    pub used: u64,
    /// Whole frames in it.
    pub frames: u64,
    /// The first and the last of them.
    pub range: Option<Range>,
    /// How it is.
    pub state: SegmentState,
    /// More about that.
    pub why: Option<String>,
    /// Places that cannot be read.
    pub bad: Vec<Bad>,
}

/// How a segment is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SegmentState {
    /// Every frame is whole.
    Whole,
    /// Something follows the last frame that is none: a write that was cut off.
    Torn,
    /// A place in the middle cannot be read.
    Rotten,
    /// Its head cannot be read, so nothing in it can.
    Headless,
    /// Its head names another number than its file.
    Misnamed,
    /// A later program wrote it.
    Newer,
    /// It belongs to another store.
    Foreign,
    /// The disk gave an error.
    Unreadable,
}

impl fmt::Display for SegmentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SegmentState::Whole => "whole",
            SegmentState::Torn => "torn at its end",
            SegmentState::Rotten => "rotten in the middle",
            SegmentState::Headless => "its head cannot be read",
            SegmentState::Misnamed => "another segment's name",
            SegmentState::Newer => "of a later format",
            SegmentState::Foreign => "of another store",
            SegmentState::Unreadable => "the disk does not give it",
        })
    }
}

/// A place that cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Bad {
    /// Where it begins.
    pub offset: u64,
    /// The frames that stood there, if the ones behind it tell.
    pub frames: Option<Range>,
}

/// A segment and its bytes.
pub(super) struct Read {
    pub(super) data: Bytes,
    pub(super) header: Header,
    pub(super) frames: Vec<Found>,
}

/// Reads every segment of a directory.
pub(super) fn segments(
    disk: &dyn Disk,
    dir: &str,
    store: Option<[u8; 16]>,
) -> io::Result<Vec<SegmentSeen>> {
    Ok(disk
        .list(dir)?
        .iter()
        .filter_map(|name| Some((name, segment::parse_name(name)?)))
        .map(|(name, number)| segment(disk, &format!("{dir}/{name}"), Some(number), store))
        .collect())
}

/// Reads one segment. `number`: the number that its name gives it.
pub(super) fn segment(
    disk: &dyn Disk,
    file: &str,
    number: Option<u64>,
    store: Option<[u8; 16]>,
) -> SegmentSeen {
    look(disk, file, number, store).0
}

/// Reads one segment and keeps its bytes, if any of it can be used.
pub(super) fn look(
    disk: &dyn Disk,
    file: &str,
    number: Option<u64>,
    store: Option<[u8; 16]>,
) -> (SegmentSeen, Option<Read>) {
    let mut seen = SegmentSeen {
        file: file.to_owned(),
        number,
        bytes: 0,
        used: 0,
        frames: 0,
        range: None,
        state: SegmentState::Whole,
        why: None,
        bad: Vec::new(),
    };
    let data = match whole(disk, file) {
        Ok(data) => data,
        Err(error) => {
            seen.state = SegmentState::Unreadable;
            seen.why = Some(error.to_string());
            return (seen, None);
        }
    };
    seen.bytes = data.len() as u64;
    let header = match Header::decode(&data) {
        Ok(header) => header,
        Err(BadHeader::Newer(version)) => {
            seen.state = SegmentState::Newer;
            seen.why = Some(format!("format {version}"));
            return (seen, None);
        }
        Err(BadHeader::Rotten) => {
            seen.state = SegmentState::Headless;
            return (seen, None);
        }
    };
    if store.is_some_and(|store| store != header.store) {
        seen.state = SegmentState::Foreign;
        seen.why = Some(format!("store {}", HEXLOWER.encode(&header.store)));
        return (seen, None);
    }
    // Nothing is needed in order, so the search goes on behind every bad place.
    let scan = frame::scan(
        &data,
        segment::HEADER as usize,
        header.seed(),
        header.first_frame,
        u64::MAX,
    );
    let mut end = segment::HEADER;
    let mut next = header.first_frame;
    for found in &scan.frames {
        if found.number > next {
            seen.bad.push(Bad {
                offset: end,
                frames: Some(Range {
                    from: next,
                    to: found.number - 1,
                }),
            });
        }
        end = found.end as u64;
        next = found.number + 1;
    }
    seen.used = end;
    seen.frames = scan.frames.len() as u64;
    seen.range = scan.frames.first().map(|first| Range {
        from: first.number,
        to: next - 1,
    });
    if let End::Torn { offset } | End::Rotten { offset, .. } = scan.end {
        seen.state = SegmentState::Torn;
        seen.bad.push(Bad {
            offset: offset as u64,
            frames: None,
        });
    }
    if seen.bad.iter().any(|bad| bad.frames.is_some()) {
        seen.state = SegmentState::Rotten;
    }
    if let Some(bad) = seen.bad.first() {
        seen.why = Some(match bad.frames {
            Some(frames) => format!("{frames} at byte {}", bad.offset),
            None => format!("at byte {}", bad.offset),
        });
    }
    if number.is_some_and(|number| number != header.number) {
        seen.state = SegmentState::Misnamed;
        seen.why = Some(format!("its head says {}", header.number));
    }
    seen.number = Some(header.number);
    let read = Read {
        header,
        frames: scan.frames,
        data,
    };
    (seen, Some(read))
}

fn whole(disk: &dyn Disk, file: &str) -> io::Result<Bytes> {
    let open = disk.open(file)?;
    let length = usize::try_from(open.length()?).map_err(io::Error::other)?;
    let mut data = vec![0; length];
    open.read_at(&mut data, 0)?;
    Ok(Bytes::from(data))
}

/// Which frames a log has.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    /// Runs of whole frames, by number, not touching.
    runs: Vec<Range>,
}

impl Numbers {
    pub(super) fn of(log: &[SegmentSeen]) -> Numbers {
        let mut runs: Vec<Range> = Vec::new();
        for segment in log {
            let Some(range) = segment.range else {
                continue;
            };
            let mut from = range.from;
            for bad in segment.bad.iter().filter_map(|bad| bad.frames) {
                // A place before the first frame of the segment leaves nothing before it.
                if bad.from > from {
                    runs.push(Range {
                        from,
                        to: bad.from - 1,
                    });
                }
                from = bad.to + 1;
            }
            runs.push(Range { from, to: range.to });
        }
        runs.sort_unstable_by_key(|run| run.from);
        let mut merged: Vec<Range> = Vec::new();
        for run in runs {
            match merged.last_mut() {
                Some(last) if run.from <= last.to.saturating_add(1) => {
                    last.to = last.to.max(run.to)
                }
                _ => merged.push(run),
            }
        }
        Numbers { runs: merged }
    }

    /// The runs of frames that are there, by number.
    pub(super) fn runs(&self) -> &[Range] {
        &self.runs
    }

    /// The first frame that is there.
    pub(super) fn first(&self) -> Option<u64> {
        self.runs.first().map(|run| run.from)
    }

    /// The last frame that is there.
    pub(super) fn last(&self) -> Option<u64> {
        self.runs.last().map(|run| run.to)
    }

    /// What is missing in between.
    pub(super) fn missing(&self) -> Vec<Range> {
        self.runs
            .windows(2)
            .map(|pair| Range {
                from: pair[0].to + 1,
                to: pair[1].from - 1,
            })
            .collect()
    }

    /// How many frames are missing from `from` on, up to but not including `end`.
    pub(super) fn missing_between(&self, from: u64, end: u64) -> u64 {
        let there: u64 = self
            .runs
            .iter()
            .map(|run| {
                let (a, b) = (run.from.max(from), (run.to + 1).min(end));
                b.saturating_sub(a)
            })
            .sum();
        end.saturating_sub(from).saturating_sub(there)
    }
}
