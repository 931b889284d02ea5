//! The bytes a program has written to one file and the cluster does not know yet.
//!
//! Owes: that reading through it always gives the newest bytes; that what is flushed together fills as few chunks as
//! it can; that whole chunks of a sequential writer are cut off as soon as they are full.
//!
//! Two stages. *Active* segments are still written to; they are disjoint, and none crosses a multiple of
//! [`CELL_BYTES`] (a *cell*), so that a cell that is wholly written becomes one chunk of its own. A [`Pack`] is
//! *sealed*: immutable, the content of one future chunk, with the places of the file that its bytes belong to.
//!
//! Invariants: packs leave in the order in which they were sealed; a later pack lies over an earlier one, the active
//! segments lie over all packs.
//!
//! Pure: no I/O, no clock, no randomness. It must not know chunk ids, commands or the cluster.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use quorumfs_proto::limits::{CHUNK_BYTES_MAX, COMMAND_CHUNKS_MAX, COMMAND_EXTENTS_MAX, INLINE_BYTES_MAX};
use quorumfs_proto::{ChunkId, Extent};

/// The grid of a file on which whole chunks are cut.
pub const CELL_BYTES: u64 = CHUNK_BYTES_MAX as u64;

/// Most ranges in one pack: four such packs fill a command's extents.
pub const PACK_RANGES_MAX: usize = COMMAND_EXTENTS_MAX / 4;

/// What a range costs beside its bytes (map node, buffer header, its extent), so that many tiny writes count as the
/// memory they take.
const RANGE_OVERHEAD_BYTES: u64 = 128;

/// Active ranges above which a flush is due: as many as fit one pack.
const ACTIVE_RANGES_MAX: usize = PACK_RANGES_MAX;

/// Active bytes (of cells not yet whole) above which a flush is due: random writers then fill chunks well, and a
/// flush still is a small part of a mount's dirty bytes.
const ACTIVE_BYTES_MAX: u64 = 8 << 20;

/// Sealed packs above which a commit is due: one command for 8 MiB costs a sequential writer nothing, and the bytes
/// they hold are free again soon.
const SEALED_PACKS_MAX: usize = 8;

/// A part of a file and where its bytes are in the pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackRange {
    /// Where it begins in the file.
    pub file_offset: u64,
    /// Its bytes, at least 1.
    pub length: u32,
    /// Where they begin in the pack's payload.
    pub pack_offset: u32,
}

impl PackRange {
    fn file_end(&self) -> u64 {
        self.file_offset + u64::from(self.length)
    }
}

/// The content of one future chunk.
#[derive(Debug)]
pub struct Pack {
    /// Counts up with each pack of the buffer.
    pub sequence: u64,
    /// 1 to [`CHUNK_BYTES_MAX`] bytes.
    pub payload: Bytes,
    /// Disjoint and sorted by file offset; they cover the payload without gaps.
    pub ranges: Vec<PackRange>,
}

impl Pack {
    /// Whether it is small enough to ride inside a command.
    pub fn is_inline(&self) -> bool {
        self.payload.len() <= INLINE_BYTES_MAX as usize
    }

    /// The extents it makes once its bytes are the chunk `chunk`.
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

/// A part of the file that is dirty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyPart {
    /// Where it begins in the file.
    pub offset: u64,
    /// What is there.
    pub bytes: Bytes,
}

/// What ought to be flushed in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing yet.
    Nothing,
    /// Enough packs are sealed.
    Sealed,
    /// So much is active that it should go too.
    Everything,
}

/// The dirty bytes of one file.
#[derive(Debug, Default)]
pub struct WriteBuffer {
    active: BTreeMap<u64, BytesMut>,
    active_bytes: u64,
    /// Dirty bytes of each cell that has any active ones.
    cells: BTreeMap<u64, u64>,
    sealed: VecDeque<Arc<Pack>>,
    sealed_footprint_bytes: u64,
    last_sequence: u64,
}

impl WriteBuffer {
    /// Whether there is nothing to flush.
    pub fn is_clean(&self) -> bool {
        self.active.is_empty() && self.sealed.is_empty()
    }

    /// The memory it stands for.
    pub fn footprint_bytes(&self) -> u64 {
        self.active_bytes + self.active.len() as u64 * RANGE_OVERHEAD_BYTES + self.sealed_footprint_bytes
    }

    /// Dirty bytes; what was written over while on its way counts twice.
    pub fn bytes(&self) -> u64 {
        self.active_bytes
            + self
                .sealed
                .iter()
                .map(|pack| pack.payload.len() as u64)
                .sum::<u64>()
    }

    /// The end of the last dirty byte; 0 when clean.
    pub fn end(&self) -> u64 {
        let active = self
            .active
            .last_key_value()
            .map(|(offset, bytes)| offset + bytes.len() as u64);
        let sealed = self.sealed.iter().filter_map(|pack| pack.ranges.last());
        sealed.map(PackRange::file_end).chain(active).max().unwrap_or(0)
    }

    /// The sequence of the youngest pack ever sealed.
    pub fn last_sequence(&self) -> u64 {
        self.last_sequence
    }

    /// What should be flushed without waiting for age or a sync.
    pub fn due(&self) -> Due {
        if self.active.len() > ACTIVE_RANGES_MAX || self.active_bytes > ACTIVE_BYTES_MAX {
            Due::Everything
        } else if self.sealed.len() >= SEALED_PACKS_MAX {
            Due::Sealed
        } else {
            Due::Nothing
        }
    }

    /// Takes `data`, newest of all, and answers with the packs that became full by it.
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

    /// Overwrites what is there and adds what is not; `data` ends in the cell it begins in.
    fn write_in_cell(&mut self, offset: u64, data: &[u8]) {
        let end = offset + data.len() as u64;
        let cell = offset - offset % CELL_BYTES;
        let mut gaps = Vec::new();
        let mut at = offset;
        // A segment of the same cell that begins before `offset` may reach into the range.
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

    /// Adds bytes where none are: to the segment that ends there, or as a new one.
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

    /// Removes the active segments of a cell and joins them.
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

    /// Seals all that is active into as few packs as it fits, and answers with them.
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

    /// The oldest packs up to `last_sequence` that fit one command. They stay until [`WriteBuffer::remove_through`].
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

    /// Forgets the packs up to `last_sequence`: the cluster knows them, or they are lost and reported.
    pub fn remove_through(&mut self, last_sequence: u64) {
        while let Some(pack) = self.sealed.pop_front_if(|pack| pack.sequence <= last_sequence) {
            self.sealed_footprint_bytes -= pack.footprint_bytes();
        }
    }

    /// The dirty parts of `range`, oldest first: what comes later lies over what came before.
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

/// Whether `parts` leave no byte of `range` uncovered.
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
