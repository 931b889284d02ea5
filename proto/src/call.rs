//! How a client speaks to the leader: the contents of the `Calls` stream's envelopes.

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::command::Command;
use crate::error::FsError;
use crate::ids::{ChunkId, InodeNumber, RequestId, SessionId, SessionSecret};
use crate::member::Member;
use crate::outcome::Outcome;
use crate::query::{Answer, Query};

/// What a client asks. Mutations and queries are different things; only mutations carry a request id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientRequest {
    /// Changes metadata once, however often it is sent.
    Mutate(Mutation),
    /// Reads metadata, as new as the last acknowledged change (P5).
    Query(Query),
    /// Makes the session known. Sending it again does no harm.
    OpenSession {
        /// Drawn at random by the client.
        session: SessionId,
        /// For people: host, process, mount point.
        description: String,
    },
    /// The session lives.
    KeepAlive {
        /// Which.
        session: SessionId,
    },
    /// The session is over: what it held is released.
    CloseSession {
        /// Which.
        session: SessionId,
    },
    /// As [`ClientRequest::OpenSession`], of a session that proves itself: from now on only streams that show the secret speak for
    /// it. With another secret than before it is refused.
    OpenSessionWithKey {
        /// Drawn at random by the client.
        session: SessionId,
        /// For people: host, process, mount point.
        description: String,
        /// Likewise.
        secret: SessionSecret,
    },
    /// The session lives, and answers the question that came with the last keep-alive. Sending it again does no harm.
    AnswerUnlinked {
        /// Which.
        session: SessionId,
        /// As in the question.
        from: u64,
        /// As in the question.
        through: u64,
        /// Those of the inodes asked about that it holds. All others it does not hold, and never will again.
        held: Vec<InodeNumber>,
    },
    /// Ends a session whose process is known to be gone; answered as [`ClientRequest::CloseSession`].
    CloseSessionWithKey {
        /// Which.
        session: SessionId,
        /// With which it was opened.
        secret: SessionSecret,
    },
}

/// A command with its identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mutation {
    /// Names it once.
    pub request: RequestId,
    /// Chunks of this session with a smaller counter that no file names are dead.
    pub chunk_low_water: u64,
    /// What is to be done.
    pub command: Command,
}

/// What a client is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientResponse {
    /// What a mutation did, or why it did nothing. Final: it is what every retry will hear.
    Outcome(Result<Outcome, FsError>),
    /// What a query found.
    Answer(Result<Answer, FsError>),
    /// The session is known and alive.
    Session(SessionState),
    /// Nothing was decided; the client tries again as the reason says.
    Refused(Refusal),
}

/// What a client should know of its session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    /// Unlinked inodes that wait for this session to say that it does not have them open
    /// ([`crate::command::Operation::ReleaseUnlinked`]): at most [`crate::limits::HELD_ASKED_MAX`] at a time, and others the
    /// next time.
    pub unlinked: Vec<InodeNumber>,
}

impl ClientResponse {
    /// The place of `Refused` among the variants, as the encoding names it.
    const REFUSED: u8 = 3;

    /// The refusal that `reply` is in the encoding of [`codec`]; `None` for every other reply, which is not decoded, and
    /// for what is malformed.
    pub fn encoded_refusal(reply: &[u8]) -> Option<Refusal> {
        if *reply.get(1)? != ClientResponse::REFUSED {
            return None;
        }
        match codec::decode(reply) {
            Ok(ClientResponse::Refused(refusal)) => Some(refusal),
            _ => None,
        }
    }
}

impl From<Refusal> for ClientResponse {
    fn from(refusal: Refusal) -> ClientResponse {
        ClientResponse::Refused(refusal)
    }
}

/// Why nothing was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// This node does not lead; ask there, or look for the leader.
    NotLeader {
        /// Its gRPC address, where it is known.
        leader: Option<String>,
    },
    /// Nobody can decide now; try again a little later.
    Unavailable {
        /// In words, for `/status` and the log.
        reason: String,
    },
    /// These chunks are not known to be on f + 1 voters: put them again, then send the same mutation again.
    PutAgain {
        /// Which.
        chunks: Vec<ChunkId>,
    },
    /// The session is not known or has ended. What it had under way has an unknown outcome and must not be sent
    /// again under another (EIO).
    UnknownSession,
    /// A later mutation of the lane was already decided; the sender has lost count.
    StaleSequence,
    /// The call could not be decoded or is out of bounds.
    Invalid {
        /// What is wrong with it.
        reason: String,
    },
    /// The session has ended, and its lanes prove that this mutation was not decided before: it never will be, and may be
    /// sent again under another session.
    NeverDecided,
}

impl Refusal {
    /// Another node leads: `leader`, if it is known.
    pub fn not_leader(leader: Option<Member>) -> Refusal {
        Refusal::NotLeader {
            leader: leader.map(|member| member.addresses.grpc),
        }
    }

    /// Nobody can decide now because of `reason`.
    pub fn unavailable(reason: impl std::fmt::Display) -> Refusal {
        Refusal::Unavailable {
            reason: reason.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_found_without_decoding_other_replies() {
        let refusals = [
            Refusal::NotLeader { leader: None },
            Refusal::unavailable("no quorum"),
            Refusal::NeverDecided,
        ];
        for refusal in refusals {
            let reply = codec::encode(&ClientResponse::from(refusal.clone()));
            assert_eq!(ClientResponse::encoded_refusal(&reply), Some(refusal));
            assert_eq!(ClientResponse::encoded_refusal(&reply[..2]), None);
        }
        for reply in [
            ClientResponse::Outcome(Err(FsError::Stale)),
            ClientResponse::Answer(Err(FsError::Stale)),
            ClientResponse::Session(SessionState::default()),
        ] {
            let reply = codec::encode(&reply);
            assert_ne!(reply[1], ClientResponse::REFUSED);
            assert_eq!(ClientResponse::encoded_refusal(&reply), None);
        }
        assert_eq!(ClientResponse::encoded_refusal(&[]), None);
    }
}
