//! How fast `apply` is: `cargo test --release -p quorumfs-metadata tests::pace -- --ignored --nocapture`.

use std::time::Instant;

use quorumfs_proto::InodeNumber;
use quorumfs_proto::command::{Command, NewKind};

use super::super::{LogBody, LogCommand};
use super::support::{Node, at, create};

const CREATES: u64 = 300_000;

/// What this thread has used of the processor, so that the figure says something on a busy machine too.
fn cpu_seconds() -> f64 {
    let schedule = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    let nanoseconds: f64 = schedule.split(' ').next().unwrap().parse().unwrap();
    nanoseconds / 1e9
}

#[test]
#[ignore = "a measurement, not a check"]
fn creates_per_second() {
    for batch_size in [1, 64, 1024] {
        let mut node = Node::with_sessions(4);
        let entries: Vec<LogCommand> = (0..CREATES)
            .map(|n| {
                let command = Command::single(create(InodeNumber::ROOT, &format!("file-{n}"), NewKind::File));
                LogCommand {
                    stamp: Default::default(),
                    body: LogBody::Call(node.mutation(quorumfs_proto::SessionId(1), command)),
                }
            })
            .collect();
        let (begun, used) = (Instant::now(), cpu_seconds());
        for some in entries.chunks(batch_size) {
            let mut batch = node.store.begin();
            for entry in some {
                node.index += 1;
                batch.apply(node.index, entry).unwrap();
            }
            batch.publish(at(node.index));
        }
        let seconds = begun.elapsed().as_secs_f64();
        let used = cpu_seconds() - used;
        println!(
            "batches of {batch_size}: {:.0} creates/s ({:.0} per second of processor time), overlay {} MiB",
            CREATES as f64 / seconds,
            CREATES as f64 / used,
            node.store.overlay_bytes() >> 20
        );
        let begun = Instant::now();
        node.store.freeze();
        node.store.flush().unwrap();
        println!("flush: {} ms", begun.elapsed().as_millis());
        node.operate(create(InodeNumber::ROOT, "after", NewKind::File))
            .unwrap();
    }
}
