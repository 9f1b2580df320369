//! How long this network bears silence: learned from the silences that happen anyway.
//!
//! Network equipment forgets a flow that is silent for too long, and a notification can then not come in; a sign of life too
//! often costs battery. Nobody says where the limit is, and it differs from network to network.
//!
//! Every silence on the one connection of the client is evidence. It was **lost** when the sign of life after it was not
//! answered, but a new connection on the same network stood soon after; and, on QUIC, when the server found us at another
//! address after it, because a router had forgotten the flow and made a new one. It **survived** when something was heard
//! after it and neither was the case. The evidence is weighed per length of silence, and loses half of its weight in a week. The next silence is drawn at random
//! around the longest length that is borne out, and below the shortest one that is believed lost. So the interval drifts
//! where the network lets it, without a second connection, a test, or a search with a beginning and an end. Decision 0028
//! tells why it is done in this way.
//!
//! Pure: times and chance are handed in.

use std::collections::BTreeMap;

use bellwire_protocol::KeepAlive as Bounds;
use serde::{Deserialize, Serialize};

/// Shortest silence that counts as evidence, in seconds: shorter ones tell nothing.
pub(crate) const SHORTEST_S: u32 = 15;

/// Lengths of silence are told apart by an eighth of an octave (9 %).
const BANDS_PER_OCTAVE: f64 = 8.0;

/// Bands: 15 seconds to more than a day.
const BANDS_MAX: u8 = 104;

/// Weight halves in this time, in milliseconds: networks change.
const HALF_LIFE_MS: f64 = 7.0 * 86_400_000.0;

/// Greatest weight of one kind of evidence in one band: a week in one place must not weigh for a year.
const WEIGHT_MAX: f32 = 64.0;

/// Less than this is forgotten.
const WEIGHT_MIN: f32 = 0.05;

/// A length is borne out by silences of at least this weight that were as long or longer.
const BORNE_OUT: f32 = 2.0;

/// A loss counts as long as it has this weight: one alone keeps its force for a week.
const LOSS_MIN: f32 = 0.5;

/// A length is believed lost when more than one silence in this many, of those that tell, was lost. Servers restart and
/// radios fade: a rare loss is no limit of the network.
const BEARABLE: f32 = 20.0;

const _: () = assert!(bellwire_protocol::limits::KEEP_ALIVE_MAX_S as u64 <= 15 * (1 << 13));

/// How a silence ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Silence {
    /// Something was heard after it.
    Survived,
    /// The flow was forgotten.
    Lost,
}

/// What is known of one carrier on one network.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Evidence {
    /// When the weights were true, in wall time.
    at_ms: u64,
    bands: BTreeMap<u8, Weights>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
struct Weights {
    survived: f32,
    lost: f32,
}

/// What the evidence says, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Belief {
    /// The longest silence that is borne out.
    reach_ms: Option<u64>,
    /// The shortest silence that is believed lost.
    lost_ms: Option<u64>,
}

impl Evidence {
    /// A silence of this length ended. `wall_ms` is wall time.
    pub(crate) fn note(&mut self, silent_ms: u64, end: Silence, wall_ms: u64) {
        let Some(band) = band_of(silent_ms) else {
            return;
        };
        self.decay(wall_ms);
        let weights = self.bands.entry(band).or_default();
        let weight = match end {
            Silence::Survived => &mut weights.survived,
            Silence::Lost => &mut weights.lost,
        };
        *weight = (*weight + 1.0).min(WEIGHT_MAX);
    }

