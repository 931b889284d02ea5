//! The search for extents of a file that are worth combining.
//!
//! A file that is appended to in small writes has an extent and a chunk for each, which cost every node memory and
//! disk, and every reader round trips. [`View::runs`] looks for runs of neighbouring extents that fit one chunk. The
//! leader writes the bytes of a run to a new chunk and proposes [`super::LogBody::Rewrite`].
//!
//! So that a growing file is not rewritten for ever, a run has no extent that is larger than all its others together:
//! each byte is moved about once for each doubling of its extent.

use std::collections::VecDeque;

use quorumfs_proto::chunk::Extent;
use quorumfs_proto::limits::{BLOCK_BYTES, CHUNK_BYTES_MAX};
use quorumfs_proto::{InodeNumber, Sha256, codec};

use super::fault::Failure;
use super::limits::COMMAND_FREED_EXTENTS_MAX;
use super::overlay::{Direction, KeyRange};
use super::tables::{ExtentRecord, Extents, Fragmented, RowOf, Rows as _};
use super::view::View;

/// Extents up to this length are combined with their neighbours: two of them fit one chunk.
pub(super) const SMALL_EXTENT_BYTES_MAX: u32 = CHUNK_BYTES_MAX / 2;
/// Most extents examined by one call: a few milliseconds.
const LOOKED_EXTENTS_MAX: usize = 16 << 10;
/// Fewer extents are not worth a chunk and a command.
const RUN_EXTENTS_MIN: usize = if cfg!(test) { 2 } else { 32 };

/// Neighbouring extents that fit one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The extents by offset.
    pub extents: Vec<Extent>,
    /// Identifies exactly these extents in their present state.
    pub digest: Sha256,
}

impl Run {
    /// Returns the start of the run in the file.
    pub fn from(&self) -> u64 {
        self.extents.first().map_or(0, |extent| extent.file_offset)
    }

    /// Returns the end of the run in the file (exclusive).
    pub fn to(&self) -> u64 {
        self.extents.last().map_or(0, Extent::file_end)
    }
}

/// The kind of runs to look for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunTerms {
    /// Runs that save much: many small extents, with holes of less than a block between them.
    Worthwhile,
    /// All runs: a command needs space.
    Any,
}

/// The result of one search.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    /// The runs by offset; they do not touch each other.
    pub runs: Vec<Run>,
    /// The file's content version at that moment.
    pub content_version: u64,
    /// Where the next search starts; `None` if the end of the range was reached.
    pub goes_on_at: Option<u64>,
    /// Whether cut-off extents of a truncation are left; while they are, there are no runs.
    pub has_cuts: bool,
    /// Number of extents that were examined.
    pub extents: usize,
}

impl View {
    /// Returns at most `max` files noted as fragmented, after a given one.
    pub fn fragmented(&self, after: Option<InodeNumber>, max: usize) -> Result<Vec<InodeNumber>, Failure> {
        let range = match after {
            Some(inode) => KeyRange::prefix(&[]).after(&Fragmented::key(&inode)),
            None => KeyRange::prefix(&[]),
        };
        let rows = self.layers.scan_keys::<Fragmented>(range, Direction::Up)?;
        Ok(rows.take(max).collect::<Result<Vec<_>, _>>()?)
    }

