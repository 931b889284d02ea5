//! Rewriting: small extents are replaced by one with the same bytes in one chunk.
//!
//! Invariant: a rewrite changes no byte, no time and no content version, so no client has to be informed. It replaces
//! exactly the extents that its proposer read, or nothing.

use quorumfs_proto::chunk::{Extent, NewChunk};
use quorumfs_proto::{FileKind, FsError, InodeNumber, Sha256, Timestamp};

use super::super::command::{Applied, ApplyResult, Effects};
use super::super::fault::{Failure, StorageFault};
use super::super::fragments::{SMALL_EXTENT_BYTES_MAX, run_digest};
use super::super::limits::{BOUNDED_WORK_LEVEL, COMMAND_FREED_EXTENTS_MAX};
use super::super::overlay::KeyRange;
use super::super::tables::{ExtentRecord, Extents, Fragmented, Rows as _};
use super::transaction::Transaction;
use super::writer::{RowWriter, without_effects};

/// A file is noted at the small writes whose content version is a multiple of this: often enough that a file of many
/// small extents is found soon, seldom enough to cost almost nothing. A prime, so that no regular pattern of a program
/// avoids it.
const NOTED_EVERY_VERSIONS: u64 = if cfg!(test) { 3 } else { 61 };

/// The extents that a rewrite replaces.
pub(super) struct Replaced {
    pub(super) inode: InodeNumber,
    pub(super) from: u64,
    pub(super) extents: u32,
    pub(super) digest: Sha256,
}

impl Transaction<'_> {
    /// Applies [`super::LogBody::Rewrite`].
    pub(super) fn rewrite_step(
        writer: &mut RowWriter,
        index: u64,
        now: Timestamp,
        replaced: Replaced,
        chunk: &NewChunk,
    ) -> Result<Applied, StorageFault> {
        let refused = |verdict| Ok(without_effects(ApplyResult::Outcome(Err(verdict))));
        if writer.summary.feature_level < BOUNDED_WORK_LEVEL {
            return refused(FsError::NotSupported);
        }
        let Some(&low_water) = writer.summary.living.get(&chunk.id.session) else {
            return Ok(without_effects(ApplyResult::UnknownSession));
        };
        let mark = writer.mark();
        let mut step = Transaction::of_the_cluster(writer, now, 0);
        if let Err(verdict) = Failure::split(step.bring(chunk, low_water))? {
            return refused(verdict);
        }
        let done = step.rewrite(&replaced, chunk).and_then(|()| step.finish(index));
        let (result, effects) = match Failure::split(done)? {
            Ok((_, effects)) => (ApplyResult::Done, effects),
            Err(verdict) => {
                writer.roll_back(mark);
                // The proposer never refers to the chunk again.
                let dead = vec![chunk.id];
                let effects = Effects {
                    dead,
                    ..Effects::default()
                };
                (ApplyResult::Outcome(Err(verdict)), effects)
            }
        };
        Ok(Applied { result, effects })
    }

    fn rewrite(&mut self, replaced: &Replaced, chunk: &NewChunk) -> Result<(), Failure> {
        chunk.validate()?;
        let inode = replaced.inode;
        let record = self.inode(inode)?;
        if record.attributes.kind != FileKind::File
            || !(2..=COMMAND_FREED_EXTENTS_MAX).contains(&replaced.extents)
        {
            return Err(FsError::InvalidArgument.into());
        }
        // Extents that a truncation cut off are not content, and may lie between those that are.
        if !record.cuts.is_empty() {
            return Err(FsError::Stale.into());
        }
        let range =
            KeyRange::prefix(&inode.0.to_be_bytes()).starting_at(&Extents::key(&(inode, replaced.from)));
        let rows = self.writer.collect::<Extents>(range, replaced.extents as usize)?;
        let (Some(((_, first), _)), Some(((_, last), last_extent))) = (rows.first(), rows.last()) else {
            return Err(FsError::Stale.into());
        };
        let span = last + u64::from(last_extent.length) - first;
        if *first != replaced.from || span != u64::from(chunk.length) || run_digest(&rows) != replaced.digest
        {
            return Err(FsError::Stale.into());
        }
        let version = rows.iter().map(|(_, extent)| extent.version).max().unwrap_or(0);
        for ((inode, offset), extent) in rows {
            self.remove_extent(inode, offset, &extent)?;
        }
        let extent = ExtentRecord {
            length: chunk.length,
            chunk: chunk.id,
            chunk_offset: 0,
            version,
        };
        self.add_extent(inode, replaced.from, &extent)
    }

    /// Notes a file that was just written in small extents.
    pub(super) fn note_fragments(&mut self, inode: InodeNumber, extents: &[Extent], version: u64) {
        let small = extents
            .iter()
            .filter(|extent| extent.length <= SMALL_EXTENT_BYTES_MAX)
            .count() as u64;
        let due =
            small > 0 && (version.is_multiple_of(NOTED_EVERY_VERSIONS) || small >= NOTED_EVERY_VERSIONS);
        if due && self.bounded_work() {
            self.writer.put::<Fragmented>(&inode, &version);
        }
    }
}

impl RowWriter {
    /// Applies [`super::LogBody::Settle`].
    pub(super) fn settle_fragmented(
        &mut self,
        inode: InodeNumber,
        through_version: u64,
    ) -> Result<(), StorageFault> {
        let noted = self.get::<Fragmented>(&inode)?;
        if noted.is_some_and(|version| version <= through_version) {
            self.remove::<Fragmented>(&inode);
        }
        Ok(())
    }
}
