//! The stream of metadata calls: [`ClientRequest`] in `CallRequest`, [`ClientResponse`] in `CallResponse`.
//!
//! Knows the encoding and which refusals concern the stream rather than the caller; nothing of lanes or sessions.
//! Replies are decoded by their callers, so that a long listing does not hold up the task that reads the stream; that
//! task decodes refusals only.

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

/// Most queries of one client at once; more wait. So many small answers fill a connection.
pub(crate) const QUERIES_MAX: usize = 256;
/// Opening, keeping and closing a session.
const SESSION_CALLS_MAX: usize = 4;

/// Metadata calls.
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

    /// Says whether this client holds the lease, and, once on each stream, for which session it speaks.
    fn prepare(request: &mut CallRequest, cluster: &Cluster, greeted: &mut u64) {
        (request.session, request.holds_lease) = cluster.lease().claim();
        request.hello = cluster.hello().filter(|hello| hello.session != *greeted);
        if let Some(hello) = &request.hello {
            request.local_addresses = cluster.local_addresses();
            *greeted = hello.session;
        }
    }

    fn is_nudge(response: &CallResponse) -> bool {
        response.keep_alive_now
    }

    fn learn(response: &CallResponse, cluster: &Cluster, sent_at: BootTime) {
        cluster.lease().granted(sent_at, response.lease_ms);
        cluster.clock().told(sent_at, response.clock_ns);
    }

    fn verdict(response: &CallResponse) -> Verdict {
        match ClientResponse::encoded_refusal(&response.reply) {
            Some(Refusal::NotLeader { leader }) => Verdict::NotLeader { hint: leader },
            Some(Refusal::Unavailable { reason }) => Verdict::Unavailable { reason },
            _ => Verdict::Decided,
        }
    }
}

/// A reply that cannot be decoded is a refusal to its caller: only a newer program can help.
fn decode(reply: &[u8]) -> ClientResponse {
    codec::decode(reply).unwrap_or_else(|error| {
        ClientResponse::Refused(Refusal::Invalid {
            reason: format!("the reply cannot be read: {error}"),
        })
    })
}

impl LeaderLink<Calls> {
    /// Sends an encoded call until the leader decides: the reply, and how often the call was sent. `None` when the
    /// client is being closed. Never answers `NotLeader` or `Unavailable`.
    pub(crate) async fn decide(&self, call: Bytes) -> Option<(ClientResponse, u32)> {
        let request = CallRequest {
            call,
            ..CallRequest::default()
        };
        let (response, sends) = self.call(request).await?;
        Some((decode(&response.reply), sends))
    }

    /// As [`LeaderLink::ask`], for a call that keeps the session alive. It carries what this client has done so far; what
    /// the cluster asks in turn comes with the reply.
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

    /// As [`LeaderLink::decide`], for a call that is not kept.
    pub(crate) async fn ask(&self, call: &ClientRequest) -> Option<ClientResponse> {
        let (reply, _) = self.decide(codec::encode(call)).await?;
        Some(reply)
    }
}
