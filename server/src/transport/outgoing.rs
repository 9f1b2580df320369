//! Bytes on their way to the peer: one buffer while there are any, none while there are not.

/// Written bytes that may stand in front of the others: less is not worth moving those.
const WRITTEN_KEPT_BYTES: usize = 4 * 1024;

/// Bytes that wait to be written. The memory is a few times that of the most that waited, however much went through.
#[derive(Default)]
pub(crate) struct Outgoing {
    bytes: Vec<u8>,
    written: usize,
}

impl Outgoing {
    /// Adds bytes at the end.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Has `write` add bytes at the end.
    pub(crate) fn fill<T>(&mut self, write: impl FnOnce(&mut Vec<u8>) -> T) -> T {
        write(&mut self.bytes)
    }

    /// Makes room for so many bytes to come.
    pub(crate) fn reserve(&mut self, bytes: usize) {
        self.bytes.reserve(bytes);
    }

    /// What is to be written next.
    pub(crate) fn rest(&self) -> &[u8] {
        &self.bytes[self.written..]
    }

    /// So many bytes of [`Outgoing::rest`] were written.
    pub(crate) fn advance(&mut self, bytes: usize) {
        self.written += bytes;
        if self.written >= self.bytes.len() {
            // Gives the memory back: an idle link holds no buffer.
            *self = Outgoing::default();
        } else if self.written >= WRITTEN_KEPT_BYTES && self.written * 2 >= self.bytes.len() {
            // A peer that never takes everything must not have it all kept. What is moved is less than what was written
            // since the last time.
            self.bytes.drain(..self.written);
            self.written = 0;
        }
    }

    /// How many bytes wait.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.written
    }

    /// Whether none wait.
    pub(crate) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bytes_come_out_in_order_and_an_empty_buffer_holds_no_memory() {
        let mut outgoing = Outgoing::default();
        outgoing.push(b"hello ");
        outgoing.push(b"there");
        outgoing.advance(3);
        assert_eq!(outgoing.rest(), b"lo there");
        outgoing.push(b"!");
        assert_eq!(outgoing.len(), 9);
        outgoing.advance(9);
        assert!(outgoing.is_empty());
        assert_eq!(outgoing.bytes.capacity(), 0);
    }

    #[test]
    fn a_reader_that_never_takes_everything_has_only_what_it_has_not_taken_kept() {
        const MIB: usize = 1024 * 1024;
        let piece: Vec<u8> = (0..16 * 1024_u32).map(|n| n as u8).collect();
        let mut outgoing = Outgoing::default();
        let (mut pushed, mut taken, mut round) = (0, 0, 0);
        while taken < 100 * MIB {
            while outgoing.len() < 64 * 1024 {
                outgoing.push(&piece);
                pushed += piece.len();
            }
            // Between 1 byte and 64 KiB stay.
            let stay = 1 + round * 7_919 % (64 * 1024);
            let take = outgoing.len().saturating_sub(stay);
            assert_eq!(outgoing.rest()[0], taken as u8);
            outgoing.advance(take);
            taken += take;
            round += 1;
            assert_eq!(outgoing.len(), pushed - taken);
            assert!(!outgoing.is_empty() && outgoing.bytes.capacity() <= 512 * 1024);
        }
    }

    proptest! {
        #[test]
        fn the_order_of_bytes_is_kept(steps in proptest::collection::vec((0_usize..9_000, 0_usize..9_000), 1..60)) {
            let (mut outgoing, mut next, mut heard) = (Outgoing::default(), 0_u32, Vec::new());
            for (push, take) in steps {
                let bytes: Vec<u8> = (next..).take(push).map(|n| (n % 251) as u8).collect();
                next += push as u32;
                outgoing.push(&bytes);
                let take = take.min(outgoing.len());
                heard.extend_from_slice(&outgoing.rest()[..take]);
                outgoing.advance(take);
                prop_assert_eq!(outgoing.len() + heard.len(), next as usize);
            }
            heard.extend_from_slice(outgoing.rest());
            prop_assert!(heard.iter().zip(0_u32..).all(|(byte, n)| *byte == (n % 251) as u8));
        }
    }
}
