//! Reads all metadata repeatedly, at the scrub's rate: when the node starts, and then at an interval. Damage is found
//! before a query meets it, and the node is rebuilt while the others are intact.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tracing::{debug, warn};

use super::{LastError, Repair};
use crate::pace::Pacer;
use crate::wall_clock::unix_ms;
use quorumfs_metadata::{Checked, StorageFault};

/// Time from the end of one check to the start of the next.
const CHECK_INTERVAL: Duration = Duration::from_secs(3600);
/// Bytes of rows read between two checks of the rate.
const SLICE_BYTES: u64 = 1 << 20;

/// The result of the last check of the metadata.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct MetadataCheck {
    /// End of the check, in milliseconds since 1970.
    pub unix_ms: u64,
    /// Number of rows read.
    pub rows: u64,
    /// Bytes of these rows.
    pub bytes: u64,
}

impl Repair {
    /// Checks the metadata repeatedly; never returns.
    pub(super) async fn run_metadata_checks(self: Arc<Self>) {
        loop {
            match self.check_metadata().await {
                Ok(check) => {
                    debug!(?check, "the metadata on the disk is intact");
                    *self.metadata_check.lock() = Some(check);
                }
                Err(message) => {
                    warn!(message, "cannot check the metadata on the disk");
                    self.state.lock().last_error = Some(LastError {
                        unix_ms: unix_ms(),
                        message,
                    });
                }
            }
            tokio::time::sleep(CHECK_INTERVAL).await;
        }
    }

    async fn check_metadata(&self) -> Result<MetadataCheck, String> {
        let mut pacer = Pacer::new(self.options.bytes_per_s);
        let (mut rows, mut bytes, mut from) = (0, 0, None);
        loop {
            let metadata = self.parts.metadata.clone();
            let read = tokio::task::spawn_blocking(move || metadata.check(from, SLICE_BYTES));
            let read: Result<Checked, StorageFault> = read.await.map_err(|panic| panic.to_string())?;
            let read = read.map_err(|fault| fault.to_string())?;
            rows += read.rows;
            bytes += read.bytes;
            from = read.next;
            if from.is_none() {
                return Ok(MetadataCheck {
                    unix_ms: unix_ms(),
                    rows,
                    bytes,
                });
            }
            tokio::time::sleep(pacer.take(Instant::now(), read.bytes)).await;
        }
    }
}
