//! Reads ranges of chunks from whichever node gives them best.
//!
//! Owes: exactly the bytes asked for, each verified against its block's CRC-32C (P3). A node that fails, is silent,
//! lacks the chunk or holds a damaged copy is passed over; every copy of a chunk is equally right.
//!
//! Invariants: one stream for each node, made when first used; bytes under way are bounded by a budget. An attempt
//! ends when its stream breaks, or is given up because nothing at all has come from the node for
//! [`ATTEMPT_SILENCE_MS_MAX`].

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

/// A node that sends nothing for this time is passed over: with one of three nodes stopped, one read pauses for it.
const ATTEMPT_SILENCE_MS_MAX: u64 = 2_000;
/// A single answer that takes longer than this while others come is lost.
const ATTEMPT_MS_MAX: u64 = 10_000;
/// A node that does not say that it is back in this time is not.
const PROBE_TIMEOUT_MS: u64 = 1_000;
/// How long nodes may say "not here" or "damaged" while others cannot be asked, before the caller hears of it:
/// enough for a restart, and for a repair from another copy.
const PATIENCE_MS: u64 = 5_000;
/// A read whose stream ended goes to the next node at once; when to come back is for [`sources`] to say.
const LIMITS: NodeLimits = NodeLimits {
    queue_max: BYTES_IN_FLIGHT_MAX / TRANSFER_COST_BYTES_MIN,
    streams_max: 1,
    silence_max: Duration::from_millis(ATTEMPT_SILENCE_MS_MAX),
    pause: Duration::ZERO,
};

/// The way chunks come from the nodes.
pub(crate) struct ChunkReader {
    cluster: Arc<Cluster>,
    budget: Budget,
    readers: Mutex<HashMap<String, Arc<NodeReader>>>,
}

/// Why an attempt brought no bytes.
#[derive(Debug)]
enum Missed {
    /// The node holds no such chunk, nor could it fetch it.
    NotFound,
    /// What it holds, or what arrived, is damaged.
    Damaged(String),
    /// No sense in asking another.
    Invalid(String),
    /// It did not answer, or could not.
    Failed(String),
}

/// What one round through all nodes brought.
#[derive(Debug, Default)]
struct Round {
    nodes: usize,
    not_found: usize,
    damaged: usize,
}

