//! The memory of an entry: a small entry takes much more than on disk. Pure.

use std::mem::size_of;

use openraft::EntryPayload;
use quorumfs_proto::{Extent, NewChunk, Operation};

use crate::consensus::types::Entry;
use quorumfs_metadata::{LogBody, LogCommand};

/// Average overhead of the allocator for each allocation: its header and the rounding.
const ALLOCATION_BYTES: usize = 16;
/// The reference counts before the entry.
const COUNTS_BYTES: usize = 2 * size_of::<usize>();

/// Returns the approximate memory of `entry`, whose encoded size is `encoded_bytes`: names and content, which have
/// their encoded size, and the structures around them.
pub fn resident_bytes(entry: &Entry, encoded_bytes: u32) -> u64 {
    let own = size_of::<Entry>() + COUNTS_BYTES + ALLOCATION_BYTES;
    let parts = match &entry.payload {
        EntryPayload::Normal(LogCommand {
            body: LogBody::Call(mutation),
            ..
        }) => {
            let command = &mutation.command;
            let extents: usize = command
                .operations
                .iter()
                .map(|operation| operation.extents().len())
                .sum();
            // A list of operations, a list of chunks, and in each of them a name, a payload or a list of extents.
            command.operations.len() * (size_of::<Operation>() + ALLOCATION_BYTES)
                + command.chunks.len() * (size_of::<NewChunk>() + ALLOCATION_BYTES)
                + extents * size_of::<Extent>()
                + 2 * ALLOCATION_BYTES
        }
        _ => ALLOCATION_BYTES,
    };
    u64::from(encoded_bytes) + (own + parts) as u64
}
