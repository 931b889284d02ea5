//! Snapshots: the metadata of a durable moment, built while applies continue, sent in parts of rows, received into a
//! file of their own.
//!
//! A snapshot has metadata, not content; recovery fetches content. One is sent at a time, since each reads the whole
//! database. The time-out applies to progress, because a large snapshot takes long.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures::{Stream, StreamExt};
use openraft::alias::SnapshotOf;
use openraft::storage::RaftSnapshotBuilder;
use quorumfs_wire as wire;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::flusher::Flusher;
use super::position::decode_position;
use super::types::{SnapshotMeta, TypeConfig};
use quorumfs_metadata::{MetadataStore, Received, Row, Snapshot, StorageFault};

/// Bytes of rows in one part: large enough to make the cost of a message negligible, small enough to measure progress.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces read ahead of the network.
const PIECES_AHEAD: usize = 4;
/// Bytes before each row's key: table, length of key, length of value.
const ROW_HEADER_BYTES: usize = 9;
/// A sender of a snapshot that is silent for this long is assumed to be gone.
pub const PROGRESS_TIMEOUT: Duration = Duration::from_secs(30);
/// Most time after the last part, when the receiver flushes its new file, which may be large.
pub const INSTALL_TIMEOUT: Duration = Duration::from_secs(300);

/// The data that openraft passes from the source of a snapshot to its destination.
pub enum SnapshotData {
    /// This node's own snapshot, to be sent.
    Held(Arc<Snapshot>),
    /// A snapshot of another node, complete, to be installed.
    Received(Box<Received>),
}

/// Returns the snapshot that this node could send now.
pub fn held_snapshot(
    metadata: &MetadataStore,
) -> Result<SnapshotOf<TypeConfig, SnapshotData>, Box<dyn std::error::Error + Send + Sync>> {
    let snapshot = metadata.snapshot()?;
    let (last_log_id, last_membership) = decode_position(snapshot.position())?;
    Ok(SnapshotOf::<TypeConfig, SnapshotData> {
        meta: SnapshotMeta {
            last_log_id,
            last_membership,
        },
        snapshot: SnapshotData::Held(Arc::new(snapshot)),
    })
}

/// Builds a snapshot: flushes, and takes the durable state.
pub struct Builder {
    metadata: Arc<MetadataStore>,
    flusher: Arc<Flusher>,
}

impl Builder {
    /// Makes a builder for `metadata`.
    pub fn new(metadata: Arc<MetadataStore>, flusher: Arc<Flusher>) -> Builder {
        Builder { metadata, flusher }
    }
}

impl RaftSnapshotBuilder<TypeConfig> for Builder {
    type SnapshotData = SnapshotData;

    async fn build_snapshot(&mut self) -> io::Result<SnapshotOf<TypeConfig, SnapshotData>> {
        let (metadata, flusher) = (self.metadata.clone(), self.flusher.clone());
        let built = tokio::task::spawn_blocking(move || {
            match flusher.flush() {
                // A full disk is no fault: the snapshot has the last durable state.
                Ok(_) | Err(super::flusher::FlushError::NoSpace(_)) => {}
                Err(fatal) => return Err(fatal.into()),
            }
            held_snapshot(&metadata).map_err(io::Error::other)
        });
        built.await.map_err(io::Error::other)?
    }
}

/// Limits the sending of snapshots to one at a time, and keeps the log while one is sent.
#[derive(Clone)]
pub struct SnapshotTraffic {
    gate: Arc<Semaphore>,
    hold_log_bytes_max: u64,
}

impl SnapshotTraffic {
    /// While a snapshot is sent, the log may grow to `hold_log_bytes_max`.
    pub fn new(hold_log_bytes_max: u64) -> SnapshotTraffic {
        SnapshotTraffic {
            gate: Arc::new(Semaphore::new(1)),
            hold_log_bytes_max,
        }
    }

    /// Waits for the permission to send.
    pub async fn turn(&self) -> SemaphorePermit<'_> {
        self.gate.acquire().await.expect("the gate is never closed")
    }

    /// Whether a new snapshot, behind which the log could be purged, must wait.
    pub fn must_wait(&self, log_bytes: u64) -> bool {
        self.gate.available_permits() == 0 && log_bytes < self.hold_log_bytes_max
    }
}

fn put_row(out: &mut BytesMut, row: &Row) {
    out.reserve(ROW_HEADER_BYTES + row.key.len() + row.value.len());
    out.put_u8(row.table);
    out.put_u32_le(row.key.len() as u32);
    out.put_u32_le(row.value.len() as u32);
    out.put_slice(&row.key);
    out.put_slice(&row.value);
}

/// Decodes the rows of a part; `None` if it is malformed.
fn take_rows(mut part: Bytes) -> Option<Vec<Row>> {
    let mut rows = Vec::new();
    while !part.is_empty() {
        if part.len() < ROW_HEADER_BYTES {
            return None;
        }
        let table = part.get_u8();
        let key_bytes = part.get_u32_le() as usize;
        let value_bytes = part.get_u32_le() as usize;
        if part.len() < key_bytes.checked_add(value_bytes)? {
            return None;
        }
        let key = part.split_to(key_bytes);
        let value = part.split_to(value_bytes);
        rows.push(Row { table, key, value });
    }
    Some(rows)
}

fn part(part: wire::snapshot_part::Part) -> wire::SnapshotPart {
    wire::SnapshotPart { part: Some(part) }
}

/// A snapshot that is being sent.
pub struct Sending {
    /// Number of parts that the network has taken.
    pub sent: Arc<AtomicU64>,
    /// Task that reads the rows; its result tells whether reading succeeded.
    pub reading: tokio::task::JoinHandle<Result<(), StorageFault>>,
}

