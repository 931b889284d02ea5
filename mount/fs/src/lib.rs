//! The filesystem: POSIX operations on a cluster, in plain async Rust.
//!
//! **One write.** [`Filesystem::write`] waits until the mount's dirty bytes are below their limit, copies the bytes
//! into the file's [`crate::write_buffer::WriteBuffer`] and returns. A full chunk is put at once, in the background
//! (`start_puts`). A commit (`commit`) is started by the number of sealed packs, by age, by memory pressure, by
//! [`Filesystem::fsync`] and by [`Filesystem::flush`] (close): it seals the remaining bytes, waits for the puts, and
//! sends one `Write` command that names all chunks. Committed bytes leave the buffer, and the cached extents of the
//! file are patched.
//!
//! **One read.** [`Filesystem::open`] queries the file's attributes and extents as of one moment (close-to-open).
//! [`Filesystem::read`] takes a snapshot of dirty bytes and extents, fetches clean bytes through the
//! [`crate::caches::chunk_cache::ChunkCache`], and overlays the dirty bytes. Meanwhile the next chunks of a sequential
//! reader are fetched (`read_ahead`). If no node has a chunk, the file has changed: its extents are queried again.
//!
//! **One whole file.** A file can be written before it has a name and be linked into place together with its last
//! bytes, or be stored in one command (`unnamed`). Uploads over HTTP do this.
//!
//! Invariants: commands that change the content of one file are sent one after another, in the order of the writes
//! (`SharedInode::commit_lock`); mtime is the time of the write, not of its commit; attributes are never set before
//! bytes that were written earlier are committed; no decision of the cluster is anticipated.
//!
//! Every operation must be polled to completion; a caller that may be dropped spawns it. An operation that only waits
//! ends early if its caller is interrupted ([`crate::interrupt`]), but not while it commits bytes of other callers.
//! This crate must not know FUSE or a kernel.
//!
//! Errors are those of the cluster. `# Errors` lists only those that an operation adds.

mod append;
mod attributes;
pub mod caches;
mod close_queue;
mod commit;
mod commit_lock;
mod directory;
mod dirty;
pub mod handles;
pub mod interrupt;
mod leased;
mod namespace;
mod open;
mod pages;
mod read;
pub mod readahead;
mod recent_lookups;
mod unlinked;
mod unnamed;
mod write;
pub mod write_buffer;

#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use futures::future::{BoxFuture, Shared};
use futures::stream::{self, StreamExt as _};
use quorumfs_proto::query::{Space, TypedQuery};
use quorumfs_proto::statistics::CacheStatistics;
use quorumfs_proto::{Attributes, Command, FsError, InodeNumber, Operation, Outcome, Query};
use quorumfs_tasks::Tasks;
use tokio::sync::Semaphore;
use tokio::time::{Interval, MissedTickBehavior};

pub use self::directory::DirectoryItem;
pub use self::leased::Leased;
pub use self::namespace::MovedDirectories;
pub use self::open::{NewFile, Opened};
pub use self::pages::PageCache;
pub use self::recent_lookups::ThreadId;
pub use self::unlinked::InUseCheck;
pub use self::unnamed::{Destination, Stored};
pub use self::write::WritePosition;
pub use crate::caches::page_tail::{Order, Reader};
pub use crate::handles::{Handle, OpenFlags};
pub use append::may_be_first_part;
pub use quorumfs_client::{Cluster, FreshContent};

use self::close_queue::CloseQueue;
use self::directory::OpenDirectories;
use self::dirty::DirtyBytes;
use self::recent_lookups::RecentLookups;
use self::unlinked::Unlinked;
use crate::caches::chunk_cache::ChunkCache;
use crate::caches::page_versions::PageVersions;
use crate::handles::{OpenFiles, Scope, SharedInode};
use crate::interrupt::interruptible;

/// Concurrent read-ahead fetches of one mount: enough to keep three nodes busy, and at most 16 MiB in flight.
const READAHEAD_FETCHES_MAX: usize = 16;

/// Files that [`Filesystem::flush_all`] commits concurrently.
const CONCURRENT_COMMITS_MAX: usize = 16;

/// Shortest period of the background tasks.
const TICK_MS_MIN: u64 = 10;

