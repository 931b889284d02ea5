//! Content that is saved from the log, and content that is not.

use bytes::Bytes;

use super::cluster::create_inline;
use super::{append, log_id, open_session};
use crate::consensus::fatal::FatalSignal;
use crate::consensus::log::LogStore;
use crate::consensus::rescue::{Rescued, rescue_content};
use crate::consensus::types::Entry;
use crate::consensus::wal::WalOptions;
use quorumfs_content::{ContentOptions, ContentStore};
use quorumfs_metadata::{LogCommand, MetadataOptions, MetadataStore, Position};

fn entry_of(index: u64, command: LogCommand) -> Entry {
    Entry {
        log_id: log_id(1, index),
        payload: openraft::EntryPayload::Normal(command),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_what_the_state_names_is_saved_and_only_with_its_digest() {
    let folder = tempfile::tempdir().unwrap();
    let payload = |byte: u8| Bytes::from(vec![byte; 5000]);
    let (named, named_id) = create_inline(1, 1, "named", payload(1));
    let (other, other_id) = create_inline(1, 2, "other", payload(2));
    let (differs, _) = create_inline(1, 2, "other", payload(3));
    let (unknown, unknown_id) = create_inline(1, 3, "unknown", payload(4));

    let options = MetadataOptions::default();
    let metadata = MetadataStore::open(&folder.path().join("metadata.redb"), options).unwrap();
    let mut batch = metadata.begin();
    for (index, command) in (1..).zip([&open_session(1, "one"), &named, &other]) {
        batch.apply(index, command).unwrap();
    }
    batch.publish(Position {
        index: 3,
        ..Position::default()
    });

    let log = LogStore::open(
        &folder.path().join("log"),
        &WalOptions::default(),
        FatalSignal::default(),
    )
    .unwrap();
    let commands = [open_session(1, "one"), named, differs, unknown];
    let entries = (1..)
        .zip(commands)
        .map(|(index, command)| entry_of(index, command));
    append(&log, entries.collect()).await;
    let (content, _) = ContentStore::open(&folder.path().join("content"), ContentOptions::default()).unwrap();
    let state = metadata.view().unwrap();
    let none = rescue_content(&content, &log, &state, 3).unwrap();
    assert_eq!(
        (none, content.counts().0),
        (Rescued::All, 0),
        "the entry before that was not looked at"
    );
    assert_eq!(rescue_content(&content, &log, &state, 0).unwrap(), Rescued::All);
    assert!(content.holds(named_id));
    assert_eq!(*content.read_whole(named_id).unwrap().payload(), payload(1));
    assert!(!content.contains(other_id) && !content.contains(unknown_id));
    log.close();
}
