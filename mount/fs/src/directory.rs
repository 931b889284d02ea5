//! Directory listings with seekable offsets.
//!
//! Invariants: an offset is the cookie of the preceding entry; "." has cookie 1, ".." has 2, the cluster's entries have
//! 3 and more and keep theirs for their lifetime. So an entry that exists throughout a listing is returned exactly
//! once, whatever is created and removed meanwhile. A directory handle caches at most one page of names.
//!
//! Rule: attributes are queried after the request has arrived, never taken from a page of an earlier one. The kernel
//! takes them as current, and would keep an old size or a removed name as long as a lease lasts.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::limits::DIRECTORY_ANSWER_BYTES_MAX;
use quorumfs_proto::query::{DirectoryEntry, DirectoryPage, EntryDetail};
use quorumfs_proto::{Attributes, FileKind, FsError, InodeNumber, Query};

use super::{Cluster, Filesystem, Handle};

/// The cookie of ".".
const DOT_COOKIE: u64 = 1;
/// The cookie of "..".
const DOT_DOT_COOKIE: u64 = 2;

/// Bytes of names per query: some thousands of names.
const PAGE_BYTES: u32 = 256 << 10;

/// Most pages cached for all open directories, about 32 MiB. A reader whose page was dropped queries it again.
const PAGES_MAX: usize = 64;

/// Bytes that an entry takes in a caller's buffer in addition to its name, without and with attributes (the larger of
/// the values of getdents(2) and readdirplus), and the alignment of names.
const ITEM_OVERHEAD_BYTES: usize = 24;
const DETAILED_ITEM_OVERHEAD_BYTES: usize = 152;
const NAME_PADDING_BYTES: usize = 8;

/// Share of the caller's buffer that is queried, in eighths. An entry with attributes takes less in the cluster's
/// answer than in the buffer, and entries that do not fit would be queried in vain.
const QUERIED_EIGHTHS: usize = 7;

/// An entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryItem {
    /// The name; may be "." or "..".
    pub name: Bytes,
    /// The inode.
    pub inode: InodeNumber,
    /// The kind of the inode.
    pub kind: FileKind,
    /// The offset at which the listing continues after this entry.
    pub cookie: u64,
    /// The attributes, if requested; never for "." and "..".
    pub attributes: Option<Attributes>,
}

/// A page of the cluster's listing: all entries after the cookie `after` up to the last one here.
#[derive(Debug, Default)]
struct Page {
    after: u64,
    entries: Vec<DirectoryEntry>,
    /// Whether the directory has no further entries.
    end: bool,
}

impl Page {
    /// Returns the index of the first entry after `cookie`, if the page covers that position.
    fn position(&self, cookie: u64) -> Option<usize> {
        let at = self.entries.partition_point(|entry| entry.cookie <= cookie);
        let covers = self.after <= cookie && (at < self.entries.len() || self.end);
        covers.then_some(at)
    }
}

#[derive(Debug)]
struct OpenDirectory {
    inode: InodeNumber,
    parent: InodeNumber,
    /// The cached page. Locked while it is queried, so readers of one handle are served one after another.
    page: tokio::sync::Mutex<Option<Page>>,
}

/// The open directories of a mount. The kernel bounds their number by the descriptors of programs.
#[derive(Debug, Default)]
pub(super) struct OpenDirectories {
    table: Mutex<(Handle, HashMap<Handle, Arc<OpenDirectory>>)>,
    /// Handles with a cached page; the newest page last.
    with_page: Mutex<VecDeque<Handle>>,
}

impl OpenDirectories {
    /// Records that `handle` has a new page, and drops the oldest pages beyond the limit, except those in use. The
    /// caller holds the lock of the handle's page.
    fn record_page(&self, handle: Handle) {
        let mut with_page = self.with_page.lock();
        with_page.retain(|other| *other != handle);
        for _ in PAGES_MAX..=with_page.len() {
            let Some(oldest) = with_page.pop_front() else {
                break;
            };
            let directory = self.table.lock().1.get(&oldest).cloned();
            match directory.as_ref().map(|directory| directory.page.try_lock()) {
                Some(Ok(mut page)) => *page = None,
                Some(Err(_)) => with_page.push_back(oldest),
                None => {}
            }
        }
        with_page.push_back(handle);
    }

