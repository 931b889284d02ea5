//! Repair as an administrator sees it: damaged copies are found, counted, told and made anew, and never served.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use quorumfs_tests::environment::{wait_for, wait_until};
use quorumfs_tests::healing::{ask, assert_served, content_folder, damage, number, upload};
use quorumfs_tests::{Cluster, Random, Sandbox, scaled};
use serde_json::{Value, json};

/// Reads all that is held within a second or two, again and again.
const BUSY_SCRUB: [&str; 4] = ["--scrub-mib-per-s", "2000", "--scrub-interval-s", "1"];
/// Reads nearly nothing.
const IDLE_SCRUB: [&str; 4] = ["--scrub-mib-per-s", "1", "--scrub-interval-s", "3600"];

#[test]
fn p7_flipped_bits_are_found_and_repaired_within_one_coverage() {
    let sandbox = Sandbox::heavy("repair-scrub");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).arguments(&BUSY_SCRUB).start();
    let count = scaled(1600).max(100);
    let lengths: Vec<u64> = (0..count).map(|_| (34 << 10) + random.below(200 << 10)).collect();
    let files = upload(&cluster, 1, "some/folder", lengths.into_iter(), &mut random);
    cluster.wait_at_rest();
    let hurt = 1 + random.below(3) as usize;
    let before = ask(&cluster, hurt, "/repair/status");
    assert_eq!(number(&before, "found_corrupt"), 0, "{before}");
    // One in a hundred, each chunk (a file has one) at one place.
    let mut chosen = BTreeSet::new();
    while (chosen.len() as u64) < (count / 100).max(3) {
        chosen.insert(random.below(count) as usize);
    }
    let began = Instant::now();
    for n in &chosen {
        let at = random.below(files[*n].2);
        damage(&cluster, hurt, &files[*n], at);
    }
    eprintln!("damaged {} of {count} in {:?}", chosen.len(), began.elapsed());
    let completed = number(&ask(&cluster, hurt, "/repair/status"), "coverages_completed");
    let began = Instant::now();
    // While it heals, no wrong byte.
    for n in &chosen {
        assert_served(&cluster, hurt, &files[*n..=*n]);
    }
    // The one under way may have passed some of them; the next sees all.
    wait_for("two coverages end", Duration::from_secs(60), || {
        number(&ask(&cluster, hurt, "/repair/status"), "coverages_completed") >= completed + 2
    });
    let status = wait_until("all are repaired", Duration::from_secs(10), || {
        let status = ask(&cluster, hurt, "/repair/status");
        (number(&status, "under_repair") == 0).then_some(status)
    });
    eprintln!("after {:?}: {status}", began.elapsed());
    assert_eq!(number(&status, "found_corrupt"), chosen.len() as u64, "{status}");
    assert_eq!(number(&status, "repaired"), chosen.len() as u64, "{status}");
    assert_eq!(number(&status, "unrepairable_chunks"), 0, "{status}");
    assert!(number(&status, "verified_chunks") >= count, "{status}");
    for slot in cluster.slots().filter(|slot| *slot != hurt) {
        let other = ask(&cluster, slot, "/repair/status");
        assert_eq!(number(&other, "found_corrupt"), 0, "node {slot}: {other}");
    }
    cluster.wait_log(hurt, &["failed its check"], Duration::from_secs(1));
    // The copies are really good: it serves them when another one is gone, and so it does after a restart.
    let gone = hurt % 3 + 1;
    cluster.kill(gone);
    cluster.leader();
    assert_served(&cluster, hurt, &files);
    cluster.start_node(gone);
    cluster.restart(hurt);
    cluster.wait_ready();
    assert_served(&cluster, hurt, &files);
    let verified = ask(&cluster, hurt, "/repair/status");
    assert!(
        number(&verified, "coverages_completed") >= completed + 2,
        "coverages are remembered across restarts: {verified}"
    );
}

