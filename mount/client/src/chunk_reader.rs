//! Reads ranges of chunks from the node that is expected to answer fastest.
//!
//! Returns exactly the requested bytes, each block verified against its CRC-32C (P3). If a node fails, does not
//! answer, lacks the chunk or has a damaged copy, the next node is asked; all copies of a chunk are equal.
//!
//! Invariants: one stream for each node, opened with the first request; the bytes in flight are bounded by a budget.
//! An attempt ends if its stream breaks, or if nothing arrives from the node for [`ATTEMPT_SILENCE_MS_MAX`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use quorumfs_proto::{ChunkId, ChunkRange, FsError};
use quorumfs_wire::calls::{NodeCalls, NodeLimits};
use quorumfs_wire::{ChunkStatus, DiscoverRequest, GetChunkRequest, GetChunkResponse};
use tokio::time::timeout;
use tonic::Status;

use crate::chunk_writer::{BYTES_IN_FLIGHT_MAX, Budget, TRANSFER_COST_BYTES_MIN};
use crate::cluster::Cluster;
use crate::connector::{Backoff, Connector, Purpose};
use crate::sources::{self, Health};

/// Longest time without data from a node before the next is asked. With one of three nodes stopped, one read is
/// delayed by this time.
const ATTEMPT_SILENCE_MS_MAX: u64 = 2_000;
/// Longest time for one answer while others arrive.
const ATTEMPT_MS_MAX: u64 = 10_000;
/// Longest time for a failed node to answer a probe.
const PROBE_TIMEOUT_MS: u64 = 1_000;
/// Time for which copies that are missing or damaged are tolerated while other nodes cannot be reached: enough for a
/// restart, and for a repair from another copy.
const RETRY_MS_MAX: u64 = 5_000;
/// A read whose stream ended is sent to the next node at once; [`sources`] decides when the failed node is used again.
const LIMITS: NodeLimits = NodeLimits {
    queue_max: BYTES_IN_FLIGHT_MAX / TRANSFER_COST_BYTES_MIN,
    streams_max: 1,
    silence_max: Duration::from_millis(ATTEMPT_SILENCE_MS_MAX),
    pause: Duration::ZERO,
};

/// Reads chunks from the nodes.
pub(crate) struct ChunkReader {
    cluster: Arc<Cluster>,
    budget: Budget,
    readers: Mutex<HashMap<String, Arc<NodeReader>>>,
}

/// Why an attempt failed.
#[derive(Debug)]
enum ReadError {
    /// The node has no copy and could not fetch one.
    NotFound,
    /// The copy or the answer is damaged.
    Damaged(String),
    /// The request is invalid; other nodes would refuse it too.
    Invalid(String),
    /// The node did not answer, or could not serve the read.
    Failed(String),
}

/// The results of one attempt on each node.
#[derive(Debug, Default)]
struct Round {
    nodes: usize,
    not_found: usize,
    damaged: usize,
}

impl Round {
    /// Returns the error for the caller, or `None` if another round makes sense after `elapsed`.
    fn verdict(&self, elapsed: Duration) -> Option<FsError> {
        let timed_out = elapsed >= Duration::from_millis(RETRY_MS_MAX);
        // A chunk that f + 1 nodes hold cannot be missing on a majority.
        if self.not_found > self.nodes / 2 || (timed_out && self.not_found > 0 && self.damaged == 0) {
            Some(FsError::Stale)
        } else if timed_out && self.damaged > 0 {
            Some(FsError::Io)
        } else {
            None
        }
    }
}

impl ChunkReader {
    pub(crate) fn new(cluster: Arc<Cluster>, bytes_in_flight_max: usize) -> ChunkReader {
        ChunkReader {
            cluster,
            budget: Budget::new(bytes_in_flight_max),
            readers: Mutex::new(HashMap::new()),
        }
    }

    /// Ends the streams; later reads fail.
    pub(crate) fn close(&self) {
        self.readers.lock().clear();
    }

