//! The places of blocks and checksums in the file. Pure arithmetic.
//!
//! ```text
//! physical block:  0        1        2      3 …  514          515    516 …
//!                  header   header   sums   512 data blocks   sums   512 data blocks …
//!                  slot A   slot B
//! ```
//!
//! Block 0 of the database, its header, is stored in the two slots. Block `n` above it is data block `n − 1`. A block
//! of sums has eight bytes for each data block of its group.

use std::ops::Range;

/// The unit of checksums, and of redb's pages.
pub const BLOCK_BYTES: u64 = 4096;
/// Physical blocks before the first group.
const SLOT_BLOCKS: u64 = 2;
/// Data blocks of a group: as many as one block of sums has entries.
const GROUP_BLOCKS: u64 = BLOCK_BYTES / SUM_BYTES;
/// Physical blocks of a group, its block of sums included.
const GROUP_PHYSICAL_BLOCKS: u64 = GROUP_BLOCKS + 1;
/// Bytes of one entry of a block of sums.
pub const SUM_BYTES: u64 = 8;

/// Returns the length of the file for a database of `logical_bytes`; `None` if no database has that length.
pub fn physical_bytes(logical_bytes: u64) -> Option<u64> {
    if logical_bytes == 0 {
        return Some(SLOT_BLOCKS * BLOCK_BYTES);
    }
    if !logical_bytes.is_multiple_of(BLOCK_BYTES) {
        return None;
    }
    let data_blocks = logical_bytes / BLOCK_BYTES - 1;
    let groups = data_blocks.div_ceil(GROUP_BLOCKS);
    Some((SLOT_BLOCKS + groups + data_blocks) * BLOCK_BYTES)
}

/// Returns the length of the database in a file of `physical_bytes`; `None` if the file was cut or lengthened.
pub fn logical_bytes(physical_bytes: u64) -> Option<u64> {
    if !physical_bytes.is_multiple_of(BLOCK_BYTES) {
        return None;
    }
    let blocks = (physical_bytes / BLOCK_BYTES).checked_sub(SLOT_BLOCKS)?;
    if blocks == 0 {
        return Some(0);
    }
    // A group without data blocks has no block of sums either.
    if blocks % GROUP_PHYSICAL_BLOCKS == 1 {
        return None;
    }
    let groups = blocks.div_ceil(GROUP_PHYSICAL_BLOCKS);
    Some((blocks - groups + 1) * BLOCK_BYTES)
}

/// Consecutive blocks of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first block, as a block of the database.
    pub block: u64,
    /// The number of blocks.
    pub count: u64,
    /// Offset of the first block's bytes in the file; the others follow.
    pub data_at: u64,
    /// Offset of the first block's sum in the file; the others follow.
    pub sums_at: u64,
}

/// Splits `blocks` of the database, which must not include block 0, by group.
pub fn runs(blocks: Range<u64>) -> impl Iterator<Item = Run> {
    let mut next = blocks.start;
    std::iter::from_fn(move || {
        if next >= blocks.end {
            return None;
        }
        let block = next;
        let (group, within) = ((block - 1) / GROUP_BLOCKS, (block - 1) % GROUP_BLOCKS);
        let count = (blocks.end - block).min(GROUP_BLOCKS - within);
        next += count;
        let sums_block = SLOT_BLOCKS + group * GROUP_PHYSICAL_BLOCKS;
        Some(Run {
            block,
            count,
            data_at: (sums_block + 1 + within) * BLOCK_BYTES,
            sums_at: sums_block * BLOCK_BYTES + within * SUM_BYTES,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_length_has_its_place_and_back() {
        let mut last = None;
        for blocks in 0..3_000 {
            let logical = blocks * BLOCK_BYTES;
            let physical = physical_bytes(logical).unwrap();
            if blocks != 1 {
                assert_eq!(logical_bytes(physical), Some(logical), "{blocks} blocks");
            }
            assert!(last <= Some(physical));
            last = Some(physical);
        }
        assert_eq!(physical_bytes(4097), None);
        for cut in [1, BLOCK_BYTES, 3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 5] {
            assert_eq!(logical_bytes(cut), None, "{cut} bytes");
        }
    }

    #[test]
    fn no_two_blocks_share_a_place() {
        let mut places = std::collections::BTreeSet::new();
        for run in runs(1..2_000) {
            for at in 0..run.count {
                assert!(places.insert((run.data_at + at * BLOCK_BYTES, BLOCK_BYTES)));
                assert!(places.insert((run.sums_at + at * SUM_BYTES, SUM_BYTES)));
            }
        }
        let ordered: Vec<_> = places.into_iter().collect();
        assert!(ordered.windows(2).all(|pair| pair[0].0 + pair[0].1 <= pair[1].0));
        let one_by_one: Vec<u64> = (500..530)
            .flat_map(|block| runs(block..block + 1))
            .map(|run| run.data_at)
            .collect();
        let together: Vec<u64> = runs(500..530)
            .flat_map(|run| (0..run.count).map(move |at| run.data_at + at * BLOCK_BYTES))
            .collect();
        assert_eq!(one_by_one, together);
    }
}
