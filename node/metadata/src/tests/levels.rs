//! Feature levels, and the digest of a state.

use quorumfs_proto::command::*;
use quorumfs_proto::*;

use super::super::*;
use super::support::*;

const ROOT: InodeNumber = InodeNumber::ROOT;

/// Names, content and attributes, the same each time.
fn history(node: &mut Node) {
    for number in 0..50 {
        let stamp = Timestamp::default().plus_nanoseconds(1_000_000 + number);
        let command = Command::single(create(ROOT, &format!("file-{number}"), NewKind::File));
        let mutation = node.mutation(SessionId(1), command);
        node.apply_at(stamp, LogBody::Call(mutation));
    }
}

fn digest(node: &Node) -> Sha256 {
    node.view().digest(|| {}).unwrap()
}

#[test]
fn below_its_level_nothing_new_takes_effect() {
    let mut node = Node::with_sessions(1);
    assert_eq!(node.view().feature_level(), 1);
    node.apply(LogBody::SetReplicas { replicas: 5 });
    assert_eq!(node.store.position_and_replicas().1, Replicas::DEFAULT);
    assert_eq!(node.attributes(ROOT).mtime, Timestamp::default());
    let now = Timestamp::default().plus_nanoseconds(77_000);
    node.apply_at(now, LogBody::RaiseFeatureLevel { level: 2 });
    assert_eq!(node.view().feature_level(), 2);
    assert!(node.attributes(ROOT).mtime >= now, "the root has a time now");
    node.apply(LogBody::SetReplicas { replicas: 5 });
    let replicas = node.store.position_and_replicas().1;
    assert_eq!((replicas.count, replicas.since_index), (5, node.index));
    // The level cannot be lowered.
    node.apply(LogBody::RaiseFeatureLevel { level: 1 });
    assert_eq!(node.view().feature_level(), 2);
}

#[test]
fn a_write_from_a_clock_that_is_ahead_is_stamped_with_its_command() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "file", NewKind::File));
    let stamp = |seconds| Timestamp {
        seconds,
        nanoseconds: 0,
    };
    for (level, mtime, expected) in [(2, 900, 900), (3, 900, 500), (3, 300, 300)] {
        node.apply(LogBody::RaiseFeatureLevel { level });
        let write = Operation::Write {
            inode: Target::Inode(file),
            extents: Vec::new(),
            mtime: Some(stamp(mtime)),
            privileges: Privileges::Keep,
        };
        let mutation = node.mutation(SessionId(1), Command::single(write));
        node.apply_at(stamp(500), LogBody::Call(mutation));
        let attributes = node.attributes(file);
        assert_eq!(attributes.mtime.seconds, expected, "at level {level}");
    }
}

#[test]
fn a_level_that_is_not_known_stops_the_node() {
    let node = Node::new();
    let mut batch = node.store.begin();
    let unknown = LogCommand {
        stamp: Timestamp::default(),
        body: LogBody::RaiseFeatureLevel {
            level: FEATURE_LEVEL + 1,
        },
    };
    let refused = batch.apply(1, &unknown).unwrap_err();
    assert!(refused.to_string().contains("use a newer program"), "{refused}");
}

#[test]
fn equal_states_have_equal_digests_wherever_their_rows_lie() {
    let (mut one, mut other) = (Node::with_sessions(1), Node::with_sessions(1));
    history(&mut one);
    history(&mut other);
    let before = digest(&one);
    assert_eq!(before, digest(&other));
    // The same state on disk, in the frozen overlay, and in both with an active overlay.
    one.store.freeze();
    assert_eq!(before, digest(&one));
    one.store.flush().unwrap();
    assert_eq!(before, digest(&one));
    for node in [&mut one, &mut other] {
        node.operate(create(ROOT, "more", NewKind::Directory)).unwrap();
    }
    let after = digest(&one);
    assert_eq!(after, digest(&other));
    assert_ne!(before, after);
    // One of them gets another name.
    one.operate(create(ROOT, "another", NewKind::File)).unwrap();
    assert_ne!(digest(&one), digest(&other));
}
