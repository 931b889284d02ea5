//! The uncommitted bytes of one file.
//!
//! Guarantees: reads through the buffer see the newest bytes; bytes that are committed together fill as few chunks as
//! possible; a full chunk of a sequential writer is sealed at once.
//!
//! It has two stages. *Active* segments are mutable; they are disjoint, and none crosses a multiple of [`CELL_BYTES`]
//! (the border of a *cell*), so that a fully written cell becomes one chunk. A [`Pack`] is *sealed*: the immutable
//! content of one future chunk, with the file ranges of its bytes.
//!
//! Invariants: packs are committed in the order in which they were sealed; a later pack overrides an earlier one,
//! active segments override all packs.
//!
//! Pure: no I/O, no clock, no randomness. This module must not know chunk ids, commands or the cluster.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quorumfs_proto::limits::{CHUNK_BYTES_MAX, COMMAND_CHUNKS_MAX, COMMAND_EXTENTS_MAX, INLINE_BYTES_MAX};
use quorumfs_proto::{ChunkId, Extent};

/// The alignment of full chunks in a file.
pub const CELL_BYTES: u64 = CHUNK_BYTES_MAX as u64;

/// Most ranges in one pack: four such packs fill a command.
pub const PACK_RANGES_MAX: usize = COMMAND_EXTENTS_MAX / 4;

/// Memory of a range in addition to its bytes (map node, buffer header, extent), so that many tiny writes are charged
/// with what they take.
const RANGE_OVERHEAD_BYTES: u64 = 128;

/// Most active ranges before a commit of everything is due: as many as fit into one pack.
const ACTIVE_RANGES_MAX: usize = PACK_RANGES_MAX;

/// Most active bytes before a commit of everything is due. Random writers then fill chunks well, and a commit is a
/// small part of a mount's dirty bytes.
const ACTIVE_BYTES_MAX: u64 = 8 << 20;

/// Sealed packs from which a commit is due: a command for 8 MiB costs a sequential writer nothing, and the bytes are
/// free again soon.
const SEALED_PACKS_MAX: usize = 8;

/// A range of a file, and the offset of its bytes in a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackRange {
    /// Offset in the file.
    pub file_offset: u64,
    /// Length in bytes, at least 1.
    pub length: u32,
    /// Offset in the pack's payload.
    pub pack_offset: u32,
}

impl PackRange {
    fn file_end(&self) -> u64 {
        self.file_offset + u64::from(self.length)
    }
}

/// The sealed content of one future chunk.
#[derive(Debug)]
pub struct Pack {
    /// Increases by 1 with each pack of the buffer.
    pub sequence: u64,
    /// From 1 to [`CHUNK_BYTES_MAX`] bytes.
    pub payload: Bytes,
    /// Disjoint and sorted by file offset; together they cover the payload without gaps.
    pub ranges: Vec<PackRange>,
}

impl Pack {
    /// Whether its bytes are sent inside the command.
    pub fn is_inline(&self) -> bool {
        self.payload.len() <= INLINE_BYTES_MAX as usize
    }

    /// Returns the extents of the pack as the chunk `chunk`.
    pub fn extents(&self, chunk: ChunkId) -> impl Iterator<Item = Extent> + '_ {
        self.ranges.iter().map(move |range| Extent {
            file_offset: range.file_offset,
            length: range.length,
            chunk,
            chunk_offset: range.pack_offset,
        })
    }

    fn footprint_bytes(&self) -> u64 {
        self.payload.len() as u64 + self.ranges.len() as u64 * RANGE_OVERHEAD_BYTES
    }
}

/// A dirty part of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPart {
    /// Offset in the file.
    pub offset: u64,
    /// Its content, not empty.
    pub bytes: Bytes,
}

/// The commit that is due in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// None.
    Nothing,
    /// The sealed packs.
    Sealed,
    /// The active segments too.
    Everything,
}

/// The uncommitted bytes of one file.
#[derive(Debug, Default)]
pub struct WriteBuffer {
    active: BTreeMap<u64, BytesMut>,
    active_bytes: u64,
    /// Active bytes of each cell that has any.
    cells: BTreeMap<u64, u64>,
    sealed: VecDeque<Arc<Pack>>,
    sealed_footprint_bytes: u64,
    last_sequence: u64,
}

impl WriteBuffer {
    /// Whether there is nothing to commit.
    pub fn is_clean(&self) -> bool {
        self.active.is_empty() && self.sealed.is_empty()
    }

    /// Memory of the buffer, with overhead.
    pub fn footprint_bytes(&self) -> u64 {
        self.active_bytes + self.active.len() as u64 * RANGE_OVERHEAD_BYTES + self.sealed_footprint_bytes
    }

