//! Writing a backup, to wherever it goes.

use std::io::Write;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use aws_lc_rs::digest;

use super::{
    BLOCK, BLOCK_HEAD, END, ENTRIES, FRAMES, HEADER, MAGIC, PROGRAM_MAX, TOTALS, VERSION,
    block_sum, header_sum,
};
use crate::delivery::Mono;
use crate::ports::{BackupError, BackupProgress, BackupSummary, BackupWatch, Clock};
use crate::store::committer::LogFigures;
use crate::store::engine::{Direction, Engine, EngineError};
use crate::store::keeper::Room;
use crate::store::keys::{self, Key};
use crate::store::log::{LiveError, Segments};
use crate::store::record::{self, Fault};
use crate::store::set_aside::SetAside;

/// So much of the log is kept for a backup whatever the free room. Beyond it a backup gives way to new pings when the reserve
/// is touched.
const HELD_MAX: u64 = 256 << 20;
/// How long a store that is closed waits for a backup that is being broken off, and how often it looks.
const CLOSE_WAIT: Duration = Duration::from_secs(5);
const CLOSE_LOOK: Duration = Duration::from_millis(2);
/// Longest pause after a block.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// Makes backups of an open store. One at a time.
pub(in crate::store) struct Copier {
    pub(in crate::store) engine: Arc<dyn Engine>,
    pub(in crate::store) segments: Arc<Segments>,
    pub(in crate::store) figures: Arc<LogFigures>,
    pub(in crate::store) aside: Arc<SetAside>,
    pub(in crate::store) clock: Arc<dyn Clock>,
    pub(in crate::store) store: [u8; 16],
    pub(in crate::store) key_mark: [u8; 32],
    pub(in crate::store) run: u32,
    room: Arc<Room>,
    /// So much of the log may be kept for a backup although the disk runs full.
    held_max: u64,
    /// A block is closed once it holds this much.
    block: usize,
    busy: AtomicBool,
    closing: AtomicBool,
}

/// What a copier needs of the house.
pub(in crate::store) struct Tools {
    pub(in crate::store) engine: Arc<dyn Engine>,
    pub(in crate::store) segments: Arc<Segments>,
    pub(in crate::store) figures: Arc<LogFigures>,
    pub(in crate::store) aside: Arc<SetAside>,
    pub(in crate::store) clock: Arc<dyn Clock>,
    pub(in crate::store) store: [u8; 16],
    pub(in crate::store) key_mark: [u8; 32],
    pub(in crate::store) run: u32,
    pub(in crate::store) room: Arc<Room>,
}

/// Held by whoever makes the one backup.
struct Turn<'a>(&'a AtomicBool);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl From<EngineError> for BackupError {
    fn from(error: EngineError) -> BackupError {
        BackupError::Store(error.to_string())
    }
}

impl Copier {
    pub(in crate::store) fn new(tools: Tools) -> Copier {
        Copier {
            engine: tools.engine,
            segments: tools.segments,
            figures: tools.figures,
            aside: tools.aside,
            clock: tools.clock,
            store: tools.store,
            key_mark: tools.key_mark,
            run: tools.run,
            room: tools.room,
            held_max: HELD_MAX,
            block: BLOCK,
            busy: AtomicBool::new(false),
            closing: AtomicBool::new(false),
        }
    }

    /// Smaller blocks, so that little data makes many.
    pub(in crate::store) fn set_block(&mut self, bytes: usize) {
        self.block = bytes.clamp(1, BLOCK);
    }

    /// Less of the log may be kept, so that little data is too much.
    pub(in crate::store) fn set_held_max(&mut self, bytes: u64) {
        self.held_max = bytes;
    }

    /// Whether one is being made.
    pub(in crate::store) fn is_busy(&self) -> bool {
        self.busy.load(Ordering::Acquire)
    }