#[test]
fn p7_a_bad_copy_met_by_a_read_is_repaired_and_counted() {
    let sandbox = Sandbox::light("repair-read");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).arguments(&IDLE_SCRUB).start();
    let files = upload(&cluster, 1, "f", (0..12).map(|_| 300 << 10), &mut random);
    cluster.wait_at_rest();
    // All nodes but one have every copy of the file damaged, so that whichever is asked, some read meets one.
    let hurt: Vec<usize> = cluster.followers();
    for slot in &hurt {
        files
            .iter()
            .for_each(|file| damage(&cluster, *slot, file, 100_000));
    }
    for slot in cluster.slots() {
        for _ in 0..3 {
            assert_served(&cluster, slot, &files);
        }
    }
    // Of the copies that nobody has read, one file's verification finds the one in it.
    for (name, _, _) in &files {
        let verdict: Value = cluster
            .http(1)
            .post("/repair/verify", json!({ "file_path": name }).to_string())
            .expect(&[200])
            .json();
        assert!(
            ["healthy", "repaired"].contains(&verdict["state"].as_str().unwrap_or("")),
            "{verdict}"
        );
    }
    for slot in hurt {
        let status = wait_until("all are repaired", Duration::from_secs(20), || {
            let status = ask(&cluster, slot, "/repair/status");
            (number(&status, "repaired") == files.len() as u64).then_some(status)
        });
        assert_eq!(
            number(&status, "found_corrupt"),
            files.len() as u64,
            "each once: {status}"
        );
    }
}

#[test]
fn p7_verifying_a_file_tells_and_repairs() {
    let sandbox = Sandbox::light("repair-verify");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).arguments(&IDLE_SCRUB).start();
    // Three chunks; and a small file whose content rode in the log.
    let files = upload(&cluster, 2, "dir", [(5 << 20) / 2, 5000].into_iter(), &mut random);
    cluster.wait_at_rest();
    let verify = |slot: usize, body: String| cluster.http(slot).post("/repair/verify", body);
    let of = |name: &str| json!({ "file_path": name }).to_string();
    for slot in cluster.slots() {
        for (name, _, length) in &files {
            let verdict: Value = verify(slot, of(name)).expect(&[200]).json();
            assert_eq!(verdict["state"], "healthy", "{verdict}");
            assert_eq!(verdict["size"], *length);
            assert_eq!(verdict["verified_to"], *length);
            assert_eq!(verdict["nodes"].as_array().expect("nodes").len(), 3, "{verdict}");
            let chunks = verdict["chunks"].as_array().expect("chunks");
            assert_eq!(chunks.len() as u64, length.div_ceil(1 << 20), "{verdict}");
        }
    }
    let hurt = cluster.followers()[0];
    damage(&cluster, hurt, &files[0], (1 << 20) + 77);
    let asked = cluster.leader();
    let verdict: Value = verify(asked, of(&files[0].0)).expect(&[200]).json();
    assert_eq!(verdict["state"], "repaired", "{verdict}");
    for node in verdict["nodes"].as_array().expect("nodes") {
        let bad = u64::from(node["slot"] == hurt);
        assert_eq!(number(node, "corrupt"), bad, "{verdict}");
        assert_eq!(number(node, "repaired"), bad, "{verdict}");
        assert_eq!(number(node, "healthy"), 3 - bad, "{verdict}");
    }
    let copies = verdict["chunks"][1]["copies"].as_array().expect("copies");
    let states: Vec<(u64, &str)> = copies
        .iter()
        .map(|copy| (number(copy, "slot"), copy["state"].as_str().expect("a word")))
        .collect();
    for (slot, state) in states {
        assert_eq!(state == "corrupt", slot == hurt as u64, "{verdict}");
    }
    let verdict: Value = verify(hurt, of(&format!("/{}", files[0].0)))
        .expect(&[200])
        .json();
    assert_eq!(verdict["state"], "healthy", "{verdict}");

    // A node that does not answer is said to be so.
    cluster.kill(hurt);
    let verdict: Value = verify(cluster.leader(), of(&files[0].0)).expect(&[200]).json();
    assert_eq!(verdict["state"], "degraded", "{verdict}");
    let node = &verdict["nodes"].as_array().expect("nodes")[hurt - 1];
    assert_eq!(number(node, "unknown"), 3, "{verdict}");
    assert!(node["error"].is_string(), "{verdict}");

    let leader = cluster.leader();
    verify(leader, of("dir/none")).expect(&[404]);
    verify(leader, of("none/at/all")).expect(&[404]);
    verify(leader, of("dir")).expect(&[409]);
    for bad in [
        "",
        "{",
        "[]",
        "{}",
        "{\"file_path\": 7}",
        "{\"file_path\": \"a\", \"other\": 1}",
        "{\"file_path\": \"\"}",
        "{\"file_path\": \"a//b\"}",
        "{\"file_path\": \"../a\"}",
        "{\"file_path\": \"a\", \"from\": -1}",
    ] {
        let reply = verify(leader, bad.to_string()).expect(&[400]);
        let error: Value = reply.json();
        assert!(
            error["code"].is_string() && error["hint"].is_string(),
            "{bad}: {error}"
        );
    }
    verify(leader, of(&"x".repeat(100 << 10))).expect(&[413]);
}

