//! P7: nodes are wiped, damaged, added and taken away, and the cluster goes on by itself.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quorumfs_tests::damage::{files_below, find_bytes, flip};
use quorumfs_tests::environment::{Finally, wait_for};
use quorumfs_tests::healing::{ask, assert_same_metadata, assert_served, upload};
use quorumfs_tests::random::Content;
use quorumfs_tests::{Cluster, Random, Sandbox, scaled};
use serde_json::Value;

/// How long a change of members may take.
const CHANGE_LIMIT: Duration = Duration::from_secs(60);
const FILE_BYTES: u64 = 1 << 20;

fn write_files(folder: &Path, count: u64) {
    for number in 0..count {
        let mut file = File::create(folder.join(format!("{number}"))).expect("create");
        std::io::copy(&mut Content::new(number, FILE_BYTES), &mut file).expect("write");
        file.sync_all().expect("fsync");
    }
}

fn assert_files(folder: &Path, count: u64) {
    for number in 0..count {
        let file = File::open(folder.join(format!("{number}"))).expect("open");
        Content::new(number, FILE_BYTES).assert_equals(file, &format!("file {number}"));
    }
}

fn incarnation(cluster: &Cluster, slot: usize) -> String {
    let members = cluster.membership(cluster.leader()).expect("membership");
    let member = members.into_iter().find(|member| member.slot == slot);
    member.expect("a member in that slot").incarnation
}

#[test]
fn p7_a_wiped_node_comes_back_by_itself_and_is_whole_again() {
    let sandbox = Sandbox::heavy("p7-rejoin");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    let count = scaled(256 << 20) / FILE_BYTES;
    write_files(mount.directory(), count);
    // Once a follower, once the leader.
    for wiped in [cluster.followers()[0], cluster.leader()] {
        let before = incarnation(&cluster, wiped);
        cluster.kill(wiped);
        fs::remove_dir_all(cluster.data_folder(wiped)).expect("wipe the data folder");
        fs::write(mount.path(format!("while-{wiped}-was-away")), "written").expect("the others go on");
        let start = Instant::now();
        cluster.start_node(wiped);
        let whole = |cluster: &Cluster| incarnation(cluster, wiped) != before;
        while !whole(&cluster) {
            assert!(start.elapsed() < CHANGE_LIMIT, "node {wiped} did not come back");
            std::thread::sleep(Duration::from_millis(50));
        }
        cluster.wait_voters(&[1, 2, 3], CHANGE_LIMIT);
        let took = start.elapsed();
        let recovery = cluster.recovery_status(wiped).expect("recovery status");
        assert!(
            recovery.missing_chunks == 0 && recovery.held_chunks >= count,
            "it votes and is not whole: {recovery:?}"
        );
        eprintln!(
            "measured: a wiped node is a voter with all content after {took:?}: {} MiB, {:.0} MB/s",
            count,
            (count * FILE_BYTES) as f64 / took.as_secs_f64() / 1e6
        );
        cluster.wait_at_rest();
        // What it holds and votes for counts: with it and one other the cluster lives.
        let other = cluster.slots().find(|slot| *slot != wiped).expect("another");
        cluster.kill(other);
        fs::write(mount.path(format!("with-{wiped}")), "written").expect("two of three are a quorum");
        assert_files(mount.directory(), count);
        cluster.start_node(other);
        cluster.wait_ready();
        cluster.wait_at_rest();
    }
    mount.unmount();
}

#[test]
fn p7_a_node_with_a_damaged_log_comes_back_with_its_content() {
    let sandbox = Sandbox::light("p7-damaged-log");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    write_files(mount.directory(), 16);
    (0..400).for_each(|n| fs::create_dir(mount.path(format!("wal-marker-{n:04}"))).expect("mkdir"));
    cluster.wait_at_rest();
    let damaged = cluster.followers()[0];
    let before = incarnation(&cluster, damaged);
    cluster.kill(damaged);
    let wal = cluster.data_folder(damaged).join("wal");
    let mut places = Vec::new();
    for n in [100, 200, 300] {
        let found = find_bytes(
            cluster.data_folder(damaged),
            format!("wal-marker-{n:04}").as_bytes(),
        );
        places.extend(found.into_iter().filter(|(file, _)| file.starts_with(&wal)));
    }
    assert!(
        !places.is_empty(),
        "the log holds what was logged: {:?}",
        files_below(&wal)
    );
    places.iter().for_each(|(file, at)| flip(file, *at + 3));
    cluster.start_node(damaged);
    cluster.wait_log(damaged, &["is damaged at byte"], Duration::from_secs(20));
    let start = Instant::now();
    while incarnation(&cluster, damaged) == before {
        assert!(start.elapsed() < CHANGE_LIMIT, "node {damaged} did not come back");
        std::thread::sleep(Duration::from_millis(50));
    }
    cluster.wait_voters(&[1, 2, 3], CHANGE_LIMIT);
    cluster.wait_at_rest();
    let recovery = cluster.recovery_status(damaged).expect("recovery status");
    assert!(recovery.held_chunks >= 16, "{recovery:?}");
    assert_eq!(recovery.fetched_chunks, 0, "it kept its content: {recovery:?}");
    assert_files(mount.directory(), 16);
    mount.unmount();
}

