//! The calls of a client to the leader: the contents of the envelopes of the `Calls` stream.

use serde::{Deserialize, Serialize};

use crate::codec;
use crate::command::Command;
use crate::error::FsError;
use crate::ids::{ChunkId, InodeNumber, RequestId, SessionId, SessionSecret};
use crate::member::Member;
use crate::outcome::Outcome;
use crate::query::{Answer, Query};

/// A request of a client. Mutations and queries are separate types; only mutations carry a request id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientRequest {
    /// Changes metadata once, however often it is sent.
    Mutate(Mutation),
    /// Reads metadata that includes every change acknowledged before (P5).
    Query(Query),
    /// Registers the session. Sending it again has no further effect.
    OpenSession {
        /// Random id drawn by the client.
        session: SessionId,
        /// Description for people: host, process, mount point.
        description: String,
    },
    /// States that the session is alive.
    KeepAlive {
        /// Id of the session.
        session: SessionId,
    },
    /// Ends the session and releases what it held.
    CloseSession {
        /// Id of the session.
        session: SessionId,
    },
    /// Like [`ClientRequest::OpenSession`], with a secret: from now on only streams that show the secret may act for
    /// the session. A secret that differs from an earlier one is refused.
    OpenSessionWithKey {
        /// Random id drawn by the client.
        session: SessionId,
        /// Description for people: host, process, mount point.
        description: String,
        /// Random secret drawn by the client.
        secret: SessionSecret,
    },
    /// States that the session is alive, and answers the question that came with the last keep-alive. Sending it again
    /// has no further effect.
    AnswerUnlinked {
        /// Id of the session.
        session: SessionId,
        /// `from` of the question.
        from: u64,
        /// `through` of the question.
        through: u64,
        /// The inodes in the question that the session holds. It does not hold the others, and never will again.
        held: Vec<InodeNumber>,
    },
    /// Ends a session whose process is known to be gone. The response is that of [`ClientRequest::CloseSession`].
    CloseSessionWithKey {
        /// Id of the session.
        session: SessionId,
        /// The secret with which the session was opened.
        secret: SessionSecret,
    },
}

/// A command with its request id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mutation {
    /// Identifies the mutation, so that it takes effect once.
    pub request: RequestId,
    /// Chunks of this session with a smaller counter that no file names are dead.
    pub chunk_low_water: u64,
    /// The operations to apply.
    pub command: Command,
}

/// A response to a client.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ClientResponse {
    /// The result of a mutation, or why it was refused. It is final: every retry gets the same.
    Outcome(Result<Outcome, FsError>),
    /// The answer to a query.
    Answer(Result<Answer, FsError>),
    /// The session is known and alive.
    Session(SessionState),
    /// Nothing was decided; the client tries again as the reason says.
    Refused(Refusal),
}

/// What the leader reports to a client about its session.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionState {
    /// Unlinked inodes for which the leader waits until this session states that it does not have them open
    /// ([`crate::command::Operation::ReleaseUnlinked`]): at most [`crate::limits::HELD_ASKED_MAX`] at a time; the
    /// others follow with later responses.
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
    /// This node is not the leader. The client asks `leader`, or looks for it.
    NotLeader {
        /// gRPC address of the leader, if it is known.
        leader: Option<String>,
    },
    /// No node can decide now; the client tries again a little later.
    Unavailable {
        /// Explanation for `/status` and the log.
        reason: String,
    },
    /// These chunks are not known to be on f + 1 voters: the client puts them again, then sends the same mutation
    /// again.
    PutAgain {
        /// Ids of the chunks.
        chunks: Vec<ChunkId>,
    },
    /// The session is not known or has ended. Its mutations without a response have an unknown outcome and must not be
    /// sent again under another session (EIO).
    UnknownSession,
    /// A later mutation of the lane was already decided; the sender's sequence numbers are wrong.
    StaleSequence,
    /// The call could not be decoded or is out of bounds.
    Invalid {
        /// What is wrong with the call.
        reason: String,
    },
    /// The session has ended, and its lanes prove that this mutation was not decided: it never will be, and may be sent
    /// again under another session.
    NeverDecided,
}

impl Refusal {
    /// Returns a refusal that names `leader` as the leader, if it is known.
    pub fn not_leader(leader: Option<Member>) -> Refusal {
        Refusal::NotLeader {
            leader: leader.map(|member| member.addresses.grpc),
        }
    }

    /// Returns a refusal that says that no node can decide now, because of `reason`.
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
