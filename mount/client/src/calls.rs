//! The stream of metadata calls: [`ClientRequest`] in `CallRequest`, [`ClientResponse`] in `CallResponse`.
//!
//! Knows the encoding and which refusals concern the stream instead of the caller; does not know lanes or sessions.
//! Callers decode replies, so that a long listing does not delay the task that reads the stream; that task only
//! decodes refusals.

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
use crate::leader_link::{LeaderLink, Protocol, Verdict};
use crate::lease::BootTime;

/// Most concurrent queries of one client; further ones wait. This number of small answers fills a connection.
pub(crate) const QUERIES_MAX: usize = 256;
/// Most concurrent calls that open, keep alive and close sessions.
const SESSION_CALLS_MAX: usize = 4;

/// The protocol of metadata calls.
pub(crate) struct Calls;

impl Protocol for Calls {
    const NAME: &'static str = "calls";
    const PURPOSE: Purpose = Purpose::Calls;
    const OUTSTANDING_MAX: usize = QUERIES_MAX + limits::LANES_MAX as usize + SESSION_CALLS_MAX;
    const RESEND_AFTER_MS: u64 = 2_000;
    type Request = CallRequest;
    type Response = CallResponse;

    async fn open(
        client: &mut FileSystemClient<Channel>,
        requests: ReceiverStream<CallRequest>,
    ) -> Result<Response<Streaming<CallResponse>>, Status> {
        client.calls(requests).await
    }

    /// Sets whether this client holds the lease and, once on each stream, which session uses the stream.
    fn prepare(request: &mut CallRequest, cluster: &Cluster, announced: &mut u64) {
        (request.session, request.holds_lease) = cluster.lease().session_and_held();
        request.hello = cluster.hello().filter(|hello| hello.session != *announced);
        if let Some(hello) = &request.hello {
            request.local_addresses = cluster.local_addresses();
            *announced = hello.session;
        }
    }

    fn is_keep_alive_request(response: &CallResponse) -> bool {
        response.keep_alive_now
    }

    fn learn(response: &CallResponse, cluster: &Cluster, sent_at: BootTime) {
        cluster.lease().granted(sent_at, response.lease_ms);
        cluster.clock().update(sent_at, response.clock_ns);
    }

    fn verdict(response: &CallResponse) -> Verdict {
        match ClientResponse::encoded_refusal(&response.reply) {
            Some(Refusal::NotLeader { leader }) => Verdict::NotLeader { hint: leader },
            Some(Refusal::Unavailable { reason }) => Verdict::Unavailable { reason },
            _ => Verdict::Decided,
        }
    }
}

/// Decodes a reply. A malformed reply becomes a refusal to the caller, because sending the call again would not help.
fn decode(reply: &[u8]) -> ClientResponse {
    codec::decode(reply).unwrap_or_else(|error| {
        ClientResponse::Refused(Refusal::Invalid {
            reason: format!("cannot decode the reply: {error}"),
        })
    })
}

/// Describes a reply for the log.
pub(crate) fn describe_reply(reply: &ClientResponse) -> String {
    match reply {
        ClientResponse::Outcome(_) => String::from("the outcome of a mutation"),
        ClientResponse::Answer(_) => String::from("the answer to a query"),
        ClientResponse::Session(_) => String::from("the state of a session"),
        ClientResponse::Refused(refusal) => match refusal {
            Refusal::NotLeader { .. } => String::from("the node is not the leader"),
            Refusal::Unavailable { reason } => format!("no decision is possible now: {reason}"),
            Refusal::PutAgain { chunks } => format!("{} chunks must be put again", chunks.len()),
            Refusal::UnknownSession => String::from("the session is unknown or has ended"),
            Refusal::StaleSequence => String::from("a later mutation of the lane was already decided"),
            Refusal::Invalid { reason } => format!("the call is invalid: {reason}"),
            Refusal::NeverDecided => String::from("the session ended before the mutation was decided"),
        },
    }
}

impl LeaderLink<Calls> {
    /// Sends an encoded call until the leader decides; returns the reply and the number of times the call was sent.
    /// `None` if the client is being closed. The reply is never `NotLeader` or `Unavailable`.
    pub(crate) async fn execute_encoded(&self, call: Bytes) -> Option<(ClientResponse, u32)> {
        let request = CallRequest {
            call,
            ..CallRequest::default()
        };
        let (response, sends) = self.call(request).await?;
        Some((decode(&response.reply), sends))
    }

    /// Like [`LeaderLink::execute`], for a call that keeps the session alive. It carries `statistics`; a question of
    /// the leader may come with the reply.
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
        let (response, _) = self.call(request).await?;
        Some((decode(&response.reply), response.unlinked))
    }

    /// Encodes `call` and sends it until the leader decides, like [`LeaderLink::execute_encoded`].
    pub(crate) async fn execute(&self, call: &ClientRequest) -> Option<ClientResponse> {
        let (reply, _) = self.execute_encoded(codec::encode(call)).await?;
        Some(reply)
    }
}