#[test]
fn p7_one_three_five_three_nodes_under_load() {
    let sandbox = Sandbox::heavy("p7-grow");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).nodes(5).founders(1).start();
    let mount = cluster.mount();
    let stop = AtomicBool::new(false);
    let first = random.number() % 1_000_000;
    let written = std::thread::scope(|scope| {
        let work = |worker: u64| {
            let folder = mount.path(format!("worker-{worker}"));
            let stop = &stop;
            move || {
                fs::create_dir(&folder).expect("mkdir");
                let mut number = 0;
                while !stop.load(Ordering::Relaxed) {
                    let path = folder.join(format!("{number}"));
                    let mut file = File::create(&path).expect("create");
                    let bytes = 1 + (first + number * 7919) % 300_000;
                    std::io::copy(&mut Content::new(number, bytes), &mut file).expect("write");
                    file.flush().expect("flush");
                    drop(file);
                    fs::rename(&path, folder.join(format!("{number}-done"))).expect("rename");
                    number += 1;
                }
                number
            }
        };
        let workers: Vec<_> = (0..3).map(|worker| scope.spawn(work(worker))).collect();
        let tell = Finally(|| stop.store(true, Ordering::Relaxed));
        let change = |what: &str, voters: &[usize], act: &dyn Fn()| {
            let start = Instant::now();
            act();
            cluster.wait_voters(voters, CHANGE_LIMIT);
            eprintln!("measured: {what} after {:?}", start.elapsed());
            std::thread::sleep(Duration::from_secs(2));
        };
        change("1 to 3", &[1, 2, 3], &|| {
            [2, 3].into_iter().for_each(|slot| cluster.start_node(slot))
        });
        change("3 to 5", &[1, 2, 3, 4, 5], &|| {
            [4, 5].into_iter().for_each(|slot| cluster.start_node(slot))
        });
        // Those that leave were there first, the leader mostly among them.
        change("5 to 3", &[3, 4, 5], &|| {
            let reply = cluster.http(2).post("/membership/remove", r#"{"slots": [1, 2]}"#);
            reply.expect(&[200]);
        });
        for slot in [1, 2] {
            cluster.terminate(slot);
        }
        std::thread::sleep(Duration::from_secs(2));
        drop(tell);
        workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|cause| std::panic::resume_unwind(cause))
            })
            .collect::<Vec<u64>>()
    });
    eprintln!("measured: files written meanwhile: {written:?}");
    assert!(written.iter().all(|count| *count > 10), "{written:?}");
    cluster.wait_at_rest();
    for slot in [3, 4, 5] {
        let recovery = cluster.recovery_status(slot).expect("recovery status");
        assert!(
            recovery.missing_chunks == 0 && recovery.held_chunks >= recovery.named_chunks,
            "node {slot}: {recovery:?}"
        );
    }
    for (worker, count) in written.iter().enumerate() {
        let folder = mount.path(format!("worker-{worker}"));
        assert_eq!(fs::read_dir(&folder).expect("list").count() as u64, *count);
        for number in 0..*count {
            let bytes = 1 + (first + number * 7919) % 300_000;
            let file = File::open(folder.join(format!("{number}-done"))).expect("open");
            Content::new(number, bytes).assert_equals(file, &format!("{worker}/{number}"));
        }
    }
    mount.unmount();
    assert_same_metadata(&cluster);
}

