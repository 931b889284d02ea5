//! Verifies one file: every node reads its copies of the file's chunks from disk, and bad or missing copies are
//! repaired and waited for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use quorumfs_proto::{Attributes, ChunkId, FsError, InodeNumber, Member, Name, NodeId};
use serde::Serialize;
use tracing::debug;

use super::{CopyCheck, Repair};
use crate::replication::Verdict;
use crate::replication::peers::VERIFY_IDS_MAX;
use crate::transport::Purpose;
use quorumfs_metadata::{Failure, StorageFault};

/// Most chunks verified by one request: 2 GiB of large ones; a request for more returns how far it got.
const CHUNKS_MAX: usize = 2048;
/// Extents looked up per query.
const EXTENTS_PAGE: u32 = 1024;
/// Longest wait for the repairs that a request caused.
const REPAIR_WAIT_MS: u64 = 15_000;
/// Interval at which repairs are looked for.
const REPAIR_TICK_MS: u64 = 200;
/// Longest wait to learn the commit index and to apply up to it.
const UP_TO_DATE_MS: u64 = 3_000;

/// Why a file was not verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// No file has this path.
    #[error("{0}")]
    Verdict(FsError),
    /// The metadata cannot be read.
    #[error(transparent)]
    Fault(#[from] StorageFault),
    /// A task was cancelled or panicked.
    #[error("{0}")]
    Internal(String),
}

impl From<Failure> for VerifyError {
    fn from(failure: Failure) -> VerifyError {
        match failure {
            Failure::Verdict(verdict) => VerifyError::Verdict(verdict),
            Failure::Fault(fault) => VerifyError::Fault(fault),
        }
    }
}

/// The state of a file as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileState {
    /// Every member has a good copy of every chunk that it should hold.
    Healthy,
    /// Some copies were bad or missing; good ones have been written.
    Repaired,
    /// Some copies are still bad or missing; the other copies that were read are good.
    Degraded,
    /// For some chunk no node that answered has a good copy.
    Damaged,
}

/// The state of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CopyState {
    /// The copy has the SHA-256 in the metadata.
    Healthy,
    /// The node has no copy.
    Missing,
    /// The node has no copy, and other nodes should hold this chunk.
    Elsewhere,
    /// The copy differs.
    Corrupt,
    /// The copy could not be examined: the node did not answer, or is stopping.
    Unknown,
}

/// The result of a node for its copies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct NodeVerdict {
    /// Slot of the node.
    pub slot: u16,
    /// Number of copies that were good when first read.
    pub healthy: u64,
    /// Number of bad copies.
    pub corrupt: u64,
    /// Number of missing copies.
    pub missing: u64,
    /// Number of copies that could not be examined.
    pub unknown: u64,
    /// Bad and missing copies that were good before this answer was given.
    pub repaired: u64,
    /// Why copies could not be examined; null if all were.
    pub error: Option<String>,
}

/// A node's copy of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct CopyVerdict {
    /// Slot of the node.
    pub slot: u16,
    /// The state of the copy when it was read.
    pub state: CopyState,
    /// What differs, or why the copy could not be examined; null for good copies.
    pub detail: Option<String>,
    /// Whether it has been replaced by a good copy.
    pub repaired: bool,
}

/// A chunk of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ChunkVerdict {
    /// Id of the chunk.
    pub chunk: String,
    /// Offset of its first extent in the file.
    pub file_offset: u64,
    /// Its length in bytes.
    pub length: u32,
    /// The copies of all members.
    pub copies: Vec<CopyVerdict>,
}

/// The result of verifying a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct FileVerdict {
    /// The path, as in the request.
    pub file_path: String,
    /// The file's inode number.
    pub inode: u64,
    /// Its size in bytes.
    pub size: u64,
    /// The state of the file.
    pub state: FileState,
    /// Offset up to which content was verified; less than `size` if the file has more chunks than one request takes.
    pub verified_to: u64,
    /// The result of each member.
    pub nodes: Vec<NodeVerdict>,
    /// Each chunk and its copies, by offset in the file.
    pub chunks: Vec<ChunkVerdict>,
}

/// The file according to the metadata.
struct Wanted {
    attributes: Attributes,
    /// In the order of the file.
    chunks: Vec<(ChunkId, u64, u32)>,
    known_to: u64,
}

