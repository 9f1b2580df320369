//! Replays the fuzz corpus in `protocol/fuzz/corpus/`, as it is and with deterministic mutations. What a fuzzer finds goes
//! there as one more file. `UPDATE_VECTORS=1` writes the seeds that come from the golden vectors.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bellwire_protocol::fuzz::BODIES;
use bellwire_protocol::write_framed;
use data_encoding::HEXLOWER;
use serde_json::Value;

/// Mutations of each corpus; spread over its files.
const MUTATIONS: usize = 30_000;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn corpus(name: &str) -> BTreeMap<PathBuf, Vec<u8>> {
    let entries = std::fs::read_dir(root().join("fuzz/corpus").join(name)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect()
}

/// Xorshift: good enough to be everywhere, and the same in every run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % sides.max(1) as u64) as usize
    }
}

fn mutate(dice: &mut Dice, bytes: &mut Vec<u8>, other: &[u8]) {
    const INTERESTING: &[u8] = &[
        0x00, 0x18, 0x1b, 0x3f, 0x40, 0x5f, 0x7f, 0x80, 0x9b, 0x9f, 0xa0, 0xbb, 0xbf, 0xc0, 0xf6,
        0xff,
    ];
    const TEXTS: &[&str] = &[
        "{",
        "}",
        "[",
        "\"",
        "\\u0000",
        "null",
        "1e999",
        "-0",
        "18446744073709551616",
        "\"type\":",
        ",",
    ];
    for _ in 0..=dice.roll(3) {
        let place = dice.roll(bytes.len() + 1);
        match dice.roll(8) {
            0 => bytes.truncate(place),
            1 => bytes.insert(place, INTERESTING[dice.roll(INTERESTING.len())]),
            2 => drop(bytes.splice(place..place, TEXTS[dice.roll(TEXTS.len())].bytes())),
            3 => bytes
                .splice(place.., other[dice.roll(other.len() + 1)..].iter().copied())
                .for_each(drop),
            4 if place < bytes.len() => bytes[place] ^= 1 << dice.roll(8),
            5 if place < bytes.len() => bytes[place] = INTERESTING[dice.roll(INTERESTING.len())],
            6 if place < bytes.len() => bytes[place] = dice.roll(256) as u8,
            _ if place < bytes.len() => drop(bytes.remove(place)),
            _ => bytes.push(dice.roll(256) as u8),
        }
    }
}

#[test]
fn no_body_breaks_a_promise_on_its_corpus_or_on_mutations_of_it() {
    for (name, body) in BODIES {
        let files = corpus(name);
        assert!(!files.is_empty(), "fuzz/corpus/{name} is empty");
        let seeds: Vec<_> = files.values().collect();
        for seed in &seeds {
            body(seed);
        }
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
        for turn in 0..MUTATIONS {
            let mut bytes = seeds[turn % seeds.len()].clone();
            let other = seeds[dice.roll(seeds.len())].clone();
            mutate(&mut dice, &mut bytes, &other);
            body(&bytes);
        }
    }
}

/// Seeds that the golden vectors give: each vector in each form, and the CBOR frames in a stream.
fn seeds() -> BTreeMap<(String, String), Vec<u8>> {
    let mut seeds = BTreeMap::new();
    for direction in ["device", "server"] {
        let file = std::fs::read(root().join("vectors").join(format!("{direction}.json"))).unwrap();
        let file: Value = serde_json::from_slice(&file).unwrap();
        let mut stream = vec![0xff, 6];
        for section in ["frames", "tolerated", "refused"] {
            for vector in file[section].as_array().unwrap() {
                let name: String = vector["name"].as_str().unwrap().to_owned();
                let name = name.replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
                if let Some(json) = vector["json"].as_str() {
                    seeds.insert(
                        (format!("{direction}_json"), name.clone()),
                        json.as_bytes().to_vec(),
                    );
                }
                if let Some(cbor) = vector["cbor"].as_str() {
                    let cbor = HEXLOWER.decode(cbor.as_bytes()).unwrap();
                    if section == "frames" {
                        write_framed(&mut stream, &cbor);
                    }
                    seeds.insert((format!("{direction}_cbor"), name), cbor);
                }
            }
        }
        seeds.insert(
            ("frame_reader".into(), format!("{direction}-frames")),
            stream,
        );
    }
    seeds
}

#[test]
fn every_golden_vector_is_a_seed() {
    for ((body, name), bytes) in seeds() {
        let path = root().join("fuzz/corpus").join(&body).join(&name);
        if std::env::var_os("UPDATE_VECTORS").is_some() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        assert_eq!(
            std::fs::read(&path).ok(),
            Some(bytes),
            "fuzz/corpus/{body}/{name}: run once with UPDATE_VECTORS=1"
        );
    }
}
