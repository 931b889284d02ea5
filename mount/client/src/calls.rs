//! The stream of metadata calls: envelopes of [`Call`] and [`CallReply`].
//!
//! Knows the encoding and which refusals concern the stream rather than the caller; nothing of lanes or sessions.

use bytes::Bytes;
use quorumfs_proto::codec;
use quorumfs_proto::wire::file_system_client::FileSystemClient;
use quorumfs_proto::wire::{CallRequest, CallResponse, ClientStatistics};
use quorumfs_proto::{Call, CallReply, Refusal, limits};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::connector::Purpose;
use crate::leader_link::{Delivery, LeaderLink, Protocol, Reading};
use crate::lease::Lease;

/// Most queries of one client at once; more wait. So many small answers fill a connection.
pub(crate) const QUERIES_MAX: usize = 256;
/// Opening, keeping and closing a session.
const SESSION_CALLS_MAX: usize = 4;
/// Replies up to this size are decoded by the task that reads the stream, which must see refusals (the largest names
/// [`limits::COMMAND_CHUNKS_MAX`] chunks of at most 20 bytes); larger ones (listings) by whoever asked, so that they
/// do not hold up the others.
const DECODE_AT_ONCE_BYTES_MAX: usize = 16 << 10;

/// Metadata calls.
pub(crate) struct Calls;

/// A reply, maybe still encoded.
#[derive(Debug)]
pub(crate) enum Received {
    Decoded(CallReply),
    Encoded(Bytes),
}

impl Protocol for Calls {
    const NAME: &'static str = "calls";
    const PURPOSE: Purpose = Purpose::Calls;
    const OUTSTANDING_MAX: usize = QUERIES_MAX + limits::LANES_MAX as usize + SESSION_CALLS_MAX;
    const RESEND_AFTER_MS: u64 = 2_000;
    type Request = CallRequest;
    type Response = CallResponse;
    type Reply = Received;

    async fn open(
        client: &mut FileSystemClient<Channel>,
        requests: ReceiverStream<CallRequest>,
    ) -> Result<Response<Streaming<CallResponse>>, Status> {
        client.calls(requests).await
    }

    fn number(request: &mut CallRequest, call_id: u64) {
        request.call_id = call_id;
    }

    fn claim(request: &mut CallRequest, lease: &Lease) {
        (request.session, request.holds_lease) = lease.claim();
    }

    fn lease_ms(response: &CallResponse) -> u32 {
        response.lease_ms
    }

    fn clock_ns(response: &CallResponse) -> i64 {
        response.clock_ns
    }

    fn read(response: CallResponse) -> (u64, Reading<Received>) {
        let reading = match response.reply.len() {
            0..=DECODE_AT_ONCE_BYTES_MAX => match decode(&response.reply) {
                CallReply::Refused(Refusal::UnknownSession) if response.never_decided => {
                    Reading::Reply(Received::Decoded(CallReply::Refused(Refusal::NeverDecided)))
                }
                CallReply::Refused(Refusal::NotLeader { leader }) => Reading::NotLeader { hint: leader },
                CallReply::Refused(Refusal::Unavailable { reason }) => Reading::Unavailable { reason },
                reply => Reading::Reply(Received::Decoded(reply)),
            },
            _ => Reading::Reply(Received::Encoded(response.reply)),
        };
        (response.call_id, reading)
    }
}

/// A reply that cannot be decoded is a refusal to whoever asked: only a newer program can help.
fn decode(reply: &[u8]) -> CallReply {
    codec::decode(reply).unwrap_or_else(|error| {
        CallReply::Refused(Refusal::Invalid {
            reason: format!("the reply cannot be read: {error}"),
        })
    })
}

/// A decided call: the reply, and how often the call was sent.
pub(crate) struct Decided {
    pub(crate) reply: CallReply,
    pub(crate) sends: u32,
}

impl LeaderLink<Calls> {
    /// Sends an encoded call until the leader decides; `None` when the client is being closed. Never answers
    /// `NotLeader` or `Unavailable`.
    pub(crate) async fn decide(&self, call: Bytes) -> Option<Decided> {
        self.deliver(CallRequest {
            call,
            ..CallRequest::default()
        })
        .await
    }

    async fn deliver(&self, request: CallRequest) -> Option<Decided> {
        match self.call(request).await {
            Delivery::Reply(Received::Decoded(reply), sends) => Some(Decided { reply, sends }),
            Delivery::Reply(Received::Encoded(reply), sends) => Some(Decided {
                reply: decode(&reply),
                sends,
            }),
            Delivery::Unavailable(..) | Delivery::Closed => None,
        }
    }

    /// As [`LeaderLink::ask`], and tells what this client has done so far.
    pub(crate) async fn ask_telling(
        &self,
        call: &Call,
        statistics: Option<ClientStatistics>,
    ) -> Option<CallReply> {
        let request = CallRequest {
            call: codec::encode(call),
            statistics,
            ..CallRequest::default()
        };
        self.deliver(request).await.map(|decided| decided.reply)
    }

    /// As [`LeaderLink::decide`], for a call that is not kept.
    pub(crate) async fn ask(&self, call: &Call) -> Option<CallReply> {
        self.decide(codec::encode(call))
            .await
            .map(|decided| decided.reply)
    }
}
