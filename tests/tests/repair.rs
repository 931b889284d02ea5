//! Repair, recovery and the sweeper as an administrator sees them: damaged copies are found, counted and made anew,
//! lost content comes back without a command, and what was deleted gives its room back.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use quorumfs_tests::damage::{files_below, find_bytes, flip};
use quorumfs_tests::environment::{wait_for, wait_until};
use quorumfs_tests::random::Content;
use quorumfs_tests::{Cluster, Random, Sandbox, scaled};
use serde_json::{Value, json};

/// Reads all that is held within a second or two, again and again.
const BUSY_SCRUB: [&str; 4] = ["--scrub-mib-per-s", "2000", "--scrub-interval-s", "1"];
/// Reads nearly nothing.
const IDLE_SCRUB: [&str; 4] = ["--scrub-mib-per-s", "1", "--scrub-interval-s", "3600"];

/// `GET /repair/status` or `/recovery/status` of one node.
#[track_caller]
fn ask(cluster: &Cluster, slot: usize, path: &str) -> Value {
    cluster.http(slot).get(path).expect(&[200]).json()
}

#[track_caller]
fn number(of: &Value, field: &str) -> u64 {
    of[field].as_u64().unwrap_or_else(|| panic!("{field} in {of}"))
}

fn content_folder(cluster: &Cluster, slot: usize) -> std::path::PathBuf {
    cluster.data_folder(slot).join("content")
}

/// What a folder takes on disk.
fn disk_bytes(folder: &Path) -> u64 {
    files_below(folder)
        .iter()
        .map(|path| fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512))
        .sum()
}

