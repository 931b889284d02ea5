//! The log in memory: the vote, the marks, each entry's id and location, and the newest entries themselves. Pure: no
//! files are read or written here.
//!
//! Invariants:
//! - `slots` are consecutive: slot `i` is entry `first + i`.
//! - An entry without a location on disk is in memory; only entries with a location are evicted, oldest first.
//! - The cache has at most `cache_bytes_max` bytes of entries with a location, as they are in memory (plus the entries
//!   without one, which the writer's bound limits).
//! - The index has a slot for each entry; bounds on the log count the slots: see [`FileInfo::weight_bytes`].

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use super::footprint::resident_bytes;
use crate::consensus::types::{CommittedLeader, Entry, LogId, Vote};

/// Weight of an entry besides its bytes on disk, for bounds on the log's length. Its slot takes a tenth of this, so
/// that a log of small entries reaches its bound before its index takes much memory.
const ENTRY_WEIGHT_BYTES: u64 = 512;
/// An index with fewer slots is not shrunk.
const SLOTS_KEPT: usize = 4096;

/// The location of a record on disk, header included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryLocation {
    /// The file's sequence number.
    pub file: u64,
    /// The offset of its first byte.
    pub at: u64,
    /// Length of the record in bytes.
    pub bytes: u32,
}

/// A file that holds entries.
#[derive(Clone, Debug)]
pub struct FileInfo {
    /// Open for reading.
    pub file: Arc<File>,
    /// Number of bytes used.
    pub bytes: u64,
    /// The highest index that the file has ever had, truncated or not.
    pub last_index: Option<u64>,
    /// Number of entries that the file has ever had.
    pub entries: u64,
}

impl FileInfo {
    /// Returns the weight on disk and, for its entries, in memory: for bounds that apply to both.
    pub fn weight_bytes(&self) -> u64 {
        self.bytes + self.entries * ENTRY_WEIGHT_BYTES
    }
}

/// A slot of the index; the entry's index follows from its position. As small as possible: there may be millions.
#[derive(Debug)]
struct Slot {
    leader: CommittedLeader,
    /// The entry, while it is in memory.
    entry: Option<Arc<Entry>>,
    written: Written,
}

// The fields are not an `EntryLocation`, so that the tag fits beside them.
#[derive(Clone, Copy, Debug)]
enum Written {
    /// Operation `ticket` will write this many bytes.
    NotYet { ticket: u64, bytes: u32 },
    /// The record is at this location.
    At { file: u64, at: u64, bytes: u32 },
}

impl Slot {
    fn bytes(&self) -> u32 {
        match self.written {
            Written::NotYet { bytes, .. } | Written::At { bytes, .. } => bytes,
        }
    }

    fn bytes_in_memory(&self) -> u64 {
        let in_memory = self.entry.as_deref();
        in_memory.map_or(0, |entry| resident_bytes(entry, self.bytes()))
    }
}

impl From<EntryLocation> for Written {
    fn from(EntryLocation { file, at, bytes }: EntryLocation) -> Written {
        Written::At { file, at, bytes }
    }
}

/// How an entry comes into memory.
#[derive(Clone, Copy, Debug)]
pub enum Cached {
    /// New: operation `ticket` will write this many bytes.
    Unwritten {
        /// Ticket of the operation.
        ticket: u64,
        /// Encoded size in bytes.
        bytes: u32,
    },
    /// Found on disk.
    WrittenAt(EntryLocation),
}

/// An entry for a reader.
#[derive(Clone, Debug)]
pub enum Held {
    /// An entry in memory.
    InMemory(Arc<Entry>),
    /// An entry that must be read.
    OnDisk {
        /// The open log file.
        file: Arc<File>,
        /// The location in the file.
        place: EntryLocation,
    },
}

/// The index and cache of the log; see the module documentation.
#[derive(Debug)]
pub struct LogMemory {
    /// The last vote of the node.
    pub vote: Option<Vote>,
    /// Entries up to this one are known to be committed.
    pub committed: Option<LogId>,
    /// Entries up to this one are purged.
    pub purged: Option<LogId>,
    /// Ticket of the last queued operation.
    pub ticket_last: u64,
    /// Ticket of the last flushed operation.
    pub ticket_flushed: u64,
    /// Bytes queued and not flushed.
    pub unflushed_bytes: u64,
    /// All files, by sequence number.
    pub files: BTreeMap<u64, FileInfo>,
    first: u64,
    slots: VecDeque<Slot>,
    /// No entry below this index is in memory.
    cached_from: u64,
    cached_bytes: u64,
    cache_bytes_max: u64,
}

impl LogMemory {
    /// Returns an empty log.
    pub fn new(cache_bytes_max: u64) -> LogMemory {
        LogMemory {
            vote: None,
            committed: None,
            purged: None,
            ticket_last: 0,
            ticket_flushed: 0,
            unflushed_bytes: 0,
            files: BTreeMap::new(),
            first: 0,
            slots: VecDeque::new(),
            cached_from: 0,
            cached_bytes: 0,
            cache_bytes_max,
        }
    }