    /// Uncommitted bytes; bytes written again while their pack is sealed count twice.
    pub fn bytes(&self) -> u64 {
        self.active_bytes
            + self
                .sealed
                .iter()
                .map(|pack| pack.payload.len() as u64)
                .sum::<u64>()
    }

    /// The end of the last uncommitted byte; 0 if there is none.
    pub fn end(&self) -> u64 {
        let active = self
            .active
            .last_key_value()
            .map(|(offset, bytes)| offset + bytes.len() as u64);
        let sealed = self.sealed.iter().filter_map(|pack| pack.ranges.last());
        sealed.map(PackRange::file_end).chain(active).max().unwrap_or(0)
    }

    /// The sequence of the newest pack; 0 if none was ever sealed.
    pub fn last_sequence(&self) -> u64 {
        self.last_sequence
    }

    /// Returns the commit that is due regardless of age and syncs.
    pub fn due(&self) -> Due {
        if self.active.len() > ACTIVE_RANGES_MAX || self.active_bytes > ACTIVE_BYTES_MAX {
            Due::Everything
        } else if self.sealed.len() >= SEALED_PACKS_MAX {
            Due::Sealed
        } else {
            Due::Nothing
        }
    }

    /// Writes `data` over all earlier bytes; returns the packs of the cells that became full.
    pub fn write(&mut self, offset: u64, mut data: Bytes) -> Vec<Arc<Pack>> {
        let mut full = Vec::new();
        let mut at = offset;
        while !data.is_empty() {
            let cell = at - at % CELL_BYTES;
            let length = (cell + CELL_BYTES - at).min(data.len() as u64);
            let part = data.split_to(length as usize);
            if length == CELL_BYTES {
                self.take_cell(cell);
                full.push(self.seal(part, vec![whole_range(cell, CELL_BYTES)]));
            } else {
                self.write_in_cell(at, &part);
                if self.cells.get(&cell) == Some(&CELL_BYTES) {
                    let payload = self.take_cell(cell);
                    full.push(self.seal(payload, vec![whole_range(cell, CELL_BYTES)]));
                }
            }
            at += length;
        }
        full
    }

    /// Overwrites existing bytes and adds missing ones; `data` must lie within one cell.
    fn write_in_cell(&mut self, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        let cell = offset - offset % CELL_BYTES;
        let mut gaps = Vec::new();
        let mut at = offset;
        // A segment of the same cell that begins before `offset` may extend into the range.
        let first = self
            .active
            .range(cell..=offset)
            .next_back()
            .map_or(offset, |(start, _)| *start);
        for (start, bytes) in self.active.range_mut(first..end) {
            let segment_end = start + bytes.len() as u64;
            if segment_end <= at {
                continue;
            }
            if *start > at {
                gaps.push(at..*start);
                at = *start;
            }
            let to = segment_end.min(end);
            bytes[(at - start) as usize..(to - start) as usize]
                .copy_from_slice(&data[(at - offset) as usize..(to - offset) as usize]);
            at = to;
        }
        if at < end {
            gaps.push(at..end);
        }
        for gap in gaps {
            self.add(
                cell,
                gap.start,
                &data[(gap.start - offset) as usize..(gap.end - offset) as usize],
            );
        }
    }

    /// Adds bytes where none are: to the segment that ends at `offset`, or as a new one.
    fn add(&mut self, cell: u64, offset: u64, data: &[u8]) {
        self.active_bytes += data.len() as u64;
        *self.cells.entry(cell).or_default() += data.len() as u64;
        if let Some((start, bytes)) = self.active.range_mut(cell..offset).next_back()
            && start + bytes.len() as u64 == offset
        {
            bytes.extend_from_slice(data);
        } else {
            self.active.insert(offset, BytesMut::from(data));
        }
    }

    /// Removes the active segments of a cell; returns their bytes joined.
    fn take_cell(&mut self, cell: u64) -> Bytes {
        let Some(bytes) = self.cells.remove(&cell) else {
            return Bytes::new();
        };
        self.active_bytes -= bytes;
        let starts: Vec<u64> = self
            .active
            .range(cell..cell + CELL_BYTES)
            .map(|(start, _)| *start)
            .collect();
        let mut segments = starts.iter().filter_map(|start| self.active.remove(start));
        let mut joined = segments.next().unwrap_or_default();
        for segment in segments {
            joined.extend_from_slice(&segment);
        }
        joined.freeze()
    }