    /// Returns `length` bytes of chunk `id` from `offset` on; waits until a node can serve them.
    ///
    /// # Errors
    /// [`FsError::InvalidArgument`] if the range is out of bounds, [`FsError::Stale`] if the nodes do not have the
    /// chunk, [`FsError::Io`] if all copies that can be reached are damaged.
    pub(crate) async fn get(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        if offset.checked_add(length).is_none_or(|end| end > CHUNK_BYTES_MAX) {
            return Err(FsError::InvalidArgument);
        }
        if length == 0 {
            return Ok(Bytes::new());
        }
        let (session, _) = self.cluster.lease().session_and_held();
        let _permit = self.budget.acquire(length as usize).await;
        let began = Instant::now();
        let mut backoff = Backoff::new();
        loop {
            let mut round = Round::default();
            for reader in self.readers_in_order() {
                round.nodes += 1;
                match reader.fetch(session, id, offset, length).await {
                    Ok(bytes) => return Ok(bytes),
                    Err(ReadError::NotFound) => round.not_found += 1,
                    Err(ReadError::Damaged(reason)) => {
                        round.damaged += 1;
                        tracing::warn!(chunk = %id, node = reader.address, reason, "a node returned a damaged copy of a chunk; the next node is asked");
                    }
                    Err(ReadError::Invalid(reason)) => {
                        tracing::error!(chunk = %id, offset, length, reason, "a node refused a read as invalid");
                        return Err(FsError::InvalidArgument);
                    }
                    Err(ReadError::Failed(reason)) => {
                        tracing::debug!(chunk = %id, node = reader.address, reason, "a node cannot serve a read; the next node is asked");
                    }
                }
            }
            if let Some(error) = round.verdict(began.elapsed()) {
                return Err(error);
            }
            backoff.pause().await;
        }
    }

    fn readers_in_order(&self) -> Vec<Arc<NodeReader>> {
        let addresses = self.cluster.addresses();
        let now = Instant::now();
        let mut known = self.readers.lock();
        known.retain(|address, _| addresses.contains(address));
        let readers: Vec<Arc<NodeReader>> = addresses
            .into_iter()
            .map(|address| {
                let make = || NodeReader::new(&address, self.cluster.connector());
                known.entry(address.clone()).or_insert_with(make).clone()
            })
            .collect();
        drop(known);
        for reader in &readers {
            reader.probe_if_due(now);
        }
        let healths: Vec<Health> = readers
            .iter()
            .map(|reader| reader.health.lock().clone())
            .collect();
        let order = sources::order(&healths, now);
        order.into_iter().map(|index| readers[index].clone()).collect()
    }
}

/// The calls to one node, and its health.
struct NodeReader {
    address: String,
    connector: Connector,
    calls: NodeCalls<GetChunkRequest, GetChunkResponse>,
    health: Mutex<Health>,
}

/// Counts a request to a node while it is in flight.
struct InFlight<'a>(&'a Mutex<Health>);

impl InFlight<'_> {
    fn begin(health: &Mutex<Health>) -> InFlight<'_> {
        health.lock().in_flight += 1;
        InFlight(health)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.lock().in_flight -= 1;
    }
}

impl NodeReader {
    fn new(address: &str, connector: &Connector) -> Arc<NodeReader> {
        let (at, connect) = (address.to_string(), connector.clone());
        let calls = NodeCalls::new(LIMITS, move |requests| {
            let client = connect.client(&at, Purpose::Bulk);
            async move {
                let mut client = client.map_err(|error| Status::invalid_argument(error.to_string()))?;
                client.get_chunks(requests).await
            }
        });
        Arc::new(NodeReader {
            address: address.to_string(),
            connector: connector.clone(),
            calls,
            health: Mutex::default(),
        })
    }

