//! The bytes of a file, in pages that are shared until they differ.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

/// Bytes of a page: what is allocated, and what a sync writes.
pub(crate) const PAGE: u64 = 4096;
/// Bytes of a sector: what a disk writes whole or not at all.
pub(crate) const SECTOR: u64 = 512;

type Page = [u8; PAGE as usize];

fn zeros() -> Arc<Page> {
    static ZEROS: OnceLock<Arc<Page>> = OnceLock::new();
    Arc::clone(ZEROS.get_or_init(|| Arc::new([0; PAGE as usize])))
}

/// A file's length and its allocated pages; what is not allocated reads as zeros. Behind the end, pages hold zeros.
#[derive(Clone, Default)]
pub(crate) struct Image {
    pages: BTreeMap<u64, Arc<Page>>,
    size: u64,
}

impl Image {
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Allocated pages.
    pub(crate) fn pages(&self) -> u64 {
        self.pages.len() as u64
    }

    /// How many pages would have to be allocated to write `from..to`.
    pub(crate) fn missing(&self, from: u64, to: u64) -> u64 {
        if from >= to {
            return 0;
        }
        let (first, last) = (from / PAGE, (to - 1) / PAGE);
        let there = self.pages.range(first..=last).count() as u64;
        last - first + 1 - there
    }

    /// What is there from `offset` on, at most `length` bytes, none of it behind the end.
    pub(crate) fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let end = self.size.min(offset.saturating_add(length));
        if offset >= end {
            return Vec::new();
        }
        self.raw(offset, end)
    }

    /// The bytes of `from..to`, with zeros where nothing is.
    pub(crate) fn raw(&self, from: u64, to: u64) -> Vec<u8> {
        let mut bytes = vec![0; (to - from) as usize];
        if from == to {
            return bytes;
        }
        for (index, page) in self.pages.range(from / PAGE..=(to - 1) / PAGE) {
            let begin = from.max(index * PAGE);
            let end = to.min((index + 1) * PAGE);
            let inside = (begin - index * PAGE) as usize..(end - index * PAGE) as usize;
            bytes[(begin - from) as usize..(end - from) as usize].copy_from_slice(&page[inside]);
        }
        bytes
    }

    /// Writes `data` at `offset`; the file grows if need be.
    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) {
        self.size = self.size.max(offset + data.len() as u64);
        self.put(offset, data);
    }

    /// Writes what of `data` lies within the file.
    pub(crate) fn write_inside(&mut self, offset: u64, data: &[u8]) {
        let end = self.size.min(offset + data.len() as u64);
        if offset < end {
            self.put(offset, &data[..(end - offset) as usize]);
        }
    }

    fn put(&mut self, offset: u64, data: &[u8]) {
        let mut at = offset;
        let mut rest = data;
        while !rest.is_empty() {
            let index = at / PAGE;
            let inside = (at - index * PAGE) as usize;
            let step = rest.len().min(PAGE as usize - inside);
            let page = self.pages.entry(index).or_insert_with(zeros);
            Arc::make_mut(page)[inside..inside + step].copy_from_slice(&rest[..step]);
            rest = &rest[step..];
            at += step as u64;
        }
    }

    /// Gives the file a length. What is cut off is gone.
    pub(crate) fn resize(&mut self, size: u64) {
        if size < self.size {
            self.pages.split_off(&size.div_ceil(PAGE));
            let inside = (size % PAGE) as usize;
            if inside > 0
                && let Some(page) = self.pages.get_mut(&(size / PAGE))
            {
                Arc::make_mut(page)[inside..].fill(0);
            }
        }
        self.size = size;
    }

    /// Allocates the pages of `from..to`.
    pub(crate) fn reserve(&mut self, from: u64, to: u64) {
        if from < to {
            for index in from / PAGE..=(to - 1) / PAGE {
                self.pages.entry(index).or_insert_with(zeros);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_off_does_not_come_back_when_the_file_grows() {
        let mut image = Image::default();
        image.write(4_000, &[7; 300]);
        assert_eq!(image.pages(), 2);
        image.resize(4_050);
        assert_eq!(image.pages(), 1);
        image.resize(5_000);
        let mut expected = vec![0; 5_000];
        expected[4_000..4_050].fill(7);
        assert_eq!(image.read(0, 9_999), expected);
    }

    #[test]
    fn holes_read_as_zeros_and_cost_nothing_until_they_are_reserved() {
        let mut image = Image::default();
        image.write(3 * PAGE, b"end");
        assert_eq!(image.pages(), 1);
        assert_eq!(image.missing(0, image.size()), 3);
        assert_eq!(image.read(PAGE - 2, 4), [0; 4]);
        image.reserve(0, 2 * PAGE);
        assert_eq!((image.pages(), image.missing(0, image.size())), (3, 1));
    }

    #[test]
    fn copies_share_pages_and_do_not_disturb_each_other() {
        let mut image = Image::default();
        image.write(0, b"before");
        let copy = image.clone();
        image.write(0, b"after!");
        assert_eq!(copy.read(0, 9), b"before");
        assert_eq!(image.read(0, 9), b"after!");
    }
}
