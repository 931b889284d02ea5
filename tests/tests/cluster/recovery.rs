//! Recovery and the sweeper as an administrator sees them: lost content comes back without a command, and what was
//! deleted gives its room back.

use std::fs;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use quorumfs_proto::call::ClientResponse;
use quorumfs_proto::command::{Command, IfExists, NewInode, NewKind, Operation, Privileges, Target};
use quorumfs_proto::limits::{CHUNK_BYTES_MAX, COMMAND_CHUNKS_MAX};
use quorumfs_proto::{ChunkBody, ChunkId, Extent, InodeNumber, Name, NewChunk, Sha256};
use quorumfs_tests::environment::{wait_for, wait_until};
use quorumfs_tests::healing::{ask, assert_served, content_folder, disk_bytes, number, upload};
use quorumfs_tests::random::Content;
use quorumfs_tests::wire_client::WireClient;
use quorumfs_tests::{Cluster, Random, Sandbox, scaled};
use serde_json::Value;

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
fn p7_content_deleted_under_a_running_node_comes_back_and_the_node_stays_who_it_is() {
    let sandbox = Sandbox::light("repair-live");
    let mut random = Random::announced();
    let cluster = Cluster::start(&sandbox);
    let mut files = upload(&cluster, 1, "before", (0..8).map(|_| 3 << 20), &mut random);
    cluster.wait_at_rest();
    let hurt = cluster.followers()[0];
    let incarnation = || {
        let members = cluster.membership(cluster.leader()).expect("membership");
        let member = members.into_iter().find(|member| member.slot == hurt);
        member.expect("it is a member").incarnation
    };
    let before = incarnation();
    fs::remove_dir_all(content_folder(&cluster, hurt)).expect("delete the content");
    // What comes now goes to a file that has no name any more: it does not count as held there.
    let other = cluster.leader();
    files.extend(upload(
        &cluster,
        other,
        "after",
        (0..4).map(|_| 3 << 20),
        &mut random,
    ));
    cluster.wait_log(
        hurt,
        &["was removed while it was in use"],
        Duration::from_secs(60),
    );
    wait_for("it is whole again", Duration::from_secs(60), || {
        cluster
            .recovery_status(hurt)
            .is_ok_and(|status| status.missing_chunks == 0 && status.held_chunks == status.named_chunks)
    });
    assert_eq!(incarnation(), before);
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
        let before = number(&ask(&cluster, slot, "/recovery/status"), "complete_passes");
        let answer: Value = cluster
            .http(slot)
            .post("/recovery/sync", "")
            .expect(&[202])
            .json();
        assert_eq!(answer["started"], true, "none is under way: {answer}");
        let status = wait_until("the pass is told", Duration::from_secs(10), || {
            let status = ask(&cluster, slot, "/recovery/status");
            (number(&status, "complete_passes") > before).then_some(status)
        });
        assert_eq!(number(&status, "complete_passes"), before + 1, "{status}");
        assert_eq!(status["last_complete_pass"]["reason"], "requested", "{status}");
        assert_eq!(
            number(&status["last_complete_pass"], "chunks_looked_at"),
            20,
            "{status}"
        );
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
            number(&status, "named_chunks") == 22 && status["last_complete_pass"]["reason"] == "requested"
        });
    }
}

/// Makes files that name so many chunks of a byte each, so far apart that they are not put together in the background.
fn name_many_chunks(cluster: &Cluster, chunks: u64) {
    let client = WireClient::connect(&cluster.members());
    let counters: Vec<u64> = (1..=chunks).collect();
    for (n, counters) in (1..).zip(counters.chunks(COMMAND_CHUNKS_MAX)) {
        let chunk = |counter: &u64| NewChunk {
            id: ChunkId {
                session: client.session(),
                counter: *counter,
            },
            length: 1,
            sha256: Sha256::of(b"x"),
            body: ChunkBody::Inline(b"x".as_slice().into()),
        };
        let chunks: Vec<NewChunk> = counters.iter().map(chunk).collect();
        let piece = |(file_offset, chunk): (u64, &NewChunk)| Extent {
            file_offset,
            length: 1,
            chunk: chunk.id,
            chunk_offset: 0,
        };
        let create = Operation::Create {
            parent: Target::Inode(InodeNumber::ROOT),
            name: Name::new(format!("many-{n}").into_bytes()).expect("a valid name"),
            inode: NewInode {
                kind: NewKind::File,
                mode: 0o644,
                uid: 0,
                gid: 0,
            },
            existing: IfExists::Refuse,
        };
        let append = Operation::Append {
            inode: Target::Created(0),
            extents: (0..)
                .step_by(CHUNK_BYTES_MAX as usize)
                .zip(&chunks)
                .map(piece)
                .collect(),
            privileges: Privileges::Keep,
        };
        let command = Command {
            chunks,
            operations: vec![create, append],
        };
        let reply = client.mutate(&client.mutation(0, n, command));
        assert!(matches!(reply, ClientResponse::Outcome(Ok(_))), "{reply:?}");
    }
    client.close();
}

#[test]
fn p7_of_many_who_ask_for_a_pass_at_once_one_begins_it() {
    /// So many that a pass takes longer than a request.
    const CHUNKS: u64 = 100 * COMMAND_CHUNKS_MAX as u64;
    const ASKING: usize = 8;
    const REQUESTS_EACH: usize = 10;
    let sandbox = Sandbox::light("repair-sync-once");
    let cluster = Cluster::start(&sandbox);
    name_many_chunks(&cluster, CHUNKS);
    cluster.wait_at_rest();
    let slot = cluster.followers()[0];
    let status = || ask(&cluster, slot, "/recovery/status");
    let before = number(&status(), "complete_passes");
    let together = Barrier::new(ASKING);
    let answers: Vec<Value> = std::thread::scope(|scope| {
        let ask_often = || {
            together.wait();
            let request = |_| {
                cluster
                    .http(slot)
                    .post("/recovery/sync", "")
                    .expect(&[202])
                    .json()
            };
            (0..REQUESTS_EACH).map(request).collect::<Vec<Value>>()
        };
        let asking: Vec<_> = (0..ASKING).map(|_| scope.spawn(ask_often)).collect();
        let answers = asking.into_iter().map(|asking| asking.join().expect("ask"));
        answers.flatten().collect()
    });
    let started = answers.iter().filter(|answer| answer["started"] == true).count();
    eprintln!("measured: {} requests began {started} passes", answers.len());
    assert!(started > 0 && started < answers.len(), "{answers:?}");
    let after = wait_until("the passes end", Duration::from_secs(20), || {
        let status = status();
        (number(&status, "complete_passes") >= before + started as u64).then_some(status)
    });
    assert_eq!(
        number(&after, "complete_passes"),
        before + started as u64,
        "a pass for each that began one, and no other: {after}"
    );
    let last = &after["last_complete_pass"];
    assert_eq!(last["reason"], "requested", "{after}");
    assert_eq!(number(last, "chunks_looked_at"), CHUNKS, "{after}");
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
        cluster.wait_log(slot, &["sparse segments were rewritten"], Duration::from_secs(1));
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
