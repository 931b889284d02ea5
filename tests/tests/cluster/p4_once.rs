//! P4: a call that is retried takes effect once and is answered as it was the first time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use quorumfs_proto::call::{ClientResponse, Mutation};
use quorumfs_proto::command::{
    Command, Held, IfExists, NewInode, NewKind, Operation, Privileges, RenameMode, Target,
};
use quorumfs_proto::{
    Answer, ChunkBody, ChunkId, Extent, FsError, InodeNumber, Name, NewChunk, OperationResult, Query, Sha256,
};
use quorumfs_tests::environment::Finally;
use quorumfs_tests::healing::assert_same_metadata;
use quorumfs_tests::proxy::{Fault, Victim};
use quorumfs_tests::wire_client::WireClient;
use quorumfs_tests::{Cluster, Mount, Random, Sandbox};

const ROOT: Target = Target::Inode(InodeNumber::ROOT);

fn name(text: &str) -> Name {
    Name::new(Bytes::copy_from_slice(text.as_bytes())).expect("a valid name")
}

fn create(text: &str, kind: NewKind) -> Operation {
    Operation::Create {
        parent: ROOT,
        name: name(text),
        inode: NewInode {
            kind,
            mode: 0o755,
            uid: 0,
            gid: 0,
        },
        existing: IfExists::Refuse,
    }
}

fn unlink(text: &str) -> Operation {
    Operation::Unlink {
        parent: ROOT,
        name: name(text),
        held: Held::NotOpen,
    }
}

fn inode_of(reply: &ClientResponse) -> InodeNumber {
    match reply {
        ClientResponse::Outcome(Ok(outcome)) => match outcome.results[0] {
            OperationResult::Entry { inode, .. } => inode,
            ref other => panic!("not an entry: {other:?}"),
        },
        other => panic!("refused: {other:?}"),
    }
}

fn append(client: &WireClient, lane: u16, inode: InodeNumber, text: &'static str) -> Mutation {
    let id = ChunkId {
        session: client.session(),
        counter: 1,
    };
    let length = text.len() as u32;
    let chunk = NewChunk {
        id,
        length,
        sha256: Sha256::of(text.as_bytes()),
        body: ChunkBody::Inline(Bytes::from_static(text.as_bytes())),
    };
    let operation = Operation::Append {
        inode: Target::Inode(inode),
        extents: vec![Extent {
            file_offset: 0,
            length,
            chunk: id,
            chunk_offset: 0,
        }],
        privileges: Privileges::Keep,
    };
    let command = Command {
        chunks: vec![chunk],
        operations: vec![operation],
    };
    client.mutation(lane, 1, command)
}