    /// How long to be silent now, in milliseconds: within the server's bounds, and otherwise as the evidence says, beginning
    /// from `usual_s`. `up_to(max)` answers a random number of `0..=max`.
    pub(crate) fn draw(
        &self,
        bounds: Bounds,
        usual_s: u32,
        wall_ms: u64,
        up_to: impl FnOnce(u64) -> u64,
    ) -> u64 {
        let (least_ms, most_ms) = (
            u64::from(bounds.min_s) * 1_000,
            u64::from(bounds.max_s.max(bounds.min_s)) * 1_000,
        );
        let Belief { reach_ms, lost_ms } = self.believe(wall_ms);
        let usual_ms = u64::from(usual_s) * 1_000;
        let around_ms = reach_ms.map_or(usual_ms, |reach| reach.max(usual_ms.min(most_ms)));
        // Room below what was lost: its band begins a little under the silence itself, and clocks differ.
        let below_ms = lost_ms.map_or(u64::MAX, |lost| lost / 16 * 15);
        let highest = (around_ms / 8 * 9).min(below_ms).clamp(least_ms, most_ms);
        let lowest = (around_ms.min(below_ms) / 8 * 7).clamp(least_ms, highest);
        lowest + up_to(highest - lowest)
    }

    /// The longest silence that is borne out, in seconds, for people.
    pub(crate) fn reach_s(&self, wall_ms: u64) -> Option<u32> {
        let reach = self.believe(wall_ms).reach_ms?;
        u32::try_from(reach / 1_000).ok()
    }

    fn believe(&self, wall_ms: u64) -> Belief {
        let faded = faded(self.at_ms, wall_ms);
        let mut longer: f32 = self
            .bands
            .values()
            .map(|weights| weights.survived * faded)
            .sum();
        let mut lost = 0.0;
        let mut belief = Belief {
            reach_ms: None,
            lost_ms: None,
        };
        for (&band, weights) in &self.bands {
            // A network that bears a silence bears every shorter one, and loses every longer one than it lost.
            lost += weights.lost * faded;
            if lost >= LOSS_MIN && lost * BEARABLE > longer {
                belief.lost_ms = Some(begins_ms(band));
                break;
            }
            if longer >= BORNE_OUT {
                belief.reach_ms = Some(begins_ms(band));
            }
            longer -= weights.survived * faded;
        }
        belief
    }

    fn decay(&mut self, wall_ms: u64) {
        let faded = faded(self.at_ms, wall_ms);
        self.at_ms = wall_ms;
        if faded < 1.0 {
            self.bands.retain(|_, weights| {
                weights.survived *= faded;
                weights.lost *= faded;
                weights.survived >= WEIGHT_MIN || weights.lost >= WEIGHT_MIN
            });
        }
    }

    /// Whether a file may hold this: numbers are numbers, and no more bands than there are.
    pub(crate) fn is_sound(&self) -> bool {
        let sound = |weight: f32| (0.0..=WEIGHT_MAX).contains(&weight);
        self.bands
            .iter()
            .all(|(&band, w)| band < BANDS_MAX && sound(w.survived) && sound(w.lost))
    }
}

/// What is left of a weight. A wall clock that was set back leaves it as it is.
fn faded(at_ms: u64, wall_ms: u64) -> f32 {
    let age_ms = wall_ms.saturating_sub(at_ms) as f64;
    (-age_ms / HALF_LIFE_MS).exp2() as f32
}

fn band_of(silent_ms: u64) -> Option<u8> {
    let shortest_ms = f64::from(SHORTEST_S) * 1_000.0;
    // A hair more, so that the beginning of a band lies in it.
    let ratio = (silent_ms as f64 + 1.0) / shortest_ms;
    if ratio < 1.0 {
        return None;
    }
    let band = (ratio.log2() * BANDS_PER_OCTAVE).floor() as u64;
    Some(band.min(u64::from(BANDS_MAX) - 1) as u8)
}

fn begins_ms(band: u8) -> u64 {
    let ratio = (f64::from(band) / BANDS_PER_OCTAVE).exp2();
    (f64::from(SHORTEST_S) * 1_000.0 * ratio).round() as u64
}

/// The silence of one connection: how long it lasted when it ended.
#[derive(Debug)]
pub(crate) struct Quiet {
    /// When something was last sent or heard.
    since_ms: u64,
    /// A sign of life was sent after a silence of this length, and nothing was heard since.
    asked_after_ms: Option<u64>,
}

