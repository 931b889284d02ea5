//! P2: content before metadata. P3: never a wrong byte.

use std::fs;
use std::time::Duration;

use quorumfs_tests::damage::{find_bytes, flip};
use quorumfs_tests::environment::wait_for;
use quorumfs_tests::tree::{self, TreeSize};
use quorumfs_tests::{Cluster, Random, Sandbox, healing, posix, shell};

#[test]
fn p2_every_node_holds_every_named_chunk_and_any_two_serve_everything() {
    let sandbox = Sandbox::heavy("p2-copies");
    let mut random = Random::announced();
    let original = sandbox.path("original");
    let (_, bytes) = tree::make(&original, TreeSize::SMALL, &mut random);
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    shell(&format!(
        "cp -a '{}' '{}'",
        original.display(),
        mount.path("copy").display()
    ));
    mount.unmount();
    cluster.wait_at_rest();
    for slot in cluster.slots() {
        let recovery = cluster.recovery_status(slot).expect("recovery status");
        eprintln!("node {slot}: {recovery:?}");
        assert_eq!(recovery.missing_chunks, 0, "node {slot}");
        assert!(
            recovery.named_chunks > 0,
            "node {slot}: a tree of {bytes} bytes names chunks"
        );
        assert!(recovery.held_chunks >= recovery.named_chunks, "node {slot}");
    }
    let named: Vec<u64> = cluster
        .slots()
        .map(|slot| {
            cluster
                .recovery_status(slot)
                .expect("recovery status")
                .named_chunks
        })
        .collect();
    assert!(
        named.iter().all(|count| *count == named[0]),
        "nodes disagree on what is named: {named:?}"
    );
    for lost in cluster.slots() {
        // Its folder is put aside, as good as deleted; and put back for the next turn.
        cluster.kill(lost);
        let (folder, aside) = (cluster.data_folder(lost), sandbox.path("aside"));
        fs::rename(folder, &aside).expect("put the data folder aside");
        posix::drop_caches();
        let mount = cluster.mount();
        tree::assert_equal(&original, &mount.path("copy"));
        mount.unmount();
        fs::rename(&aside, folder).expect("put the data folder back");
        cluster.start_node(lost);
        cluster.wait_ready();
    }
}

#[test]
fn p3_a_corrupt_block_is_never_served_and_is_reported() {
    let sandbox = Sandbox::light("p3-corrupt");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let content = random.bytes(3 << 20);
    cluster
        .http(1)
        .post("/upload/file", content.clone())
        .expect(&[201]);
    cluster.wait_at_rest();
    // Two of three copies are damaged, in different blocks of the same chunk, in the first and the last byte too.
    let bad = [1usize, 2];
    let offsets = [vec![0usize, (1 << 20) + 5000], vec![300_000, (3 << 20) - 1]];
    for (slot, offsets) in bad.iter().zip(&offsets) {
        for offset in offsets {
            let block = offset / 4096 * 4096;
            let places = find_bytes(cluster.data_folder(*slot), &content[block..block + 4096]);
            assert!(
                !places.is_empty(),
                "the content lies on node {slot} as it was written"
            );
            places
                .iter()
                .for_each(|(file, at)| flip(file, at + (offset - block) as u64));
        }
    }
    posix::drop_caches();
    for slot in cluster.slots() {
        let reply = cluster.http(slot).get("/upload/file").expect(&[200]);
        assert!(reply.body == content, "node {slot} served a wrong byte");
    }
    let mount = cluster.mount();
    assert!(
        fs::read(mount.path("file")).expect("read") == content,
        "the mount served a wrong byte"
    );
    mount.unmount();
    for slot in bad {
        cluster.wait_log(
            slot,
            &["corrupt", "checksum", "crc", "damaged", "failed its check"],
            Duration::from_secs(30),
        );
    }
    // Repaired: the two can serve it without the one that was always good.
    wait_for("the bad copies are replaced", Duration::from_secs(90), || {
        bad.iter().all(|slot| {
            cluster
                .recovery_status(*slot)
                .is_ok_and(|status| status.missing_chunks == 0)
        })
    });
    cluster.kill(3);
    cluster.leader();
    posix::drop_caches();
    for slot in bad {
        let reply = cluster.http(slot).get("/upload/file").expect(&[200]);
        assert!(reply.body == content, "node {slot} served a wrong byte");
    }
}

#[test]
fn p3_when_every_copy_is_corrupt_reading_fails_and_says_so() {
    let sandbox = Sandbox::light("p3-all-corrupt");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let content = random.bytes(1 << 20);
    cluster
        .http(1)
        .post("/upload/file", content.clone())
        .expect(&[201]);
    cluster.wait_at_rest();
    for slot in cluster.slots() {
        let copies = find_bytes(cluster.data_folder(slot), &content[8192..12288]);
        assert!(!copies.is_empty(), "node {slot} holds no copy");
        for (file, at) in copies {
            flip(&file, at + 77);
        }
    }
    posix::drop_caches();
    let mount = cluster.mount_with(quorumfs_tests::mount::MountOptions::options("timeout=10"));
    let error = fs::read(mount.path("file")).expect_err("no copy is good");
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    for slot in cluster.slots() {
        wait_for(
            "the loss is told with the file's name",
            Duration::from_secs(90),
            || {
                let status = healing::ask(&cluster, slot, "/repair/status");
                status["unrepairable_files"].to_string().contains("file")
            },
        );
    }
    // What is whole can still be read.
    fs::write(mount.path("other"), "whole").expect("write");
    assert_eq!(fs::read(mount.path("other")).expect("read"), b"whole");
}
