//! What is known of an inode.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::InodeNumber;

const NANOSECONDS_PER_S: i64 = 1_000_000_000;

/// Seconds and nanoseconds since 1970-01-01T00:00:00Z. Ordered as time is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timestamp {
    /// Whole seconds, rounded towards the past (so before 1970 they are negative).
    pub seconds: i64,
    /// 0 to 999,999,999, counted forward from `seconds`.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// The moment `nanoseconds` after this one.
    #[must_use]
    pub fn plus_nanoseconds(self, nanoseconds: u32) -> Timestamp {
        let sum = u64::from(self.nanoseconds) + u64::from(nanoseconds);
        Timestamp {
            seconds: self.seconds.saturating_add((sum / 1_000_000_000) as i64),
            nanoseconds: (sum % 1_000_000_000) as u32,
        }
    }

    /// The moment `duration` after this one.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Timestamp {
        let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        Timestamp {
            seconds: self.seconds.saturating_add(seconds),
            ..self
        }
        .plus_nanoseconds(duration.subsec_nanos())
    }

    /// In nanoseconds since 1970; what lies outside the years 1678 to 2262 at their end.
    pub fn unix_ns(self) -> i64 {
        self.seconds
            .saturating_mul(NANOSECONDS_PER_S)
            .saturating_add(i64::from(self.nanoseconds))
    }

    /// From nanoseconds since 1970.
    pub fn from_unix_ns(nanoseconds: i64) -> Timestamp {
        Timestamp {
            seconds: nanoseconds.div_euclid(NANOSECONDS_PER_S),
            nanoseconds: nanoseconds.rem_euclid(NANOSECONDS_PER_S) as u32,
        }
    }
}

impl From<std::time::SystemTime> for Timestamp {
    fn from(time: std::time::SystemTime) -> Timestamp {
        match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(after) => Timestamp {
                seconds: after.as_secs() as i64,
                nanoseconds: after.subsec_nanos(),
            },
            Err(before) => {
                let before = before.duration();
                match before.subsec_nanos() {
                    0 => Timestamp {
                        seconds: -(before.as_secs() as i64),
                        nanoseconds: 0,
                    },
                    n => Timestamp {
                        seconds: -(before.as_secs() as i64) - 1,
                        nanoseconds: 1_000_000_000 - n,
                    },
                }
            }
        }
    }
}

impl From<Timestamp> for std::time::SystemTime {
    fn from(t: Timestamp) -> std::time::SystemTime {
        use std::time::UNIX_EPOCH;
        let whole = Duration::from_secs(t.seconds.unsigned_abs());
        let whole = if t.seconds < 0 {
            UNIX_EPOCH.checked_sub(whole)
        } else {
            UNIX_EPOCH.checked_add(whole)
        };
        whole.unwrap_or(UNIX_EPOCH) + Duration::from_nanos(u64::from(t.nanoseconds))
    }
}

/// What kind of thing an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
}

/// What stat(2) tells of an inode, and what the caches need beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Its number.
    pub inode: InodeNumber,
    /// What it is. Never changes.
    pub kind: FileKind,
    /// The low twelve bits of the mode: permissions, set-user-id, set-group-id, sticky.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Hard links; of a directory 2 and one for each sub-directory. 0: unlinked, but maybe still open.
    pub links: u32,
    /// Bytes of content; of a directory the number of its entries; of a symbolic link the bytes of its target.
    pub size: u64,
    /// Bytes that extents cover (holes do not count).
    pub allocated_bytes: u64,
    /// Device number, of device files.
    pub rdev: u32,
    /// Last access.
    pub atime: Timestamp,
    /// Last change of content.
    pub mtime: Timestamp,
    /// Last change of the inode.
    pub ctime: Timestamp,
    /// When it was made.
    pub birth_time: Timestamp,
    /// Grows with every change of the content. Equal versions mean equal bytes.
    pub content_version: u64,
    /// Extended attributes it has; 0 spares the question.
    pub xattr_count: u32,
    /// Whether one of them is `security.capability`.
    pub has_capability: bool,
    /// Of a directory, the one it lies in (of the root: the root).
    pub parent: InodeNumber,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime, UNIX_EPOCH};

    #[test]
    fn times_survive_the_way_there_and_back() {
        for time in [
            UNIX_EPOCH,
            UNIX_EPOCH - Duration::from_nanos(1),
            UNIX_EPOCH - Duration::from_millis(1500),
            UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789),
        ] {
            assert_eq!(SystemTime::from(Timestamp::from(time)), time);
        }
        assert_eq!(
            Timestamp::from(UNIX_EPOCH - Duration::from_millis(1500)),
            Timestamp {
                seconds: -2,
                nanoseconds: 500_000_000
            }
        );
    }
}
