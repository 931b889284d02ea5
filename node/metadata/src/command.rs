//! What the log carries for the metadata, and what applying it answers.
//!
//! A [`LogCommand`] holds everything that `apply` may depend on besides the state itself: the leader's stamp is in it,
//! so no node looks at a clock.

use std::fmt;

use bytes::Bytes;
use quorumfs_proto::call::Mutation;
use quorumfs_proto::{
    ChunkId, FsError, InodeNumber, NewChunk, Outcome, RequestId, SessionId, Sha256, Timestamp,
};
use serde::{Deserialize, Serialize};

/// One entry of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogCommand {
    /// The leader's clock when it proposed the entry.
    pub stamp: Timestamp,
    /// What is to be done.
    pub body: LogBody,
}

/// What an entry does. The order of the variants is part of the encoding: append, never reorder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogBody {
    /// A client's mutation.
    Call(Mutation),
    /// Makes a session known. Of a session that is known already it changes nothing; of one that has ended neither,
    /// and answers [`ApplyResult::UnknownSession`].
    OpenSession {
        /// Drawn at random by the client.
        session: SessionId,
        /// For people.
        description: String,
    },
    /// The session's pins lapse; what its calls answered stays known until [`LogBody::ForgetSession`].
    EndSession {
        /// Which.
        session: SessionId,
    },
    /// Drops what is left of an ended session (a day later). A session that is alive is left alone. Where more pins
    /// are left than one step drops, the session stays known and the leader proposes this again.
    ForgetSession {
        /// Which.
        session: SessionId,
    },
    /// One step of freeing what nobody can reach any more: the content of an unlinked inode that nobody holds, or what
    /// a truncation cut off. The leader repeats it while [`super::View::reclaimable`] names the inode.
    ReclaimUnlinked {
        /// Which.
        inode: InodeNumber,
        /// Most extents (and extended attributes) that this step looks at.
        extents_max: u32,
    },
    /// A client's mutation that the leader could not take, for want of room: decided as this verdict, unless its lane
    /// has decided it before. So that a retry of one that was taken hears what it did, never the refusal (P4).
    Refuse {
        /// The mutation's.
        request: RequestId,
        /// What its client is told.
        verdict: FsError,
    },
    /// On how many nodes each chunk is kept, from now on.
    SetReplicas {
        /// How many; what the number of voters asks for at the least is kept whatever this says.
        replicas: u8,
    },
    /// All members know what belongs to this level: from now on it may be applied. A program that does not know it stops
    /// here, with a reason, rather than apply something else than the others.
    RaiseFeatureLevel {
        /// One of those up to [`FEATURE_LEVEL`](crate::FEATURE_LEVEL).
        level: u32,
    },
    /// Every node keeps a view of the state at this entry, so that it can be compared with the others'.
    Audit,
    /// Small extents of a file are replaced by one that holds the same bytes. Nothing that a program can see changes,
    /// the content version included. Refused ([`FsError::Stale`]) if the extents are not exactly those that the
    /// proposer read.
    Rewrite {
        /// The file.
        inode: InodeNumber,
        /// Where the first of the extents begins.
        from: u64,
        /// How many extents are replaced, at most [`super::COMMAND_FREED_EXTENTS_MAX`].
        extents: u32,
        /// What [`super::Run::digest`] tells of them.
        digest: Sha256,
        /// Their bytes, with zeros for the holes between them, on the disks of f + 1 voters. Its session must be alive.
        chunk: NewChunk,
    },
    /// A file noted as fragmented was looked at: nothing is to be gained, unless it was noted again since.
    Settle {
        /// The file.
        inode: InodeNumber,
        /// The content version that was looked at.
        through_version: u64,
    },
    /// As [`LogBody::OpenSession`], for a client that proves itself and answers questions about unlinked inodes in order.
    /// One that lives without a key has this one from now on; of one with another key nothing is changed, and the answer is
    /// [`ApplyResult::WrongKey`].
    OpenSessionWithKey {
        /// Drawn at random by the client.
        session: SessionId,
        /// For people.
        description: String,
        /// How it proves itself.
        key: SessionKey,
    },
    /// As [`LogBody::OpenSessionWithKey`], for a session of the leader's own in which it makes chunks. It opens no files, so
    /// it is never asked about unlinked inodes, and none waits for it.
    OpenContentSession {
        /// Drawn at random by the leader.
        session: SessionId,
        /// For people.
        description: String,
        /// Nobody else speaks for the session.
        key: SessionKey,
    },
    /// Which unlinked inodes sessions hold.
    AnswerUnlinked {
        /// What each says; what is out of date is passed over.
        answers: Vec<UnlinkedAnswer>,
    },
    /// One step of freeing what nobody can reach any more, of many inodes. The leader repeats it while
    /// [`super::View::has_reclaimable`].
    Reclaim {
        /// Most rows (extents, extended attributes, inodes, holds) that this step frees.
        work_max: u32,
    },
    /// For how long sessions have been silent, so that the next leader goes on counting from there.
    NoteSilences {
        /// In milliseconds; 0: the session was heard again.
        silences: Vec<(SessionId, u64)>,
    },
}

