//! Sessions: whom the cluster waits for before it frees what was unlinked, and who speaks for whom.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::statvfs::statvfs;
use quorumfs_proto::call::{ClientRequest, ClientResponse, Refusal};
use quorumfs_proto::command::{IfExists, NewInode, NewKind, Operation, Target};
use quorumfs_proto::{InodeNumber, Name};
use quorumfs_tests::environment::{Finally, wait_for};
use quorumfs_tests::proxy::{Fault, Victim};
use quorumfs_tests::wire_client::WireClient;
use quorumfs_tests::{Cluster, Mount, Sandbox};

/// For what takes a second or two on a machine that has nothing else to do. What this file is about takes a minute or never
/// ends where it does not work.
const SOON: Duration = Duration::from_secs(30);

/// Inodes in use.
fn inodes(mount: &Mount) -> u64 {
    let space = statvfs(mount.directory()).expect("statvfs");
    space.files() - space.files_free()
}

/// Sessions that live, as a node knows.
fn sessions(cluster: &Cluster<'_>, slot: usize) -> Option<u64> {
    let reply = cluster.http(slot).try_get("/status").ok()?;
    let status: serde_json::Value = serde_json::from_slice(&reply.body).ok()?;
    status["sessions"].as_u64()
}

#[track_caller]
fn wait_for_sessions(cluster: &Cluster<'_>, count: u64) {
    let what = format!("{count} sessions live");
    wait_for(&what, SOON, || sessions(cluster, cluster.leader()) == Some(count));
}

#[test]
fn p8_unlinked_files_are_freed_although_a_session_holds_many() {
    const HELD: usize = 1_500;
    const FREE: usize = 2_000;
    let sandbox = Sandbox::light("unlinked");
    let cluster = Cluster::start(&sandbox);
    let (mount, other) = (cluster.mount(), cluster.mount());
    let before = inodes(&mount);
    let held: Vec<File> = (0..HELD)
        .map(|n| {
            let path = mount.path(format!("held-{n}"));
            fs::write(&path, format!("{n}")).expect("write");
            let file = File::open(other.path(format!("held-{n}"))).expect("open");
            fs::remove_file(path).expect("unlink");
            file
        })
        .collect();
    for n in 0..FREE {
        fs::write(mount.path(format!("free-{n}")), "x").expect("write");
    }
    for n in 0..FREE {
        fs::remove_file(mount.path(format!("free-{n}"))).expect("unlink");
    }
    wait_for("what nobody holds is freed", SOON, || {
        inodes(&mount) <= before + HELD as u64
    });
    for (n, mut file) in held.into_iter().enumerate() {
        let mut content = String::new();
        file.read_to_string(&mut content).expect("it is held");
        assert_eq!(content, format!("{n}"));
    }
    wait_for("what was held is freed", SOON, || inodes(&mount) <= before);
    other.unmount();
    mount.unmount();
}

#[test]
fn p7_processes_that_are_gone_are_not_waited_for() {
    let sandbox = Sandbox::light("gone");
    let cluster = Cluster::start(&sandbox);
    let mount = cluster.mount();
    wait_for_sessions(&cluster, 4);
    // A node that ends in order says so.
    let follower = cluster.followers()[0];
    assert!(cluster.terminate(follower).success());
    wait_for_sessions(&cluster, 3);
    cluster.start_node(follower);
    wait_for_sessions(&cluster, 4);
    // So does a leader, although there is another after it.
    let leader = cluster.leader();
    assert!(cluster.terminate(leader).success());
    wait_for_sessions(&cluster, 3);
    cluster.start_node(leader);
    cluster.wait_ready();
    wait_for_sessions(&cluster, 4);
    // One that was killed says what it was when it starts again.
    let follower = cluster.followers()[0];
    cluster.restart(follower);
    cluster.wait_log(follower, &["ended the session of the previous process"], SOON);
    wait_for_sessions(&cluster, 4);
    // A mount that was killed is seen to be gone.
    let before = inodes(&mount);
    let mut doomed = cluster.mount();
    let files: Vec<File> = (0..10)
        .map(|n| {
            let path = doomed.path(format!("{n}"));
            let file = File::create(&path).expect("create");
            fs::remove_file(path).expect("unlink");
            file
        })
        .collect();
    wait_for_sessions(&cluster, 5);
    doomed.kill();
    wait_for("what it held is freed", SOON, || inodes(&mount) <= before);
    wait_for_sessions(&cluster, 4);
    drop(files);
    mount.unmount();
}

