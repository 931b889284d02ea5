//! The receiving side of [`network`](super::network): takes the messages of the peer service and returns the answers.

use std::sync::Arc;
use std::time::Instant;

use futures::stream::BoxStream;
use futures::{Stream, StreamExt};
use openraft::alias::SnapshotOf;
use openraft::raft::{AppendEntriesRequest, TransferLeaderRequest, VoteRequest};
use parking_lot::Mutex;
use quorumfs_wire as wire;
use serde::de::DeserializeOwned;
use tonic::Status;

use super::Consensus;
use super::network::{Addressed, SnapshotHeader, from_wire, to_wire};
use super::rescue::{Rescued, rescue_content};
use super::snapshot::{ReceiveError, SnapshotData, receive_header, receive_rows};
use super::types::TypeConfig;
use super::types::VoterId;
use quorumfs_metadata::{StorageFault, View};

/// Returns the body of a message, if it is for `this` node and not for an earlier incarnation.
fn body<T: DeserializeOwned>(this: VoterId, message: &wire::RaftMessage) -> Result<T, Status> {
    let addressed: Addressed<T> =
        from_wire(message).map_err(|error| Status::invalid_argument(error.to_string()))?;
    if addressed.to != this {
        return Err(Status::failed_precondition(format!(
            "this is node {this}, not {}",
            addressed.to
        )));
    }
    Ok(addressed.body)
}

fn stopped(error: impl ToString) -> Status {
    Status::unavailable(error.to_string())
}

impl Consensus {
    /// Handles `AppendEntries`: a stream of requests, with answers in the same order. Ends after the first refused
    /// request.
    pub fn append_stream<S>(&self, incoming: S) -> BoxStream<'static, Result<wire::RaftMessage, Status>>
    where
        S: Stream<Item = Result<wire::RaftMessage, Status>> + Send + 'static,
    {
        let this = self.0.id;
        let refused: Arc<Mutex<Option<Status>>> = Arc::default();
        let refusal = refused.clone();
        let (stream, taken) = self.0.intake.stream();
        let requests = incoming
            .then(move |message| {
                let stream = stream.clone();
                async move {
                    let message = message?;
                    let mut request = body::<AppendEntriesRequest<TypeConfig>>(this, &message)?;
                    if !stream.admit(&request, message.payload.len() as u64).await {
                        return Err(Status::cancelled("the receiver of the answers is gone"));
                    }
                    stream.hold_back(&mut request);
                    Ok(request)
                }
            })
            .scan(refused, |refused, request: Result<_, Status>| {
                let request = request.map_err(|status| *refused.lock() = Some(status)).ok();
                futures::future::ready(request)
            });
        let heard = self.0.heard_of_leader.clone();
        let answers = self.0.raft.stream_append(requests).map(move |answer| {
            taken.answered();
            match answer {
                Ok(answer) => {
                    if answer.is_ok() {
                        *heard.lock() = Some(Instant::now());
                    }
                    Ok(to_wire(&answer))
                }
                Err(fatal) => Err(stopped(fatal)),
            }
        });
        // The refusal is read after the answers before it have been sent.
        let refusal = futures::stream::once(async move { refusal.lock().take() });
        Box::pin(answers.chain(refusal.filter_map(|status| futures::future::ready(status.map(Err)))))
    }

    /// Handles `Vote`.
    pub async fn vote(&self, message: wire::RaftMessage) -> Result<wire::RaftMessage, Status> {
        let request: VoteRequest<TypeConfig> = body(self.0.id, &message)?;
        let answer = self.0.raft.vote(request).await.map_err(stopped)?;
        Ok(to_wire(&answer))
    }

    /// Handles `PreVote`.
    pub async fn pre_vote(&self, message: wire::RaftMessage) -> Result<wire::RaftMessage, Status> {
        let request: VoteRequest<TypeConfig> = body(self.0.id, &message)?;
        let answer = self.0.raft.pre_vote(request).await.map_err(stopped)?;
        Ok(to_wire(&answer))
    }

    /// Handles `TransferLeader`. A node whose state is unreliable refuses: openraft would stand for election at once,
    /// even if elections are disabled ([`Consensus::step_aside`]).
    pub async fn transfer_leader(&self, message: wire::RaftMessage) -> Result<wire::RaftMessage, Status> {
        let request: TransferLeaderRequest<TypeConfig> = body(self.0.id, &message)?;
        if *request.to_node_id() == self.0.id
            && let Some(trouble) = self.trouble()
        {
            return Err(Status::failed_precondition(trouble));
        }
        let answer = self.0.raft.handle_transfer_leader(request).await;
        Ok(to_wire(&answer.map_err(stopped)?))
    }

    /// Handles `InstallSnapshot`: the snapshot is received into a file beside the metadata, and installed when it is
    /// whole and no content is lost by it.
    pub async fn install_snapshot<S>(&self, incoming: S) -> Result<wire::RaftMessage, Status>
    where
        S: Stream<Item = Result<wire::SnapshotPart, Status>> + Send + Unpin,
    {
        if let Some(trouble) = self.trouble() {
            return Err(Status::failed_precondition(trouble));
        }
        let mut incoming = incoming;
        let Ok(mut refusals) = self.0.receiving.try_lock() else {
            return Err(Status::aborted("another snapshot is being received"));
        };
        if refusals.is_too_soon() {
            return Err(Status::resource_exhausted(
                "the disk had no space for a snapshot a moment ago",
            ));
        }
        let header = receive_header(&mut incoming).await.map_err(not_received)?;
        let SnapshotHeader { vote, meta } = body(self.0.id, &header)?;
        let received = receive_rows(&mut incoming, self.0.metadata.clone());
        let received = match received.await {
            Ok(received) => received,
            Err(error) => {
                if matches!(error, ReceiveError::Storage(StorageFault::NoSpace { .. })) {
                    refusals.note();
                }
                return Err(not_received(error));
            }
        };
        if let Rescued::AllBut(chunks) = self.rescue(received.view()).await? {
            if !refusals.note() {
                return Err(Status::resource_exhausted(format!(
                    "the disk has no space for {chunks} chunks that only the log has on this node"
                )));
            }
            tracing::warn!(
                chunks,
                "content in the log is dropped with it, since the disk has no space; other nodes have it"
            );
        }
        refusals.clear();
        let snapshot = SnapshotOf::<TypeConfig, SnapshotData> {
            meta,
            snapshot: SnapshotData::Received(Box::new(received)),
        };
        let answer = self.0.raft.install_full_snapshot(vote, snapshot).await;
        Ok(to_wire(&answer.map_err(stopped)?))
    }
}

impl Consensus {
    /// Stores the content that `state` refers to and the log has.
    async fn rescue(&self, state: View) -> Result<Rescued, Status> {
        let (flusher, log) = (self.0.flusher.clone(), self.0.log.clone());
        let rescued = tokio::task::spawn_blocking(move || rescue_content(flusher.content(), &log, &state, 0));
        let rescued = rescued
            .await
            .map_err(|panicked| Status::internal(panicked.to_string()))?;
        rescued.map_err(|error| Status::internal(error.to_string()))
    }
}

fn not_received(error: ReceiveError) -> Status {
    match error {
        ReceiveError::CutShort(_) => Status::aborted(error.to_string()),
        ReceiveError::Malformed(_) => Status::data_loss(error.to_string()),
        ReceiveError::Storage(StorageFault::NoSpace { .. }) => Status::resource_exhausted(error.to_string()),
        ReceiveError::Storage(_) | ReceiveError::Panicked(_) => Status::internal(error.to_string()),
    }
}
