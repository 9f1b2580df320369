//! Bytes on their way to the peer: one buffer while there are any, none while there are not.

/// Bytes that wait to be written.
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
}