impl Round {
    /// The error for the caller, if it is not worth another round after this time.
    fn verdict(&self, elapsed: Duration) -> Option<FsError> {
        let impatient = elapsed >= Duration::from_millis(PATIENCE_MS);
        // What f + 1 nodes hold cannot be missing on a majority.
        if self.not_found > self.nodes / 2 || (impatient && self.not_found > 0 && self.damaged == 0) {
            Some(FsError::Stale)
        } else if impatient && self.damaged > 0 {
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

    /// Ends the streams. Nothing is read from now on.
    pub(crate) fn close(&self) {
        self.readers.lock().clear();
    }

    /// `length` bytes of chunk `id` from `offset` on, however long it takes to find a node that has them.
    pub(crate) async fn get(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        if offset.checked_add(length).is_none_or(|end| end > CHUNK_BYTES_MAX) {
            return Err(FsError::InvalidArgument);
        }
        if length == 0 {
            return Ok(Bytes::new());
        }
        let (session, _) = self.cluster.lease().claim();
        let _share = self.budget.share(length as usize).await;
        let began = Instant::now();
        let mut backoff = Backoff::new();
        loop {
            let mut round = Round::default();
            for reader in self.readers_in_order() {
                round.nodes += 1;
                match reader.fetch(session, id, offset, length).await {
                    Ok(bytes) => return Ok(bytes),
                    Err(Missed::NotFound) => round.not_found += 1,
                    Err(Missed::Damaged(reason)) => {
                        round.damaged += 1;
                        tracing::warn!(chunk = %id, node = reader.address, reason, "a damaged copy is passed over");
                    }
                    Err(Missed::Invalid(reason)) => {
                        tracing::error!(chunk = %id, offset, length, reason, "a node refuses a read");
                        return Err(FsError::InvalidArgument);
                    }
                    Err(Missed::Failed(reason)) => {
                        tracing::debug!(chunk = %id, node = reader.address, reason, "asking the next node");
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

/// The calls to one node, and what is known of it.
struct NodeReader {
    address: String,
    connector: Connector,
    calls: NodeCalls<GetChunkRequest, GetChunkResponse>,
    health: Mutex<Health>,
}

/// A request under way, for the judgement of its node.
struct UnderWay<'a>(&'a Mutex<Health>);

impl UnderWay<'_> {
    fn begin(health: &Mutex<Health>) -> UnderWay<'_> {
        health.lock().under_way += 1;
        UnderWay(health)
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.lock().under_way -= 1;
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

    /// One attempt, verified.
    async fn fetch(&self, session: u64, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, Missed> {
        let sent_at = Instant::now();
        let request = GetChunkRequest {
            call_id: 0,
            chunk: Some(id.into()),
            offset,
            length,
            session,
        };
        let under_way = UnderWay::begin(&self.health);
        let limit = Duration::from_millis(ATTEMPT_MS_MAX);
        let result = match timeout(limit, self.calls.call(request, ())).await {
            Ok(Ok(answer)) => open_answer(answer, offset, length),
            Ok(Err(lost)) => Err(Missed::Failed(lost.to_string())),
            Err(_) => Err(Missed::Failed(format!("no answer in {ATTEMPT_MS_MAX} ms"))),
        };
        drop(under_way);
        let now = Instant::now();
        match &result {
            Ok(_) => self.health.lock().answered(now.duration_since(sent_at), now),
            Err(Missed::Failed(_)) => self.health.lock().failed(now),
            Err(Missed::NotFound | Missed::Damaged(_) | Missed::Invalid(_)) => {}
        }
        result
    }

    /// Asks a node that failed whether it is back, so that no read has to try.
    fn probe_if_due(self: &Arc<Self>, now: Instant) {
        if !self.health.lock().wants_probe(now) {
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

/// The bytes asked for out of an answer that is widened to whole blocks.
fn open_answer(answer: GetChunkResponse, offset: u32, length: u32) -> Result<Bytes, Missed> {
    match answer.status() {
        ChunkStatus::Ok => {}
        ChunkStatus::NotFound => return Err(Missed::NotFound),
        ChunkStatus::Corrupt => return Err(Missed::Damaged(answer.detail)),
        ChunkStatus::Invalid => return Err(Missed::Invalid(answer.detail)),
        status => return Err(Missed::Failed(format!("{status:?}: {}", answer.detail))),
    }
    let range = ChunkRange::try_from(answer).map_err(|malformed| Missed::Damaged(malformed.to_string()))?;
    range.exactly(offset, length).ok_or_else(|| {
        Missed::Damaged(format!(
            "{} bytes from {} are not {length} from {offset}",
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
        let bytes = open_answer(answer(4096, payload.clone()), 5000, 3000).unwrap();
        assert_eq!(bytes, payload[904..3904]);
        let all = open_answer(answer(0, payload.clone()), 0, 10_000).unwrap();
        assert_eq!(all, payload);
    }

    #[test]
    fn a_damaged_or_short_answer_is_no_answer() {
        let damaged = |mut answer: GetChunkResponse, change: fn(&mut GetChunkResponse)| {
            change(&mut answer);
            matches!(open_answer(answer, 4096, 100), Err(Missed::Damaged(_)))
        };
        let good = answer(4096, vec![1; 4096]);
        assert!(open_answer(good.clone(), 4096, 100).is_ok());
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
        let (soon, late) = (Duration::ZERO, Duration::from_millis(PATIENCE_MS));
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
            "nobody can be asked: it waits (P6)"
        );
    }
}
