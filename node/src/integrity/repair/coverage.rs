//! The progress of the scrub. One coverage is a walk over all held chunks in the order of ids. It is written to a small
//! file from time to time, so that a restart continues it.
//!
//! The file has 96 bytes: magic, numbers, and a CRC-32C over them. If it is damaged, a new coverage begins; so it need
//! not be flushed.

use std::io;
use std::path::{Path, PathBuf};

use quorumfs_proto::{ChunkId, SessionId};

const MAGIC: u64 = u64::from_le_bytes(*b"QFSscrb1");
const NUMBERS: usize = 11;

/// The progress of a coverage, and the totals of all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// The last chunk that was examined; `None` at the beginning of a coverage.
    pub cursor: Option<ChunkId>,
    /// Start of the coverage, in milliseconds since 1970; 0 if it has not begun.
    pub began_unix_ms: u64,
    /// Number of chunks examined in this coverage.
    pub chunks: u64,
    /// Bytes of these chunks.
    pub bytes: u64,
    /// Coverages completed since the data folder was created.
    pub completed: u64,
    /// End of the last completed coverage, in milliseconds since 1970; 0 if there is none.
    pub completed_unix_ms: u64,
    /// Its duration in milliseconds, pauses and restarts included.
    pub completed_duration_ms: u64,
    /// Its number of chunks.
    pub completed_chunks: u64,
}

impl Coverage {
    /// Records that `id`, of `length` bytes, was examined.
    pub fn examined(&mut self, id: ChunkId, length: u32) {
        self.cursor = Some(id);
        self.chunks += 1;
        self.bytes += u64::from(length);
    }

    /// Completes the coverage: no chunk follows the cursor, and the next coverage starts at the beginning.
    pub fn complete(&mut self, now_unix_ms: u64) {
        *self = Coverage {
            completed: self.completed + 1,
            completed_unix_ms: now_unix_ms,
            completed_duration_ms: now_unix_ms.saturating_sub(self.began_unix_ms),
            completed_chunks: self.chunks,
            ..Coverage::default()
        };
    }

    /// Returns the percentage of `held_bytes` that was examined.
    pub fn percent(&self, held_bytes: u64) -> f64 {
        match held_bytes {
            0 => 100.0,
            _ => (self.bytes as f64 * 100.0 / held_bytes as f64).min(100.0),
        }
    }

    /// Loads the coverage from `path`; returns a new one if the file is missing or damaged.
    pub fn load(path: &Path) -> Coverage {
        std::fs::read(path)
            .ok()
            .and_then(|bytes| Coverage::decode(&bytes))
            .unwrap_or_default()
    }

    /// Writes the coverage to `path` as a whole.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let beside: PathBuf = path.with_extension("new");
        std::fs::write(&beside, self.encode())?;
        std::fs::rename(&beside, path)
    }

    fn encode(&self) -> Vec<u8> {
        let cursor = self.cursor.unwrap_or(ChunkId {
            session: SessionId(0),
            counter: 0,
        });
        let numbers: [u64; NUMBERS] = [
            MAGIC,
            u64::from(self.cursor.is_some()),
            cursor.session.0,
            cursor.counter,
            self.began_unix_ms,
            self.chunks,
            self.bytes,
            self.completed,
            self.completed_unix_ms,
            self.completed_duration_ms,
            self.completed_chunks,
        ];
        let mut bytes: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
        bytes.extend_from_slice(&u64::from(crc32c::crc32c(&bytes)).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Coverage> {
        let (body, crc) = bytes.split_at_checked(NUMBERS * 8)?;
        if crc != u64::from(crc32c::crc32c(body)).to_le_bytes() {
            return None;
        }
        let mut numbers = [0; NUMBERS];
        for (number, bytes) in numbers.iter_mut().zip(body.chunks_exact(8)) {
            *number = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        let [
            magic,
            begun,
            session,
            counter,
            began_unix_ms,
            chunks,
            bytes,
            completed,
            completed_unix_ms,
            completed_duration_ms,
            completed_chunks,
        ] = numbers;
        let cursor = ChunkId {
            session: SessionId(session),
            counter,
        };
        (magic == MAGIC).then_some(Coverage {
            cursor: (begun == 1).then_some(cursor),
            began_unix_ms,
            chunks,
            bytes,
            completed,
            completed_unix_ms,
            completed_duration_ms,
            completed_chunks,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_coverage_survives_a_restart_and_no_damage() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scrub");
        assert_eq!(Coverage::load(&path), Coverage::default());
        let mut coverage = Coverage {
            began_unix_ms: 1000,
            ..Coverage::default()
        };
        let id = ChunkId {
            session: SessionId(7),
            counter: 9,
        };
        coverage.examined(id, 500);
        coverage.save(&path).unwrap();
        assert_eq!(Coverage::load(&path), coverage);
        assert_eq!(coverage.percent(1000), 50.0);
        let bytes = std::fs::read(&path).unwrap();
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert_eq!(Coverage::decode(&damaged), None, "byte {at}");
        }
        assert_eq!(Coverage::decode(&bytes[..bytes.len() - 1]), None);
        coverage.complete(5000);
        assert_eq!(coverage.cursor, None);
        assert_eq!((coverage.completed, coverage.completed_duration_ms), (1, 4000));
        assert_eq!((coverage.chunks, coverage.completed_chunks), (0, 1));
    }
}