#[test]
fn p4_a_repeated_request_is_answered_as_at_first_even_after_failover_and_restart() {
    let sandbox = Sandbox::light("p4-wire");
    let cluster = Cluster::start(&sandbox);
    let client = WireClient::connect(&cluster.members());
    // Each in a lane of its own: a lane remembers its last answer.
    let mut done: Vec<(&str, Mutation, ClientResponse)> = Vec::new();
    let mut send = |what: &'static str, make: &dyn Fn(u16) -> Mutation| {
        let mutation = make(u16::try_from(done.len()).expect("lanes enough"));
        let reply = client.mutate(&mutation);
        done.push((what, mutation, reply.clone()));
        reply
    };
    send("mkdir", &|lane| {
        client.operation(lane, 1, create("directory", NewKind::Directory))
    });
    let file = inode_of(&send("exclusive create", &|lane| {
        client.operation(lane, 1, create("file", NewKind::File))
    }));
    send("append", &|lane| append(&client, lane, file, "once"));
    let link = Operation::Link {
        inode: Target::Inode(file),
        parent: ROOT,
        name: name("link"),
        existing: IfExists::Refuse,
    };
    send("link", &|lane| client.operation(lane, 1, link.clone()));
    let rename = Operation::Rename {
        from_parent: ROOT,
        from_name: name("link"),
        to_parent: ROOT,
        to_name: name("renamed"),
        mode: RenameMode::Replace,
        held: Held::NotOpen,
    };
    send("rename", &|lane| client.operation(lane, 1, rename.clone()));
    send("unlink", &|lane| client.operation(lane, 1, unlink("file")));
    let refused = send("mkdir that is refused", &|lane| {
        client.operation(lane, 1, create("directory", NewKind::Directory))
    });
    assert_eq!(refused, ClientResponse::Outcome(Err(FsError::Exists)));
    let refused = send("unlink that is refused", &|lane| {
        client.operation(lane, 1, unlink("later"))
    });
    assert_eq!(refused, ClientResponse::Outcome(Err(FsError::NotFound)));
    // Now both refused ones would succeed: the verdicts must stay what they were.
    let removal = Operation::RemoveDirectory {
        parent: ROOT,
        name: name("directory"),
    };
    send("rmdir", &|lane| client.operation(lane, 1, removal.clone()));
    send("mknod", &|lane| {
        client.operation(lane, 1, create("later", NewKind::Fifo))
    });
    for (what, _, reply) in &done {
        assert!(matches!(reply, ClientResponse::Outcome(_)), "{what}: {reply:?}");
    }

    let repeat_all = |when: &str| {
        for (what, mutation, first) in &done {
            assert_eq!(&client.mutate(mutation), first, "{what}, repeated {when}");
        }
    };
    repeat_all("at once");
    let old = cluster.leader();
    cluster.kill(old);
    cluster.leader();
    repeat_all("at another leader");
    cluster.start_node(old);
    cluster.kill_all();
    cluster.start_all();
    cluster.wait_ready();
    repeat_all("after a restart of all nodes");

    let lookup = |text: &str| Query::Lookup {
        parent: InodeNumber::ROOT,
        name: name(text),
    };
    let Answer::Attributes(renamed) = client.query(lookup("renamed")) else {
        panic!("a lookup answers attributes")
    };
    assert_eq!(
        (renamed.inode, renamed.size, renamed.links),
        (file, 4, 1),
        "appended once, linked once, unlinked once"
    );
    let Answer::Attributes(later) = client.query(lookup("later")) else {
        panic!("a lookup answers attributes")
    };
    assert_eq!(later.links, 1);
    let mount = cluster.mount();
    assert_eq!(fs::read(mount.path("renamed")).expect("read"), b"once");
    assert!(!mount.path("directory").exists());
    mount.unmount();
}

/// A call that a program makes through the mount, on the name number `n` below a folder: what must be there before,
/// the call, and how another mount sees that it has happened.
struct Kind {
    what: &'static str,
    prepare: fn(&Path, usize) -> io::Result<()>,
    call: fn(&Path, usize) -> io::Result<()>,
    happened: fn(&Path, usize) -> bool,
}

fn new(folder: &Path, n: usize) -> std::path::PathBuf {
    folder.join(format!("new-{n}"))
}

fn old(folder: &Path, n: usize) -> std::path::PathBuf {
    folder.join(format!("old-{n}"))
}

fn make_old(folder: &Path, n: usize) -> io::Result<()> {
    File::create(old(folder, n)).map(drop)
}

const KINDS: [Kind; 6] = [
    Kind {
        what: "mkdir",
        prepare: |_, _| Ok(()),
        call: |folder, n| fs::create_dir(new(folder, n)),
        happened: |folder, n| new(folder, n).is_dir(),
    },
    Kind {
        what: "exclusive create",
        prepare: |_, _| Ok(()),
        call: |folder, n| File::create_new(new(folder, n)).map(drop),
        happened: |folder, n| new(folder, n).is_file(),
    },
    Kind {
        what: "rename",
        prepare: make_old,
        call: |folder, n| fs::rename(old(folder, n), new(folder, n)),
        happened: |folder, n| new(folder, n).is_file(),
    },
    Kind {
        what: "unlink",
        prepare: make_old,
        call: |folder, n| fs::remove_file(old(folder, n)),
        happened: |folder, n| !old(folder, n).exists(),
    },
    Kind {
        what: "link",
        // One file with many names: what is lost is to be the answer to the link, not to a preparation.
        prepare: |folder, n| if n == 1 { make_old(folder, n) } else { Ok(()) },
        call: |folder, n| fs::hard_link(old(folder, 1), new(folder, n)),
        happened: |folder, n| new(folder, n).is_file(),
    },
    Kind {
        what: "append",
        prepare: |_, _| Ok(()),
        call: |folder, n| {
            let mut file = OpenOptions::new()
                .create(true)
                .append(true)
                .open(folder.join("log"))?;
            writeln!(file, "{n:08}")
        },
        happened: |folder, n| {
            let log = fs::read_to_string(folder.join("log")).unwrap_or_default();
            log.lines().any(|line| line == format!("{n:08}"))
        },
    },
];

