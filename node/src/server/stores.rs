//! What the data folder holds: opening it, and what follows from how that ends.

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

/// The metadata, or why they do not open, and the content.
type Stores = (anyhow::Result<Arc<MetadataStore>>, Arc<ContentStore>);

/// Opens both: without metadata too the node may vote, and what is in its log is content.
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
        let (content, report) =
            ContentStore::open(&data.join("content"), content_options).context("open content store")?;
        info!(?report, "content store opened");
        let metadata = MetadataStore::open(&data.join(METADATA_FILE), MetadataOptions::default())
            .context("open metadata database");
        anyhow::Ok((metadata.map(Arc::new), Arc::new(content)))
    });
    opened.await.context("open the data folder")?
}

/// How this node takes part in `cluster`: its log is in proportion to the disk that it shares with content.
pub fn consensus_options(
    config: &Config,
    node: &Node,
    cluster: ClusterId,
    content: &ContentStore,
) -> anyhow::Result<ConsensusOptions> {
    let mut options = ConsensusOptions::new(node.own().id, cluster, config.data.join(LOG_FOLDER));
    let capacity_bytes = content
        .space()
        .context("ask for the size of the disk")?
        .capacity_bytes;
    options.log_in_files_of(log_file_bytes(capacity_bytes));
    options.had_log = node.folder().took_part();
    options.tasks = node.tasks().clone();
    Ok(options)
}

/// Whether there are nodes from which what is lost here can be had.
pub fn has_others(config: &Config) -> bool {
    config.members.len() > 1 || !config.founds
}

/// Whether the metadata, which do not open, are to be made anew.
pub fn is_damaged_metadata(error: &anyhow::Error) -> bool {
    let fault = error.downcast_ref::<StorageFault>();
    fault.is_some_and(StorageFault::is_damage)
}

/// How long a log file is on a disk of `capacity_bytes`: the log and what is kept free for it take some of these, which
/// must leave a small disk to content.
fn log_file_bytes(capacity_bytes: u64) -> u64 {
    const PART_OF_CAPACITY: u64 = 64;
    (capacity_bytes / PART_OF_CAPACITY).clamp(8 << 20, 64 << 20)
}