/// Which unlinked inodes a session holds, of those that lost their last name in a range of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnlinkedAnswer {
    /// Who says so.
    pub session: SessionId,
    /// The log index up to which it had answered before; the answer counts only if that is so.
    pub from: u64,
    /// The log index up to which it answers.
    pub through: u64,
    /// What it holds of what lost its last name after `from` and up to `through`.
    pub held: Vec<InodeNumber>,
}

/// What applying an entry answers; equal on every node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ApplyResult {
    /// Of a mutation, now or when it was first applied.
    Outcome(Result<Outcome, FsError>),
    /// The session is not known (any more): nothing was done, but whether it was done before nobody can tell.
    UnknownSession,
    /// The lane has decided a later mutation, or not yet the one before: nothing was done.
    StaleSequence,
    /// Of everything that is not a mutation, and of entries that carry no command.
    Done,
    /// More extents lie where the mutation writes than one command replaces: nothing was done and nothing is remembered.
    /// The leader makes room there and proposes the mutation again.
    Crowded(Crowded),
    /// A session of this id was opened with another key: nothing was done.
    WrongKey,
    /// The session has ended, and its lanes show that it did not decide this mutation: nothing was done, nor ever will be.
    /// Never stored.
    NeverDecided,
}

/// Where a mutation would have had to replace more extents than one command may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Crowded {
    /// The file.
    pub inode: InodeNumber,
    /// Where in it the range begins.
    pub from: u64,
    /// Where it ends (exclusive). Equal to `from`: only what truncations left is in the way.
    pub to: u64,
}

/// What an applied entry asks of the content store. Empty for a mutation that was applied before.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Effects {
    /// Content that rode inside the entry and is now named by a file: this node stores it.
    pub inline: Vec<InlineChunk>,
    /// Chunks that are named for the first time and should be in the content store already.
    pub named: Vec<ChunkId>,
    /// Chunks that no file names any more, for ever.
    pub dead: Vec<ChunkId>,
}

impl Effects {
    /// Whether nothing is asked.
    pub fn is_empty(&self) -> bool {
        self.inline.is_empty() && self.named.is_empty() && self.dead.is_empty()
    }
}

/// A chunk that rode inside an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InlineChunk {
    /// Its identity.
    pub id: ChunkId,
    /// The digest of its bytes, as its writer computed it.
    pub sha256: Sha256,
    /// Its bytes.
    pub payload: Bytes,
}

/// An applied entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Applied {
    /// What its proposer is told.
    pub result: ApplyResult,
    /// What the content store has to do.
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
            ApplyResult::Outcome(Ok(_)) => write!(f, "done as asked"),
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

/// How a session proves itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionKey {
    /// The digest of the secret that its client drew.
    pub secret: Sha256,
    /// The digest of the certificate that its client showed, where it showed one.
    pub certificate: Option<Sha256>,
}
