//! The stream of metadata calls: envelopes of [`ClientRequest`] and [`ClientResponse`].
//!
//! Knows the encoding and which refusals concern the stream rather than the caller; nothing of lanes or sessions.

use bytes::Bytes;
use quorumfs_proto::codec;
use quorumfs_proto::{ClientRequest, ClientResponse, Refusal, limits};
use quorumfs_wire::file_system_client::FileSystemClient;
use quorumfs_wire::{CallRequest, CallResponse, ClientStatistics, UnlinkedQuestion};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Response, Status, Streaming};

use crate::cluster::Cluster;
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
    Decoded(ClientResponse),
    Encoded(Bytes),
    /// The answer to a keep-alive, and what the cluster asks in turn.
    Asking(ClientResponse, UnlinkedQuestion),
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

    fn greet(request: &mut CallRequest, cluster: &Cluster, greeted: u64) -> u64 {
        request.hello = cluster.hello().filter(|hello| hello.session != greeted);
        if request.hello.is_some() {
            request.local_addresses = cluster.local_addresses();
        }
        request.hello.as_ref().map_or(greeted, |hello| hello.session)
    }

    fn is_nudge(response: &CallResponse) -> bool {
        response.keep_alive_now
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
                ClientResponse::Refused(Refusal::UnknownSession) if response.never_decided => {
                    Reading::Reply(Received::Decoded(ClientResponse::Refused(Refusal::NeverDecided)))
                }
                ClientResponse::Refused(Refusal::NotLeader { leader }) => Reading::NotLeader { hint: leader },
                ClientResponse::Refused(Refusal::Unavailable { reason }) => Reading::Unavailable { reason },
                reply => Reading::Reply(match response.unlinked {
                    Some(question) => Received::Asking(reply, question),
                    None => Received::Decoded(reply),
                }),
            },
            _ => Reading::Reply(Received::Encoded(response.reply)),
        };
        (response.call_id, reading)
    }
}

/// A reply that cannot be decoded is a refusal to whoever asked: only a newer program can help.
fn decode(reply: &[u8]) -> ClientResponse {
    codec::decode(reply).unwrap_or_else(|error| {
        ClientResponse::Refused(Refusal::Invalid {
            reason: format!("the reply cannot be read: {error}"),
        })
    })
}

/// A decided call: the reply, and how often the call was sent.
pub(crate) struct Decided {
    pub(crate) reply: ClientResponse,
    pub(crate) sends: u32,
}

impl LeaderLink<Calls> {
    /// Sends an encoded call until the leader decides; `None` when the client is being closed. Never answers
    /// `NotLeader` or `Unavailable`.
    pub(crate) async fn decide(&self, call: Bytes) -> Option<Decided> {
        let request = CallRequest {
            call,
            ..CallRequest::default()
        };
        self.deliver(request).await.map(|(decided, _)| decided)
    }

    async fn deliver(&self, request: CallRequest) -> Option<(Decided, Option<UnlinkedQuestion>)> {
        let (reply, sends, question) = match self.call(request).await {
            Delivery::Reply(Received::Decoded(reply), sends) => (reply, sends, None),
            Delivery::Reply(Received::Encoded(reply), sends) => (decode(&reply), sends, None),
            Delivery::Reply(Received::Asking(reply, question), sends) => (reply, sends, Some(question)),
            Delivery::Unavailable(..) | Delivery::Closed => return None,
        };
        Some((Decided { reply, sends }, question))
    }

    /// As [`LeaderLink::ask`], of a call that keeps the session alive: tells what this client has done so far, and answers
    /// with what the cluster asks in turn.
    pub(crate) async fn keep_alive(
        &self,
        call: &ClientRequest,
        statistics: Option<ClientStatistics>,
    ) -> Option<(ClientResponse, Option<UnlinkedQuestion>)> {
        let request = CallRequest {
            call: codec::encode(call),
            statistics,
            answers_unlinked: true,
            local_addresses: self.cluster().local_addresses(),
            ..CallRequest::default()
        };
        let answered = self.deliver(request).await;
        answered.map(|(decided, question)| (decided.reply, question))
    }

    /// As [`LeaderLink::decide`], for a call that is not kept.
    pub(crate) async fn ask(&self, call: &ClientRequest) -> Option<ClientResponse> {
        self.decide(codec::encode(call))
            .await
            .map(|decided| decided.reply)
    }
}
