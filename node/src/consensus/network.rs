//! openraft's messages between nodes.
//!
//! Each message is addressed: it names the node it is for by slot and incarnation. A node that was wiped has a new
//! incarnation at the old address and refuses messages for the old one; otherwise it would vote and acknowledge for
//! entries that it has lost.
//!
//! Appends use one long bidirectional stream with many requests in flight; snapshots use the bulk connection.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures::{Stream, StreamExt};
use openraft::alias::SnapshotOf;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{NetworkError, RPCError, ReplicationClosed, StreamingError, Timeout, Unreachable};
use openraft::network::{RPCOption, RPCTypes, RaftNetworkFactory, RaftNetworkV2};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, SnapshotResponse, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, RaftTypeConfig};
use quorumfs_proto::{Addresses, Member, codec};
use quorumfs_wire as wire;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::commit_only;
use super::cutoff::{Cutoff, Overtaken};
use super::fatal::FatalSignal;
use super::revocable::revocable;
use super::snapshot::{INSTALL_TIMEOUT, PROGRESS_TIMEOUT, SnapshotData, SnapshotTraffic, parts};
use super::types::{SnapshotMeta, TypeConfig, Vote, VoterId};
use crate::transport::{Peer, Purpose, Transport};

/// Most time for the first answer on a stream: a connection and a round trip.
const SETUP_TIMEOUT: Duration = Duration::from_millis(1_500);
/// Most time for the answer to an append: the follower flushes before it answers, and a slow disk is no reason to send
/// everything again.
const APPEND_TIMEOUT: Duration = Duration::from_secs(5);

/// Most time for a node to answer whether it could lead.
const HELLO_TIMEOUT: Duration = Duration::from_millis(500);

type RpcResult<T> = Result<T, RPCError<TypeConfig>>;

/// A message and its receiver.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Addressed<T> {
    /// The node that receives it.
    pub to: VoterId,
    /// The message itself.
    pub body: T,
}

/// First part of a snapshot.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SnapshotHeader {
    /// The sender's vote.
    pub vote: Vote,
    /// The entries that it covers.
    pub meta: SnapshotMeta,
}

/// Encodes `value` into an envelope.
pub fn to_wire<T: Serialize>(value: &T) -> wire::RaftMessage {
    wire::RaftMessage {
        payload: codec::encode(value),
    }
}

/// Decodes the value in an envelope.
pub fn from_wire<T: DeserializeOwned>(message: &wire::RaftMessage) -> Result<T, codec::DecodeError> {
    codec::decode(&message.payload)
}

/// Makes a [`PeerNetwork`] for each peer.
#[derive(Clone)]
pub struct NetworkFactory {
    id: VoterId,
    transport: Arc<Transport>,
    traffic: SnapshotTraffic,
    cutoff: Cutoff,
    fatal: FatalSignal,
    /// Whether the sender's state is unreliable: its log is sent to others, its state is not.
    stood_down: Arc<AtomicBool>,
}

impl NetworkFactory {
    /// Makes the factory for the node `id`.
    pub fn new(
        id: VoterId,
        transport: Arc<Transport>,
        traffic: SnapshotTraffic,
        cutoff: Cutoff,
        fatal: FatalSignal,
        stood_down: Arc<AtomicBool>,
    ) -> NetworkFactory {
        NetworkFactory {
            id,
            transport,
            traffic,
            cutoff,
            fatal,
            stood_down,
        }
    }
}

impl NetworkFactory {
    /// Asks `member` whether it is running and could lead.
    pub async fn ask_whether_it_can_lead(&self, member: &Member) -> Result<(), String> {
        let ask = async {
            let peer = self.transport.peer(&member.addresses, Purpose::Raft);
            let mut peer = peer.map_err(|error| error.to_string())?;
            let answer = peer.hello(wire::HelloRequest::default()).await;
            let answer = answer
                .map_err(|status| status.message().to_string())?
                .into_inner();
            let found = answer.node.and_then(|node| Member::try_from(node).ok());
            match found.is_some_and(|found| found.id == member.id) {
                true if answer.trouble.is_empty() => Ok(()),
                true => Err(answer.trouble),
                false => Err("another incarnation is there".to_string()),
            }
        };
        let asked = tokio::time::timeout(HELLO_TIMEOUT, ask).await;
        asked.unwrap_or_else(|_| Err("it does not answer".to_string()))
    }
}

impl RaftNetworkFactory<TypeConfig> for NetworkFactory {
    type Network = PeerNetwork;

    async fn new_client(&mut self, target: VoterId, node: &Addresses) -> PeerNetwork {
        PeerNetwork {
            shared: self.clone(),
            target,
            addresses: node.clone(),
        }
    }
}

/// The connection to one peer. The transport owns the sockets.
pub struct PeerNetwork {
    shared: NetworkFactory,
    target: VoterId,
    addresses: Addresses,
}

impl PeerNetwork {
    fn peer(&self, purpose: Purpose) -> Result<Peer, Unreachable<TypeConfig>> {
        let peer = self.shared.transport.peer(&self.addresses, purpose);
        peer.map_err(|error| Unreachable::new(&error))
    }