impl Repair {
    /// Has every member verify its copies of the file at `path` from offset `from` on, and waits for the repairs that
    /// result. `shown` is the path for people.
    ///
    /// # Errors
    /// [`VerifyError`].
    pub async fn verify_file(
        self: &Arc<Self>,
        path: Vec<Name>,
        shown: &str,
        from: u64,
    ) -> Result<FileVerdict, VerifyError> {
        // A file that was just created must be found. Without a leader, this node's state must suffice.
        if let Err(reason) = self.come_up_to_date().await {
            debug!(reason, "verifying a file with the state of this node alone");
        }
        let repair = Arc::clone(self);
        let wanted = tokio::task::spawn_blocking(move || repair.chunks_of(&path, from))
            .await
            .map_err(|panic| VerifyError::Internal(panic.to_string()))??;
        let members = self.parts.consensus.members();
        let snapshot = self.parts.placement.snapshot();
        let belongs = |id: ChunkId, node: NodeId| snapshot.should_hold(id, node);
        let ids: Vec<ChunkId> = wanted.chunks.iter().map(|(id, _, _)| *id).collect();
        let said = join_all(members.iter().map(|member| self.ask(member, &ids))).await;
        let repaired = join_all(members.iter().zip(&said).map(|(member, verdicts)| {
            let awaited = ids
                .iter()
                .zip(verdicts)
                .filter(|(id, _)| belongs(**id, member.id));
            self.wait_for_repairs(member, awaited)
        }))
        .await;
        Ok(file_verdict(shown, &wanted, &members, &said, &repaired, belongs))
    }

    /// Verifies this node's copies, and repairs bad ones. Blocking work runs on other threads.
    pub async fn verify_own(self: &Arc<Self>, ids: Vec<ChunkId>) -> Vec<Verdict> {
        let count = ids.len();
        let repair = Arc::clone(self);
        let looked = tokio::task::spawn_blocking(move || {
            let look = |id: &ChunkId| match repair.check_copy(*id) {
                CopyCheck::Healthy(_) => Verdict::Healthy,
                CopyCheck::Missing => {
                    repair.parts.recovery.request_fetch(*id);
                    Verdict::Missing
                }
                CopyCheck::Bad(reason) => {
                    repair.found_bad_blocking(*id, &reason);
                    Verdict::Corrupt(reason)
                }
                CopyCheck::Unknown(reason) => Verdict::Unknown(reason),
            };
            ids.iter().map(look).collect()
        });
        looked
            .await
            .unwrap_or_else(|panic| vec![Verdict::Unknown(panic.to_string()); count])
    }

    /// Asks `member` for the state of its copies of `ids`.
    async fn ask(self: &Arc<Self>, member: &Member, ids: &[ChunkId]) -> Vec<Verdict> {
        let mut verdicts = Vec::with_capacity(ids.len());
        for page in ids.chunks(VERIFY_IDS_MAX) {
            if member.id == self.parts.consensus.id() {
                verdicts.extend(self.verify_own(page.to_vec()).await);
                continue;
            }
            match self.parts.peers.verify(member, page).await {
                Ok(said) => verdicts.extend(said),
                Err(error) => {
                    // The node would not answer for the rest either.
                    verdicts.resize(ids.len(), Verdict::Unknown(error.to_string()));
                    return verdicts;
                }
            }
        }
        verdicts
    }