    /// Returns the id of the last entry, or the purge mark if there is none.
    pub fn last_log_id(&self) -> Option<LogId> {
        let last = self.slots.len().checked_sub(1);
        let last = last.and_then(|last| self.log_id(self.first + last as u64));
        last.or(self.purged)
    }

    /// Returns the range of the indexes.
    pub fn range(&self) -> Range<u64> {
        self.first..self.first + self.slots.len() as u64
    }

    /// Returns the id of entry `index`, if the log has it.
    pub fn log_id(&self, index: u64) -> Option<LogId> {
        self.slot(index).map(|slot| LogId::new(slot.leader, index))
    }

    /// Whether entry `index` is on disk, or not in the log.
    pub fn is_placed(&self, index: u64) -> bool {
        let unwritten = |slot: &Slot| matches!(slot.written, Written::NotYet { .. });
        !self.slot(index).is_some_and(unwritten)
    }

    fn slot(&self, index: u64) -> Option<&Slot> {
        self.slots
            .get(usize::try_from(index.checked_sub(self.first)?).ok()?)
    }

    /// Returns the index of an entry that is missing: the purge mark and the entries do not meet.
    pub fn missing_entry(&self) -> Option<u64> {
        let expected = self.purged.map_or(0, |purged| purged.index + 1);
        (!self.slots.is_empty() && self.first > expected).then_some(expected)
    }

    /// Adds the next entry. Fails if it is not the next.
    pub fn append(&mut self, entry: Arc<Entry>, cached: Cached) -> Result<(), String> {
        let index = entry.log_id.index;
        let next = self.range().end;
        if self.slots.is_empty() {
            self.first = index;
            self.cached_from = index;
        } else if index != next {
            return Err(format!("entry {index} follows entry {}", next - 1));
        }
        let written = match cached {
            Cached::Unwritten { ticket, bytes } => Written::NotYet { ticket, bytes },
            Cached::WrittenAt(place) => {
                self.note_in_file(place.file, index);
                place.into()
            }
        };
        let slot = Slot {
            leader: entry.log_id.leader_id,
            entry: Some(entry),
            written,
        };
        self.cached_bytes += slot.bytes_in_memory();
        self.slots.push_back(slot);
        self.evict();
        Ok(())
    }

    fn note_in_file(&mut self, file: u64, index: u64) {
        if let Some(info) = self.files.get_mut(&file) {
            info.last_index = info.last_index.max(Some(index));
            info.entries += 1;
        }
    }

    /// Records that operation `ticket` has written entry `index` to `place`.
    pub fn placed(&mut self, index: u64, ticket: u64, place: EntryLocation) {
        self.note_in_file(place.file, index);
        let at = index.checked_sub(self.first).map(|at| at as usize);
        if let Some(slot) = at.and_then(|at| self.slots.get_mut(at))
            && matches!(slot.written, Written::NotYet { ticket: waits_for, .. } if waits_for == ticket)
        {
            slot.written = place.into();
        }
    }

    /// Evicts entries that are on disk, oldest first, down to the bound.
    pub fn evict(&mut self) {
        while self.cached_bytes > self.cache_bytes_max && self.cached_from < self.range().end {
            let slot = &mut self.slots[(self.cached_from - self.first) as usize];
            if matches!(slot.written, Written::NotYet { .. }) {
                return;
            }
            self.cached_bytes -= slot.bytes_in_memory();
            slot.entry = None;
            self.cached_from += 1;
        }
    }

    /// Removes the entries after `last`.
    pub fn truncate_after(&mut self, last: Option<LogId>) {
        let keep_end = last.map_or(0, |last| last.index + 1);
        while self.range().end > keep_end.max(self.first) {
            if let Some(slot) = self.slots.pop_back() {
                self.cached_bytes -= slot.bytes_in_memory();
            }
        }
        self.cached_from = self.cached_from.min(self.range().end);
    }

    /// Removes the entries up to `upto`.
    pub fn purge(&mut self, upto: LogId) {
        while self.first <= upto.index
            && let Some(slot) = self.slots.pop_front()
        {
            self.first += 1;
            self.cached_bytes -= slot.bytes_in_memory();
        }
        if self.slots.is_empty() {
            self.first = upto.index + 1;
        }
        self.cached_from = self.cached_from.max(self.first);
        self.purged = self.purged.max(Some(upto));
        if self.slots.len().max(SLOTS_KEPT) < self.slots.capacity() / 4 {
            self.slots.shrink_to(2 * self.slots.len());
        }
    }

    /// Returns the first entry of `range` that the log has, and as many of the next ones as `bytes_max` admits.
    pub fn read(&self, range: Range<u64>, bytes_max: u64) -> Vec<Held> {
        let held = self.range();
        let mut found = Vec::new();
        let mut bytes = 0;
        for index in range.start.max(held.start)..range.end.min(held.end) {
            let slot = &self.slots[(index - self.first) as usize];
            bytes += u64::from(slot.bytes());
            if bytes > bytes_max && !found.is_empty() {
                break;
            }
            found.push(match (&slot.entry, slot.written) {
                (Some(entry), _) => Held::InMemory(entry.clone()),
                (None, Written::At { file, at, bytes }) => Held::OnDisk {
                    file: self.files[&file].file.clone(),
                    place: EntryLocation { file, at, bytes },
                },
                // Only written entries are evicted (see `evict`).
                (None, Written::NotYet { .. }) => break,
            });
        }
        found
    }

