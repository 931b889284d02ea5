//! The bounds on which both sides of a connection must agree, each with its reason.

/// Most bytes of one chunk. One FUSE write is at most 1 MiB, so a large write makes one chunk.
pub const CHUNK_BYTES_MAX: u32 = 1 << 20;

/// Size of the blocks of a chunk that carry a CRC-32C of their own: a page, the least FUSE reads.
pub const BLOCK_BYTES: u32 = 4096;

/// Most bytes of content inside one command. They pass through the Raft log, which writes them once more; above this
/// bound a chunk of its own costs less than the second copy.
pub const INLINE_BYTES_MAX: u32 = 32 << 10;

/// Most bytes of a file or directory name (NAME_MAX of Linux).
pub const NAME_BYTES_MAX: usize = 255;

/// Most bytes of a symbolic link's target (PATH_MAX less its NUL).
pub const SYMLINK_BYTES_MAX: usize = 4095;

/// Most bytes of the name of an extended attribute (XATTR_NAME_MAX).
pub const XATTR_NAME_BYTES_MAX: usize = 255;

/// Most bytes of the value of an extended attribute (XATTR_SIZE_MAX).
pub const XATTR_VALUE_BYTES_MAX: usize = 64 << 10;

/// Most bytes of all names of an inode's extended attributes together (XATTR_LIST_MAX).
pub const XATTR_LIST_BYTES_MAX: usize = 64 << 10;

/// Most operations in one command.
pub const COMMAND_OPERATIONS_MAX: usize = 256;

/// Most extents in one command: 1 MiB of random 4 KiB writes makes 256 of them.
pub const COMMAND_EXTENTS_MAX: usize = 4096;

/// Most new chunks in one command.
pub const COMMAND_CHUNKS_MAX: usize = 256;

/// Most bytes of one encoded command. The largest that clients make (inline content, the most extents, names and an
/// extended attribute) has a quarter of it. Together with as many bytes of earlier entries, as a message to a follower
/// may have, it stays below [`MESSAGE_BYTES_MAX`].
pub const COMMAND_BYTES_MAX: usize = (CHUNK_BYTES_MAX as usize) + (64 << 10);

/// Most bytes of the description of a session; a longer one is cut.
pub const SESSION_DESCRIPTION_BYTES_MAX: usize = 1024;

/// Lanes of one session: the number of mutations of one client that can be in progress at once.
pub const LANES_MAX: u16 = 64;

/// Most hard links of one inode (as ext4).
pub const LINKS_MAX: u32 = 65_000;

/// Largest size of a file, and so the largest end of an extent (MAX_LFS_FILESIZE of 64-bit Linux).
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;

/// Most bytes of the entries in one answer to a directory listing.
pub const DIRECTORY_ANSWER_BYTES_MAX: u32 = 1 << 20;

/// Most extents in one answer.
pub const EXTENTS_ANSWER_MAX: u32 = 8192;

/// Largest gRPC message that either side accepts: a chunk or command with room for its envelope.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;

/// Most unlinked inodes in one [`crate::call::SessionState`].
pub const HELD_ASKED_MAX: usize = 1000;

/// Time without a message from a client after which its session's pins lapse.
pub const SESSION_TIMEOUT_MS: u64 = 60_000;

/// Lifetime of a lease, counted from when its holder sent the request whose response granted it. A call of another
/// session waits at most this long; the kernel keeps names and attributes no longer.
pub const LEASE_MS: u32 = 1_000;

/// Interval of a client's keep-alives.
pub const KEEP_ALIVE_INTERVAL_MS: u64 = 5_000;
