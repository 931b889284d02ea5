//! Opens the stores in the data folder, and derives options from the results.

use std::sync::Arc;

use anyhow::Context as _;
use quorumfs_proto::ClusterId;
use tracing::info;

use super::{LOG_FOLDER, METADATA_FILE, log_only};
use crate::config::Config;
use crate::consensus::ConsensusOptions;
use crate::node::Node;
use quorumfs_content::{ContentOptions, ContentStore, Unlisted};
use quorumfs_metadata::{MetadataOptions, MetadataStore, StorageFault};

/// The metadata, or why they cannot be opened, and the content.
type Stores = (anyhow::Result<Arc<MetadataStore>>, Arc<ContentStore>);

/// Opens both stores. Without metadata the node may still vote, and the content of its log is needed for that.
pub async fn open_stores(config: &Config) -> anyhow::Result<Stores> {
    let data = config.data.clone();
    let content_options = ContentOptions {
        unlisted: match has_others(config) {
            true => Unlisted::SetAside,
            false => Unlisted::Refuse,
        },
        ..ContentOptions::default()
    };
    let opened = tokio::task::spawn_blocking(move || {
        log_only::tidy(&data)?;
        let (content, report) = ContentStore::open(&data.join("content"), content_options)
            .context("cannot open the content store")?;
        info!(
            segments = report.segments,
            scanned_segments = report.scanned_segments,
            chunks = report.chunks,
            bytes = report.payload_bytes,
            rewritten_records = report.rewritten_records,
            torn_records = report.torn_records,
            elapsed_ms = report.elapsed.as_millis() as u64,
            "content store opened"
        );
        let metadata = MetadataStore::open(&data.join(METADATA_FILE), MetadataOptions::default())
            .context("cannot open the metadata");
        anyhow::Ok((metadata.map(Arc::new), Arc::new(content)))
    });
    opened.await.context("cannot open the data folder")?
}

/// Returns the options of this node's consensus in `cluster`: its log is in proportion to the disk that it shares with
/// content.
pub fn consensus_options(
    config: &Config,
    node: &Node,
    cluster: ClusterId,
    content: &ContentStore,
) -> anyhow::Result<ConsensusOptions> {
    let mut options = ConsensusOptions::new(node.own().id, cluster, config.data.join(LOG_FOLDER));
    let capacity_bytes = content
        .space()
        .context("cannot get the size of the disk")?
        .capacity_bytes;
    options.log_in_files_of(log_file_bytes(capacity_bytes));
    options.had_log = node.folder().took_part();
    options.tasks = node.tasks().clone();
    Ok(options)
}

/// Whether there are other nodes from which lost state can be rebuilt.
pub fn has_others(config: &Config) -> bool {
    config.members.len() > 1 || !config.founds
}

/// Whether metadata that cannot be opened must be rebuilt.
pub fn is_damaged_metadata(error: &anyhow::Error) -> bool {
    let fault = error.downcast_ref::<StorageFault>();
    fault.is_some_and(StorageFault::is_damage)
}

/// Returns the size of a log file on a disk of `capacity_bytes`: the log and its reserve take several files, and a
/// small disk must have space for content.
fn log_file_bytes(capacity_bytes: u64) -> u64 {
    const PART_OF_CAPACITY: u64 = 64;
    (capacity_bytes / PART_OF_CAPACITY).clamp(8 << 20, 64 << 20)
}
