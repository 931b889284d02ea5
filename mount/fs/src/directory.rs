//! Listing directories, with offsets that can be sought.
//!
//! Invariants: an offset is the cookie of the entry before; "." has 1, ".." has 2, the cluster's entries have 3 and
//! more, and keep theirs as long as they exist. So an entry that exists throughout a listing is told exactly once,
//! whatever comes and goes meanwhile. A directory handle holds one page of names at a time.
//!
//! Rule: attributes are told as they are after the request came, never from a page of an earlier one. Whoever is told
//! takes them for new: the kernel would keep an old size or a removed name for as long as a lease lasts.

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

/// Bytes of names asked for at once: some thousands.
const PAGE_BYTES: u32 = 256 << 10;

/// Pages that are kept of all open directories together: some 32 MiB. Who goes on reading where one was dropped asks
/// for it again.
const PAGES_MAX: usize = 64;

/// What an entry takes in a caller's buffer beside its name, without and with attributes (the larger of what
/// getdents(2) and its relatives use), and what names are padded to.
const ITEM_OVERHEAD_BYTES: usize = 24;
const DETAILED_ITEM_OVERHEAD_BYTES: usize = 152;
const NAME_PADDING_BYTES: usize = 8;

/// An entry with attributes takes a little less of the cluster's answer than of a caller's buffer. So much less is asked
/// for, as what does not fit was fetched in vain.
const ASKED_EIGHTHS: usize = 7;

/// One entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirectoryItem {
    /// Its name, "." and ".." among them.
    pub name: Bytes,
    /// What it names.
    pub inode: InodeNumber,
    /// What kind of thing that is.
    pub kind: FileKind,
    /// Where the listing goes on after it.
    pub cookie: u64,
    /// If asked for; never of "." and "..".
    pub attributes: Option<Attributes>,
}

/// An answer of the cluster: all entries after `after` up to the last one here.
#[derive(Debug, Default)]
struct Page {
    after: u64,
    entries: Vec<DirectoryEntry>,
    /// Whether there are none behind it.
    end: bool,
}

impl Page {
    /// Where in the page the entries after `cookie` begin, if the page tells what comes next.
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
    /// Names. Held while they are fetched: readers of one handle take turns.
    page: tokio::sync::Mutex<Option<Page>>,
}

/// The open directories of a mount. As many as programs hold open: the kernel bounds them.
#[derive(Debug, Default)]
pub(super) struct OpenDirectories {
    table: Mutex<(Handle, HashMap<Handle, Arc<OpenDirectory>>)>,
    /// Handles with a page, the one that got its page last at the end.
    with_page: Mutex<VecDeque<Handle>>,
}

impl OpenDirectories {
    /// `handle` has a new page; of too many the oldest that nobody reads right now are dropped. The caller holds the
    /// handle's own.
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

    /// `handle` is closed.
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

    /// The entries after `offset` (0: from the start, and anew), as many as fit `bytes_max` of a caller's buffer; none
    /// at the end.
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
            let asked_bytes = u32::try_from(listing.bytes_left / 8 * ASKED_EIGHTHS).unwrap_or(u32::MAX);
            let page = self
                .directory_page(directory.inode, after, detail, asked_bytes)
                .await?;
            self.add_entries(&mut listing, &page.entries);
            return listing.finish();
        }
        loop {
            let at = names.as_ref().and_then(|page| page.position(after));
            let (Some(page), Some(at)) = (names.as_ref(), at) else {
                if listing.has_entries() {
                    return listing.finish(); // What is there is enough for one answer.
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

    /// Adds as many of `entries` as fit and answers the cookie of the last. Those of one cookie stay together: the caller
    /// can only go on behind all of them.
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
            // Unlinked while it was open: it is empty.
            Err(FsError::NotFound | FsError::Stale) => Ok(Page {
                after,
                end: true,
                ..Page::default()
            }),
            Err(error) => Err(error),
        }
    }

    /// A page of a directory without a handle: entries with their attributes, after the one with the cookie `after` (0: from
    /// the start). What is at hand of their files is not looked at.
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
            // Names are kept above as long as the lease holds: it may be opened without a look-up.
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

    /// The last descriptor of a directory handle is gone.
    pub fn release_directory(&self, handle: Handle) -> Result<(), FsError> {
        self.directories.close(handle).map(|_| ()).ok_or(FsError::Stale)
    }
}

/// Items for a buffer of bounded size.
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

    /// Adds all of `group`, or says that they do not fit.
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

    /// Whether there is anything but dots.
    fn has_entries(&self) -> bool {
        self.items.last().is_some_and(|item| item.cookie > DOT_DOT_COOKIE)
    }

    /// [`FsError::InvalidArgument`] where not even the first entry fits, as getdents(2) has it.
    fn finish(self) -> Result<Vec<DirectoryItem>, FsError> {
        if self.items.is_empty() && self.is_full {
            return Err(FsError::InvalidArgument);
        }
        Ok(self.items)
    }
}