/// The cluster ended the session meanwhile, and says that it never decided the write that was on its way.
#[test]
fn p6_a_write_waits_out_a_cut_that_is_longer_than_its_session_lives() {
    let sandbox = Sandbox::light("long-cut");
    let cluster = Cluster::builder(&sandbox).proxied().start();
    let (mount, other) = (cluster.mount(), cluster.mount());
    let path = mount.path("log");
    let lines = AtomicUsize::new(0);
    let (wanted, is_over) = (AtomicUsize::new(usize::MAX), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let _over = Finally(|| is_over.store(true, Ordering::SeqCst));
            let mut file = File::options()
                .append(true)
                .create(true)
                .open(&path)
                .expect("open");
            while lines.load(Ordering::SeqCst) < wanted.load(Ordering::SeqCst) {
                let line = format!("{}\n", lines.load(Ordering::SeqCst));
                file.write_all(line.as_bytes()).expect("write");
                file.sync_all().expect("sync");
                lines.fetch_add(1, Ordering::SeqCst);
            }
        });
        let more_lines = |count: usize| {
            let enough = lines.load(Ordering::SeqCst) + count;
            wait_for("lines are written", SOON, || {
                lines.load(Ordering::SeqCst) >= enough || is_over.load(Ordering::SeqCst)
            });
        };
        // The writer ends also when this thread panics.
        let enough = Finally(|| wanted.store(0, Ordering::SeqCst));
        more_lines(20);
        let leader = cluster.leader();
        for slot in 1..=3 {
            cluster
                .proxy(slot)
                .set(Fault::Refuse, Victim::Process(mount.process_id()));
        }
        // Longer than the session can live: a minute.
        cluster.wait_log(leader, &["session ended"], 3 * SOON);
        assert!(!writer.is_finished(), "the program saw an error");
        for slot in 1..=3 {
            cluster.proxy(slot).heal();
        }
        more_lines(20);
        drop(enough);
        writer.join().expect("no call failed");
    });
    let written = fs::read_to_string(other.path("log")).expect("read");
    let expected: String = (0..lines.load(Ordering::SeqCst))
        .map(|n| format!("{n}\n"))
        .collect();
    assert_eq!(written, expected, "each line once, in order");
    other.unmount();
    mount.unmount();
}

#[test]
fn a_session_is_spoken_for_by_its_own_client_only() {
    let sandbox = Sandbox::light("impostor");
    let cluster = Cluster::start(&sandbox);
    // From then on sessions prove themselves.
    cluster.wait_log(cluster.leader(), &["feature level was raised"], SOON);
    let client = WireClient::connect(&cluster.members());
    let impostor = client.impostor();
    let session = client.session();
    let make = |sequence| {
        let operation = Operation::Create {
            parent: Target::Inode(InodeNumber::ROOT),
            name: Name::new(format!("file-{sequence}").into_bytes()).expect("a name"),
            inode: NewInode {
                kind: NewKind::File,
                mode: 0o644,
                uid: 0,
                gid: 0,
            },
            existing: IfExists::Refuse,
        };
        client.operation(0, sequence, operation)
    };
    let attempts = [
        ClientRequest::CloseSession { session },
        ClientRequest::KeepAlive { session },
        ClientRequest::Mutate(make(1)),
        ClientRequest::AnswerUnlinked {
            session,
            from: 0,
            through: 0,
            held: Vec::new(),
        },
        impostor.opening(),
    ];
    for attempt in attempts {
        let reply = impostor.call(&attempt);
        assert!(
            matches!(reply, ClientResponse::Refused(Refusal::Invalid { .. })),
            "{attempt:?} is answered {reply:?}"
        );
    }
    // Its own client does all that, on a stream of its own each time, and after a change of leader.
    assert!(matches!(client.mutate(&make(1)), ClientResponse::Outcome(Ok(_))));
    assert!(matches!(
        client.call(&client.opening()),
        ClientResponse::Session(_)
    ));
    cluster.kill(cluster.leader());
    cluster.leader();
    let reply = impostor.call(&ClientRequest::CloseSession { session });
    assert!(
        matches!(reply, ClientResponse::Refused(Refusal::Invalid { .. })),
        "{reply:?}"
    );
    assert!(matches!(client.mutate(&make(2)), ClientResponse::Outcome(Ok(_))));
    client.close();
}
