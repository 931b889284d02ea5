//! Random choices that one printed number replays: SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom
//! number generators", 2014), and content that can be told apart and checked without being kept.

use std::io::{self, Read};

/// A generator; equal seeds make equal choices.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Seeded from `QUORUMFS_TEST_SEED` or, without it, by chance; prints the seed, so that a failure tells it.
    pub fn announced() -> Random {
        let seed = match std::env::var("QUORUMFS_TEST_SEED") {
            Ok(text) => text.parse().expect("QUORUMFS_TEST_SEED is a number"),
            Err(_) => rand::random::<u64>(),
        };
        eprintln!("seed: QUORUMFS_TEST_SEED={seed}");
        Random(seed)
    }

    /// With this seed.
    pub fn seeded(seed: u64) -> Random {
        Random(seed)
    }

    /// The next 64 bits.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `end`, exclusive.
    pub fn below(&mut self, end: u64) -> u64 {
        assert!(end > 0, "nothing to choose from");
        self.number() % end
    }

    /// `length` bytes that do not compress.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(length + 8);
        while bytes.len() < length {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(length);
        bytes
    }
}

/// A long, incompressible content of known length, made while it is read: writing and checking a file of gigabytes
/// needs no second copy of it.
#[derive(Clone, Debug)]
pub struct Content {
    random: Random,
    left: u64,
    word: [u8; 8],
    word_used: usize,
}

impl Content {
    /// `length` bytes that `seed` names.
    pub fn new(seed: u64, length: u64) -> Content {
        Content {
            random: Random::seeded(seed),
            left: length,
            word: [0; 8],
            word_used: 8,
        }
    }

    /// Panics where `other` does not hold exactly these bytes; says at which offset.
    #[track_caller]
    pub fn assert_equals(mut self, mut other: impl Read, what: &str) {
        let (mut expected, mut found) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let mut offset = 0u64;
        loop {
            let length = read_full(&mut self, &mut expected).expect("made in memory");
            let got = read_full(&mut other, &mut found).unwrap_or_else(|e| panic!("{what}: read: {e}"));
            if expected[..length] != found[..got] {
                let same = expected[..length]
                    .iter()
                    .zip(&found[..got])
                    .take_while(|(a, b)| a == b)
                    .count();
                panic!(
                    "{what}: differs at offset {} (read {got} of {length} there)",
                    offset + same as u64
                );
            }
            if length == 0 {
                return;
            }
            offset += length as u64;
        }
    }
}

impl Read for Content {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let mut at = 0;
        while at < length {
            if self.word_used == 8 {
                self.word = self.random.number().to_le_bytes();
                self.word_used = 0;
            }
            let part = (8 - self.word_used).min(length - at);
            buffer[at..at + part].copy_from_slice(&self.word[self.word_used..self.word_used + part]);
            self.word_used += part;
            at += part;
        }
        self.left -= length as u64;
        Ok(length)
    }
}

fn read_full(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match from.read(&mut buffer[length..])? {
            0 => break,
            more => length += more,
        }
    }
    Ok(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_the_same_however_it_is_read() {
        let mut whole = Vec::new();
        Content::new(7, 100_003).read_to_end(&mut whole).unwrap();
        assert_eq!(whole.len(), 100_003);
        let mut pieces = Content::new(7, 100_003);
        let mut at = 0;
        for size in [1usize, 3, 8, 4096, 13].into_iter().cycle() {
            let mut piece = vec![0; size];
            let length = pieces.read(&mut piece).unwrap();
            if length == 0 {
                break;
            }
            assert_eq!(piece[..length], whole[at..at + length]);
            at += length;
        }
        assert_eq!(at, whole.len());
        Content::new(7, 100_003).assert_equals(&whole[..], "itself");
    }

    #[test]
    #[should_panic(expected = "differs at offset 5")]
    fn a_wrong_byte_is_found() {
        let mut whole = Vec::new();
        Content::new(7, 64).read_to_end(&mut whole).unwrap();
        whole[5] ^= 1;
        Content::new(7, 64).assert_equals(&whole[..], "damaged");
    }
}