    /// Removes a handle.
    fn close(&self, handle: Handle) -> Option<Arc<OpenDirectory>> {
        self.with_page.lock().retain(|other| *other != handle);
        self.table.lock().1.remove(&handle)
    }

    #[cfg(test)]
    pub(super) fn pages(&self) -> usize {
        let table = self.table.lock();
        let held =
            |directory: &&Arc<OpenDirectory>| directory.page.try_lock().is_ok_and(|page| page.is_some());
        table.1.values().filter(held).count()
    }
}

impl<C: Cluster> Filesystem<C> {
    /// Opens a directory for listing.
    ///
    /// # Errors
    /// [`FsError::NotDirectory`].
    pub async fn open_directory(&self, inode: InodeNumber) -> Result<Handle, FsError> {
        let attributes = self.ask(Query::attributes(inode)).await?;
        if attributes.kind != FileKind::Directory {
            return Err(FsError::NotDirectory);
        }
        let directory = OpenDirectory {
            inode,
            parent: if inode == self.options.root {
                inode
            } else {
                attributes.parent
            },
            page: tokio::sync::Mutex::new(None),
        };
        let mut table = self.directories.table.lock();
        table.0 += 1;
        let handle = table.0;
        table.1.insert(handle, Arc::new(directory));
        Ok(handle)
    }

    /// Returns the entries after `offset` (0 restarts the listing), as many as fit into `bytes_max` of the caller's
    /// buffer; none at the end.
    ///
    /// # Errors
    /// [`FsError::Stale`] if there is no such handle; [`FsError::InvalidArgument`] if the first entry does not fit.
    pub async fn read_directory(
        &self,
        handle: Handle,
        offset: u64,
        detail: EntryDetail,
        bytes_max: usize,
    ) -> Result<Vec<DirectoryItem>, FsError> {
        let directory = self
            .directories
            .table
            .lock()
            .1
            .get(&handle)
            .cloned()
            .ok_or(FsError::Stale)?;
        let mut listing = Listing::new(bytes_max, detail);
        let dots = [
            (&b"."[..], directory.inode, DOT_COOKIE),
            (&b".."[..], directory.parent, DOT_DOT_COOKIE),
        ];
        for (name, inode, cookie) in dots.into_iter().filter(|(_, _, cookie)| *cookie > offset) {
            let item = DirectoryItem {
                name: Bytes::from_static(name),
                inode,
                kind: FileKind::Directory,
                cookie,
                attributes: None,
            };
            if !listing.add(vec![item]) {
                return listing.finish();
            }
        }
        let mut names = directory.page.lock().await;
        if offset == 0 {
            *names = None;
        }
        let mut after = if offset <= DOT_DOT_COOKIE { 0 } else { offset };
        if detail == EntryDetail::Attributes {
            drop(names);
            let query_bytes = u32::try_from(listing.bytes_left / 8 * QUERIED_EIGHTHS).unwrap_or(u32::MAX);
            let page = self
                .directory_page(directory.inode, after, detail, query_bytes)
                .await?;
            self.add_entries(&mut listing, &page.entries);
            return listing.finish();
        }
        loop {
            let at = names.as_ref().and_then(|page| page.position(after));
            let (Some(page), Some(at)) = (names.as_ref(), at) else {
                if listing.has_entries() {
                    return listing.finish();
                }
                let fetched = self.directory_page(directory.inode, after, detail, PAGE_BYTES);
                *names = Some(fetched.await?);
                self.directories.record_page(handle);
                continue;
            };
            let last_cookie = self.add_entries(&mut listing, &page.entries[at..]);
            if listing.is_full || page.end {
                return listing.finish();
            }
            after = last_cookie.unwrap_or(after);
        }
    }

