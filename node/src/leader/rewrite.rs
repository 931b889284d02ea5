//! The leader combines small extents: in the background, and when a write needs it.
//!
//! A file that is appended to in small writes has an extent and a chunk for each. `apply` notes such files
//! ([`View::fragmented`]). The loop here looks for runs of neighbouring extents ([`View::runs`]), reads their bytes,
//! stores them as one chunk on f + 1 voters (P2), and proposes [`LogBody::Rewrite`]. That changes nothing visible to
//! programs, so no lease is recalled. It is refused if the extents are not those that were read, so concurrent changes
//! are safe. A client that still knows the old extents finds their chunks gone and looks the extents up again.
//!
//! [`Rewriter::mutate`] carries every client's mutation: one that would have to replace more extents than one command
//! may is proposed again when the extents have been combined.
//!
//! The new chunks belong to a session of this node, opened when there is work and ended soon: unlinked files wait for
//! every living session.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures::{StreamExt as _, TryStreamExt as _};
use parking_lot::Mutex;
use quorumfs_proto::call::Mutation;
use quorumfs_proto::limits::BLOCK_BYTES;
use quorumfs_proto::{
    Chunk, ChunkBody, ChunkId, ClientResponse, Extent, FsError, InodeNumber, NewChunk, Operation, Refusal,
    SessionId, Sha256,
};
use tracing::{debug, info, warn};

use crate::consensus::Consensus;
use crate::leader::read::ReadPath;
use crate::leader::sessions::SessionTracker;
use crate::leader::write::WritePath;
use crate::pace::Pacer;
use quorumfs_metadata::{
    ApplyResult, COMMAND_FREED_EXTENTS_MAX, Crowded, Failure, LogBody, MetadataStore, Run, RunTerms, Runs,
    SessionKey, View,
};

/// Interval at which noted files are looked for.
const CHECK_INTERVAL_MS: u64 = 2_000;
/// Bytes of content rewritten per second in the background.
const REWRITE_BYTES_PER_S: u64 = 8 << 20;
/// Fixed cost of a command, in bytes of that rate: it bounds the number of commands for runs of tiny extents.
const COMMAND_COST_BYTES: u64 = 256 << 10;
/// Noted files examined in one round.
const FILES_PER_ROUND_MAX: usize = 64;
/// Shortest and longest time until a file is searched again after a search without result, and its ratio to the
/// duration of the search: large files that change constantly are not searched constantly.
const DEFER_MS_MIN: u64 = 5_000;
const DEFER_MS_MAX: u64 = 600_000;
const DEFER_PER_SEARCH: u32 = 20;
/// Bytes of one file rewritten before the other files have their turn.
const TURN_BYTES_MAX: u64 = 256 << 20;
/// Pause after one page of extents, as a multiple of the time to read it.
const PAUSE_PER_PAGE: u32 = 3;
/// Most deferred files; beyond it all are forgotten and examined again.
const DEFERRED_FILES_MAX: usize = 4096;
/// Lifetime of a session of this node.
const SESSION_LIFE_MS: u64 = 10_000;
/// Extents of a run read concurrently.
const READS_CONCURRENT_MAX: usize = 16;
/// Longest time spent on one mutation before its client is told to ask again.
const COMBINE_MS_MAX: u64 = 20_000;
/// Description of the session for people.
const DESCRIPTION: &str = "rewriting of fragmented files";

/// The rewriter of a node; see the module documentation.
pub struct Rewriter {
    consensus: Consensus,
    metadata: Arc<MetadataStore>,
    write_path: Arc<WritePath>,
    read_path: Arc<ReadPath>,
    sessions: Arc<SessionTracker>,
    session: tokio::sync::Mutex<Option<Arc<OwnSession>>>,
    /// Locked while extents are combined for a mutation: one at a time.
    combining: tokio::sync::Mutex<()>,
    pace: Mutex<Pacer>,
}