/// Files of random content; (path, seed, length).
fn upload(
    cluster: &Cluster,
    slot: usize,
    folder: &str,
    lengths: impl Iterator<Item = u64>,
    random: &mut Random,
) -> Vec<(String, u64, u64)> {
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

#[track_caller]
fn assert_served(cluster: &Cluster, slot: usize, files: &[(String, u64, u64)]) {
    for (name, seed, length) in files {
        let reply = cluster.http(slot).get(&format!("/upload/{name}")).expect(&[200]);
        Content::new(*seed, *length).assert_equals(&reply.body[..], name);
    }
}

/// Damages the copy of a file on one node, `at` so far into it; the bytes there must lie in one block.
fn damage(cluster: &Cluster, slot: usize, (_, seed, length): &(String, u64, u64), at: u64) {
    let mut bytes = Vec::new();
    std::io::copy(&mut Content::new(*seed, *length), &mut bytes).expect("made in memory");
    let from = (at / 4096 * 4096) as usize;
    let places = find_bytes(&content_folder(cluster, slot), &bytes[from..from + 64]);
    assert_eq!(places.len(), 1, "the content lies once on node {slot}");
    let (file, place) = &places[0];
    flip(file, place + (at - from as u64).min(63));
}

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
fn p7_a_node_without_its_content_folder_is_made_whole() {
    let sandbox = Sandbox::heavy("repair-content");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mebibytes = scaled(1024).max(64);
    let large = (0..mebibytes / 8).map(|_| 7 << 20);
    let small = (0..scaled(2000).max(100)).map(|n| 1 + n * 13 % 20_000);
    let mut files = upload(&cluster, 1, "large", large, &mut random);
    files.extend(upload(&cluster, 1, "small", small, &mut random));
    cluster.wait_at_rest();
    let hurt = cluster.followers()[0];
    let before = ask(&cluster, hurt, "/recovery/status");
    cluster.kill(hurt);
    fs::remove_dir_all(content_folder(&cluster, hurt)).expect("delete the content");
    cluster.start_node(hurt);
    let began = Instant::now();
    cluster.wait_ready();
    let mut most = 0;
    let status = wait_until("it is whole again", Duration::from_secs(300), || {
        let status = ask(&cluster, hurt, "/recovery/status");
        most = most.max(number(&status, "missing_chunks"));
        (number(&status, "missing_chunks") == 0 && status["counted"] == true).then_some(status)
    });
    let took = began.elapsed();
    let bytes = number(&status, "fetched_bytes");
    eprintln!(
        "{} chunks, {} MiB in {took:?}: {:.1} MiB/s; at most {most} were missing; {status}",
        number(&status, "fetched_chunks"),
        bytes >> 20,
        (bytes >> 20) as f64 / took.as_secs_f64(),
    );
    assert!(most > 0, "the loss was seen");
    assert_eq!(number(&status, "held_chunks"), number(&before, "named_chunks"));
    assert_eq!(number(&status, "named_chunks"), number(&before, "named_chunks"));
    assert_eq!(number(&status, "held_bytes"), number(&before, "named_bytes"));
    assert_eq!(status["local_files"], status["total_files"]);
    let gone = hurt % 3 + 1;
    cluster.kill(gone);
    cluster.leader();
    assert_served(&cluster, hurt, &files);
}

#[test]
fn p7_a_pass_can_be_asked_for_and_costs_nothing_when_nothing_changed() {
    let sandbox = Sandbox::light("repair-sync");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let files = upload(&cluster, 1, "f", (0..20).map(|_| 50_000), &mut random);
    cluster.wait_at_rest();
    for slot in cluster.slots() {
        let status = ask(&cluster, slot, "/recovery/status");
        assert_eq!(number(&status, "named_chunks"), 20, "{status}");
        assert_eq!(number(&status, "named_bytes"), 20 * 50_000, "{status}");
        let asked = |_| {
            cluster
                .http(slot)
                .post("/recovery/sync", "")
                .expect(&[202])
                .json()
        };
        let answers: [Value; 3] = std::array::from_fn(asked);
        for answer in answers {
            assert_ne!(answer["started"], answer["already_running"], "{answer}");
            assert_eq!(answer["began"], "complete", "{answer}");
        }
        let status = wait_until("the pass is told", Duration::from_secs(10), || {
            let status = ask(&cluster, slot, "/recovery/status");
            (status["last_pass"]["reason"] == "requested").then_some(status)
        });
        assert_eq!(number(&status["last_pass"], "chunks_looked_at"), 20, "{status}");
        assert_eq!(status["running"], false, "{status}");
    }
    // These nodes were given no secret.
    for path in [
        "/replicate/000000000000002a.7",
        "/delete-content/000000000000002a.7",
    ] {
        let shown = [("authorization", "Bearer 0123456789abcdef")];
        cluster.http(1).post_with(path, &shown, "").expect(&[403]);
        cluster.http(1).post(path, "").expect(&[403]);
    }
    // What changes is followed without a walk.
    cluster
        .http(1)
        .delete(&format!("/upload/{}", files[0].0))
        .expect(&[204]);
    upload(&cluster, 2, "more", [3 << 20].into_iter(), &mut random);
    cluster.wait_at_rest();
    for slot in cluster.slots() {
        wait_for("the numbers follow", Duration::from_secs(20), || {
            let status = ask(&cluster, slot, "/recovery/status");
            number(&status, "named_chunks") == 22 && status["last_pass"]["reason"] != "start"
        });
    }
}

#[test]
fn p7_deleting_files_gives_room_back() {
    let sandbox = Sandbox::heavy("repair-room");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let folder = mount.path("small");
    fs::create_dir(&folder).expect("mkdir");
    // Small files share pages: only rewriting gives the room of most of them back.
    let count = scaled(16_000).max(2000);
    let content = random.bytes(1500);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (folder, content) = (&folder, &content);
            scope.spawn(move || {
                for n in (thread..count).step_by(8) {
                    fs::write(folder.join(format!("{n}")), content).expect("write");
                }
            });
        }
    });
    mount.unmount();
    cluster.wait_at_rest();
    // A restart seals the segments; open ones are not rewritten.
    cluster.kill_all();
    cluster.start_all();
    cluster.wait_ready();
    cluster.wait_at_rest();
    // The next segment is allocated ahead; it must be there before, for the sums to be comparable.
    upload(&cluster, 1, "more", [40_000].into_iter(), &mut random);
    cluster.wait_at_rest();
    let before: Vec<u64> = cluster
        .slots()
        .map(|slot| disk_bytes(&content_folder(&cluster, slot)))
        .collect();
    let mount = cluster.mount();
    let folder = mount.path("small");
    for n in (0..count).filter(|n| n % 10 != 0) {
        fs::remove_file(folder.join(format!("{n}"))).expect("remove");
    }
    let began = Instant::now();
    for slot in cluster.slots() {
        let was = before[slot - 1];
        // Holes alone give two thirds back: every page with a living record stays.
        wait_for("the room comes back", Duration::from_secs(150), || {
            disk_bytes(&content_folder(&cluster, slot)) + count * 1500 * 85 / 100 <= was
        });
        let now = disk_bytes(&content_folder(&cluster, slot));
        eprintln!(
            "node {slot}: {was} bytes on disk, {now} after {:?}",
            began.elapsed()
        );
    }
    for n in (0..count).step_by(10) {
        assert!(
            fs::read(folder.join(format!("{n}"))).expect("read") == content,
            "{n}"
        );
    }
    mount.unmount();
    for slot in cluster.slots() {
        cluster.wait_log(slot, &["sparse content was rewritten"], Duration::from_secs(1));
        assert_eq!(number(&ask(&cluster, slot, "/repair/status"), "found_corrupt"), 0);
    }
}

