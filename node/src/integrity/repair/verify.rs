//! Verifying one file: every node reads its copies of the file's chunks from disk, and what is bad or missing is
//! repaired and waited for.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::future::join_all;
use quorumfs_proto::{Attributes, ChunkId, FsError, InodeNumber, Member, Name, NodeId};
use serde::Serialize;
use tracing::debug;

use super::{Looked, Repair};
use crate::replication::Verdict;
use crate::replication::peers::VERIFY_IDS_MAX;
use crate::transport::Purpose;
use quorumfs_metadata::{Failure, StorageFault};

/// Chunks verified by one request: 2 GiB of large ones; a request for more says up to where it got.
const CHUNKS_MAX: usize = 2048;
/// Extents looked up at a time.
const EXTENTS_PAGE: u32 = 1024;
/// How long a request waits for the repairs it caused.
const REPAIR_WAIT_MS: u64 = 15_000;
/// How often it looks.
const REPAIR_TICK_MS: u64 = 200;
/// How long it waits to learn how far the log goes, and to have applied that.
const UP_TO_DATE_MS: u64 = 3_000;

/// Why a file was not verified.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The path leads to no file.
    #[error("{0}")]
    Verdict(FsError),
    /// The metadata cannot be read.
    #[error(transparent)]
    Fault(#[from] StorageFault),
    /// A task was cancelled.
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

/// How a file stands as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileState {
    /// Every member has a good copy of every chunk that it should hold.
    Healthy,
    /// Some copies were bad or missing; good ones have been written.
    Repaired,
    /// Some copies are bad or missing still; what was read of the others is good.
    Degraded,
    /// Of some chunk no node that answered has a good copy.
    Damaged,
}

/// How a copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CopyState {
    /// It has the SHA-256 that the metadata names.
    Healthy,
    /// There is none.
    Missing,
    /// There is none, and other nodes are to hold this chunk.
    Elsewhere,
    /// It differs.
    Corrupt,
    /// It could not be looked at: the node did not answer, or is stopping.
    Unknown,
}

/// What a node said of its copies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct NodeVerdict {
    /// The node.
    pub slot: u16,
    /// Good copies at first sight.
    pub healthy: u64,
    /// Bad ones.
    pub corrupt: u64,
    /// Missing ones.
    pub missing: u64,
    /// Those it could not tell of.
    pub unknown: u64,
    /// Of the bad and missing ones, those that were good before this answer was given.
    pub repaired: u64,
    /// Why it could not tell; null where it could.
    pub error: Option<String>,
}

/// A node's copy of a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct CopyVerdict {
    /// The node.
    pub slot: u16,
    /// How the copy was when it was read.
    pub state: CopyState,
    /// What differs, or why it could not be looked at; null for good ones.
    pub detail: Option<String>,
    /// Whether a good copy has been written instead.
    pub repaired: bool,
}

/// A chunk of the file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ChunkVerdict {
    /// Its id.
    pub chunk: String,
    /// Where in the file its first piece lies.
    pub file_offset: u64,
    /// Its length in bytes.
    pub length: u32,
    /// Every member's copy.
    pub copies: Vec<CopyVerdict>,
}

/// What verifying a file showed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct FileVerdict {
    /// The path, as it was asked.
    pub file_path: String,
    /// The file.
    pub inode: u64,
    /// Its size in bytes.
    pub size: u64,
    /// How it stands.
    pub state: FileState,
    /// Up to where in the file content was verified; less than `size` where it has more chunks than one request takes.
    pub verified_to: u64,
    /// What each member said.
    pub nodes: Vec<NodeVerdict>,
    /// Each chunk and its copies, by their place in the file.
    pub chunks: Vec<ChunkVerdict>,
}

/// What the metadata says of the file.
struct Wanted {
    attributes: Attributes,
    /// In the order of the file.
    chunks: Vec<(ChunkId, u64, u32)>,
    known_to: u64,
}

impl Repair {
    /// Has every member verify its copies of the file at `path` from offset `from` on, and waits a while for the
    /// repairs that causes. `shown` is the path for people.
    pub async fn verify_file(
        self: &Arc<Self>,
        path: Vec<Name>,
        shown: &str,
        from: u64,
    ) -> Result<FileVerdict, VerifyError> {
        // A file that was just made must not be unknown; without a leader, what this node knows must do.
        if let Err(reason) = self.come_up_to_date().await {
            debug!(reason, "verifying a file as this node knows it");
        }
        let repair = Arc::clone(self);
        let wanted = tokio::task::spawn_blocking(move || repair.chunks_of(&path, from))
            .await
            .map_err(|panic| VerifyError::Internal(panic.to_string()))??;
        let members = self.parts.consensus.members();
        let picture = self.parts.placement.picture();
        let belongs = |id: ChunkId, node: NodeId| picture.should_hold(id, node);
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

    /// Verifies this node's copies, and repairs what is bad. Blocking work is done elsewhere.
    pub async fn verify_own(self: &Arc<Self>, ids: Vec<ChunkId>) -> Vec<Verdict> {
        let count = ids.len();
        let repair = Arc::clone(self);
        let looked = tokio::task::spawn_blocking(move || {
            let look = |id: &ChunkId| match repair.look_at(*id) {
                Looked::Healthy(_) => Verdict::Healthy,
                Looked::Missing => {
                    repair.parts.recovery.wanted(*id);
                    Verdict::Missing
                }
                Looked::Bad(reason) => {
                    repair.found_bad_blocking(*id, &reason);
                    Verdict::Corrupt(reason)
                }
                Looked::Unknown(reason) => Verdict::Unknown(reason),
            };
            ids.iter().map(look).collect()
        });
        looked
            .await
            .unwrap_or_else(|panic| vec![Verdict::Unknown(panic.to_string()); count])
    }

    /// What `member` says of its copies of `ids`.
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
                    // It would not answer the rest either.
                    verdicts.resize(ids.len(), Verdict::Unknown(error.to_string()));
                    return verdicts;
                }
            }
        }
        verdicts
    }

    /// Which of the copies that were said not to be healthy are so now, after a while if need be.
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
                        debug!(%error, "a node does not say whether it has repaired its copies");
                        return repaired;
                    }
                }
            };
            // A bad copy is held no more, so one that is held is a new one; it was checked when it came.
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
            for piece in &page.extents {
                if seen.len() == CHUNKS_MAX && !seen.contains_key(&piece.chunk) {
                    wanted.known_to = piece.file_offset;
                    return Ok(wanted);
                }
                if seen.insert(piece.chunk, ()).is_none() {
                    let length = view.chunk(piece.chunk)?.map_or(0, |record| record.length);
                    wanted.chunks.push((piece.chunk, piece.file_offset, length));
                }
            }
            if page.known_to >= wanted.attributes.size || page.known_to <= at {
                return Ok(wanted);
            }
            at = page.known_to;
        }
    }

    /// Waits until this node has applied everything that was acknowledged before the call. Says why not, where that takes
    /// more than a few seconds or no quorum confirms who leads.
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
            .unwrap_or_else(|_| Err(format!("this node does not catch up within {UP_TO_DATE_MS} ms")))
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
            // A bad copy that was for other nodes to hold is gone, and no other comes.
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