/// A session of this node.
struct OwnSession {
    id: SessionId,
    term: u64,
    opened: Instant,
    next_counter: AtomicU64,
}

impl OwnSession {
    fn is_due(&self) -> bool {
        self.opened.elapsed() >= Duration::from_millis(SESSION_LIFE_MS)
    }
}

/// The result of rewriting a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rewritten {
    Done,
    /// The file has changed in that range.
    Overtaken,
}

impl Rewriter {
    /// Creates a rewriter; it does nothing in the background before [`Rewriter::run`].
    pub fn new(
        consensus: Consensus,
        metadata: Arc<MetadataStore>,
        write_path: Arc<WritePath>,
        read_path: Arc<ReadPath>,
        sessions: Arc<SessionTracker>,
    ) -> Arc<Rewriter> {
        Arc::new(Rewriter {
            consensus,
            metadata,
            write_path,
            read_path,
            sessions,
            session: tokio::sync::Mutex::new(None),
            combining: tokio::sync::Mutex::new(()),
            pace: Mutex::new(Pacer::new(REWRITE_BYTES_PER_S)),
        })
    }

    /// Applies a mutation of a client, and combines extents for it if necessary.
    pub async fn mutate(&self, mutation: Mutation) -> ClientResponse {
        let again = may_be_crowded(&mutation).then(|| mutation.clone());
        let mut crowded = match (self.write_path.mutate(mutation).await, &again) {
            (Ok(reply), _) => return reply,
            (Err(crowded), _) => crowded,
        };
        let Some(mutation) = again else {
            let inode = crowded.inode;
            return Refusal::unavailable(format!(
                "inode {inode} has too many extents to be changed by one command"
            ))
            .into();
        };
        let unavailable = |crowded: Crowded, why: &str| {
            let inode = crowded.inode;
            Refusal::unavailable(format!(
                "the extents of inode {inode} must be combined first{why}"
            ))
            .into()
        };
        let deadline = Instant::now() + Duration::from_millis(COMBINE_MS_MAX);
        while Instant::now() < deadline {
            if let Err(reason) = self.combine_extents(crowded, deadline).await {
                warn!(inode = %crowded.inode, reason, "cannot combine the extents in the way of a write");
                return unavailable(crowded, &format!(": {reason}"));
            }
            match self.write_path.mutate(mutation.clone()).await {
                Ok(reply) => return reply,
                Err(again) => crowded = again,
            }
        }
        unavailable(crowded, "")
    }

    /// Combines the extents that are in the way of a mutation, once.
    async fn combine_extents(&self, crowded: Crowded, deadline: Instant) -> Result<(), String> {
        let _turn = self.combining.lock().await;
        let Crowded { inode, from, to } = crowded;
        let mut at = from;
        let mut extents = 0;
        while Instant::now() < deadline {
            let found = match self.runs(inode, at, to, RunTerms::Any).await? {
                // The file is gone; the mutation gets that as its result.
                None => return Ok(()),
                Some(found) => found,
            };
            if found.has_cuts {
                let extents_max = COMMAND_FREED_EXTENTS_MAX;
                let step = LogBody::ReclaimUnlinked { inode, extents_max };
                self.write_path
                    .housekeep(step)
                    .await
                    .map_err(|error| error.to_string())?;
                continue;
            }
            extents += found.extents;
            for run in &found.runs {
                self.rewrite(inode, run).await?;
            }
            match found.goes_on_at {
                Some(next) => at = next,
                None => break,
            }
        }
        info!(%inode, from, to, extents, "extents in the way of a write were combined");
        Ok(())
    }

    /// Rewrites noted files while this node leads; never returns.
    pub async fn run(self: Arc<Self>) {
        let mut deferred = HashMap::new();
        loop {
            tokio::time::sleep(Duration::from_millis(CHECK_INTERVAL_MS)).await;
            if !self.consensus.is_leader() {
                deferred.clear();
                continue;
            }
            if let Err(reason) = self.round(&mut deferred).await {
                // A disk may be full, or another node leads by now: the next round tries again.
                debug!(
                    reason,
                    "cannot rewrite fragmented files now; the next round tries again"
                );
            }
            self.end_session_if(|_| true).await;
        }
    }

