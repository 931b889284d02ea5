//! Conversions of members and chunk ids to and from messages.

use quorumfs_proto::{Addresses, ChunkId, Member, NodeId, SessionId};

use crate::messages;

/// A message is not a valid member.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed member: {0}")]
pub struct MalformedMember(&'static str);

impl TryFrom<messages::Member> for Member {
    type Error = MalformedMember;
    fn try_from(member: messages::Member) -> Result<Member, MalformedMember> {
        let slot = u16::try_from(member.slot).map_err(|_| MalformedMember("the slot is above 65535"))?;
        if slot == 0 || member.incarnation == 0 {
            return Err(MalformedMember("the slot or the incarnation is 0"));
        }
        Ok(Member {
            id: NodeId {
                slot,
                incarnation: member.incarnation,
            },
            addresses: Addresses {
                grpc: member.grpc_address,
                http: member.http_address,
            },
        })
    }
}

impl From<Member> for messages::Member {
    fn from(member: Member) -> messages::Member {
        messages::Member {
            slot: u32::from(member.id.slot),
            incarnation: member.id.incarnation,
            grpc_address: member.addresses.grpc,
            http_address: member.addresses.http,
        }
    }
}

impl From<ChunkId> for messages::ChunkId {
    fn from(id: ChunkId) -> messages::ChunkId {
        messages::ChunkId {
            session: id.session.0,
            counter: id.counter,
        }
    }
}

impl From<messages::ChunkId> for ChunkId {
    fn from(id: messages::ChunkId) -> ChunkId {
        ChunkId {
            session: SessionId(id.session),
            counter: id.counter,
        }
    }
}