    /// Breaks off what is under way and makes no more. Waits a while for it to end, so that nobody reads an engine that is
    /// being closed.
    pub(in crate::store) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        let mut left = CLOSE_WAIT.as_millis() / CLOSE_LOOK.as_millis();
        while self.is_busy() && left > 0 {
            std::thread::sleep(CLOSE_LOOK);
            left -= 1;
        }
    }

    /// Whether the log that is kept for a backup takes room that is needed.
    fn is_in_the_way(&self, first_frame: u64) -> bool {
        self.room.full.load(Ordering::Relaxed)
            && self.segments.size_from(first_frame) >= self.held_max
    }

    /// Writes a backup. It is whole only if this says so; `out` is flushed, and syncing it is the caller's.
    pub(in crate::store) fn copy(
        &self,
        out: &mut dyn Write,
        watch: BackupWatch<'_>,
    ) -> Result<BackupSummary, BackupError> {
        if self.busy.swap(true, Ordering::AcqRel) {
            return Err(BackupError::Busy);
        }
        let _turn = Turn(&self.busy);
        // Before the position is read: no segment from there on may go.
        let hold = self.segments.hold();
        let engine = Arc::clone(&self.engine);
        let first_frame = engine.position()?.unwrap_or(1);
        hold.narrow(first_frame);
        let mut summary = BackupSummary {
            store: self.store,
            key_mark: self.key_mark,
            program: env!("CARGO_PKG_VERSION")
                .chars()
                .take(PROGRAM_MAX)
                .collect(),
            run: self.run,
            begun_ms: self.clock.now().unix_ms,
            finished_ms: 0,
            first_frame,
            last_frame: 0,
            entries: 0,
            entry_bytes: 0,
            frames: 0,
            frame_bytes: 0,
            left_out: 0,
            bytes: 0,
            sha256: [0; 32],
        };
        let mut blocks = Blocks {
            out,
            watch,
            closing: &self.closing,
            in_the_way: &|| self.is_in_the_way(first_frame),
            limit: self.block,
            place: 0,
            kind: ENTRIES,
            block: vec![0; BLOCK_HEAD],
            digest: digest::Context::new(&digest::SHA256),
            progress: BackupProgress::default(),
        };
        blocks.write(&header(&summary))?;
        self.walk(&*engine, &mut blocks, &mut summary)?;
        blocks.close()?;
        // Everything that was answered as safe by now is in it.
        summary.last_frame = self.figures.last_frame.load(Ordering::Acquire);
        blocks.kind = FRAMES;
        self.frames(&mut blocks, &mut summary)?;
        blocks.close()?;
        summary.finished_ms = self.clock.now().unix_ms;
        blocks.end(&mut summary)?;
        Ok(summary)
    }

    /// The same, at a pace that leaves half of a core to others.
    pub(in crate::store) fn copy_gently(
        &self,
        out: &mut dyn Write,
        watch: BackupWatch<'_>,
    ) -> Result<BackupSummary, BackupError> {
        let gentle = std::cell::RefCell::new(Gentle::new(&*self.clock));
        self.copy(out, &|progress| {
            gentle.borrow_mut().rest();
            watch(progress)
        })
    }

    /// Every entry of the engine, page by page.
    fn walk(
        &self,
        engine: &dyn Engine,
        blocks: &mut Blocks<'_>,
        summary: &mut BackupSummary,
    ) -> Result<(), BackupError> {
        let mut from = Key::from_slice(&[]);
        loop {
            let mut trouble = None;
            let mut last = None;
            engine.scan(&*from..&[u8::MAX], Direction::Up, &mut |key, value| {
                // The engine's own note of where it stands is not part of what it holds.
                if key != keys::POSITION {
                    match record::verify(key, value) {
                        Ok(()) => {
                            summary.entries += 1;
                            summary.entry_bytes += (key.len() + value.len()) as u64;
                            blocks.progress.entries += 1;
                            blocks.entry(key, value);
                        }
                        Err(fault @ Fault::Rotten(_)) => {
                            summary.left_out += 1;
                            self.aside.record(key, value, fault);
                        }
                        Err(Fault::Newer(version)) => {
                            trouble = Some(BackupError::Store(format!(
                                "it holds a record of format {version}, newer than this program"
                            )));
                            return ControlFlow::Break(());
                        }
                    }
                }
                if blocks.is_full() {
                    last = Some(Key::from_slice(key));
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })?;
            if let Some(trouble) = trouble {
                return Err(trouble);
            }
            let Some(last) = last else {
                return Ok(());
            };
            blocks.close()?;
            from = last.after();
        }
    }

    fn frames(
        &self,
        blocks: &mut Blocks<'_>,
        summary: &mut BackupSummary,
    ) -> Result<(), BackupError> {
        if summary.last_frame < summary.first_frame {
            // Nothing was written since. The engine may even be a frame ahead of what was last announced.
            summary.last_frame = summary.first_frame - 1;
            return Ok(());
        }
        self.segments
            .frames(
                summary.first_frame,
                summary.last_frame,
                &mut |number, payload| {
                    summary.frames += 1;
                    summary.frame_bytes += payload.len() as u64;
                    blocks.progress.frames += 1;
                    blocks.frame(number, &payload);
                    if blocks.is_full() {
                        blocks.close()?;
                    }
                    Ok(())
                },
            )
            .map_err(|error| match error {
                LiveError::Visit(error) => error,
                LiveError::Io(_) | LiveError::Missing(_) => BackupError::Store(error.to_string()),
            })
    }
}

/// Work that leaves half of a core to others.
pub(in crate::store) struct Gentle<'a> {
    clock: &'a dyn Clock,
    began: Mono,
}

