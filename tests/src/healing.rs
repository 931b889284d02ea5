//! What the tests of healing share: asking a node how it heals, and content that can be checked without being kept.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::Cluster;
use crate::damage::{files_below, find_bytes, flip};
use crate::environment::{wait_for, wait_until};
use crate::random::{Content, Random};

/// A file: its path, and the seed and length of its content.
pub type SeededFile = (String, u64, u64);

/// `GET /repair/status` or `/recovery/status` of one node.
#[track_caller]
pub fn ask(cluster: &Cluster, slot: usize, path: &str) -> Value {
    cluster.http(slot).get(path).expect(&[200]).json()
}

/// A number in it.
#[track_caller]
pub fn number(of: &Value, field: &str) -> u64 {
    of[field].as_u64().unwrap_or_else(|| panic!("{field} in {of}"))
}

/// Where a node keeps its content.
pub fn content_folder(cluster: &Cluster, slot: usize) -> PathBuf {
    cluster.data_folder(slot).join("content")
}

/// What a folder takes on disk.
pub fn disk_bytes(folder: &Path) -> u64 {
    files_below(folder)
        .iter()
        .map(|path| fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512))
        .sum()
}

/// Files of random content; (path, seed, length).
pub fn upload(
    cluster: &Cluster,
    slot: usize,
    folder: &str,
    lengths: impl Iterator<Item = u64>,
    random: &mut Random,
) -> Vec<SeededFile> {
    let mut files = Vec::new();
    for (n, length) in lengths.enumerate() {
        let (name, seed) = (format!("{folder}/file-{n}"), random.number());
        let body = Content::new(seed, length);
        cluster
            .http(slot)
            .post_stream(&format!("/upload/{name}"), body, Some(length))
            .expect(&[201]);
        files.push((name, seed, length));
    }
    files
}

/// Has all nodes compare their metadata, and waits until each says that all have the same.
#[track_caller]
pub fn assert_same_metadata(cluster: &Cluster) {
    const LIMIT: Duration = Duration::from_secs(30);
    let slots = cluster.running();
    let report = |slot: usize| ask(cluster, slot, "/repair/audit");
    let earlier = report(slots[0])["index"].as_u64().unwrap_or_default();
    // As long as not all are known to be able to, it is refused; a leader notices that within a second or two.
    wait_for("all can compare", LIMIT, || {
        cluster.http(slots[0]).post("/repair/audit", "").status == 202
    });
    let digest = |slot: &usize| {
        wait_until(
            &format!("node {slot} knows that it has the same metadata"),
            LIMIT,
            || {
                let report = report(*slot);
                let is_new = report["index"].as_u64().is_some_and(|index| index > earlier);
                let same = report["same"].as_array().map_or(0, Vec::len);
                (is_new && same == slots.len()).then(|| report["sha256"].clone())
            },
        )
    };
    let digests: Vec<Value> = slots.iter().map(digest).collect();
    assert!(digests.windows(2).all(|pair| pair[0] == pair[1]), "{digests:?}");
}

/// That a node serves these files as they were written.
#[track_caller]
pub fn assert_served(cluster: &Cluster, slot: usize, files: &[SeededFile]) {
    for (name, seed, length) in files {
        let reply = cluster.http(slot).get(&format!("/upload/{name}")).expect(&[200]);
        Content::new(*seed, *length).assert_equals(&reply.body[..], name);
    }
}

/// Damages the copy of a file on one node, `at` so far into it; the bytes there must lie in one block.
pub fn damage(cluster: &Cluster, slot: usize, (_, seed, length): &SeededFile, at: u64) {
    let mut bytes = Vec::new();
    std::io::copy(&mut Content::new(*seed, *length), &mut bytes).expect("made in memory");
    let from = (at / 4096 * 4096) as usize;
    let places = find_bytes(&content_folder(cluster, slot), &bytes[from..from + 64]);
    assert_eq!(places.len(), 1, "the content lies once on node {slot}");
    let (file, place) = &places[0];
    flip(file, place + (at - from as u64).min(63));
}