    /// Examines all noted files once.
    async fn round(&self, deferred: &mut HashMap<InodeNumber, Instant>) -> Result<(), String> {
        let mut after = None;
        loop {
            let noted = self
                .read_metadata(move |view| view.fragmented(after, FILES_PER_ROUND_MAX))
                .await?;
            let Some(last) = noted.last() else { return Ok(()) };
            after = Some(*last);
            let now = Instant::now();
            deferred.retain(|_, until| *until > now);
            if deferred.len() > DEFERRED_FILES_MAX {
                deferred.clear();
            }
            for inode in noted {
                if deferred.contains_key(&inode) {
                    continue;
                }
                if !self.consensus.is_leader() {
                    return Ok(());
                }
                let began = Instant::now();
                if let Err(reason) = self.rewrite_file(inode).await {
                    // A problem with one file must not stop the rewriting of others.
                    debug!(%inode, reason, "cannot rewrite a fragmented file now; a later round tries again");
                }
                let defer = (began.elapsed() * DEFER_PER_SEARCH).clamp(
                    Duration::from_millis(DEFER_MS_MIN),
                    Duration::from_millis(DEFER_MS_MAX),
                );
                deferred.insert(inode, Instant::now() + defer);
            }
        }
    }

    /// Rewrites the runs of one file that are worth it; if there are none, removes its note.
    async fn rewrite_file(&self, inode: InodeNumber) -> Result<(), String> {
        let (mut at, mut through_version) = (0, None);
        let (mut rewritten, mut turn_bytes) = (0, 0);
        loop {
            let began = Instant::now();
            let Some(found) = self.runs(inode, at, u64::MAX, RunTerms::Worthwhile).await? else {
                // The file is gone, and so is any later note of it.
                return self.settle(inode, u64::MAX).await;
            };
            let pause = began.elapsed() * PAUSE_PER_PAGE;
            if found.has_cuts {
                return Ok(());
            }
            // A note made after the first search is not covered by all of them.
            let through = *through_version.get_or_insert(found.content_version);
            for run in &found.runs {
                let bytes = run.to() - run.from() + COMMAND_COST_BYTES;
                turn_bytes += bytes;
                let wait = self.pace.lock().take(Instant::now(), bytes);
                tokio::time::sleep(wait).await;
                self.end_session_if(OwnSession::is_due).await;
                if self.rewrite(inode, run).await? == Rewritten::Done {
                    rewritten += run.extents.len();
                }
            }
            match found.goes_on_at {
                Some(_) if turn_bytes >= TURN_BYTES_MAX => return Ok(()),
                Some(next) => at = next,
                None if rewritten > 0 || !found.runs.is_empty() => {
                    debug!(%inode, extents = rewritten, "small extents were combined");
                    return Ok(());
                }
                None => return self.settle(inode, through).await,
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn settle(&self, inode: InodeNumber, through_version: u64) -> Result<(), String> {
        let settle = LogBody::Settle {
            inode,
            through_version,
        };
        let settled = self.write_path.housekeep(settle).await;
        settled.map(|_| ()).map_err(|error| error.to_string())
    }

    /// Reads a run, stores it as one chunk, and replaces the extents.
    async fn rewrite(&self, inode: InodeNumber, run: &Run) -> Result<Rewritten, String> {
        let Some(payload) = self.read(run).await? else {
            return Ok(Rewritten::Overtaken);
        };
        let session = self.own_session().await?;
        self.sessions.in_use(session.id);
        let id = ChunkId {
            session: session.id,
            counter: session.next_counter.fetch_add(1, Ordering::Relaxed),
        };
        let created = tokio::task::spawn_blocking(move || Chunk::new(id, payload));
        let stored = created.await.map_err(|panic| panic.to_string())?;
        let stored = stored.map_err(|bad| bad.to_string())?;
        let chunk = NewChunk {
            id,
            length: stored.length(),
            sha256: stored.sha256(),
            body: ChunkBody::Stored,
        };
        self.write_path
            .put_chunk(stored)
            .await
            .map_err(|error| error.to_string())?;
        let body = LogBody::Rewrite {
            inode,
            from: run.from(),
            extents: run.extents.len() as u32,
            digest: run.digest,
            chunk,
        };
        match self.write_path.name_chunk(body, id).await {
            Ok(ApplyResult::Done) => Ok(Rewritten::Done),
            Ok(ApplyResult::Outcome(Err(FsError::Stale))) => Ok(Rewritten::Overtaken),
            Ok(other) => {
                self.forget_session().await;
                Err(format!("the rewrite has an unexpected result: {other}"))
            }
            Err(error) => {
                self.forget_session().await;
                Err(error.to_string())
            }
        }
    }

    /// Reads the bytes of a run, with zeros for holes; `None` if a chunk is gone because the file has changed.
    async fn read(&self, run: &Run) -> Result<Option<bytes::Bytes>, String> {
        let read = |wanted: ReadRange| async move {
            let chunk = wanted.chunk();
            let (offset, length) = (wanted.offset, wanted.end - wanted.offset);
            let range = self.read_path.chunk(chunk, offset, length).await;
            let range = range.map_err(|error| (chunk, error.to_string()))?;
            let parts = wanted.extents.into_iter().map(|extent| {
                let bytes = range.exactly(extent.chunk_offset, extent.length);
                bytes.map(|bytes| (extent, bytes))
            });
            let parts: Option<Vec<(Extent, bytes::Bytes)>> = parts.collect();
            parts.ok_or_else(|| (chunk, "the copy is too short".to_string()))
        };
        let parts = futures::stream::iter(read_ranges(&run.extents))
            .map(read)
            .buffered(READS_CONCURRENT_MAX)
            .try_collect::<Vec<_>>()
            .await;
        let parts = match parts {
            Ok(parts) => parts,
            Err((chunk, reason)) => {
                let named = self.read_metadata(move |view| view.chunk(chunk)).await?;
                return match named {
                    None => Ok(None),
                    Some(_) => Err(format!("cannot read chunk {chunk}: {reason}")),
                };
            }
        };
        let mut bytes = BytesMut::zeroed((run.to() - run.from()) as usize);
        for (extent, part) in parts.into_iter().flatten() {
            let at = (extent.file_offset - run.from()) as usize;
            bytes[at..at + part.len()].copy_from_slice(&part);
        }
        Ok(Some(bytes.freeze()))
    }

    async fn runs(
        &self,
        inode: InodeNumber,
        from: u64,
        to: u64,
        terms: RunTerms,
    ) -> Result<Option<Runs>, String> {
        self.read_metadata(move |view| match view.runs(inode, from, to, terms) {
            Ok(found) => Ok(Some(found)),
            Err(Failure::Verdict(_)) => Ok(None),
            Err(fault) => Err(fault),
        })
        .await
    }

    /// Reads the metadata on a blocking thread.
    async fn read_metadata<T: Send + 'static>(
        &self,
        read: impl FnOnce(&View) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, String> {
        let metadata = self.metadata.clone();
        let result = tokio::task::spawn_blocking(move || read(&metadata.view()?)).await;
        match result {
            Ok(found) => found.map_err(|fault| fault.to_string()),
            Err(panic) => Err(panic.to_string()),
        }
    }

    /// Returns the session in which chunks are made now.
    async fn own_session(&self) -> Result<Arc<OwnSession>, String> {
        let mut own = self.session.lock().await;
        let term = self.consensus.term();
        if let Some(session) = own.as_ref().filter(|session| session.term == term) {
            return Ok(Arc::clone(session));
        }
        let session = OwnSession {
            id: SessionId(rand::random()),
            term,
            opened: Instant::now(),
            next_counter: AtomicU64::new(0),
        };
        let open = LogBody::OpenContentSession {
            session: session.id,
            description: DESCRIPTION.to_string(),
            key: SessionKey {
                secret: Sha256(rand::random()),
                certificate: None,
            },
        };
        match self.write_path.housekeep(open).await {
            Ok(ApplyResult::Done) => Ok(Arc::clone(own.insert(Arc::new(session)))),
            Ok(other) => Err(format!("opening a session has an unexpected result: {other}")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Ends the session if it is unused and `should_end` returns true. Chunks that were named stay; all have been
    /// named.
    async fn end_session_if(&self, should_end: impl FnOnce(&OwnSession) -> bool) {
        let mut own = self.session.lock().await;
        let ends = own
            .as_ref()
            .is_some_and(|session| Arc::strong_count(session) == 1 && should_end(session));
        let Some(session) = own.take_if(|_| ends) else {
            return;
        };
        drop(own);
        for body in [
            LogBody::EndSession { session: session.id },
            LogBody::ForgetSession { session: session.id },
        ] {
            // If this is not decided now, the next leader ends the session because it is silent.
            if let Err(error) = self.write_path.housekeep(body).await {
                debug!(%error, "cannot end a session of this node; it lapses");
            }
        }
    }

    /// Drops the session, because the result of its last command is unknown: it lapses.
    async fn forget_session(&self) {
        *self.session.lock().await = None;
    }
}

/// A range of one chunk that contains several close extents, read at once.
struct ReadRange {
    /// Offset in the chunk.
    offset: u32,
    end: u32,
    /// At least one extent.
    extents: Vec<Extent>,
}

impl ReadRange {
    fn chunk(&self) -> ChunkId {
        self.extents[0].chunk
    }
}

fn read_ranges(extents: &[Extent]) -> Vec<ReadRange> {
    let mut read_ranges: Vec<ReadRange> = Vec::new();
    for extent in extents {
        let end = extent.chunk_offset + extent.length;
        match read_ranges.last_mut() {
            Some(last)
                if last.chunk() == extent.chunk
                    && (last.end..=last.end.saturating_add(BLOCK_BYTES)).contains(&extent.chunk_offset) =>
            {
                last.end = end;
                last.extents.push(*extent);
            }
            _ => read_ranges.push(ReadRange {
                offset: extent.chunk_offset,
                end,
                extents: vec![*extent],
            }),
        }
    }
    read_ranges
}

/// Whether a mutation may have to replace extents.
fn may_be_crowded(mutation: &Mutation) -> bool {
    mutation
        .command
        .operations
        .iter()
        .any(|operation| match operation {
            Operation::SetAttributes { changes, .. } => changes.size.is_some(),
            operation => !operation.extents().is_empty(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_in_one_chunk_are_read_together() {
        let extent = |file_offset, counter, chunk_offset, length| Extent {
            file_offset,
            length,
            chunk: ChunkId {
                session: SessionId(1),
                counter,
            },
            chunk_offset,
        };
        let extents = [
            extent(0, 1, 0, 10),
            extent(10, 1, 10, 5),
            extent(15, 1, 20, 5),
            extent(20, 2, 25, 5),
            extent(25, 1, 25, 5),
            extent(30, 1, 1 << 19, 5),
            extent(35, 1, 0, 5),
        ];
        let read: Vec<(u32, u32, usize)> = read_ranges(&extents)
            .into_iter()
            .map(|range| (range.offset, range.end, range.extents.len()))
            .collect();
        let far = 1 << 19;
        assert_eq!(
            read,
            [(0, 25, 3), (25, 30, 1), (25, 30, 1), (far, far + 5, 1), (0, 5, 1)]
        );
    }
}