/// Returns the parts of `snapshot`, after `header`.
pub fn parts(
    header: wire::RaftMessage,
    snapshot: Arc<Snapshot>,
) -> (Sending, impl Stream<Item = wire::SnapshotPart> + Send + 'static) {
    use wire::snapshot_part::Part;
    let (sender, receiver) = mpsc::channel(PIECES_AHEAD);
    let reading = tokio::task::spawn_blocking(move || {
        let mut rows = 0;
        let mut crc = 0;
        let mut buffer = BytesMut::with_capacity(PIECE_BYTES);
        // A send fails when the receiver is gone: then the rest is not needed.
        if sender.blocking_send(part(Part::Header(header))).is_err() {
            return Ok(());
        }
        for row in snapshot.rows() {
            put_row(&mut buffer, &row?);
            rows += 1;
            if buffer.len() >= PIECE_BYTES {
                crc = crc32c::crc32c_append(crc, &buffer);
                let full = std::mem::replace(&mut buffer, BytesMut::with_capacity(PIECE_BYTES));
                if sender.blocking_send(part(Part::Rows(full.freeze()))).is_err() {
                    return Ok(());
                }
            }
        }
        crc = crc32c::crc32c_append(crc, &buffer);
        if sender.blocking_send(part(Part::Rows(buffer.freeze()))).is_ok() {
            let _ = sender.blocking_send(part(Part::End(wire::SnapshotEnd { rows, crc })));
        }
        Ok(())
    });
    let sent = Arc::new(AtomicU64::new(0));
    let counter = sent.clone();
    let stream = ReceiverStream::new(receiver).inspect(move |_| {
        counter.fetch_add(1, Ordering::Relaxed);
    });
    (Sending { sent, reading }, stream)
}

/// Why the received data is not a snapshot that can be installed.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The sender ended the stream, or fell silent.
    #[error("the snapshot was cut short: {0}")]
    CutShort(String),
    /// The data is not what was sent.
    #[error("the snapshot is malformed: {0}")]
    Malformed(&'static str),
    /// The snapshot could not be stored.
    #[error("cannot store the snapshot: {0}")]
    Storage(#[from] StorageFault),
    /// The task that stores it panicked.
    #[error("storing the snapshot failed: {0}")]
    Panicked(#[from] tokio::task::JoinError),
}

async fn next_part<S>(incoming: &mut S) -> Result<wire::snapshot_part::Part, ReceiveError>
where
    S: Stream<Item = Result<wire::SnapshotPart, tonic::Status>> + Unpin,
{
    let cut = |reason: &str| ReceiveError::CutShort(reason.to_string());
    match tokio::time::timeout(PROGRESS_TIMEOUT, incoming.next()).await {
        Err(_) => Err(cut("the sender fell silent")),
        Ok(None) => Err(cut("the sender stopped before the end")),
        Ok(Some(Err(status))) => Err(cut(status.message())),
        Ok(Some(Ok(message))) => message.part.ok_or(ReceiveError::Malformed("an empty part")),
    }
}

/// Receives the header of a snapshot.
pub async fn receive_header<S>(incoming: &mut S) -> Result<wire::RaftMessage, ReceiveError>
where
    S: Stream<Item = Result<wire::SnapshotPart, tonic::Status>> + Unpin,
{
    match next_part(incoming).await? {
        wire::snapshot_part::Part::Header(header) => Ok(header),
        _ => Err(ReceiveError::Malformed("no header")),
    }
}

/// Receives the parts after the header. The snapshot is on disk when this returns.
pub async fn receive_rows<S>(incoming: &mut S, metadata: Arc<MetadataStore>) -> Result<Received, ReceiveError>
where
    S: Stream<Item = Result<wire::SnapshotPart, tonic::Status>> + Unpin,
{
    use wire::snapshot_part::Part;
    let mut installation = tokio::task::spawn_blocking(move || metadata.begin_install()).await??;
    let mut row_count = 0;
    let mut crc = 0;
    loop {
        match next_part(incoming).await? {
            Part::Header(_) => return Err(ReceiveError::Malformed("a second header")),
            Part::Rows(bytes) => {
                crc = crc32c::crc32c_append(crc, &bytes);
                let rows = take_rows(bytes).ok_or(ReceiveError::Malformed("a broken row"))?;
                row_count += rows.len() as u64;
                let added = tokio::task::spawn_blocking(move || {
                    installation.add(&rows)?;
                    Ok::<_, StorageFault>(installation)
                });
                installation = added.await??;
            }
            Part::End(end) if end.rows == row_count && end.crc == crc => {
                return Ok(tokio::task::spawn_blocking(move || installation.finish()).await??);
            }
            Part::End(_) => {
                return Err(ReceiveError::Malformed(
                    "the number of rows or the checksum differs",
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_survive_a_piece_and_a_cut_piece_is_seen() {
        let row = |table, key: &'static [u8], value: &'static [u8]| Row {
            table,
            key: Bytes::from_static(key),
            value: Bytes::from_static(value),
        };
        let rows = vec![row(1, b"key", b"value"), row(2, b"", b""), row(255, b"k", b"")];
        let mut part = BytesMut::new();
        for row in &rows {
            put_row(&mut part, row);
        }
        let part = part.freeze();
        assert_eq!(take_rows(part.clone()).as_ref(), Some(&rows));
        let whole_rows = [0, 17, 26, part.len()];
        for end in 0..part.len() {
            let cut = take_rows(part.slice(..end));
            assert_eq!(cut.is_some(), whole_rows.contains(&end), "cut at {end}");
        }
    }
}