    /// Returns the runs of extents of a file that begin in `from..to`.
    ///
    /// # Errors
    /// [`quorumfs_proto::FsError::Stale`] if the file does not exist.
    pub fn runs(&self, inode: InodeNumber, from: u64, to: u64, terms: RunTerms) -> Result<Runs, Failure> {
        let record = self.inode(inode)?;
        let mut found = Runs {
            runs: Vec::new(),
            content_version: record.attributes.content_version,
            goes_on_at: None,
            has_cuts: !record.cuts.is_empty(),
            extents: 0,
        };
        if found.has_cuts || from >= to {
            return Ok(found);
        }
        let range = KeyRange::prefix(&inode.0.to_be_bytes())
            .starting_at(&Extents::key(&(inode, from)))
            .before(&Extents::key(&(inode, to)));
        let mut gathered = Gathered::default();
        for row in self.layers.scan::<Extents>(range, Direction::Up)? {
            let row = row?;
            if found.extents == LOOKED_EXTENTS_MAX {
                // A run has fewer extents than one search examines, so this is always an advance.
                found.goes_on_at = Some(gathered.first_offset().unwrap_or(row.0.1));
                return Ok(found);
            }
            found.extents += 1;
            if !gathered.takes(&row, terms) {
                found.runs.extend(gathered.close(terms));
            }
            if terms == RunTerms::Any || row.1.length <= SMALL_EXTENT_BYTES_MAX {
                gathered.push(row);
            }
        }
        found.runs.extend(gathered.close(terms));
        Ok(found)
    }
}

/// Returns the digest that distinguishes these extents from any others.
pub(super) fn run_digest(rows: &[RowOf<Extents>]) -> Sha256 {
    let told: Vec<(u64, &ExtentRecord)> = rows
        .iter()
        .map(|((_, offset), extent)| (*offset, extent))
        .collect();
    Sha256::of(&codec::encode(&told))
}

/// Extents that may become a run.
#[derive(Default)]
struct Gathered {
    rows: VecDeque<RowOf<Extents>>,
}

impl Gathered {
    fn first_offset(&self) -> Option<u64> {
        self.rows.front().map(|((_, offset), _)| *offset)
    }

    fn end(&self) -> u64 {
        self.rows.back().map_or(0, end_of)
    }

    /// Whether the run can be extended by `row`.
    fn takes(&self, row: &RowOf<Extents>, terms: RunTerms) -> bool {
        let Some(first) = self.first_offset() else {
            return true;
        };
        let hole_bytes_max = match terms {
            RunTerms::Worthwhile => u64::from(BLOCK_BYTES) - 1,
            RunTerms::Any => u64::from(CHUNK_BYTES_MAX),
        };
        self.rows.len() < COMMAND_FREED_EXTENTS_MAX as usize
            && end_of(row) - first <= u64::from(CHUNK_BYTES_MAX)
            && row.0.1 - self.end() <= hole_bytes_max
            && (terms == RunTerms::Any || row.1.length <= SMALL_EXTENT_BYTES_MAX)
    }

    fn push(&mut self, row: RowOf<Extents>) {
        self.rows.push_back(row);
    }

    /// Returns the run of these extents, if they are one, and clears the list.
    fn close(&mut self, terms: RunTerms) -> Option<Run> {
        let mut rows = std::mem::take(&mut self.rows);
        let extents_min = match terms {
            RunTerms::Any => 2,
            RunTerms::Worthwhile => {
                let mut bytes: u64 = rows.iter().map(length_of).sum();
                let outweighs = |row: Option<&RowOf<Extents>>, bytes| {
                    row.map(length_of).filter(|length| *length > bytes - length)
                };
                while let Some(length) = outweighs(rows.front(), bytes) {
                    rows.pop_front();
                    bytes -= length;
                }
                while let Some(length) = outweighs(rows.back(), bytes) {
                    rows.pop_back();
                    bytes -= length;
                }
                RUN_EXTENTS_MIN
            }
        };
        if rows.len() < extents_min {
            return None;
        }
        let rows = Vec::from(rows);
        let digest = run_digest(&rows);
        let extents = rows.into_iter().map(|((_, offset), extent)| Extent {
            file_offset: offset,
            length: extent.length,
            chunk: extent.chunk,
            chunk_offset: extent.chunk_offset,
        });
        Some(Run {
            extents: extents.collect(),
            digest,
        })
    }
}

fn length_of(row: &RowOf<Extents>) -> u64 {
    u64::from(row.1.length)
}

fn end_of(row: &RowOf<Extents>) -> u64 {
    row.0.1 + length_of(row)
}