#[test]
fn p7_a_node_that_was_away_while_much_was_written_is_whole_again() {
    let sandbox = Sandbox::heavy("repair-away");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let away = cluster.followers()[0];
    cluster.kill(away);
    let mount = cluster.mount();
    let (count, bytes) = (scaled(10_000), scaled(1 << 30));
    let folder = mount.path("many");
    fs::create_dir(&folder).expect("mkdir");
    let content = random.bytes(2000);
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (folder, content) = (&folder, &content);
            scope.spawn(move || {
                for n in (thread..count).step_by(8) {
                    fs::write(folder.join(format!("{n}")), content).expect("write");
                }
            });
        }
    });
    let seed = random.number();
    let mut large = fs::File::create(mount.path("large")).expect("create");
    std::io::copy(&mut Content::new(seed, bytes), &mut large).expect("write");
    drop(large);
    mount.unmount();
    cluster.start_node(away);
    let began = Instant::now();
    cluster.wait_ready();
    cluster.wait_at_rest();
    let status = ask(&cluster, away, "/recovery/status");
    eprintln!(
        "{count} files and {} MiB: whole after {:?}; {status}",
        bytes >> 20,
        began.elapsed()
    );
    let gone = away % 3 + 1;
    cluster.kill(gone);
    cluster.leader();
    let files = [("large".to_string(), seed, bytes)];
    assert_served(&cluster, away, &files);
    for n in (0..count).step_by(97) {
        let reply = cluster
            .http(away)
            .get(&format!("/upload/many/{n}"))
            .expect(&[200]);
        assert!(reply.body == content, "{n}");
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
    let digest = |bytes: &[u8]| {
        let digest = quorumfs_proto::Sha256::of(bytes);
        digest
            .0
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let right = digest(&bytes);
    let known = ("authorization", "Bearer the cluster's own secret");
    let (replicate, delete) = (format!("/replicate/{last}"), format!("/delete-content/{last}"));
    for path in [&replicate, &delete] {
        cluster.http(2).post(path, bytes.clone()).expect(&[401]);
        for wrong in [
            "Bearer the cluster's own secreT",
            "Bearer ",
            "Bearer",
            "Basic abc",
        ] {
            let shown = [("authorization", wrong), ("x-content-sha256", &right)];
            cluster
                .http(2)
                .post_with(path, &shown, bytes.clone())
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
    offer(2, &replicate, &right, &content[..2 << 20]).expect(&[413]);
    cluster
        .http(2)
        .post_with("/delete-content/000000000000002a.7", &[known], "")
        .expect(&[404]);

    let hurt = cluster.followers()[0];
    cluster.kill(hurt);
    fs::remove_dir_all(content_folder(&cluster, hurt)).expect("delete the content");
    cluster.start_node(hurt);
    cluster.wait_ready();
    offer(hurt, &replicate, &right, &bytes).expect(&[201]);
    let status = ask(&cluster, hurt, "/recovery/status");
    assert!(
        number(&status, "missing_chunks") > 0,
        "only that one was brought: {status}"
    );
    assert_eq!(status["missing_files"], json!(["file"]), "{status}");
    assert!(
        number(&status, "bytes_per_s") <= 3 << 19,
        "the bound holds: {status}"
    );
    cluster.wait_at_rest();
    assert!(cluster.http(hurt).get("/upload/file").expect(&[200]).body == content);
}
