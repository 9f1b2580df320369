//! What a mailbox knows of its session.
