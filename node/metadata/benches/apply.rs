//! The pace of `apply` and of a view: `cargo bench --workspace --bench apply`.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use quorumfs_metadata::{LogBody, LogCommand, MetadataOptions, MetadataStore, Position};
use quorumfs_proto::call::Mutation;
use quorumfs_proto::command::{IfExists, NewInode, NewKind, Target};
use quorumfs_proto::{Command, InodeNumber, Lane, Name, Operation, RequestId, SessionId, Timestamp};

const SESSION: SessionId = SessionId(1);
/// Creations in one sample.
const CREATES: u64 = 4096;
/// Entries that are applied before they are published, as the apply thread does when it is behind.
const BATCH: usize = 64;

fn name(number: u64) -> Name {
    Name::new(format!("file-{number}").into_bytes()).expect("a valid name")
}

fn creation(number: u64) -> LogCommand {
    let command = Command::single(Operation::Create {
        parent: Target::Inode(InodeNumber::ROOT),
        name: name(number),
        inode: NewInode {
            kind: NewKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
        },
        existing: IfExists::Refuse,
    });
    LogCommand {
        stamp: Timestamp::default(),
        body: LogBody::Call(Mutation {
            request: RequestId {
                session: SESSION,
                lane: Lane(0),
                sequence: number,
            },
            chunk_low_water: 0,
            command,
        }),
    }
}

/// A store in a folder of its own, and the index of its last entry.
struct Fixture {
    _folder: tempfile::TempDir,
    store: MetadataStore,
    index: u64,
}

impl Fixture {
    fn new() -> Fixture {
        let folder = tempfile::tempdir().expect("make a folder");
        let store = MetadataStore::open(&folder.path().join("metadata.redb"), MetadataOptions::default())
            .expect("make a store");
        let mut fixture = Fixture {
            _folder: folder,
            store,
            index: 0,
        };
        fixture.apply(&[LogCommand {
            stamp: Timestamp::default(),
            body: LogBody::OpenSession {
                session: SESSION,
                description: String::new(),
            },
        }]);
        fixture
    }

    fn apply(&mut self, entries: &[LogCommand]) {
        for some in entries.chunks(BATCH) {
            let mut batch = self.store.begin();
            for entry in some {
                self.index += 1;
                batch.apply(self.index, entry).expect("apply an entry");
            }
            batch.publish(Position {
                index: self.index,
                ..Position::default()
            });
        }
    }
}

fn apply(criterion: &mut Criterion) {
    let entries: Vec<LogCommand> = (1..=CREATES).map(creation).collect();
    let mut group = criterion.benchmark_group("apply");
    group.throughput(Throughput::Elements(CREATES)).sample_size(10);
    group.bench_function("creates", |bencher| {
        bencher.iter_batched_ref(
            Fixture::new,
            |fixture| fixture.apply(&entries),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn view(criterion: &mut Criterion) {
    let entries: Vec<LogCommand> = (1..=CREATES).map(creation).collect();
    let mut fixture = Fixture::new();
    fixture.apply(&entries);
    let view = fixture.store.view().expect("a view");
    let mut number = 0;
    criterion.bench_function("lookup/overlay", |bencher| {
        bencher.iter(|| {
            number = number % CREATES + 1;
            black_box(
                view.lookup(InodeNumber::ROOT, &name(number))
                    .expect("it is there"),
            )
        });
    });
    fixture.store.freeze();
    fixture.store.flush().expect("flush");
    let view = fixture.store.view().expect("a view");
    criterion.bench_function("lookup/database", |bencher| {
        bencher.iter(|| {
            number = number % CREATES + 1;
            black_box(
                view.lookup(InodeNumber::ROOT, &name(number))
                    .expect("it is there"),
            )
        });
    });
}

criterion_group!(benches, apply, view);
criterion_main!(benches);