    fn address<T>(&self, body: T) -> Addressed<T> {
        Addressed {
            to: self.target,
            body,
        }
    }

    fn timeout(&self, action: RPCTypes, timeout: Duration) -> Timeout<TypeConfig> {
        Timeout {
            action,
            id: self.shared.id,
            target: self.target,
            timeout,
        }
    }

    /// Sends one request and returns the answer, within openraft's time-out.
    async fn ask<Answer, Call>(
        &self,
        action: RPCTypes,
        option: RPCOption,
        call: impl FnOnce(Peer) -> Call,
    ) -> RpcResult<Answer>
    where
        Answer: DeserializeOwned,
        Call: Future<Output = Result<tonic::Response<wire::RaftMessage>, tonic::Status>>,
    {
        let peer = self.peer(Purpose::Raft)?;
        match tokio::time::timeout(option.soft_ttl(), call(peer)).await {
            Err(_) => Err(self.timeout(action, option.soft_ttl()).into()),
            Ok(Err(status)) => Err(rpc_error(&status)),
            Ok(Ok(answer)) => from_wire(answer.get_ref()).map_err(|error| NetworkError::new(&error).into()),
        }
    }
}

/// Converts an error: an unreachable peer is left alone for a while, everything else is retried.
fn rpc_error(status: &tonic::Status) -> RPCError<TypeConfig> {
    match status.code() {
        tonic::Code::Unavailable | tonic::Code::Unimplemented | tonic::Code::FailedPrecondition => {
            Unreachable::new(status).into()
        }
        _ => NetworkError::new(status).into(),
    }
}

impl RaftNetworkV2<TypeConfig> for PeerNetwork {
    type SnapshotData = SnapshotData;

    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<AppendEntriesResponse<TypeConfig>> {
        let mut answers = self
            .stream_append(Box::pin(futures::stream::iter([rpc])), option)
            .await?;
        match answers.next().await {
            Some(answer) => answer.map(AppendEntriesResponse::from),
            None => Err(NetworkError::from_string("the stream ended without an answer").into()),
        }
    }

    fn stream_append<'s, S>(
        &'s mut self,
        input: S,
        _option: RPCOption,
    ) -> BoxFuture<'s, RpcResult<BoxStream<'s, RpcResult<StreamAppendResult<TypeConfig>>>>>
    where
        S: Stream<Item = AppendEntriesRequest<TypeConfig>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            let mut peer = self.peer(Purpose::Raft)?;
            let in_flight = Arc::new(AtomicU64::new(0));
            let (to, sent) = (self.target, in_flight.clone());
            let position = Arc::new(self.shared.cutoff.position());
            let sending = position.clone();
            let slow_to_open = self.timeout(RPCTypes::AppendEntries, SETUP_TIMEOUT);
            let slow_to_answer = self.timeout(RPCTypes::AppendEntries, APPEND_TIMEOUT);
            let answers: BoxStream<'s, _> = Box::pin(async_stream::stream! {
                let mut input = input.peekable();
                // openraft holds back the first request to an unreachable peer. A stream opened before that request
                // came would try to connect for each call proposed meanwhile.
                match Pin::new(&mut input).peek().await {
                    Some(first) => position.sends(first),
                    None => return,
                }
                let (input, _revoke) = revocable(input);
                // Fused, since the encoder may poll once more after the end.
                let outgoing = commit_only::merged(input).fuse().map(move |body| {
                    sent.fetch_add(1, Ordering::Relaxed);
                    sending.sends(&body);
                    to_wire(&Addressed { to, body })
                });
                let opened = tokio::time::timeout(SETUP_TIMEOUT, peer.append_entries(outgoing)).await;
                let mut incoming = match opened {
                    Err(_) => return yield Err(slow_to_open.into()),
                    Ok(Err(status)) => return yield Err(rpc_error(&status)),
                    Ok(Ok(response)) => response.into_inner(),
                };
                let (mut go_on, mut is_answered) = (true, false);
                while go_on {
                    let answer = tokio::select! {
                        answer = next_answer(&mut incoming, &in_flight, &slow_to_answer) => answer,
                        overtaken = position.overtaken() => Some(Err(too_far_behind(to, overtaken))),
                    };
                    // Requests without an answer have failed. openraft would take the end of the stream as a reason to
                    // repeat its last requests, however old, although the log may be purged beyond them.
                    let is_over = is_answered && in_flight.load(Ordering::Relaxed) == 0;
                    let Some(answer) = answer.or_else(|| (!is_over).then(unanswered)) else { return };
                    is_answered = true;
                    if let Ok(Ok(Some(log_id))) = &answer {
                        position.acknowledged(log_id.index);
                    }
                    go_on = matches!(answer, Ok(Ok(_)));
                    yield answer;
                }
            });
            Ok(answers)
        })
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let message = to_wire(&self.address(rpc));
        self.ask(RPCTypes::Vote, option, |mut peer| async move {
            peer.vote(message).await
        })
        .await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<VoteResponse<TypeConfig>> {
        let message = to_wire(&self.address(rpc));
        self.ask(RPCTypes::Vote, option, |mut peer| async move {
            peer.pre_vote(message).await
        })
        .await
    }

    async fn transfer_leader(
        &mut self,
        rpc: TransferLeaderRequest<TypeConfig>,
        option: RPCOption,
    ) -> RpcResult<TransferLeaderResponse<TypeConfig>> {
        let message = to_wire(&self.address(rpc));
        self.ask(RPCTypes::TransferLeader, option, |mut peer| async move {
            peer.transfer_leader(message).await
        })
        .await
    }

    async fn full_snapshot(
        &mut self,
        vote: <TypeConfig as RaftTypeConfig>::Vote,
        snapshot: SnapshotOf<TypeConfig, SnapshotData>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<TypeConfig>, StreamingError<TypeConfig>> {
        if self.shared.stood_down.load(Ordering::Acquire) || self.shared.fatal.raised().is_some() {
            return Err(NetworkError::from_string(
                "the state of this node is unreliable; it is about to be set aside",
            )
            .into());
        }
        let mut cancel = pin!(cancel);
        let _turn = tokio::select! {
            turn = self.shared.traffic.turn() => turn,
            closed = &mut cancel => return Err(closed.into()),
        };
        let SnapshotData::Held(held) = snapshot.snapshot else {
            return Err(
                NetworkError::from_string("only a snapshot that this node has built can be sent").into(),
            );
        };
        let meta = snapshot.meta;
        let header = to_wire(&self.address(SnapshotHeader { vote, meta }));
        let (mut sending, stream) = parts(header, held);
        let mut peer = self.peer(Purpose::Bulk)?;
        let answer = pin!(peer.install_snapshot(stream));
        let stalled = stalled(sending.sent.clone(), &mut sending.reading, &self.shared.fatal);
        let outcome = tokio::select! {
            answer = answer => answer,
            closed = &mut cancel => return Err(closed.into()),
            waited = stalled => {
                return Err(self.timeout(RPCTypes::InstallSnapshot, waited).into());
            }
        };
        match outcome {
            Ok(answer) => from_wire(answer.get_ref()).map_err(|error| NetworkError::new(&error).into()),
            Err(status) => Err(rpc_error(&status).into()),
        }
    }
}