    /// Seals all active segments into as few packs as possible; returns the packs.
    pub fn seal_all(&mut self) -> Vec<Arc<Pack>> {
        let active = std::mem::take(&mut self.active);
        self.cells.clear();
        self.active_bytes = 0;
        if active.len() == 1 {
            return active
                .into_iter()
                .map(|(offset, bytes)| {
                    let ranges = vec![whole_range(offset, bytes.len() as u64)];
                    self.seal(bytes.freeze(), ranges)
                })
                .collect();
        }
        let mut packs = Vec::new();
        let mut payload = BytesMut::new();
        let mut ranges: Vec<PackRange> = Vec::new();
        for (mut offset, mut bytes) in active {
            while !bytes.is_empty() {
                let room = CELL_BYTES as usize - payload.len();
                let adjacent = ranges.last().is_some_and(|last| last.file_end() == offset);
                if room == 0 || (ranges.len() == PACK_RANGES_MAX && !adjacent) {
                    packs.push(self.seal(payload.split().freeze(), std::mem::take(&mut ranges)));
                    continue;
                }
                let part = bytes.split_to(room.min(bytes.len()));
                match ranges.last_mut() {
                    Some(last) if adjacent => last.length += part.len() as u32,
                    _ => ranges.push(PackRange {
                        file_offset: offset,
                        length: part.len() as u32,
                        pack_offset: payload.len() as u32,
                    }),
                }
                offset += part.len() as u64;
                payload.extend_from_slice(&part);
            }
        }
        if !payload.is_empty() {
            packs.push(self.seal(payload.freeze(), ranges));
        }
        packs
    }

    fn seal(&mut self, payload: Bytes, ranges: Vec<PackRange>) -> Arc<Pack> {
        self.last_sequence += 1;
        let pack = Arc::new(Pack {
            sequence: self.last_sequence,
            payload,
            ranges,
        });
        self.sealed_footprint_bytes += pack.footprint_bytes();
        self.sealed.push_back(Arc::clone(&pack));
        pack
    }

    /// Returns the oldest packs up to `last_sequence` that fit into one command. They remain until
    /// [`WriteBuffer::remove_through`].
    pub fn next_batch(&self, last_sequence: u64) -> Vec<Arc<Pack>> {
        let (mut extents, mut inline_bytes) = (0, 0);
        let fits = |pack: &&Arc<Pack>| {
            extents += pack.ranges.len();
            if pack.is_inline() {
                inline_bytes += pack.payload.len();
            }
            pack.sequence <= last_sequence
                && extents <= COMMAND_EXTENTS_MAX
                && inline_bytes <= INLINE_BYTES_MAX as usize
        };
        self.sealed
            .iter()
            .take(COMMAND_CHUNKS_MAX)
            .take_while(fits)
            .cloned()
            .collect()
    }

    /// Removes the packs up to `last_sequence`, which are committed or lost.
    pub fn remove_through(&mut self, last_sequence: u64) {
        while let Some(pack) = self.sealed.pop_front_if(|pack| pack.sequence <= last_sequence) {
            self.sealed_footprint_bytes -= pack.footprint_bytes();
        }
    }

    /// Returns the dirty parts of `range`; later ones override earlier ones.
    pub fn overlay(&self, range: Range<u64>) -> Vec<DirtyPart> {
        let mut parts = Vec::new();
        for pack in &self.sealed {
            let first = pack.ranges.partition_point(|r| r.file_end() <= range.start);
            for part in pack.ranges[first..]
                .iter()
                .take_while(|r| r.file_offset < range.end)
            {
                let from = part.file_offset.max(range.start);
                let to = part.file_end().min(range.end);
                let in_pack = |at: u64| (at - part.file_offset) as usize + part.pack_offset as usize;
                parts.push(DirtyPart {
                    offset: from,
                    bytes: pack.payload.slice(in_pack(from)..in_pack(to)),
                });
            }
        }
        let first = self
            .active
            .range(..=range.start)
            .next_back()
            .map_or(range.start, |(start, _)| *start);
        for (start, bytes) in self.active.range(first..range.end) {
            let from = (*start).max(range.start);
            let to = (start + bytes.len() as u64).min(range.end);
            if from < to {
                parts.push(DirtyPart {
                    offset: from,
                    bytes: Bytes::copy_from_slice(&bytes[(from - start) as usize..(to - start) as usize]),
                });
            }
        }
        parts
    }
}

fn whole_range(file_offset: u64, length: u64) -> PackRange {
    PackRange {
        file_offset,
        length: length as u32,
        pack_offset: 0,
    }
}

/// Whether `parts` cover all of `range`.
pub fn covers(parts: &[DirtyPart], range: Range<u64>) -> bool {
    let mut spans: Vec<(u64, u64)> = parts
        .iter()
        .map(|part| (part.offset, part.offset + part.bytes.len() as u64))
        .collect();
    spans.sort_unstable();
    let mut covered_to = range.start;
    for (from, to) in spans {
        if from > covered_to {
            return false;
        }
        covered_to = covered_to.max(to);
    }
    covered_to >= range.end
}

#[cfg(test)]
mod tests;