/// How the answer is lost.
#[derive(Clone, Copy, Debug)]
enum Loss {
    /// Only the answer, on its way; the mount asks the same leader again.
    Answer,
    /// The leader too; the mount asks its successor.
    Leader,
}

/// Calls again and again while answers are lost, until `wanted` calls have taken effect without an answer. Every call
/// must succeed nevertheless.
fn lose_answers(
    cluster: &Cluster,
    mount: &Mount,
    observer: &Mount,
    kind: &Kind,
    loss: Loss,
    wanted: usize,
    random: &mut Random,
) {
    const ROUNDS_MAX: usize = 150;
    let below = format!("{}-{loss:?}", kind.what.replace(' ', "-"));
    fs::create_dir(mount.path(&below)).expect("mkdir");
    let (folder, seen) = (mount.path(&below), observer.path(&below));
    let (called, answered, over) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
    let mut lost = 0;
    std::thread::scope(|scope| {
        let caller = scope.spawn(|| {
            for n in 1.. {
                if over.load(Ordering::SeqCst) {
                    return n - 1;
                }
                (kind.prepare)(&folder, n).unwrap_or_else(|e| panic!("prepare {} {n}: {e}", kind.what));
                called.store(n, Ordering::SeqCst);
                (kind.call)(&folder, n).unwrap_or_else(|e| panic!("{} {n}: {e}", kind.what));
                answered.store(n, Ordering::SeqCst);
            }
            unreachable!("numbers do not end")
        });
        let stop = Finally(|| over.store(true, Ordering::SeqCst));
        for round in 0..ROUNDS_MAX {
            if lost >= wanted || caller.is_finished() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20 + random.below(30)));
            let leader = cluster.leader();
            cluster
                .proxy(leader)
                .set(Fault::SwallowReplies, Victim::Process(mount.process_id()));
            std::thread::sleep(Duration::from_millis(250));
            let n = called.load(Ordering::SeqCst);
            if answered.load(Ordering::SeqCst) < n && (kind.happened)(&seen, n) {
                lost += 1;
                eprintln!(
                    "{} {n}: done, and the answer lost (round {round}, {loss:?})",
                    kind.what
                );
                if matches!(loss, Loss::Leader) {
                    cluster.kill(leader);
                    cluster.proxy(leader).heal();
                    cluster.leader();
                    cluster.start_node(leader);
                    cluster.wait_ready();
                    continue;
                }
            }
            cluster.proxy(leader).heal();
        }
        drop(stop);
        let calls = caller
            .join()
            .unwrap_or_else(|cause| std::panic::resume_unwind(cause));
        eprintln!("{}: {calls} calls, {lost} answers lost ({loss:?})", kind.what);
        for n in 1..=calls {
            assert!(
                (kind.happened)(&folder, n),
                "{} {n} of {calls} was acknowledged and is not there",
                kind.what
            );
        }
        if kind.what == "append" {
            let log = fs::read_to_string(folder.join("log")).expect("read");
            let expected: String = (1..=calls).map(|n| format!("{n:08}\n")).collect();
            assert_eq!(log, expected, "each is appended once");
        }
    });
    assert!(
        lost >= wanted,
        "{}: only {lost} answers were lost in {ROUNDS_MAX} rounds",
        kind.what
    );
}

#[test]
fn p4_a_call_whose_answer_is_lost_succeeds_and_is_done_once() {
    let sandbox = Sandbox::heavy("p4-lost-answers");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).proxied().start();
    let (mount, observer) = (cluster.mount(), cluster.mount());
    for kind in &KINDS {
        lose_answers(&cluster, &mount, &observer, kind, Loss::Answer, 3, &mut random);
    }
    observer.unmount();
    mount.unmount();
    assert_same_metadata(&cluster);
}

#[test]
fn p4_a_call_whose_leader_dies_between_commit_and_answer_succeeds_and_is_done_once() {
    let sandbox = Sandbox::heavy("p4-lost-leader");
    let mut random = Random::announced();
    let cluster = Cluster::builder(&sandbox).proxied().start();
    let (mount, observer) = (cluster.mount(), cluster.mount());
    for kind in &KINDS {
        lose_answers(&cluster, &mount, &observer, kind, Loss::Leader, 1, &mut random);
    }
    observer.unmount();
    mount.unmount();
    assert_same_metadata(&cluster);
}