    /// One attempt; verifies the answer.
    async fn fetch(&self, session: u64, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, ReadError> {
        let sent_at = Instant::now();
        let request = GetChunkRequest {
            call_id: 0,
            chunk: Some(id.into()),
            offset,
            length,
            session,
        };
        let in_flight = InFlight::begin(&self.health);
        let limit = Duration::from_millis(ATTEMPT_MS_MAX);
        let result = match timeout(limit, self.calls.call(request, ())).await {
            Ok(Ok(answer)) => requested_range(answer, offset, length),
            Ok(Err(error)) => Err(ReadError::Failed(error.to_string())),
            Err(_) => Err(ReadError::Failed(format!("no answer in {ATTEMPT_MS_MAX} ms"))),
        };
        drop(in_flight);
        let now = Instant::now();
        match &result {
            Ok(_) => self.health.lock().answered(now.duration_since(sent_at), now),
            Err(ReadError::Failed(_)) => self.health.lock().failed(now),
            Err(ReadError::NotFound | ReadError::Damaged(_) | ReadError::Invalid(_)) => {}
        }
        result
    }

    /// Probes a failed node in the background if a probe is due, so that no read has to try it.
    fn probe_if_due(self: &Arc<Self>, now: Instant) {
        if !self.health.lock().start_probe_if_due(now) {
            return;
        }
        let reader = self.clone();
        tokio::spawn(async move {
            let back = match reader.connector.client(&reader.address, Purpose::Calls) {
                Ok(mut client) => {
                    let limit = Duration::from_millis(PROBE_TIMEOUT_MS);
                    let answer = timeout(limit, client.discover(DiscoverRequest {})).await;
                    matches!(answer, Ok(Ok(_)))
                }
                Err(_) => false,
            };
            reader.health.lock().probed(back, Instant::now());
        });
    }
}

/// Returns the requested bytes of an answer, which is widened to whole blocks.
fn requested_range(answer: GetChunkResponse, offset: u32, length: u32) -> Result<Bytes, ReadError> {
    match answer.status() {
        ChunkStatus::Ok => {}
        ChunkStatus::NotFound => return Err(ReadError::NotFound),
        ChunkStatus::Corrupt => return Err(ReadError::Damaged(answer.detail)),
        ChunkStatus::Invalid => return Err(ReadError::Invalid(answer.detail)),
        status => {
            return Err(ReadError::Failed(format!(
                "{}: {}",
                status.as_str_name(),
                answer.detail
            )));
        }
    }
    let range =
        ChunkRange::try_from(answer).map_err(|malformed| ReadError::Damaged(malformed.to_string()))?;
    range.exactly(offset, length).ok_or_else(|| {
        ReadError::Damaged(format!(
            "the answer has {} bytes from offset {}, not {length} from {offset}",
            range.payload().len(),
            range.offset()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use quorumfs_proto::chunk::block_crcs;

    fn answer(offset: u32, payload: Vec<u8>) -> GetChunkResponse {
        GetChunkResponse {
            call_id: 1,
            status: ChunkStatus::Ok.into(),
            detail: String::new(),
            offset,
            block_crcs: block_crcs(&payload),
            payload: payload.into(),
        }
    }

    #[test]
    fn exactly_the_range_comes_out_of_whole_blocks() {
        let payload: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
        let bytes = requested_range(answer(4096, payload.clone()), 5000, 3000).unwrap();
        assert_eq!(bytes, payload[904..3904]);
        let all = requested_range(answer(0, payload.clone()), 0, 10_000).unwrap();
        assert_eq!(all, payload);
    }

    #[test]
    fn a_damaged_or_short_answer_is_no_answer() {
        let damaged = |mut answer: GetChunkResponse, change: fn(&mut GetChunkResponse)| {
            change(&mut answer);
            matches!(requested_range(answer, 4096, 100), Err(ReadError::Damaged(_)))
        };
        let good = answer(4096, vec![1; 4096]);
        assert!(requested_range(good.clone(), 4096, 100).is_ok());
        assert!(damaged(good.clone(), |a| a.block_crcs[0] ^= 1));
        assert!(damaged(good.clone(), |a| a.block_crcs.clear()));
        assert!(damaged(good.clone(), |a| a.payload = Bytes::from(vec![2; 4096])));
        assert!(damaged(good.clone(), |a| a.offset = 8192));
        assert!(damaged(good, |a| a.offset = 4095));
        assert!(damaged(answer(4096, vec![1; 99]), |_| {}));
    }

    #[test]
    fn a_round_is_judged_by_what_a_quorum_can_know() {
        let round = |nodes, not_found, damaged| Round {
            nodes,
            not_found,
            damaged,
        };
        let (soon, late) = (Duration::ZERO, Duration::from_millis(RETRY_MS_MAX));
        assert_eq!(round(3, 3, 0).verdict(soon), Some(FsError::Stale));
        assert_eq!(round(3, 2, 0).verdict(soon), Some(FsError::Stale));
        assert_eq!(round(3, 1, 0).verdict(soon), None);
        assert_eq!(round(3, 1, 0).verdict(late), Some(FsError::Stale));
        assert_eq!(round(3, 1, 1).verdict(late), Some(FsError::Io));
        assert_eq!(round(3, 0, 3).verdict(soon), None);
        assert_eq!(round(3, 0, 3).verdict(late), Some(FsError::Io));
        assert_eq!(
            round(3, 0, 0).verdict(late),
            None,
            "no node can be reached: the read waits (P6)"
        );
    }
}