    /// Returns which of the copies that were not good are good now, after a while if necessary.
    async fn wait_for_repairs(
        self: &Arc<Self>,
        member: &Member,
        said: impl Iterator<Item = (&ChunkId, &Verdict)>,
    ) -> BTreeMap<ChunkId, bool> {
        let bad = |verdict: &Verdict| matches!(verdict, Verdict::Missing | Verdict::Corrupt(_));
        let mut repaired: BTreeMap<ChunkId, bool> = said
            .filter(|(_, verdict)| bad(verdict))
            .map(|(id, _)| (*id, false))
            .collect();
        let until = Instant::now() + Duration::from_millis(REPAIR_WAIT_MS);
        while repaired.values().any(|done| !done) && Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(REPAIR_TICK_MS)).await;
            let open: Vec<ChunkId> = repaired
                .iter()
                .filter(|(_, done)| !**done)
                .map(|(id, _)| *id)
                .collect();
            let held = if member.id == self.parts.consensus.id() {
                open.iter().map(|id| self.parts.content.holds(*id)).collect()
            } else {
                match self.parts.peers.held(member, &open).await {
                    Ok(held) => held,
                    Err(error) => {
                        debug!(%error, "cannot ask a node whether it has repaired its copies");
                        return repaired;
                    }
                }
            };
            // A bad copy is not held, so a held copy is a new one; it was checked when it arrived.
            for (id, held) in open.into_iter().zip(held) {
                repaired.insert(id, held);
            }
            let lost = self.parts.recovery.lost();
            if repaired.iter().all(|(id, done)| *done || lost.contains(id)) {
                break;
            }
        }
        repaired
    }

    fn chunks_of(&self, path: &[Name], from: u64) -> Result<Wanted, VerifyError> {
        let view = self.parts.metadata.view()?;
        let attributes = view.resolve(InodeNumber::ROOT, path)?;
        let mut wanted = Wanted {
            known_to: attributes.size,
            chunks: Vec::new(),
            attributes,
        };
        let mut seen = BTreeMap::new();
        let mut at = from;
        loop {
            let page = view.extents(wanted.attributes.inode, at, wanted.attributes.size, EXTENTS_PAGE)?;
            for extent in &page.extents {
                if seen.len() == CHUNKS_MAX && !seen.contains_key(&extent.chunk) {
                    wanted.known_to = extent.file_offset;
                    return Ok(wanted);
                }
                if seen.insert(extent.chunk, ()).is_none() {
                    let length = view.chunk(extent.chunk)?.map_or(0, |record| record.length);
                    wanted.chunks.push((extent.chunk, extent.file_offset, length));
                }
            }
            if page.known_to >= wanted.attributes.size || page.known_to <= at {
                return Ok(wanted);
            }
            at = page.known_to;
        }
    }

    /// Waits until this node has applied everything that was acknowledged before the call.
    ///
    /// # Errors
    /// The reason, if that takes more than a few seconds or no quorum confirms the leader.
    pub async fn come_up_to_date(&self) -> Result<(), String> {
        let reach = async {
            let consensus = &self.parts.consensus;
            if consensus.is_leader() {
                return consensus.barrier().await.map_err(|error| error.to_string());
            }
            let leader = consensus.leader().ok_or("no leader is known")?;
            let mut peer = self
                .parts
                .transport
                .peer(&leader.addresses, Purpose::Control)
                .map_err(|error| error.to_string())?;
            let answer = peer.read_index(quorumfs_wire::ReadIndexRequest {}).await;
            let goal = answer.map_err(|status| status.to_string())?.into_inner().index;
            while self.parts.metadata.position().index < goal {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            Ok(())
        };
        tokio::time::timeout(Duration::from_millis(UP_TO_DATE_MS), reach)
            .await
            .unwrap_or_else(|_| {
                Err(format!(
                    "this node did not catch up with the leader within {UP_TO_DATE_MS} ms"
                ))
            })
    }
}

fn file_verdict(
    shown: &str,
    wanted: &Wanted,
    members: &[Member],
    said: &[Vec<Verdict>],
    repaired: &[BTreeMap<ChunkId, bool>],
    belongs: impl Fn(ChunkId, NodeId) -> bool,
) -> FileVerdict {
    let mut nodes: Vec<NodeVerdict> = members
        .iter()
        .map(|member| NodeVerdict {
            slot: member.id.slot,
            healthy: 0,
            corrupt: 0,
            missing: 0,
            unknown: 0,
            repaired: 0,
            error: None,
        })
        .collect();
    let (mut not_healthy, mut not_repaired, mut damaged) = (0, 0, 0);
    let mut chunks = Vec::with_capacity(wanted.chunks.len());
    for (at, (id, file_offset, length)) in wanted.chunks.iter().enumerate() {
        let mut copies = Vec::with_capacity(members.len());
        let mut good = 0;
        for (((member, verdicts), repaired), node) in members.iter().zip(said).zip(repaired).zip(&mut nodes) {
            let repaired = repaired.get(id).copied().unwrap_or(false);
            let belongs = belongs(*id, member.id);
            let (state, detail) = match &verdicts[at] {
                Verdict::Healthy => (CopyState::Healthy, None),
                Verdict::Missing if !belongs => (CopyState::Elsewhere, None),
                Verdict::Missing => (CopyState::Missing, None),
                Verdict::Corrupt(what) => (CopyState::Corrupt, Some(what.clone())),
                Verdict::Unknown(why) => (CopyState::Unknown, Some(why.clone())),
            };
            match state {
                CopyState::Healthy => node.healthy += 1,
                CopyState::Missing => node.missing += 1,
                CopyState::Elsewhere => {}
                CopyState::Corrupt => node.corrupt += 1,
                CopyState::Unknown => {
                    node.unknown += 1;
                    node.error.clone_from(&detail);
                }
            }
            let is_good = state == CopyState::Healthy || repaired;
            node.repaired += u64::from(repaired);
            // A bad copy that other nodes should hold has been removed and is not replaced.
            not_healthy += u64::from(!matches!(state, CopyState::Healthy | CopyState::Elsewhere));
            not_repaired += u64::from(belongs && !is_good);
            good += u64::from(is_good);
            copies.push(CopyVerdict {
                slot: member.id.slot,
                state,
                detail,
                repaired,
            });
        }
        damaged += u64::from(good == 0);
        chunks.push(ChunkVerdict {
            chunk: id.to_string(),
            file_offset: *file_offset,
            length: *length,
            copies,
        });
    }
    let state = match (damaged, not_repaired, not_healthy) {
        (0, 0, 0) => FileState::Healthy,
        (0, 0, _) => FileState::Repaired,
        (0, _, _) => FileState::Degraded,
        _ => FileState::Damaged,
    };
    FileVerdict {
        file_path: shown.to_string(),
        inode: wanted.attributes.inode.0,
        size: wanted.attributes.size,
        state,
        verified_to: wanted.known_to,
        nodes,
        chunks,
    }
}

