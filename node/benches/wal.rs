//! The pace at which entries become the bytes of the log, without the disk: `cargo bench --workspace --bench wal`.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use quorumfs_metadata::{LogBody, LogCommand};
use quorumfs_node::consensus::wal_frame::{BatchWriter, Kind, scan};
use quorumfs_proto::{SessionId, Timestamp};

/// Entries that one flush makes durable while many programs write.
const ENTRIES: usize = 64;
const FILE_SEQUENCE: u64 = 7;

/// An entry whose payload is about `bytes` long.
fn entry(bytes: usize) -> LogCommand {
    LogCommand {
        stamp: Timestamp::default(),
        body: LogBody::OpenSession {
            session: SessionId(1),
            description: "d".repeat(bytes),
        },
    }
}

/// A batch of [`ENTRIES`] entries, as the log's writer puts it together.
fn batch(entry: &LogCommand, buffer: Vec<u8>) -> Vec<u8> {
    let mut batch = BatchWriter::new(FILE_SEQUENCE, 0, buffer);
    for _ in 0..ENTRIES {
        batch.record(Kind::Entry, |out| {
            *out = postcard::to_extend(entry, std::mem::take(out)).expect("encode to memory");
        });
    }
    batch.finish()
}

fn wal(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("wal");
    for bytes in [100, 4096, 64 << 10] {
        let entry = entry(bytes);
        let whole = batch(&entry, Vec::new());
        group.throughput(Throughput::Bytes(whole.len() as u64));
        group.bench_with_input(BenchmarkId::new("encode", bytes), &entry, |bencher, entry| {
            let mut buffer = Vec::new();
            bencher.iter(|| buffer = black_box(batch(entry, std::mem::take(&mut buffer))));
        });
        group.bench_with_input(BenchmarkId::new("scan", bytes), &whole, |bencher, whole| {
            bencher.iter(|| black_box(scan(whole, FILE_SEQUENCE)));
        });
    }
    group.finish();
}

criterion_group!(benches, wal);
criterion_main!(benches);