/// When an acknowledged operation is durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Durability {
    /// When it returns; writes, when their file is closed.
    #[default]
    Close,
    /// After fsync, or within [`FsOptions::dirty_age_ms`]: close queues its commit and returns. Every later change
    /// waits for the commits queued before it.
    Fsync,
}

/// Options of a filesystem.
#[derive(Clone, Debug)]
pub struct FsOptions {
    /// When close returns.
    pub durability: Durability,
    /// Whether all changes are refused.
    pub read_only: bool,
    /// Most bytes of chunks in the cache.
    pub cache_bytes: u64,
    /// Most bytes that are written but not committed; beyond it, writes wait.
    pub dirty_bytes_max: u64,
    /// Age at which written bytes are committed without a sync.
    pub dirty_age_ms: u64,
    /// Shortest time for which a looked-up inode can be opened although another mount has unlinked it meanwhile; the
    /// longest is twice as much. The kernel sends the open up to a second after the lookup (it may cache a name that
    /// long), and later on a busy machine.
    pub lookup_grace_ms: u64,
    /// The mounted directory; it is its own parent.
    pub root: InodeNumber,
}

impl Default for FsOptions {
    fn default() -> FsOptions {
        FsOptions {
            durability: Durability::Close,
            read_only: false,
            cache_bytes: 128 << 20,
            dirty_bytes_max: 64 << 20,
            dirty_age_ms: 1000,
            lookup_grace_ms: 2000,
            root: InodeNumber::ROOT,
        }
    }
}

/// The future of a chunk that is being put.
type Put<C> = Shared<BoxFuture<'static, Result<<C as Cluster>::Chunk, FsError>>>;

/// The state shared by all handles of a file.
type OpenInode<C> = Arc<SharedInode<Put<C>>>;

/// A mounted filesystem.
pub struct Filesystem<C: Cluster = quorumfs_client::Client> {
    cluster: Arc<C>,
    options: FsOptions,
    open: OpenFiles<Put<C>>,
    directories: OpenDirectories,
    dirty: DirtyBytes<Put<C>>,
    close_queue: CloseQueue<Put<C>>,
    chunks: ChunkCache,
    page_versions: PageVersions,
    page_cache: OnceLock<Arc<dyn PageCache>>,
    readahead_permits: Semaphore,
    unlinked: Unlinked,
    recent_lookups: RecentLookups,
}

impl<C: Cluster> Filesystem<C> {
    /// Makes a filesystem on `cluster` and starts its background tasks under `tasks`; they end when it is dropped. Must
    /// be called within a tokio runtime.
    pub fn new(cluster: C, options: FsOptions, tasks: &Arc<Tasks>) -> Arc<Filesystem<C>> {
        let filesystem = Arc::new(Filesystem {
            cluster: Arc::new(cluster),
            open: OpenFiles::default(),
            directories: OpenDirectories::default(),
            dirty: DirtyBytes::new(options.dirty_bytes_max),
            close_queue: CloseQueue::default(),
            chunks: ChunkCache::new(options.cache_bytes),
            page_versions: PageVersions::default(),
            page_cache: OnceLock::new(),
            readahead_permits: Semaphore::new(READAHEAD_FETCHES_MAX),
            unlinked: Unlinked::default(),
            recent_lookups: RecentLookups::new(options.lookup_grace_ms),
            options,
        });
        let weak = Arc::downgrade(&filesystem);
        filesystem
            .cluster
            .set_unlinked_handler(Box::new(move |inodes| match weak.upgrade() {
                Some(filesystem) => filesystem.not_held(inodes),
                None => inodes.to_vec(),
            }));
        let weak = Arc::downgrade(&filesystem);
        tasks.supervise_until_done("write-back", weak.clone(), Filesystem::run_write_back);
        tasks.supervise_until_done("release-unlinked", weak, Filesystem::run_release_unlinked);
        filesystem
    }

    /// Returns the cluster.
    pub fn cluster(&self) -> &C {
        &self.cluster
    }

    /// Returns the mounted directory.
    pub fn root(&self) -> InodeNumber {
        self.options.root
    }

    /// Returns the counters of the chunk cache.
    pub fn cache_statistics(&self) -> CacheStatistics {
        self.chunks.statistics()
    }

