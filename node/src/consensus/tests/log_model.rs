//! Random operations on the log against a plain model of it, with reopenings in between.

use openraft::storage::{RaftLogReader, RaftLogStorage};
use proptest::prelude::*;

use super::{append, entry, log_id, vote};
use crate::consensus::fatal::FatalSignal;
use crate::consensus::log::LogStore;
use crate::consensus::types::{Entry, LogId, Vote};
use crate::consensus::wal::WalOptions;

#[derive(Clone, Debug)]
enum Step {
    /// This number of entries of this number of bytes.
    Append(u64, usize),
    /// Keep this share (of 256) of the entries.
    Truncate(u8),
    /// Drop this share (of 256) of the entries.
    Purge(u8),
    /// Drops all entries and this many more, as after a snapshot.
    PurgeBeyond(u64),
    Vote(u64),
    /// Close in order and open again.
    Reopen,
    /// Open what a crash would leave: a copy of the files, taken while the log is open.
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (1u64..20, 0usize..400).prop_map(|(count, bytes)| Step::Append(count, bytes)),
        2 => any::<u8>().prop_map(Step::Truncate),
        2 => any::<u8>().prop_map(Step::Purge),
        1 => (0u64..10).prop_map(Step::PurgeBeyond),
        2 => (1u64..100).prop_map(Step::Vote),
        1 => Just(Step::Reopen),
        1 => Just(Step::Crash),
    ]
}

#[derive(Default)]
struct Model {
    term: u64,
    vote: Option<Vote>,
    purged: Option<LogId>,
    entries: Vec<Entry>,
}

impl Model {
    fn next(&self) -> u64 {
        let last = self.entries.last().map(|entry| entry.log_id).or(self.purged);
        last.map_or(0, |last| last.index + 1)
    }
}

struct Opened {
    folder: tempfile::TempDir,
    log: LogStore,
    fatal: FatalSignal,
}

impl Opened {
    fn close(self) -> tempfile::TempDir {
        self.log.close();
        assert!(self.fatal.raised().is_none(), "{:?}", self.fatal.raised());
        self.folder
    }
}

/// In memory if possible: the test is about order, not about the disk, and it needs thousands of flushes.
fn folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .unwrap()
}

fn options() -> WalOptions {
    WalOptions {
        file_bytes: 4 << 10,
        cache_bytes_max: 2 << 10,
        unflushed_bytes_max: 1 << 20,
        ..WalOptions::default()
    }
}

fn open(folder: tempfile::TempDir) -> Opened {
    let fatal = FatalSignal::default();
    let log = LogStore::open(folder.path(), &options(), fatal.clone()).unwrap();
    Opened { folder, log, fatal }
}

async fn step_both(model: &mut Model, mut opened: Opened, step: Step) -> Opened {
    let log = &mut opened.log;
    match step {
        Step::Append(count, bytes) => {
            model.term += 1;
            let first = model.next();
            let entries: Vec<Entry> = (first..first + count)
                .map(|index| entry(model.term, index, "e".repeat(bytes)))
                .collect();
            model.entries.extend(entries.clone());
            append(log, entries).await;
        }
        Step::Truncate(share) => {
            let keep = model.entries.len() * usize::from(share) / 256;
            model.entries.truncate(keep);
            let last = model.entries.last().map(|entry| entry.log_id).or(model.purged);
            log.truncate_after(last).await.unwrap();
        }
        Step::Purge(share) => {
            let gone = model.entries.len() * usize::from(share) / 256;
            if let Some(upto) = gone.checked_sub(1).map(|last| model.entries[last].log_id) {
                model.entries.drain(..gone);
                model.purged = Some(upto);
                log.purge(upto).await.unwrap();
            }
        }
        Step::PurgeBeyond(more) => {
            model.term += 1;
            let upto = log_id(model.term, model.next() + more);
            model.entries.clear();
            model.purged = Some(upto);
            log.purge(upto).await.unwrap();
        }
        Step::Vote(term) => {
            model.vote = Some(vote(term, 1));
            log.save_vote(&vote(term, 1)).await.unwrap();
        }
        Step::Reopen => {
            return open(opened.close());
        }
        Step::Crash => {
            opened.log.wait_all_flushed();
            let copy = folder();
            let listing = std::fs::read_dir(opened.folder.path()).unwrap();
            let mut paths: Vec<_> = listing.map(|item| item.unwrap().path()).collect();
            paths.sort();
            // Newest first: the thread may be removing purged files, oldest first. The reserve has no entries.
            for path in paths.iter().rev() {
                let name = path.file_name().unwrap();
                if path.extension().is_some_and(|extension| extension == "wal")
                    && std::fs::copy(path, copy.path().join(name)).is_err()
                {
                    break;
                }
            }
            opened.close();
            return open(copy);
        }
    }
    opened
}

async fn compare(model: &Model, log: &LogStore) {
    let mut log = log.clone();
    assert_eq!(log.read_vote().await.unwrap(), model.vote);
    let state = log.get_log_state().await.unwrap();
    assert_eq!(state.last_purged_log_id, model.purged);
    let last = model.entries.last().map(|entry| entry.log_id).or(model.purged);
    assert_eq!(state.last_log_id, last);
    assert_eq!(log.try_get_log_entries(..).await.unwrap(), model.entries);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn the_log_is_what_was_done_to_it(steps in prop::collection::vec(step(), 1..40)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut model = Model::default();
            let mut opened = open(folder());
            for step in steps {
                opened = step_both(&mut model, opened, step).await;
                compare(&model, &opened.log).await;
            }
            opened.close();
        });
    }
}
