//! openraft's own storage suite, run on the log and the state machine on disk.

use std::sync::Arc;
use std::time::Duration;

use openraft::StorageError;
use openraft::testing::log::{StoreBuilder, Suite};

use crate::consensus::fatal::FatalSignal;
use crate::consensus::flusher::Flusher;
use crate::consensus::log::LogStore;
use crate::consensus::snapshot::SnapshotTraffic;
use crate::consensus::state_machine::{Outlets, StateMachine};
use crate::consensus::types::TypeConfig;
use crate::consensus::wal::WalOptions;
use quorumfs_content::{ContentOptions, ContentStore};
use quorumfs_metadata::{MetadataOptions, MetadataStore};

struct OnDisk;

/// Ends what `build` started; then the folder is removed.
struct Guard {
    flusher: Arc<Flusher>,
    _folder: tempfile::TempDir,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.flusher.stop();
    }
}

impl StoreBuilder<TypeConfig, LogStore, StateMachine, Guard> for OnDisk {
    async fn build(&self) -> Result<(Guard, LogStore, StateMachine), StorageError<TypeConfig>> {
        let folder = tempfile::tempdir().unwrap();
        let fatal = FatalSignal::default();
        let wal = WalOptions {
            file_bytes: 64 << 10,
            ..WalOptions::default()
        };
        let log = LogStore::open(&folder.path().join("log"), &wal, fatal.clone()).unwrap();
        let metadata =
            MetadataStore::open(&folder.path().join("metadata.redb"), MetadataOptions::default()).unwrap();
        let metadata = Arc::new(metadata);
        let content = ContentStore::open(
            &folder.path().join("content"),
            ContentOptions {
                segment_bytes: 1 << 20,
                ..ContentOptions::default()
            },
        );
        let content = Arc::new(content.unwrap().0);
        let age_max = Duration::from_secs(60);
        let directory = folder.path().join("log");
        let flusher = Flusher::start(
            metadata.clone(),
            content,
            log.clone(),
            fatal.clone(),
            age_max,
            &directory,
        )
        .unwrap();
        let (effects, _) = tokio::sync::mpsc::channel(1);
        let outlets = Outlets {
            effects,
            audited: Arc::default(),
            takes_part: Arc::default(),
            log_only: false,
        };
        let machine = StateMachine::new(
            metadata,
            flusher.clone(),
            log.clone(),
            SnapshotTraffic::new(1 << 30),
            outlets,
            Arc::default(),
            fatal,
        );
        let guard = Guard {
            flusher,
            _folder: folder,
        };
        Ok((guard, log, machine.unwrap()))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_and_state_machine_are_what_openraft_expects() {
    Suite::test_all(OnDisk).await.unwrap();
}