#[test]
fn p7_a_removal_that_takes_long_goes_on_by_itself() {
    let sandbox = Sandbox::light("p7-removal");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).nodes(5).start();
    let files = upload(&cluster, 1, "f", (0..30).map(|_| 300_000), &mut random);
    cluster.wait_at_rest();
    let (leader, followers) = (cluster.leader(), cluster.followers());
    let (away, leaving) = followers.split_at(2);
    away.iter().for_each(|slot| cluster.kill(*slot));
    // Of the three that are to remain only the leader can say that it holds everything.
    let start = Instant::now();
    let remove = || {
        cluster
            .http(leaving[0])
            .post("/membership/remove", format!(r#"{{"slots": {leaving:?}}}"#))
    };
    let view: Value = remove().expect(&[202]).json();
    eprintln!(
        "measured: answered after {:?}: {}",
        start.elapsed(),
        view["removal"]
    );
    let says = |view: &Value, what: &str| view["removal"].as_str().is_some_and(|text| text.contains(what));
    assert!(says(&view, "must") && says(&view, "repeat the request"), "{view}");
    assert!(says(&ask(&cluster, leader, "/membership"), "must"));
    // What cannot be does not take its place.
    let refused = cluster
        .http(leader)
        .post("/membership/remove", format!(r#"{{"slots": [{}]}}"#, leaving[0]))
        .expect(&[409]);
    assert!(refused.text().contains("4 voters"), "{}", refused.text());
    assert!(says(&ask(&cluster, leader, "/membership"), "must"));

    away.iter().for_each(|slot| cluster.start_node(*slot));
    let start = Instant::now();
    let mut remain = vec![leader, away[0], away[1]];
    remain.sort_unstable();
    cluster.wait_voters(&remain, CHANGE_LIMIT);
    eprintln!(
        "measured: they are out {:?} after the others are back",
        start.elapsed()
    );
    assert_eq!(ask(&cluster, leader, "/membership")["removal"], Value::Null);
    leaving.iter().for_each(|slot| {
        cluster.terminate(*slot);
    });
    cluster.wait_at_rest();
    for slot in remain {
        let recovery = cluster.recovery_status(slot).expect("recovery status");
        assert!(
            recovery.missing_chunks == 0 && recovery.held_chunks == recovery.named_chunks,
            "node {slot}: {recovery:?}"
        );
        assert_served(&cluster, slot, &files);
    }
}

#[test]
fn p7_a_learner_leaves_at_once_though_a_voter_is_away() {
    let sandbox = Sandbox::light("p7-learner");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).nodes(4).founders(3).start();
    upload(&cluster, 1, "f", (0..5).map(|_| 300_000), &mut random);
    cluster.start_node(4);
    let leader = cluster.leader();
    let members = || cluster.membership(leader).map_or(0, |members| members.len());
    wait_for("the fourth is a learner", CHANGE_LIMIT, || members() == 4);
    let away = (1..=3).find(|slot| *slot != leader).expect("three voters");
    cluster.kill(away);
    let start = Instant::now();
    let reply = cluster
        .http(leader)
        .post("/membership/remove", r#"{"slots": [4]}"#);
    let view: Value = reply.expect(&[200]).json();
    eprintln!("measured: out after {:?}", start.elapsed());
    assert_eq!(view["removal"], Value::Null, "{view}");
    assert!(
        start.elapsed() < Duration::from_secs(15),
        "nobody's content had to be waited for"
    );
    cluster.wait_voters(&[1, 2, 3], CHANGE_LIMIT);
}

#[test]
fn changes_that_cannot_be_are_refused_in_words() {
    let sandbox = Sandbox::light("p7-refused");
    let cluster = Cluster::start(&sandbox);
    let refused = |path: &str, body: &str, status: u16, says: &str| {
        let reply = cluster.http(1).post(path, body).expect(&[status]);
        assert!(reply.text().contains(says), "{path} {body}: {}", reply.text());
    };
    refused("/membership/remove", "{", 400, "the body is not valid");
    refused("/membership/remove", &" ".repeat(100 << 10), 413, "length limit");
    refused("/membership/remove", r#"{"slots": []}"#, 400, "at least one");
    refused(
        "/membership/remove",
        r#"{"slots": [9]}"#,
        409,
        "no member in slot 9",
    );
    refused("/membership/remove", r#"{"slots": [2]}"#, 409, "2 voters");
    refused("/membership/remove", r#"{"slots": [1, 2, 3]}"#, 409, "0 voters");
    refused("/membership/add", r#"{"address": "x"}"#, 400, "grpc_address");
    refused("/membership/add", r#"{"grpc_address": ""}"#, 400, "HOST:PORT");
    let nobody = sandbox.address();
    refused(
        "/membership/add",
        &format!(r#"{{"grpc_address": "{nobody}"}}"#),
        422,
        "no node could be asked",
    );
    // A member that lives is no news.
    let own = cluster.grpc_address(2).to_string();
    cluster
        .http(3)
        .post("/membership/add", format!(r#"{{"grpc_address": "{own}"}}"#))
        .expect(&[202]);
    cluster.wait_voters(&[1, 2, 3], Duration::from_secs(5));
}