    /// Returns the size of all files.
    pub fn wal_bytes(&self) -> u64 {
        self.files.values().map(|file| file.bytes).sum()
    }

    /// Returns the weight of all files.
    pub fn weight_bytes(&self) -> u64 {
        self.files.values().map(FileInfo::weight_bytes).sum()
    }

    /// Returns the bytes written since entry `index`: those of the files with entries after it.
    pub fn bytes_after(&self, index: Option<u64>) -> u64 {
        let beyond = |file: &&FileInfo| file.last_index > index;
        self.files.values().filter(beyond).map(|file| file.bytes).sum()
    }

    /// Returns the highest index, at most `snapshot`, up to which whole files can be purged so that the rest weighs at
    /// least `keep_bytes`, not counting what is beyond `snapshot`.
    pub fn purgeable(&self, snapshot: u64, keep_bytes: u64) -> Option<u64> {
        let mut covered: Vec<(u64, u64)> = Vec::new();
        for file in self.files.values() {
            match file.last_index {
                Some(last) if last <= snapshot => covered.push((last, file.weight_bytes())),
                Some(_) => break,
                None => {}
            }
        }
        let mut kept = 0;
        while let Some((last, bytes)) = covered.pop() {
            if kept >= keep_bytes {
                return (last >= self.first).then_some(last);
            }
            kept += bytes;
        }
        None
    }

    /// Returns the files without entries beyond the flushed purge mark `purged`, oldest first, never the newest file.
    pub fn purged_files(&self, purged: Option<LogId>) -> Vec<u64> {
        let Some(purged) = purged else {
            return Vec::new();
        };
        let newest = self.files.keys().next_back().copied();
        self.files
            .iter()
            .take_while(|(sequence, file)| {
                Some(**sequence) != newest && file.last_index.is_none_or(|last| last <= purged.index)
            })
            .map(|(sequence, _)| *sequence)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::tests::cluster::create_inline;
    use openraft::EntryPayload;

    fn small_entry(index: u64) -> Entry {
        let (command, _) = create_inline(1, index, &format!("file {index}"), vec![7; 10].into());
        Entry {
            log_id: LogId::new_term_index(1, index),
            payload: EntryPayload::Normal(command),
        }
    }

    #[test]
    fn the_cache_of_small_entries_counts_what_they_take_in_memory() {
        const CACHE_BYTES_MAX: u64 = 1 << 20;
        const ENTRIES: u64 = 20_000;
        const ENCODED_BYTES: u32 = 200;
        let mut memory = LogMemory::new(CACHE_BYTES_MAX);
        for index in 0..ENTRIES {
            let place = EntryLocation {
                file: 1,
                at: index,
                bytes: ENCODED_BYTES,
            };
            memory
                .append(Arc::new(small_entry(index)), Cached::WrittenAt(place))
                .unwrap();
        }
        let cached = memory.slots.iter().filter_map(|slot| slot.entry.as_deref());
        let bytes: u64 = cached.map(|entry| resident_bytes(entry, ENCODED_BYTES)).sum();
        assert!(
            bytes <= CACHE_BYTES_MAX && bytes > CACHE_BYTES_MAX - 4096,
            "{bytes}"
        );
        assert_eq!(bytes, memory.cached_bytes);
        let one = resident_bytes(&small_entry(1), ENCODED_BYTES);
        assert!(one > 3 * u64::from(ENCODED_BYTES), "{one} bytes");
        assert!(size_of::<Slot>() <= 40, "{} bytes", size_of::<Slot>());
        memory.purge(LogId::new_term_index(1, ENTRIES - 1));
        assert_eq!(memory.cached_bytes, 0);
        assert!(memory.slots.capacity() < ENTRIES as usize, "the index shrinks");
    }

    /// Must run alone in its process: `cargo test --lib what_an_entry_takes -- --ignored`.
    #[test]
    #[ignore = "measures the whole process"]
    fn what_an_entry_takes_in_memory() {
        const ENTRIES: u64 = 100_000;
        let in_use = || {
            // SAFETY: the call only reads the allocator's counters.
            let info = unsafe { libc::mallinfo2() };
            (info.uordblks + info.hblkhd) as u64
        };
        let before = in_use();
        let entries: Vec<Arc<Entry>> = (0..ENTRIES)
            .map(|index| {
                // Decoded, as entries from the network are.
                let encoded = quorumfs_proto::codec::encode(&small_entry(index));
                Arc::new(quorumfs_proto::codec::decode(&encoded).unwrap())
            })
            .collect();
        let taken = in_use() - before - ENTRIES * 8;
        let encoded = quorumfs_proto::codec::encode(&small_entry(ENTRIES - 1)).len() as u32;
        println!(
            "an entry of {encoded} bytes takes {} bytes, counted as {}",
            taken / ENTRIES,
            resident_bytes(&entries[0], encoded)
        );
    }
}