#[cfg(test)]
mod tests {
    use quorumfs_proto::{Addresses, FileKind, NodeId, SessionId, Timestamp};

    use super::*;

    fn member(slot: u16) -> Member {
        Member {
            id: NodeId { slot, incarnation: 1 },
            addresses: Addresses {
                grpc: String::new(),
                http: String::new(),
            },
        }
    }

    fn wanted(chunks: u64) -> Wanted {
        let id = |counter| ChunkId {
            session: SessionId(1),
            counter,
        };
        Wanted {
            attributes: Attributes {
                inode: InodeNumber(5),
                kind: FileKind::File,
                mode: 0,
                uid: 0,
                gid: 0,
                links: 1,
                size: chunks * 10,
                allocated_bytes: chunks * 10,
                rdev: 0,
                atime: Timestamp::default(),
                mtime: Timestamp::default(),
                ctime: Timestamp::default(),
                birth_time: Timestamp::default(),
                content_version: 1,
                xattr_count: 0,
                has_capability: false,
                parent: InodeNumber::ROOT,
            },
            chunks: (0..chunks).map(|n| (id(n), n * 10, 10)).collect(),
            known_to: chunks * 10,
        }
    }

    #[test]
    fn a_file_is_as_good_as_its_worst_chunk() {
        let members = [member(1), member(2), member(3)];
        let wanted = wanted(2);
        let (first, healthy) = (wanted.chunks[0].0, Verdict::Healthy);
        let corrupt = Verdict::Corrupt("a block".into());
        let unknown = Verdict::Unknown("down".into());
        let judge = |second: [Verdict; 2], of_first: &Verdict, repaired: bool| {
            let third = vec![Verdict::Missing, Verdict::Missing];
            let said = [vec![of_first.clone(), healthy.clone()], second.to_vec(), third];
            let repaired = [
                BTreeMap::new(),
                BTreeMap::from([(first, repaired)]),
                BTreeMap::new(),
            ];
            file_verdict("f", &wanted, &members, &said, &repaired, |_, node| node.slot < 3)
        };
        let fine = judge([healthy.clone(), healthy.clone()], &healthy, false);
        assert_eq!(
            fine.state,
            FileState::Healthy,
            "the third is to hold nothing of it"
        );
        assert_eq!(fine.chunks[0].copies[2].state, CopyState::Elsewhere);
        let repaired = judge([corrupt.clone(), healthy.clone()], &healthy, true);
        assert_eq!(repaired.state, FileState::Repaired);
        assert_eq!((repaired.nodes[1].corrupt, repaired.nodes[1].repaired), (1, 1));
        assert_eq!(repaired.chunks[0].copies[1].state, CopyState::Corrupt);
        let degraded = judge([unknown.clone(), unknown.clone()], &healthy, false);
        assert_eq!(degraded.state, FileState::Degraded);
        assert_eq!(degraded.nodes[1].error.as_deref(), Some("down"));
        let damaged = judge([corrupt.clone(), healthy.clone()], &Verdict::Missing, false);
        assert_eq!(damaged.state, FileState::Damaged);
    }
}
