//! What an entry takes in memory: much more than on the disk, where it is small. Pure.

use std::mem::size_of;

use openraft::EntryPayload;
use quorumfs_proto::{Extent, NewChunk, Operation};

use crate::consensus::types::Entry;
use quorumfs_metadata::{LogBody, LogCommand};

/// What the allocator takes for each allocation beside what was asked for, on average: its header and the rounding.
const ALLOCATION_BYTES: usize = 16;
/// The reference counts before the entry.
const COUNTS_BYTES: usize = 2 * size_of::<usize>();

/// About how many bytes `entry`, encoded in `encoded_bytes`, takes: names and content, which are as long as they are
/// encoded, and the structures that hold them.
pub fn resident_bytes(entry: &Entry, encoded_bytes: u32) -> u64 {
    let own = size_of::<Entry>() + COUNTS_BYTES + ALLOCATION_BYTES;
    let parts = match &entry.payload {
        EntryPayload::Normal(LogCommand {
            body: LogBody::Call(mutation),
            ..
        }) => {
            let command = &mutation.command;
            let pieces: usize = command
                .operations
                .iter()
                .map(|operation| operation.pieces().len())
                .sum();
            // A list of operations, a list of chunks, and in each of them a name or a payload or a list of pieces.
            command.operations.len() * (size_of::<Operation>() + ALLOCATION_BYTES)
                + command.chunks.len() * (size_of::<NewChunk>() + ALLOCATION_BYTES)
                + pieces * size_of::<Extent>()
                + 2 * ALLOCATION_BYTES
        }
        _ => ALLOCATION_BYTES,
    };
    u64::from(encoded_bytes) + (own + parts) as u64
}
