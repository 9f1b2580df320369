//! A naive model of one mailbox beside the real one, over random histories.
//!
//! Two ways of looking at the same core ([`bellwire_server::delivery`]):
//!
//! - **In step** ([`lockstep`]): reads are answered at once and every frame is safe at once, so a plain list of notifications with
//!   full knowledge ([`mod@reference`]) says beforehand what each event causes, word for word.
//! - **In a storm** ([`storm`]): reads come late or fail, frames stay open, the disk fills up or fails, the server dies with a
//!   frame half written. Nobody can say beforehand what happens when, but what must never happen can be said, and
//!   [`observer`] watches for it.
//!
//! A history is a list of [`step::Step`]s, whose text is the language of the tables in `server/src/delivery/tables`: what fails
//! here is cut down to the fewest steps and can be pasted there as a story.

pub mod history;
pub mod lockstep;
pub mod observer;
pub mod reference;
pub mod step;
pub mod store;
pub mod storm;
pub mod world;