#[test]
fn p7_what_no_node_has_a_good_copy_of_is_named() {
    let sandbox = Sandbox::light("repair-unrepairable");
    let mut random = Random::announced();
    // A busy scrub would repair the first copy while the second is being damaged.
    let cluster = Cluster::builder(&sandbox).arguments(&IDLE_SCRUB).start();
    let files = upload(&cluster, 1, "deep/down", (0..5).map(|_| 100 << 10), &mut random);
    cluster.wait_at_rest();
    for slot in cluster.slots() {
        damage(&cluster, slot, &files[3], 5000);
    }
    let asked = json!({ "file_path": files[3].0 }).to_string();
    let verdict: Value = cluster
        .http(2)
        .post("/repair/verify", asked)
        .expect(&[200])
        .json();
    assert_eq!(verdict["state"], "damaged", "{verdict}");
    for slot in cluster.slots() {
        let status = wait_until("it is named", Duration::from_secs(30), || {
            let status = ask(&cluster, slot, "/repair/status");
            (status["unrepairable_files"] == json!(["deep/down/file-3"])).then_some(status)
        });
        assert_eq!(number(&status, "unrepairable_chunks"), 1, "{status}");
        assert_eq!(number(&status, "found_corrupt"), 1, "{status}");
        assert_eq!(number(&status, "repaired"), 0, "{status}");
        let recovery = ask(&cluster, slot, "/recovery/status");
        assert_eq!(number(&recovery, "missing_chunks"), 1, "{recovery}");
        assert_eq!(recovery["missing_files"], json!(["deep/down/file-3"]));
        assert_eq!(
            number(&recovery, "local_files") + 1,
            number(&recovery, "total_files"),
            "{recovery}"
        );
    }
    // It is not served as something else, and the others are.
    let refused = cluster.http(1).try_get("/upload/deep/down/file-3");
    assert!(
        !refused.is_ok_and(|reply| reply.status == 200),
        "something was served"
    );
    assert_served(&cluster, 1, &files[..3]);
    // Deleted, it is nobody's worry any more.
    cluster.http(1).delete("/upload/deep/down/file-3").expect(&[204]);
    for slot in cluster.slots() {
        wait_for("it is forgotten", Duration::from_secs(30), || {
            let status = ask(&cluster, slot, "/repair/status");
            number(&status, "unrepairable_chunks") == 0
                && number(&status, "under_repair") == 0
                && number(&status, "obsolete") == 1
        });
    }
}

