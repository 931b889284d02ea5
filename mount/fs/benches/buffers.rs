//! Throughput of the write buffer and of the extent cache: `cargo bench --workspace --bench buffers`.

use std::hint::black_box;

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use quorumfs_fs::caches::extent_cache::ExtentCache;
use quorumfs_fs::write_buffer::{PACK_RANGES_MAX, WriteBuffer};
use quorumfs_proto::{ChunkId, Extent, SessionId};

/// Bytes written sequentially per sample.
const SEQUENTIAL_BYTES: u64 = 16 << 20;
/// The write size of most programs.
const PAGE_BYTES: u64 = 4096;
/// Extents of a file after many random writes.
const EXTENTS: u64 = 4096;
/// Coprime to the counts above, so that all positions are visited and no two neighbours in succession.
const STRIDE: u64 = 1031;

fn extent(file_offset: u64, counter: u64) -> Extent {
    Extent {
        file_offset,
        length: PAGE_BYTES as u32,
        chunk: ChunkId {
            session: SessionId(1),
            counter,
        },
        chunk_offset: 0,
    }
}

fn write_buffer(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("write_buffer");
    for write_bytes in [PAGE_BYTES, 128 << 10, 1 << 20] {
        let data = Bytes::from(vec![7; write_bytes as usize]);
        group.throughput(Throughput::Bytes(SEQUENTIAL_BYTES));
        group.bench_function(format!("sequential/{write_bytes}"), |bencher| {
            bencher.iter_batched_ref(
                WriteBuffer::default,
                |buffer| {
                    for offset in (0..SEQUENTIAL_BYTES).step_by(write_bytes as usize) {
                        for pack in buffer.write(offset, data.clone()) {
                            buffer.remove_through(pack.sequence);
                        }
                    }
                },
                BatchSize::PerIteration,
            );
        });
    }
    let page = Bytes::from(vec![7; PAGE_BYTES as usize]);
    let scattered = |buffer: &mut WriteBuffer| {
        let places = PACK_RANGES_MAX as u64;
        for number in 0..places {
            // Every second page, so that no two ranges join.
            let offset = number * STRIDE % places * 2 * PAGE_BYTES;
            buffer.write(offset, page.clone());
        }
    };
    group.throughput(Throughput::Elements(PACK_RANGES_MAX as u64));
    group.bench_function("scattered, then sealed", |bencher| {
        bencher.iter_batched_ref(
            WriteBuffer::default,
            |buffer| {
                scattered(buffer);
                black_box(buffer.seal_all())
            },
            BatchSize::PerIteration,
        );
    });
    let mut buffer = WriteBuffer::default();
    scattered(&mut buffer);
    group.throughput(Throughput::Elements(1));
    group.bench_function("overlay of 128 KiB", |bencher| {
        bencher.iter(|| black_box(buffer.overlay(1 << 20..(1 << 20) + (128 << 10))));
    });
    group.finish();
}

fn extent_cache(criterion: &mut Criterion) {
    let known_bytes = EXTENTS * PAGE_BYTES;
    let filled = || {
        let mut cache = ExtentCache::default();
        let extents = (0..EXTENTS).map(|number| extent(number * PAGE_BYTES, number));
        cache.store(1, 0..known_bytes, extents.collect());
        cache
    };
    let mut group = criterion.benchmark_group("extent_cache");
    group.throughput(Throughput::Elements(EXTENTS));
    group.bench_function("store", |bencher| bencher.iter(|| black_box(filled())));
    group.bench_function("patch", |bencher| {
        bencher.iter_batched_ref(
            filled,
            |cache| {
                for number in 0..EXTENTS {
                    // Offset by half a page, so that each patch cuts two extents.
                    let offset = number * STRIDE % EXTENTS * PAGE_BYTES + PAGE_BYTES / 2;
                    cache.patch(number + 2, &[extent(offset, EXTENTS + number)]);
                }
            },
            BatchSize::PerIteration,
        );
    });
    let cache = filled();
    let mut number = 0;
    group.throughput(Throughput::Elements(1));
    group.bench_function("lookup of 128 KiB", |bencher| {
        bencher.iter(|| {
            number = (number + STRIDE) % (EXTENTS - 32);
            let start = number * PAGE_BYTES;
            black_box(cache.lookup(1, start..start + (128 << 10)).expect("it is known"))
        });
    });
    group.finish();
}

criterion_group!(benches, write_buffer, extent_cache);
criterion_main!(benches);
