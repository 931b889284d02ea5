//! The contents of log entries for the metadata, and the results of applying them.
//!
//! A [`LogCommand`] has everything that `apply` may depend on besides the state itself. It contains the leader's time
//! stamp, so no node reads a clock.

use std::fmt;

use bytes::Bytes;
use quorumfs_proto::call::Mutation;
use quorumfs_proto::{
    ChunkId, FsError, InodeNumber, NewChunk, Outcome, RequestId, SessionId, Sha256, Timestamp,
};
use serde::{Deserialize, Serialize};

/// The content of one log entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogCommand {
    /// The leader's clock at the time of the proposal.
    pub stamp: Timestamp,
    /// What the entry does.
    pub body: LogBody,
}

/// The action of an entry. The order of the variants is part of the encoding: append, never reorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogBody {
    /// A client's mutation.
    Call(Mutation),
    /// Registers a session. Has no effect on a session that is known or has ended; the latter is answered with
    /// [`ApplyResult::UnknownSession`].
    OpenSession {
        /// Random id drawn by the client.
        session: SessionId,
        /// Description for people.
        description: String,
    },
    /// Ends the session: its pins lapse. The results of its calls stay known until [`LogBody::ForgetSession`].
    EndSession {
        /// Id of the session.
        session: SessionId,
    },
    /// Removes the remains of an ended session (a day later). Has no effect on a session that is alive. If more pins
    /// are left than one step drops, the session stays known and the leader proposes this again.
    ForgetSession {
        /// Id of the session.
        session: SessionId,
    },
    /// One step of freeing unreachable data: the content of an unlinked inode that no session holds, or content that a
    /// truncation cut off. The leader repeats it while [`super::View::reclaimable`] returns the inode.
    ReclaimUnlinked {
        /// Number of the inode.
        inode: InodeNumber,
        /// Most extents (and extended attributes) that this step looks at.
        extents_max: u32,
    },
    /// Decides a client's mutation as refused, because the leader had no space for it, unless its lane has decided it
    /// before. So the retry of a mutation that was applied gets its result, never the refusal (P4).
    Refuse {
        /// The id of the mutation.
        request: RequestId,
        /// The verdict for the client.
        verdict: FsError,
    },
    /// Sets the number of nodes that hold each chunk, from now on.
    SetReplicas {
        /// The number of copies. The minimum that the number of voters requires is kept in any case.
        replicas: u8,
    },
    /// Raises the feature level: all members know the level, and from now on its features may be applied. A program
    /// that does not know the level stops here with a reason, so that it does not apply something else than the others.
    RaiseFeatureLevel {
        /// A level up to [`FEATURE_LEVEL`](crate::FEATURE_LEVEL).
        level: u32,
    },
    /// Makes every node keep a view of the state at this entry, so that the states can be compared.
    Audit,
    /// Replaces small extents of a file by one with the same bytes. Clients see no change, not even of the content
    /// version. Refused with [`FsError::Stale`] if the extents are not exactly those that the proposer read.
    Rewrite {
        /// Inode number of the file.
        inode: InodeNumber,
        /// Offset of the first of the extents in the file.
        from: u64,
        /// Number of extents that are replaced, at most [`super::COMMAND_FREED_EXTENTS_MAX`].
        extents: u32,
        /// [`super::Run::digest`] of the extents.
        digest: Sha256,
        /// The bytes of the extents, with zeros for the holes between them, on the disks of f + 1 voters. The chunk's
        /// session must be alive.
        chunk: NewChunk,
    },
    /// States that a file noted as fragmented was examined and gains nothing from a rewrite, unless it was noted again
    /// since.
    Settle {
        /// Inode number of the file.
        inode: InodeNumber,
        /// The content version that was examined.
        through_version: u64,
    },
    /// Like [`LogBody::OpenSession`], for a client that proves its identity and answers questions about unlinked inodes
    /// in order. A living session without a key gets this key. If the session has another key, nothing changes, and the
    /// result is [`ApplyResult::WrongKey`].
    OpenSessionWithKey {
        /// Random id drawn by the client.
        session: SessionId,
        /// Description for people.
        description: String,
        /// The key with which the client proves its identity.
        key: SessionKey,
    },
    /// Like [`LogBody::OpenSessionWithKey`], for a session of the leader's own in which it makes chunks. It opens no
    /// files, so it is never asked about unlinked inodes, and none is kept for it.
    OpenContentSession {
        /// Random id drawn by the leader.
        session: SessionId,
        /// Description for people.
        description: String,
        /// The key; only the leader acts for the session.
        key: SessionKey,
    },
    /// Records which unlinked inodes sessions hold.
    AnswerUnlinked {
        /// The answers of the sessions; outdated ones are ignored.
        answers: Vec<UnlinkedAnswer>,
    },
    /// One step of freeing unreachable data of many inodes. The leader repeats it while
    /// [`super::View::has_reclaimable`] returns true.
    Reclaim {
        /// Most rows (extents, extended attributes, inodes, holds) that this step frees.
        work_max: u32,
    },
    /// Records how long sessions have been silent, so that the next leader continues the count.
    NoteSilences {
        /// Silences in milliseconds; 0 means that the session was heard again.
        silences: Vec<(SessionId, u64)>,
    },
}