/// The error that a stream of answers ended too early.
fn unanswered<T>() -> RpcResult<T> {
    Err(NetworkError::from_string("the stream ended before all was answered").into())
}

/// The reason why the stream to `follower` ends.
fn too_far_behind(follower: VoterId, overtaken: Overtaken) -> RPCError<TypeConfig> {
    let Overtaken {
        acknowledged,
        upto,
        has_entries,
    } = overtaken;
    if has_entries {
        tracing::warn!(
            %follower,
            acknowledged,
            upto,
            "the follower is too slow for the log to wait for it: it gets a snapshot"
        );
    }
    let reason = format!("the follower has entries up to {acknowledged} and the log goes up to {upto}");
    NetworkError::from_string(reason).into()
}

/// Returns the next answer of an append stream; `None` at its end. While requests are unanswered, an answer must come
/// in time.
async fn next_answer(
    incoming: &mut tonic::Streaming<wire::RaftMessage>,
    in_flight: &AtomicU64,
    timeout: &Timeout<TypeConfig>,
) -> Option<RpcResult<StreamAppendResult<TypeConfig>>> {
    let mut waiting_before = false;
    let message = loop {
        match tokio::time::timeout(timeout.timeout, incoming.message()).await {
            Ok(message) => break message,
            // The requests in flight may have just been sent: the answer is late only if some were in flight a whole
            // time-out ago.
            Err(_) if in_flight.load(Ordering::Relaxed) > 0 => {
                if waiting_before {
                    return Some(Err(timeout.clone().into()));
                }
                waiting_before = true;
            }
            Err(_) => waiting_before = false,
        }
    };
    match message {
        Ok(None) => None,
        Err(status) => Some(Err(rpc_error(&status))),
        Ok(Some(message)) => {
            in_flight.fetch_sub(1, Ordering::Relaxed);
            Some(from_wire(&message).map_err(|error| NetworkError::new(&error).into()))
        }
    }
}

/// Resolves when a snapshot makes no progress any more, with the time since the last progress.
async fn stalled(
    sent: Arc<AtomicU64>,
    reading: &mut tokio::task::JoinHandle<Result<(), quorumfs_metadata::StorageFault>>,
    fatal: &FatalSignal,
) -> Duration {
    let mut before = 0;
    loop {
        match tokio::time::timeout(PROGRESS_TIMEOUT, &mut *reading).await {
            Err(_) => {
                let now = sent.load(Ordering::Relaxed);
                if now == before {
                    return PROGRESS_TIMEOUT;
                }
                before = now;
            }
            Ok(read) => {
                match read {
                    Ok(Ok(())) => {}
                    Ok(Err(fault)) => {
                        fatal.raise("read a snapshot to send it", fault);
                    }
                    Err(panicked) => {
                        fatal.raise("read a snapshot to send it", panicked);
                    }
                }
                tokio::time::sleep(INSTALL_TIMEOUT).await;
                return INSTALL_TIMEOUT;
            }
        }
    }
}
