//! The events of random histories.

use proptest::collection::vec;
use proptest::prelude::*;

/// Sessions at a time.
pub const SESSIONS: u64 = 3;
/// Bytes of the longest file.
const FILE_BYTES_MAX: u64 = 120;

/// An operation with small numbers, so that operations affect the same inodes.
#[derive(Clone, Debug)]
pub enum Op {
    Create(u8, u8, u8, bool),
    CreateUnlinked,
    Link(u8, u8, u8, bool),
    Unlink(u8, u8, bool),
    RemoveDirectory(u8, u8),
    Rename((u8, u8), (u8, u8), u8, bool),
    Truncate(u8, u64),
    /// File, extents (offset, length), whether a time comes with it, whether privileges are dropped.
    Write(u8, Vec<(u64, u32)>, bool, bool),
    Append(u8, u32),
    Chmod(u8, u16),
    Chown(u8, u32),
    Times(u8, bool),
    Kill(u8),
    SetXattr(u8, u8, u8),
    RemoveXattr(u8, u8),
}

#[derive(Clone, Debug)]
pub enum Event {
    Command(u8, Vec<Op>),
    Release(u8, Vec<u8>),
    Retry,
    /// The clock advances, or goes back, by this number of nanoseconds.
    Clock(i16),
    Open(u8),
    End(u8),
    Forget(u8),
    Reclaim(u32),
    /// Runs of a file are combined as an earlier view showed them.
    Rewrite(u8, bool),
    /// The session answers about this number of unlinked inodes, and holds those whose bit is set.
    Answer(u8, usize, u32),
    Publish,
    Freeze,
    Flush,
    Reopen,
    Install,
}

fn op() -> impl Strategy<Value = Op> {
    let i = || 0u8..40;
    let n = || 0u8..4;
    let place = || (i(), n());
    prop_oneof![
        6 => (i(), n(), 0u8..8, any::<bool>()).prop_map(|(p, n, k, e)| Op::Create(p, n, k, e)),
        1 => Just(Op::CreateUnlinked),
        3 => (i(), i(), n(), any::<bool>()).prop_map(|(t, p, n, e)| Op::Link(t, p, n, e)),
        3 => (i(), n(), any::<bool>()).prop_map(|(p, n, h)| Op::Unlink(p, n, h)),
        2 => (i(), n()).prop_map(|(p, n)| Op::RemoveDirectory(p, n)),
        5 => (place(), place(), 0u8..3, any::<bool>()).prop_map(|(f, t, m, h)| Op::Rename(f, t, m, h)),
        3 => (i(), 0..FILE_BYTES_MAX).prop_map(|(t, s)| Op::Truncate(t, s)),
        8 => (i(), vec((0..FILE_BYTES_MAX - 30, 1u32..30), 1..6), any::<bool>(), any::<bool>())
            .prop_map(|(t, p, m, k)| Op::Write(t, p, m, k)),
        2 => (i(), 1u32..20).prop_map(|(t, l)| Op::Append(t, l)),
        1 => (i(), 0u16..0o10000).prop_map(|(t, m)| Op::Chmod(t, m)),
        1 => (i(), 0u32..3).prop_map(|(t, u)| Op::Chown(t, u)),
        1 => (i(), any::<bool>()).prop_map(|(t, n)| Op::Times(t, n)),
        1 => i().prop_map(Op::Kill),
        2 => (i(), 0u8..4, 0u8..3).prop_map(|(t, n, m)| Op::SetXattr(t, n, m)),
        1 => (i(), 0u8..4).prop_map(|(t, n)| Op::RemoveXattr(t, n)),
    ]
}

pub fn event() -> impl Strategy<Value = Event> {
    let s = || 0u8..SESSIONS as u8;
    prop_oneof![
        40 => (s(), vec(op(), 1..4)).prop_map(|(s, ops)| Event::Command(s, ops)),
        6 => (s(), vec(0u8..40, 1..20)).prop_map(|(s, i)| Event::Release(s, i)),
        3 => Just(Event::Retry),
        3 => any::<i16>().prop_map(Event::Clock),
        1 => s().prop_map(Event::Open),
        1 => s().prop_map(Event::End),
        1 => s().prop_map(Event::Forget),
        5 => (1u32..4).prop_map(Event::Reclaim),
        6 => (0u8..40, any::<bool>()).prop_map(|(i, any)| Event::Rewrite(i, any)),
        12 => (s(), 1usize..6, any::<u32>()).prop_map(|(s, n, h)| Event::Answer(s, n, h)),
        10 => Just(Event::Publish),
        3 => Just(Event::Freeze),
        2 => Just(Event::Flush),
        1 => Just(Event::Reopen),
        1 => Just(Event::Install),
    ]
}