impl Quiet {
    pub(crate) const fn new(now_ms: u64) -> Self {
        Self {
            since_ms: now_ms,
            asked_after_ms: None,
        }
    }

    /// Something was sent; `asks`: it is a sign of life that will be answered.
    pub(crate) fn sent(&mut self, asks: bool, now_ms: u64) {
        let silent_ms = now_ms.saturating_sub(self.since_ms);
        if asks && self.asked_after_ms.is_none() {
            self.asked_after_ms = Some(silent_ms);
        }
        self.since_ms = now_ms;
    }

    /// Something was heard: the silence that it ended, if it tells anything.
    pub(crate) fn heard(&mut self, now_ms: u64) -> Option<u64> {
        let silent_ms = now_ms.saturating_sub(self.since_ms);
        self.since_ms = now_ms;
        let silent_ms = self.asked_after_ms.take().unwrap_or(silent_ms);
        (silent_ms >= u64::from(SHORTEST_S) * 1_000).then_some(silent_ms)
    }

    /// The silence that was perhaps lost, if the connection ends now.
    pub(crate) fn unanswered(&self) -> Option<u64> {
        self.asked_after_ms
            .filter(|silent_ms| *silent_ms >= u64::from(SHORTEST_S) * 1_000)
    }

    /// The machine slept, or the network changed: what was before tells nothing.
    pub(crate) fn forget(&mut self, now_ms: u64) {
        *self = Self::new(now_ms);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIC: Bounds = Bounds {
        min_s: 20,
        max_s: 120,
    };
    const DAY_MS: u64 = 86_400_000;

    /// A network that forgets a flow after this long, and a client on it: signs of life and losses over some hours.
    struct Life {
        evidence: Evidence,
        forgets_after_ms: u64,
        now_ms: u64,
        seed: u64,
        losses: u32,
        drawn: Vec<u64>,
    }

    impl Life {
        fn on(forgets_after_s: u64) -> Self {
            Self {
                evidence: Evidence::default(),
                forgets_after_ms: forgets_after_s * 1_000,
                now_ms: 1_700_000_000_000,
                seed: 1,
                losses: 0,
                drawn: Vec::new(),
            }
        }

        fn pass(&mut self, hours: u64) {
            let until_ms = self.now_ms + hours * 3_600_000;
            while self.now_ms < until_ms {
                let seed = &mut self.seed;
                let silent_ms = self.evidence.draw(QUIC, 25, self.now_ms, |max| {
                    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (*seed >> 33) % (max + 1)
                });
                assert!((20_000..=120_000).contains(&silent_ms), "{silent_ms}");
                self.now_ms += silent_ms;
                let end = match silent_ms < self.forgets_after_ms {
                    true => Silence::Survived,
                    false => Silence::Lost,
                };
                self.losses += u32::from(end == Silence::Lost);
                self.evidence.note(silent_ms, end, self.now_ms);
                self.drawn.push(silent_ms);
            }
        }

        fn mean_of_the_last_hundred(&self) -> u64 {
            let last = &self.drawn[self.drawn.len().saturating_sub(100)..];
            last.iter().sum::<u64>() / last.len() as u64
        }
    }

    #[test]
    fn where_nothing_is_forgotten_the_interval_drifts_to_the_servers_bound() {
        let mut life = Life::on(100_000);
        life.pass(1);
        assert!(life.drawn[0] < 30_000, "it begins with what is usual");
        life.pass(48);
        let mean = life.mean_of_the_last_hundred();
        assert!(mean > 105_000, "{mean} ms after two days");
        assert_eq!(life.losses, 0);
    }

    #[test]
    fn it_settles_below_what_the_network_forgets_and_rarely_loses() {
        let mut life = Life::on(60);
        life.pass(24);
        let mean = life.mean_of_the_last_hundred();
        assert!((45_000..60_000).contains(&mean), "{mean} ms after a day");
        let after_a_day = life.losses;
        assert!(after_a_day <= 3, "{after_a_day} losses in a day");
        life.pass(24 * 27);
        assert!(life.losses <= after_a_day + 8, "{} in a month", life.losses);
        let mean = life.mean_of_the_last_hundred();
        assert!((45_000..60_000).contains(&mean), "{mean} ms after a month");
    }

    #[test]
    fn a_network_that_is_worse_than_usual_is_met_at_the_servers_least() {
        let mut life = Life::on(22);
        life.pass(24);
        assert!(life.losses <= 3, "{}", life.losses);
        assert!(life.mean_of_the_last_hundred() < 22_000);
    }

    #[test]
    fn one_loss_among_many_that_survived_is_no_limit() {
        let mut evidence = Evidence::default();
        for _ in 0..30 {
            evidence.note(50_000, Silence::Survived, DAY_MS);
        }
        evidence.note(45_000, Silence::Lost, DAY_MS);
        let belief = evidence.believe(DAY_MS);
        assert_eq!(belief.lost_ms, None);
        assert!(belief.reach_ms.is_some_and(|reach| reach > 45_000));
        // Three of them are.
        evidence.note(45_000, Silence::Lost, DAY_MS);
        assert!(evidence.believe(DAY_MS).lost_ms.is_some());
    }

    #[test]
    fn a_loss_loses_its_force_after_a_week_and_everything_after_months() {
        let mut evidence = Evidence::default();
        evidence.note(40_000, Silence::Lost, 0);
        assert!(evidence.believe(6 * DAY_MS).lost_ms.is_some());
        assert_eq!(evidence.believe(8 * DAY_MS).lost_ms, None);
        evidence.note(20_000, Silence::Survived, 60 * DAY_MS);
        assert_eq!(evidence.bands.len(), 1, "{evidence:?}");
        // A clock that was set back changes nothing.
        assert_eq!(evidence.believe(0), evidence.believe(60 * DAY_MS));
    }

    #[test]
    fn a_draw_stays_within_the_servers_bounds_whatever_is_known() {
        let narrow = Bounds {
            min_s: 300,
            max_s: 300,
        };
        let mut evidence = Evidence::default();
        assert_eq!(evidence.draw(narrow, 25, 0, |max| max), 300_000);
        evidence.note(30_000, Silence::Lost, 0);
        assert_eq!(evidence.draw(narrow, 25, 0, |_| 0), 300_000);
        for _ in 0..30 {
            evidence.note(80_000_000, Silence::Survived, 0);
        }
        assert_eq!(evidence.draw(QUIC, 25, 0, |max| max), 120_000);
    }

    #[test]
    fn every_length_has_its_band() {
        for band in 0..BANDS_MAX {
            assert_eq!(band_of(begins_ms(band)), Some(band));
        }
        assert_eq!(band_of(14_000), None);
        assert_eq!(band_of(u64::MAX / 2), Some(BANDS_MAX - 1));
    }

    #[test]
    fn a_silence_is_measured_from_the_last_word_of_either_side() {
        let mut quiet = Quiet::new(0);
        quiet.sent(false, 1_000);
        assert_eq!(quiet.heard(2_000), None, "too short to tell");
        // A notification after a long silence.
        assert_eq!(quiet.heard(42_000), Some(40_000));
        // A sign of life, and its answer.
        quiet.sent(true, 72_000);
        assert_eq!(quiet.unanswered(), Some(30_000));
        quiet.sent(false, 73_000);
        assert_eq!(quiet.heard(74_000), Some(30_000));
        assert_eq!(quiet.unanswered(), None);
        // A machine that slept learns nothing of it.
        quiet.sent(true, 174_000);
        quiet.forget(174_000);
        assert_eq!(quiet.unanswered(), None);
        assert_eq!(quiet.heard(174_100), None);
    }
}
