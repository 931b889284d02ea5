//! The limits that `apply` consults besides the rows. They are part of the state machine: every node must decide alike,
//! so a change needs a feature level.

use super::fault::StorageFault;

/// The newest feature level of this program:
/// - 1: everything up to [`LogBody::Refuse`](crate::LogBody::Refuse).
/// - 2: [`LogBody::SetReplicas`](crate::LogBody::SetReplicas), [`LogBody::Audit`](crate::LogBody::Audit), and a root
///   directory whose times are not those of 1970.
/// - 3: the work of every command is bounded ([`ApplyResult::Crowded`](crate::ApplyResult::Crowded)); fragmented files
///   are noted and rewritten ([`LogBody::Rewrite`](crate::LogBody::Rewrite)); every write drops file capabilities;
///   names of extended attributes must be in a known namespace;
///   [`LogBody::OpenSessionWithKey`](crate::LogBody::OpenSessionWithKey) to
///   [`LogBody::NoteSilences`](crate::LogBody::NoteSilences), with an unlink that writes no row for each session; the
///   time of a write is not after the stamp of its command.
pub const FEATURE_LEVEL: u32 = 3;

/// Most extents (or pins, or extended attributes) that one command may free beyond those it overwrites; the rest is
/// left to [`LogBody::ReclaimUnlinked`](crate::LogBody::ReclaimUnlinked). A few milliseconds of work. (The tests of
/// this crate set it so low that the steps are needed.)
pub const COMMAND_FREED_EXTENTS_MAX: u32 = if cfg!(test) { 3 } else { 4096 };

/// Most cuts of a file: a further truncation waits until the older ones have been processed.
pub(super) const CUTS_MAX: usize = if cfg!(test) { 3 } else { 64 };
/// From this level on the work of every command is bounded, fragmented files are noted, and writes and extended
/// attributes follow the rules of Linux' own filesystems.
pub(super) const BOUNDED_WORK_LEVEL: u32 = 3;

/// Refuses a feature level that this program does not know: it would not know all of the state.
pub(super) fn check_feature_level(level: u32) -> Result<(), StorageFault> {
    match level <= FEATURE_LEVEL {
        true => Ok(()),
        false => Err(StorageFault::UnknownFeatures {
            found: level,
            known: FEATURE_LEVEL,
        }),
    }
}