    /// Returns the number of bytes that are written but not committed.
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty.bytes()
    }

    /// Returns the files with bytes that are written but not committed.
    pub fn unwritten(&self) -> Vec<InodeNumber> {
        self.dirty.nodes().iter().map(|node| node.inode).collect()
    }

    /// Queries the cluster's space and inode count.
    pub async fn space(&self) -> Result<Space, FsError> {
        self.ask(Query::space()).await
    }

    /// Commits all written bytes and waits for that. Every file is tried; the first failure is returned.
    pub async fn flush_all(&self) -> Result<(), FsError> {
        let results = stream::iter(self.dirty.nodes())
            .map(|node| async move { self.commit(&node, Scope::Everything).await })
            .buffer_unordered(CONCURRENT_COMMITS_MAX)
            .collect::<Vec<_>>()
            .await;
        self.release_unlinked().await;
        results.into_iter().collect()
    }

    /// Commits files that have been dirty for longer than [`FsOptions::dirty_age_ms`]. Returns when the filesystem is
    /// dropped.
    async fn run_write_back(filesystem: Weak<Filesystem<C>>) {
        let Some(mut ticks) = Ticks::new(filesystem) else {
            return;
        };
        while let Some(filesystem) = ticks.next().await {
            let dirty_age = Duration::from_millis(filesystem.options.dirty_age_ms);
            for node in filesystem.dirty.nodes() {
                let dirty_since = node.state.lock().dirty_since;
                if dirty_since.is_some_and(|since| since.elapsed() >= dirty_age) {
                    filesystem.commit_in_background(&node, Scope::Everything);
                }
            }
        }
    }

    /// Releases unlinked inodes that are no longer in use. Returns when the filesystem is dropped.
    async fn run_release_unlinked(filesystem: Weak<Filesystem<C>>) {
        let Some(mut ticks) = Ticks::new(filesystem) else {
            return;
        };
        while let Some(filesystem) = ticks.next().await {
            if !filesystem.unlinked.is_empty() {
                filesystem.release_unlinked().await;
            }
        }
    }

    fn writable(&self) -> Result<(), FsError> {
        if self.options.read_only {
            Err(FsError::ReadOnly)
        } else {
            Ok(())
        }
    }

    /// Queries the cluster; ends early if the caller is interrupted.
    async fn ask<A>(&self, query: TypedQuery<A>) -> Result<A, FsError> {
        interruptible(self.cluster.ask(query)).await
    }

    /// Sends a command without content and updates the attributes of open files.
    async fn mutate(&self, operation: Operation) -> Result<Outcome, FsError> {
        self.mutate_all(Command::single(operation), &[]).await
    }

    /// Sends `command`, whose chunks `stored` were put before, and updates the attributes of open files.
    async fn mutate_all(&self, command: Command, stored: &[C::Chunk]) -> Result<Outcome, FsError> {
        self.drain_close_queue().await;
        let outcome = interruptible(self.cluster.mutate(command, stored)).await?;
        self.update_open_files(&outcome.touched);
        Ok(outcome)
    }

    /// Updates the attributes of files that are open here.
    fn update_open_files(&self, touched: &[Attributes]) {
        if self.open.is_empty() {
            return;
        }
        for attributes in touched {
            if let Some(node) = self.open.find(attributes.inode) {
                node.state.lock().update_attributes(attributes);
            }
        }
    }
}

/// The timer of a background task of one filesystem. Holds no strong reference between two ticks, so the task does not
/// keep the filesystem alive.
struct Ticks<C: Cluster> {
    filesystem: Weak<Filesystem<C>>,
    interval: Interval,
}

impl<C: Cluster> Ticks<C> {
    /// Ticks four times within [`FsOptions::dirty_age_ms`]; `None` if the filesystem is dropped.
    fn new(filesystem: Weak<Filesystem<C>>) -> Option<Ticks<C>> {
        let dirty_age_ms = filesystem.upgrade()?.options.dirty_age_ms;
        let period = Duration::from_millis((dirty_age_ms / 4).max(TICK_MS_MIN));
        let mut interval = tokio::time::interval(period);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Some(Ticks { filesystem, interval })
    }

    /// Waits for the next tick; `None` if the filesystem is dropped.
    async fn next(&mut self) -> Option<Arc<Filesystem<C>>> {
        self.interval.tick().await;
        self.filesystem.upgrade()
    }
}
