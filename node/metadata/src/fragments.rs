//! Which extents of a file are worth putting together.
//!
//! A file that is appended to in small pieces has an extent and a chunk for each, and every node pays for these in
//! memory and on disk, every reader in round trips. [`View::runs`] looks for runs of neighbours that fit one chunk; the
//! leader writes such a run anew and proposes [`super::LogBody::Rewrite`].
//!
//! So that a file that grows for ever is not written anew for ever, a run holds no extent that is larger than all
//! others together: each byte is then moved about once for each doubling of the extent it lies in.

use std::collections::VecDeque;

use quorumfs_proto::chunk::Extent;
use quorumfs_proto::limits::{BLOCK_BYTES, CHUNK_BYTES_MAX};
use quorumfs_proto::{InodeNumber, Sha256, codec};

use super::fault::Failure;
use super::limits::COMMAND_FREED_EXTENTS_MAX;
use super::overlay::{Direction, KeyRange};
use super::tables::{ExtentRecord, Extents, Fragmented, RowOf, Rows as _};
use super::view::View;

/// Extents up to this length are put together with their neighbours: two of them still fit one chunk.
pub(super) const SMALL_EXTENT_BYTES_MAX: u32 = CHUNK_BYTES_MAX / 2;
/// Extents looked at for one answer: a few milliseconds.
const LOOKED_EXTENTS_MAX: usize = 16 << 10;
/// Fewer extents than this are not worth a chunk and a command.
const RUN_EXTENTS_MIN: usize = if cfg!(test) { 2 } else { 32 };

/// Neighbouring extents that fit one chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// By offset.
    pub pieces: Vec<Extent>,
    /// Names exactly these extents, as they are now.
    pub digest: Sha256,
}

impl Run {
    /// Where it begins in the file.
    pub fn from(&self) -> u64 {
        self.pieces.first().map_or(0, |piece| piece.file_offset)
    }

    /// Where it ends in the file (exclusive).
    pub fn to(&self) -> u64 {
        self.pieces.last().map_or(0, Extent::file_end)
    }
}

/// Which runs are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunTerms {
    /// Those that save much: many small extents, with holes between them of less than a block.
    Worthwhile,
    /// Any: room is needed for a command.
    Any,
}

/// What one look has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Runs {
    /// By offset, none touching another.
    pub runs: Vec<Run>,
    /// The file's content version at that moment.
    pub content_version: u64,
    /// Where the next look goes on; `None`: the range was seen to its end.
    pub goes_on_at: Option<u64>,
    /// Whether a truncation has left extents: as long as it has, there are no runs.
    pub has_cuts: bool,
    /// How many extents were looked at.
    pub extents: usize,
}

impl View {
    /// Files noted as fragmented, after a given one.
    pub fn fragmented(&self, after: Option<InodeNumber>, max: usize) -> Result<Vec<InodeNumber>, Failure> {
        let range = match after {
            Some(inode) => KeyRange::prefix(&[]).after(&Fragmented::key(&inode)),
            None => KeyRange::prefix(&[]),
        };
        let rows = self.layers.scan_keys::<Fragmented>(range, Direction::Up)?;
        Ok(rows.take(max).collect::<Result<Vec<_>, _>>()?)
    }

    /// Runs of the extents of a file that begin in `from..to`. [`quorumfs_proto::FsError::Stale`] if it is gone.
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
                // A run has fewer extents than one look, so this is always further on.
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

/// What tells these extents from any others.
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

    /// Whether `row` may follow what is here.
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

    /// The run that they make, if they do. Nothing is left here.
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
        let pieces = rows.into_iter().map(|((_, offset), extent)| Extent {
            file_offset: offset,
            length: extent.length,
            chunk: extent.chunk,
            chunk_offset: extent.chunk_offset,
        });
        Some(Run {
            pieces: pieces.collect(),
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