impl<'a> Gentle<'a> {
    pub(in crate::store) fn new(clock: &'a dyn Clock) -> Gentle<'a> {
        Gentle {
            clock,
            began: clock.now().mono,
        }
    }

    /// As long a pause as the work since the last one took.
    pub(in crate::store) fn rest(&mut self) {
        let took = self.clock.now().mono - self.began;
        std::thread::sleep(took.min(PAUSE_MAX));
        self.began = self.clock.now().mono;
    }
}

fn header(summary: &BackupSummary) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[0..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..24].copy_from_slice(&summary.first_frame.to_le_bytes());
    header[24..32].copy_from_slice(&summary.begun_ms.to_le_bytes());
    header[32..48].copy_from_slice(&summary.store);
    header[48..80].copy_from_slice(&summary.key_mark);
    header[80..84].copy_from_slice(&summary.run.to_le_bytes());
    let program = summary.program.as_bytes();
    let length = program.len().min(PROGRAM_MAX);
    header[84] = length as u8;
    header[88..88 + length].copy_from_slice(&program[..length]);
    let sum = header_sum(&header);
    header[12..16].copy_from_slice(&sum.to_le_bytes());
    header
}

/// The file, block by block.
struct Blocks<'a> {
    out: &'a mut dyn Write,
    watch: BackupWatch<'a>,
    closing: &'a AtomicBool,
    in_the_way: &'a dyn Fn() -> bool,
    limit: usize,
    /// Of the block that is being filled.
    place: u64,
    kind: u32,
    /// Begins with room for its head.
    block: Vec<u8>,
    digest: digest::Context,
    progress: BackupProgress,
}

impl Blocks<'_> {
    fn is_full(&self) -> bool {
        self.block.len() - BLOCK_HEAD >= self.limit
    }

    fn entry(&mut self, key: &[u8], value: &[u8]) {
        // Both are far below: keys::KEY_MAX and record::RECORD_MAX.
        self.block
            .extend_from_slice(&(key.len() as u16).to_le_bytes());
        self.block
            .extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.block.extend_from_slice(key);
        self.block.extend_from_slice(value);
    }

    fn frame(&mut self, number: u64, payload: &[u8]) {
        self.block.extend_from_slice(&number.to_le_bytes());
        // Bounded by log::frame::FRAME_MAX.
        self.block
            .extend_from_slice(&(payload.len() as u32).to_le_bytes());
        self.block.extend_from_slice(payload);
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        self.digest.update(bytes);
        self.progress.bytes += bytes.len() as u64;
        self.out.write_all(bytes).map_err(BackupError::Write)
    }

    fn seal(&mut self) {
        let length = (self.block.len() - BLOCK_HEAD) as u32;
        self.block[0..4].copy_from_slice(&self.kind.to_le_bytes());
        self.block[4..8].copy_from_slice(&length.to_le_bytes());
        let sum = block_sum(self.place, &self.block[..8], &self.block[BLOCK_HEAD..]);
        self.block[8..12].copy_from_slice(&sum.to_le_bytes());
        self.place += 1;
    }

    /// Writes what is in the block, and lets others breathe.
    fn close(&mut self) -> Result<(), BackupError> {
        if self.block.len() == BLOCK_HEAD {
            return Ok(());
        }
        self.seal();
        let block = std::mem::take(&mut self.block);
        let written = self.write(&block);
        self.block = block;
        self.block.truncate(BLOCK_HEAD);
        // One large frame must not stay in memory for the rest of the way.
        self.block.shrink_to(2 * BLOCK);
        written?;
        if self.closing.load(Ordering::Acquire) || (self.watch)(&self.progress).is_break() {
            return Err(BackupError::Interrupted);
        }
        if (self.in_the_way)() {
            return Err(BackupError::NoRoom);
        }
        Ok(())
    }

    fn end(&mut self, summary: &mut BackupSummary) -> Result<(), BackupError> {
        self.kind = END;
        for number in [
            summary.last_frame,
            summary.entries,
            summary.entry_bytes,
            summary.frames,
            summary.frame_bytes,
            summary.left_out,
            summary.finished_ms,
        ] {
            self.block.extend_from_slice(&number.to_le_bytes());
        }
        debug_assert_eq!(self.block.len(), BLOCK_HEAD + TOTALS);
        self.digest.update(&self.block[BLOCK_HEAD..]);
        let digest = self.digest.clone().finish();
        for (to, from) in summary.sha256.iter_mut().zip(digest.as_ref()) {
            *to = *from;
        }
        self.block.extend_from_slice(&summary.sha256);
        self.seal();
        let block = std::mem::take(&mut self.block);
        self.write(&block)?;
        summary.bytes = self.progress.bytes;
        self.out.flush().map_err(BackupError::Write)
    }
}