    /// Adds as many of `entries` as fit; returns the cookie of the last. Entries of one cookie are added together,
    /// because the caller can only continue after all of them.
    fn add_entries(&self, listing: &mut Listing, entries: &[DirectoryEntry]) -> Option<u64> {
        let groups = entries.chunk_by(|a, b| a.cookie == b.cookie);
        groups
            .take_while(|group| listing.add(group.iter().map(|entry| self.item(entry)).collect()))
            .last()
            .map(|group| group[0].cookie)
    }

    async fn directory_page(
        &self,
        inode: InodeNumber,
        after: u64,
        detail: EntryDetail,
        bytes_max: u32,
    ) -> Result<Page, FsError> {
        match self
            .ask(Query::read_directory(inode, after, bytes_max, detail))
            .await
        {
            Ok(DirectoryPage { entries, end }) if end || !entries.is_empty() => {
                Ok(Page { after, entries, end })
            }
            Ok(_) => {
                tracing::error!(%inode, after, "the cluster returned an empty page of a listing that has not ended");
                Err(FsError::Io)
            }
            // Removed while open: such a directory is empty.
            Err(FsError::NotFound | FsError::Stale) => Ok(Page {
                after,
                end: true,
                ..Page::default()
            }),
            Err(error) => Err(error),
        }
    }

    /// Returns a page of a directory without a handle: entries with attributes, after the cookie `after` (0: from the
    /// start). Uncommitted writes of this mount are not included.
    pub async fn list_directory(&self, inode: InodeNumber, after: u64) -> Result<DirectoryPage, FsError> {
        let detail = EntryDetail::Attributes;
        self.ask(Query::read_directory(
            inode,
            after,
            DIRECTORY_ANSWER_BYTES_MAX,
            detail,
        ))
        .await
    }

    fn item(&self, entry: &DirectoryEntry) -> DirectoryItem {
        let attributes = entry.attributes.clone();
        if attributes.is_some() && self.cluster.lease().is_some() {
            // Under a lease the kernel may open the inode by its cached name, without a lookup.
            self.recent_lookups.add(entry.inode);
        }
        DirectoryItem {
            name: Bytes::from(entry.name.clone()),
            inode: entry.inode,
            kind: entry.kind,
            cookie: entry.cookie,
            attributes: attributes.map(|attributes| self.present_in_listing(attributes)),
        }
    }

    /// Ends a directory handle.
    ///
    /// # Errors
    /// [`FsError::Stale`] if there is no such handle.
    pub fn release_directory(&self, handle: Handle) -> Result<(), FsError> {
        self.directories.close(handle).map(|_| ()).ok_or(FsError::Stale)
    }
}

/// Entries for a buffer of bounded size.
struct Listing {
    items: Vec<DirectoryItem>,
    bytes_left: usize,
    overhead_bytes: usize,
    is_full: bool,
}

impl Listing {
    fn new(bytes_max: usize, detail: EntryDetail) -> Listing {
        Listing {
            items: Vec::new(),
            bytes_left: bytes_max,
            overhead_bytes: match detail {
                EntryDetail::Name => ITEM_OVERHEAD_BYTES,
                EntryDetail::Attributes => DETAILED_ITEM_OVERHEAD_BYTES,
            },
            is_full: false,
        }
    }

    /// Adds all of `group`; returns false if they do not fit.
    fn add(&mut self, group: Vec<DirectoryItem>) -> bool {
        let of =
            |item: &DirectoryItem| self.overhead_bytes + item.name.len().next_multiple_of(NAME_PADDING_BYTES);
        let bytes: usize = group.iter().map(of).sum();
        if bytes > self.bytes_left {
            self.is_full = true;
            return false;
        }
        self.bytes_left -= bytes;
        self.items.extend(group);
        true
    }

    /// Whether there is any entry but "." and "..".
    fn has_entries(&self) -> bool {
        self.items.last().is_some_and(|item| item.cookie > DOT_DOT_COOKIE)
    }

    /// Returns the entries.
    ///
    /// # Errors
    /// [`FsError::InvalidArgument`] if not even the first entry fits, like getdents(2).
    fn finish(self) -> Result<Vec<DirectoryItem>, FsError> {
        if self.items.is_empty() && self.is_full {
            return Err(FsError::InvalidArgument);
        }
        Ok(self.items)
    }
}