/// A session's answer about inodes that lost their last name in a range of the log: those it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnlinkedAnswer {
    /// The session that answers.
    pub session: SessionId,
    /// The log index up to which it had answered before; otherwise the answer is ignored.
    pub from: u64,
    /// The log index up to which this answer goes.
    pub through: u64,
    /// The inodes it holds that lost their last name after `from` and up to `through`.
    pub held: Vec<InodeNumber>,
}

/// The result of applying an entry; equal on every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ApplyResult {
    /// The result of a mutation, from now or from when it was first applied.
    Outcome(Result<Outcome, FsError>),
    /// The session is not, or no longer, known. Nothing was done; whether the mutation was applied before is unknown.
    UnknownSession,
    /// The lane has decided a later mutation, or not yet the previous one. Nothing was done.
    StaleSequence,
    /// The result of entries other than mutations, and of entries without a command.
    Done,
    /// The mutation would replace more extents than one command may. Nothing was done and no result is stored. The
    /// leader makes space there and proposes the mutation again.
    Crowded(Crowded),
    /// The session was opened with another key. Nothing was done.
    WrongKey,
    /// The session has ended, and its lanes show that it did not decide this mutation. Nothing was done, and the
    /// mutation will never be decided. This result is never stored.
    NeverDecided,
}

/// Where a mutation would replace more extents than one command may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crowded {
    /// Inode number of the file.
    pub inode: InodeNumber,
    /// Start of the range in the file.
    pub from: u64,
    /// End of the range (exclusive). If it equals `from`, only extents that truncations cut off are in the way.
    pub to: u64,
}

/// What an applied entry requires of the content store. Empty for a mutation that was applied before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Inline content that a file now refers to: this node stores it.
    pub inline: Vec<InlineChunk>,
    /// Chunks that a file now refers to for the first time, and that should be in the content store already.
    pub named: Vec<ChunkId>,
    /// Chunks that no file refers to any more, and never will again.
    pub dead: Vec<ChunkId>,
}

impl Effects {
    /// Whether nothing is required.
    pub fn is_empty(&self) -> bool {
        self.inline.is_empty() && self.named.is_empty() && self.dead.is_empty()
    }
}

/// A chunk whose content was inside an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlineChunk {
    /// The chunk's id.
    pub id: ChunkId,
    /// SHA-256 of its bytes, as computed by its writer.
    pub sha256: Sha256,
    /// The bytes of the chunk.
    pub payload: Bytes,
}

/// The results of an applied entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// The result for the proposer.
    pub result: ApplyResult,
    /// The work for the content store.
    pub effects: Effects,
}

impl fmt::Display for LogCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.body {
            LogBody::Call(Mutation { request, .. }) | LogBody::Refuse { request, .. } => {
                write!(
                    f,
                    "call {}/{}/{}",
                    request.session, request.lane.0, request.sequence
                )
            }
            LogBody::OpenSession { session, .. }
            | LogBody::OpenSessionWithKey { session, .. }
            | LogBody::OpenContentSession { session, .. } => {
                write!(f, "open session {session}")
            }
            LogBody::EndSession { session } => write!(f, "end session {session}"),
            LogBody::ForgetSession { session } => write!(f, "forget session {session}"),
            LogBody::ReclaimUnlinked { inode, .. } => write!(f, "reclaim inode {inode}"),
            LogBody::SetReplicas { replicas } => write!(f, "keep {replicas} copies"),
            LogBody::RaiseFeatureLevel { level } => write!(f, "raise the feature level to {level}"),
            LogBody::Audit => f.write_str("compare the state"),
            LogBody::Rewrite { inode, .. } => write!(f, "rewrite extents of inode {inode}"),
            LogBody::Settle { inode, .. } => write!(f, "inode {inode} is not fragmented"),
            LogBody::AnswerUnlinked { answers } => {
                write!(f, "{} answers about unlinked inodes", answers.len())
            }
            LogBody::Reclaim { work_max } => write!(f, "reclaim {work_max} rows"),
            LogBody::NoteSilences { silences } => write!(f, "{} sessions are silent", silences.len()),
        }
    }
}

impl fmt::Display for ApplyResult {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ApplyResult::Outcome(Ok(_)) => write!(f, "done"),
            ApplyResult::Outcome(Err(error)) => write!(f, "{error}"),
            ApplyResult::UnknownSession => write!(f, "unknown session"),
            ApplyResult::StaleSequence => write!(f, "stale sequence"),
            ApplyResult::Done => write!(f, "done"),
            ApplyResult::Crowded(place) => write!(f, "too many extents in inode {}", place.inode),
            ApplyResult::WrongKey => write!(f, "wrong key"),
            ApplyResult::NeverDecided => write!(f, "never decided"),
        }
    }
}

/// The key with which a session proves its identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionKey {
    /// Digest of the secret that the client drew.
    pub secret: Sha256,
    /// Digest of the client's certificate, if it showed one.
    pub certificate: Option<Sha256>,
}