#[test]
fn p7_internal_endpoints_ask_for_the_secret_and_never_touch_what_files_name() {
    let sandbox = Sandbox::light("repair-internal");
    let mut random = Random::announced();
    let secret = sandbox.path("secret");
    fs::write(&secret, "the cluster's own secret\n").expect("write the secret");
    let secret = secret.to_string_lossy().into_owned();
    // Slow enough that something is still missing when it is brought.
    let arguments = ["--secret-file", &secret, "--recovery-mib-per-s", "1"];
    let cluster = Cluster::builder(&sandbox).arguments(&arguments).start();
    let content = random.bytes(20 << 20);
    cluster
        .http(1)
        .post("/upload/file", content.clone())
        .expect(&[201]);
    cluster.wait_at_rest();
    let asked = json!({ "file_path": "file" }).to_string();
    let verdict: Value = cluster
        .http(1)
        .post("/repair/verify", asked)
        .expect(&[200])
        .json();
    let chunks = verdict["chunks"].as_array().expect("chunks");
    assert_eq!(chunks.len(), 20, "{verdict}");
    let last = chunks[19]["chunk"].as_str().expect("an id").to_string();
    let bytes = content[19 << 20..].to_vec();
    let digest = |bytes: &[u8]| quorumfs_proto::Sha256::of(bytes).to_string();
    let right = digest(&bytes);
    let known = ("authorization", "Bearer the cluster's own secret");
    let (replicate, delete) = (format!("/replicate/{last}"), format!("/delete-content/{last}"));
    for path in [&replicate, &delete] {
        // Nothing is read of a body that comes with them, so a long one would break the connection.
        cluster.http(2).post(path, "body").expect(&[401]);
        for wrong in [
            "Bearer the cluster's own secreT",
            "Bearer ",
            "Bearer",
            "Basic abc",
        ] {
            let shown = [("authorization", wrong), ("x-content-sha256", &right)];
            cluster
                .http(2)
                .post_with(path, &shown, "body")
                .expect(&[401, 403]);
        }
    }
    for slot in cluster.slots() {
        cluster.http(slot).post_with(&delete, &[known], "").expect(&[409]);
    }
    let offer = |slot: usize, path: &str, digest: &str, bytes: &[u8]| {
        let headers = [known, ("x-content-sha256", digest)];
        cluster.http(slot).post_with(path, &headers, bytes.to_vec())
    };
    offer(2, &replicate, &right, &bytes).expect(&[200]);
    offer(2, &replicate, &right, &bytes[1..]).expect(&[400]);
    offer(2, &replicate, &digest(&bytes[1..]), &bytes[1..]).expect(&[409]);
    offer(2, &replicate, "nonsense", &bytes).expect(&[400]);
    offer(2, "/replicate/nonsense", &right, &bytes).expect(&[400]);
    offer(2, "/replicate/000000000000002a.7", &right, &bytes).expect(&[404]);
    cluster
        .http(2)
        .post_with("/delete-content/000000000000002a.7", &[known], "")
        .expect(&[404]);

    let hurt = cluster.followers()[0];
    cluster.kill(hurt);
    fs::remove_dir_all(content_folder(&cluster, hurt)).expect("delete the content");
    let began = Instant::now();
    cluster.start_node(hurt);
    cluster.wait_ready();
    // It takes copies of what it knows to be named: first it reads its log again.
    wait_for("the node knows what is named", Duration::from_secs(20), || {
        number(&ask(&cluster, hurt, "/recovery/status"), "named_chunks") == 20
    });
    offer(hurt, &replicate, &right, &bytes).expect(&[201]);
    let status = ask(&cluster, hurt, "/recovery/status");
    assert!(
        number(&status, "missing_chunks") > 0,
        "only that one was brought: {status}"
    );
    cluster.wait_at_rest();
    let took = began.elapsed();
    assert!(took > Duration::from_secs(15), "18 MiB at 1 MiB/s took {took:?}");
    assert!(cluster.http(hurt).get("/upload/file").expect(&[200]).body == content);
}
