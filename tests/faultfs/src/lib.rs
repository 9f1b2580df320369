//! A file system for tests that forgets, tears, delays, fails and runs full when told to.
