//! What `apply` consults beside the rows: part of the state machine, so every node decides by the same. A change comes with
//! a feature level.

use super::fault::StorageFault;

/// What this program knows. 1: everything up to [`LogBody::Refuse`](crate::LogBody::Refuse). 2: [`LogBody::SetReplicas`](crate::LogBody::SetReplicas), [`LogBody::Audit`](crate::LogBody::Audit), and a
/// root directory whose times are not those of 1970. 3: the work of every command is bounded ([`ApplyResult::Crowded`](crate::ApplyResult::Crowded)),
/// fragmented files are noted and rewritten ([`LogBody::Rewrite`](crate::LogBody::Rewrite)), every write takes file capabilities away, names of
/// extended attributes are those of a known namespace; [`LogBody::OpenSessionWithKey`](crate::LogBody::OpenSessionWithKey) to [`LogBody::NoteSilences`](crate::LogBody::NoteSilences), and an
/// unlink that writes no row for each session; a write's time is not after the stamp of its command.
pub const FEATURE_LEVEL: u32 = 3;

/// How many extents (or pins, or extended attributes) one command may free beyond those it overwrites; what is more is
/// left to [`LogBody::ReclaimUnlinked`](crate::LogBody::ReclaimUnlinked). A few milliseconds' work. (This part's own tests take it so low that the steps
/// are taken.)
pub const COMMAND_FREED_EXTENTS_MAX: u32 = if cfg!(test) { 3 } else { 4096 };

/// How many cuts a file has at most: a further truncation waits until the older ones have been dealt with.
pub(super) const CUTS_MAX: usize = if cfg!(test) { 3 } else { 64 };
/// From this level on the work of every command is bounded, fragmented files are noted, and writes and extended
/// attributes follow the rules of Linux' own filesystems.
pub(super) const BOUNDED_WORK_LEVEL: u32 = 3;

/// A program must not go on with a state of which it does not know what belongs to it.
pub(super) fn check_feature_level(level: u32) -> Result<(), StorageFault> {
    match level <= FEATURE_LEVEL {
        true => Ok(()),
        false => Err(StorageFault::UnknownFeatures {
            found: level,
            known: FEATURE_LEVEL,
        }),
    }
}
