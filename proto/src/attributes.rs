//! The attributes of an inode.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::ids::InodeNumber;

const NANOSECONDS_PER_S: i64 = 1_000_000_000;

/// Seconds and nanoseconds since 1970-01-01T00:00:00Z. Ordered by time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Timestamp {
    /// Whole seconds, rounded down (negative before 1970).
    pub seconds: i64,
    /// 0 to 999,999,999, added to `seconds`.
    pub nanoseconds: u32,
}

impl Timestamp {
    /// Returns the time `nanoseconds` after this one.
    #[must_use]
    pub fn plus_nanoseconds(self, nanoseconds: u32) -> Timestamp {
        let sum = u64::from(self.nanoseconds) + u64::from(nanoseconds);
        Timestamp {
            seconds: self.seconds.saturating_add((sum / 1_000_000_000) as i64),
            nanoseconds: (sum % 1_000_000_000) as u32,
        }
    }

    /// Returns the time `duration` after this one.
    #[must_use]
    pub fn plus(self, duration: Duration) -> Timestamp {
        let seconds = i64::try_from(duration.as_secs()).unwrap_or(i64::MAX);
        Timestamp {
            seconds: self.seconds.saturating_add(seconds),
            ..self
        }
        .plus_nanoseconds(duration.subsec_nanos())
    }

    /// Returns nanoseconds since 1970, clamped to the years 1678 to 2262.
    pub fn unix_ns(self) -> i64 {
        self.seconds
            .saturating_mul(NANOSECONDS_PER_S)
            .saturating_add(i64::from(self.nanoseconds))
    }

    /// Converts nanoseconds since 1970.
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

/// The kind of an inode.
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
    /// A Unix socket.
    Socket,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
}

/// The attributes that stat(2) returns, and those that the caches need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// The inode's number.
    pub inode: InodeNumber,
    /// The inode's kind. It never changes.
    pub kind: FileKind,
    /// The low twelve bits of the mode: permissions, set-user-id, set-group-id, sticky.
    pub mode: u16,
    /// User id of the owner.
    pub uid: u32,
    /// Id of the group.
    pub gid: u32,
    /// Number of hard links; for a directory 2 plus the number of its sub-directories. 0 means unlinked, but maybe
    /// still open.
    pub links: u32,
    /// Bytes of content; for a directory the number of its entries; for a symbolic link the bytes of its target.
    pub size: u64,
    /// Bytes that extents cover (holes do not count).
    pub allocated_bytes: u64,
    /// Device number of a device file; 0 for other kinds.
    pub rdev: u32,
    /// Time of the last access.
    pub atime: Timestamp,
    /// Time of the last change of content.
    pub mtime: Timestamp,
    /// Time of the last change of the inode.
    pub ctime: Timestamp,
    /// Time of creation.
    pub birth_time: Timestamp,
    /// Number that grows with every change of the content. Equal versions mean equal bytes.
    pub content_version: u64,
    /// Number of extended attributes. If 0, a client need not ask for them.
    pub xattr_count: u32,
    /// Whether `security.capability` is one of them.
    pub has_capability: bool,
    /// For a directory, its parent directory (for the root, the root).
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
