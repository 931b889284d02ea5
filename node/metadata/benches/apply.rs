//! The pace of `apply` and of a view: `cargo bench --workspace --bench apply`.

use std::hint::black_box;

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use quorumfs_metadata::{LogBody, LogCommand, MetadataOptions, MetadataStore, Position};
use quorumfs_proto::call::Mutation;
use quorumfs_proto::command::{IfExists, NewInode, NewKind, Privileges, Target};
use quorumfs_proto::{
    ChunkBody, ChunkId, Command, Extent, InodeNumber, Lane, Name, NewChunk, Operation, RequestId, SessionId,
    Sha256, Timestamp,
};

const SESSION: SessionId = SessionId(1);
/// Creations in one sample.
const CREATES: u64 = 4096;
/// Extents of a file before it is written over, and how often it is.
const EXTENTS: u64 = 2048;
/// What each of them covers.
const EXTENT_BYTES: u32 = 4096;
/// A step that has no factor in common with [`EXTENTS`]: it visits all places, never two neighbours in turn.
const STRIDE: u64 = 1031;
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
    call(number, command)
}

fn call(sequence: u64, command: Command) -> LogCommand {
    LogCommand {
        stamp: Timestamp::default(),
        body: LogBody::Call(Mutation {
            request: RequestId {
                session: SESSION,
                lane: Lane(0),
                sequence,
            },
            chunk_low_water: 0,
            command,
        }),
    }
}

/// One new chunk at `file_offset` of `inode`.
fn write(number: u64, inode: InodeNumber, file_offset: u64) -> LogCommand {
    let chunk = ChunkId {
        session: SESSION,
        counter: number,
    };
    let command = Command {
        chunks: vec![NewChunk {
            id: chunk,
            length: EXTENT_BYTES,
            sha256: Sha256([7; 32]),
            body: ChunkBody::Stored,
        }],
        operations: vec![Operation::Write {
            inode: Target::Inode(inode),
            extents: vec![Extent {
                file_offset,
                length: EXTENT_BYTES,
                chunk,
                chunk_offset: 0,
            }],
            mtime: None,
            privileges: Privileges::Keep,
        }],
    };
    call(number, command)
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

/// Writes that each cut two extents of a file that has many.
fn extents(criterion: &mut Criterion) {
    let mut first = Fixture::new();
    first.apply(&[creation(1)]);
    let view = first.store.view().expect("a view");
    let file = view
        .lookup(InodeNumber::ROOT, &name(1))
        .expect("it is there")
        .inode;
    let bytes = u64::from(EXTENT_BYTES);
    let filling: Vec<LogCommand> = (0..EXTENTS).map(|at| write(at + 2, file, at * bytes)).collect();
    let cutting: Vec<LogCommand> = (0..EXTENTS)
        .map(|at| write(at + 2 + EXTENTS, file, at * STRIDE % EXTENTS * bytes + bytes / 2))
        .collect();
    let filled = || {
        let mut fixture = Fixture::new();
        fixture.apply(&[creation(1)]);
        fixture.apply(&filling);
        fixture
    };
    let mut written = filled();
    written.apply(&cutting);
    let view = written.store.view().expect("a view");
    let end = EXTENTS * bytes + bytes / 2;
    assert_eq!(
        view.attributes(file).expect("it is there").size,
        end,
        "all writes count"
    );
    let mut group = criterion.benchmark_group("apply");
    group.throughput(Throughput::Elements(EXTENTS)).sample_size(10);
    group.bench_function("writes that cut extents", |bencher| {
        bencher.iter_batched_ref(filled, |fixture| fixture.apply(&cutting), BatchSize::PerIteration);
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

criterion_group!(benches, apply, extents, view);
criterion_main!(benches);
