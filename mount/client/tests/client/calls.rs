//! Mutations and queries with a cluster that loses, delays and forgets calls (P4, P6).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::fake::{Act, Fake};
use bytes::Bytes;
use quorumfs_client::{Client, ClientOptions, ConnectError};
use quorumfs_proto::command::{IfExists, NewInode, NewKind, Privileges, Target};
use quorumfs_proto::limits::LANES_MAX;
use quorumfs_proto::{
    ClientRequest, ClientResponse, Command, Extent, FsError, InodeNumber, Name, NewChunk, Operation, Outcome,
    Query, Refusal, RequestId,
};

const MS: Duration = Duration::from_millis(1);
/// Longest pause of a failover, including the election.
const PAUSE_MAX: Duration = Duration::from_secs(3);

pub async fn connect(fake: &Fake, call_timeout: Option<Duration>) -> Client {
    let options = ClientOptions {
        addresses: fake.addresses(),
        description: String::from("test"),
        call_timeout,
        ..ClientOptions::default()
    };
    Client::connect(options).await.unwrap()
}

pub fn make(name: impl Into<String>) -> Command {
    Command::single(Operation::Create {
        parent: Target::Inode(InodeNumber::ROOT),
        name: Name::new(Bytes::from(name.into())).unwrap(),
        inode: NewInode {
            kind: NewKind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
        },
        existing: IfExists::Refuse,
    })
}

pub fn write(chunk: NewChunk) -> Command {
    let piece = Extent {
        file_offset: 0,
        length: chunk.length,
        chunk: chunk.id,
        chunk_offset: 0,
    };
    Command {
        chunks: vec![chunk],
        operations: vec![Operation::Write {
            inode: Target::Inode(InodeNumber(7)),
            extents: vec![piece],
            mtime: None,
            privileges: Privileges::Keep,
        }],
    }
}

pub fn created(outcome: Result<Outcome, FsError>) {
    let outcome = outcome.unwrap();
    assert_eq!(outcome.results.len(), 1, "{outcome:?}");
}

/// Handles the first mutation with `act`, and later ones normally.
pub fn first_mutation(
    mut act: impl FnMut() -> Act + Send + 'static,
) -> impl FnMut(usize, &ClientRequest) -> Act + Send {
    let mut seen = false;
    move |_, call| match call {
        ClientRequest::Mutate(_) if !std::mem::replace(&mut seen, true) => act(),
        _ => Act::Normal,
    }
}

/// Asserts that every mutation was executed once, with consecutive numbers in each lane.
pub fn assert_once_and_in_order(fake: &Fake, expected: usize) {
    let world = fake.world.lock();
    assert_eq!(world.executed.len(), expected);
    let mut last: HashMap<_, u64> = HashMap::new();
    for mutation in &world.executed {
        let RequestId {
            session,
            lane,
            sequence,
        } = mutation.request;
        assert!(lane.0 < LANES_MAX);
        let last = last.entry((session, lane)).or_default();
        assert_eq!(sequence, *last + 1);
        *last = sequence;
    }
}

pub fn received_requests(fake: &Fake) -> Vec<RequestId> {
    fake.world
        .lock()
        .received
        .iter()
        .map(|mutation| mutation.request)
        .collect()
}

#[tokio::test]
async fn one_follower_is_enough_to_find_the_leader() {
    let fake = Fake::start(3).await;
    let follower = fake.addresses()[2].clone();
    let options = ClientOptions {
        addresses: vec![follower],
        ..ClientOptions::default()
    };
    let client = Client::connect(options).await.unwrap();
    created(client.mutate(make("a"), &[]).await);
    assert_eq!(client.leader(), Some(fake.addresses()[0].clone()));
    assert_eq!(client.cluster().0, fake.world.lock().cluster_id);
    assert_eq!(client.generation(), 1);
    // The configured node dies; the learned ones are sufficient.
    fake.cut(2);
    fake.cut(0);
    fake.world.lock().elect(Some(1));
    created(client.mutate(make("b"), &[]).await);
    assert_once_and_in_order(&fake, 2);
}

#[tokio::test]
async fn a_cluster_that_is_not_there_is_reported_with_the_reason() {
    let options = ClientOptions::default();
    assert_eq!(
        Client::connect(options).await.unwrap_err(),
        ConnectError::NoAddress
    );
    let options = ClientOptions {
        addresses: vec![String::from("not an address")],
        ..ClientOptions::default()
    };
    assert!(matches!(
        Client::connect(options).await,
        Err(ConnectError::BadAddress { .. })
    ));

    let fake = Fake::start(1).await;
    fake.cut(0);
    let options = || ClientOptions {
        addresses: fake.addresses(),
        call_timeout: Some(500 * MS),
        ..ClientOptions::default()
    };
    let error = Client::connect(options()).await.unwrap_err().to_string();
    assert!(error.contains(&fake.addresses()[0]), "{error}");
    fake.mend(0);
    fake.world.lock().elect(None);
    let error = Client::connect(options()).await.unwrap_err().to_string();
    assert!(error.contains("knows no leader"), "{error}");
    fake.world.lock().elect(Some(0));
    fake.on_call(|_, _| {
        Act::Reply(ClientResponse::Refused(Refusal::Unavailable {
            reason: String::from("two voters are away"),
        }))
    });
    let error = Client::connect(options()).await.unwrap_err().to_string();
    assert!(error.contains("two voters are away"), "{error}");
}

#[tokio::test]
async fn a_node_that_does_not_lead_names_the_one_that_does() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    created(client.mutate(make("a"), &[]).await);
    fake.world.lock().elect(Some(2));
    created(client.mutate(make("b"), &[]).await);
    assert_eq!(client.leader(), Some(fake.addresses()[2].clone()));
    assert_once_and_in_order(&fake, 2);
}

#[tokio::test]
async fn nodes_that_name_each_other_are_not_believed_for_ever_nor_asked_without_pause() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    {
        let mut world = fake.world.lock();
        world.leader = None;
        world.beliefs = vec![Some(1), Some(0), None];
        (world.discovers, world.calls_streams) = (0, 0);
    }
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.mutate(make("a"), &[]).await }
    });
    tokio::time::sleep(2_000 * MS).await;
    {
        let mut world = fake.world.lock();
        assert!(world.calls_streams < 30, "{} streams", world.calls_streams);
        assert!(world.discovers < 150, "{} questions", world.discovers);
        world.elect(Some(2));
    }
    created(tokio::time::timeout(PAUSE_MAX, pending).await.unwrap().unwrap());
    assert_once_and_in_order(&fake, 1);
}

#[tokio::test]
async fn a_swallowed_answer_is_asked_for_again_and_is_the_first_one() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    fake.on_call(first_mutation(|| Act::DoAndSwallow));
    let began = Instant::now();
    created(client.mutate(make("a"), &[]).await);
    assert!(began.elapsed() < PAUSE_MAX, "{:?}", began.elapsed());
    let requests = received_requests(&fake);
    assert_eq!(requests.len(), 2);
    assert_eq!(requests[0], requests[1], "the same request id");
    assert_once_and_in_order(&fake, 1);
    // Another name of another client exists.
    assert_eq!(client.mutate(make("a"), &[]).await, Err(FsError::Exists));
}

#[tokio::test]
async fn a_lost_call_and_a_stream_broken_after_the_effect_are_both_sent_again() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    fake.on_call(first_mutation(|| Act::DoAndBreak));
    let began = Instant::now();
    created(client.mutate(make("a"), &[]).await);
    assert!(began.elapsed() < 1_000 * MS, "{:?}", began.elapsed());
    fake.on_call(first_mutation(|| Act::Lose));
    created(client.mutate(make("b"), &[]).await);
    let requests = received_requests(&fake);
    assert_eq!(requests[0], requests[1]);
    assert_eq!(requests[2], requests[3]);
    assert_once_and_in_order(&fake, 2);
}

/// Runs many callers, each with one call at a time, while `lose` removes the leader.
async fn work_through_a_loss(lose: impl FnOnce(&Fake)) {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    let until = Instant::now() + Duration::from_secs(4);
    let mut workers = Vec::new();
    for worker in 0..16 {
        let client = client.clone();
        workers.push(tokio::spawn(async move {
            let mut longest = Duration::ZERO;
            let mut calls = 0;
            while Instant::now() < until {
                let began = Instant::now();
                created(client.mutate(make(format!("{worker}-{calls}")), &[]).await);
                client.query(Query::Space).await.unwrap();
                longest = longest.max(began.elapsed());
                calls += 1;
                tokio::time::sleep(2 * MS).await;
            }
            (calls, longest)
        }));
    }
    tokio::time::sleep(300 * MS).await;
    lose(&fake);
    {
        // The other nodes have not noticed yet.
        let mut world = fake.world.lock();
        world.leader = None;
    }
    tokio::time::sleep(1_000 * MS).await;
    fake.world.lock().elect(Some(1));
    let mut all = 0;
    for worker in workers {
        let (calls, longest) = worker.await.unwrap();
        assert!(calls > 2);
        assert!(longest < PAUSE_MAX, "a pause of {longest:?}");
        all += calls;
    }
    assert_once_and_in_order(&fake, all);
    assert_eq!(client.generation(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_costs_a_pause_and_nothing_else() {
    work_through_a_loss(|fake| fake.cut(0)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_leader_costs_a_pause_and_nothing_else() {
    work_through_a_loss(|fake| fake.freeze(0)).await;
}

#[tokio::test]
async fn a_leader_that_cannot_decide_is_left_for_one_that_can() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    created(client.mutate(make("a"), &[]).await);
    // The partitioned leader still names itself.
    let unavailable = || {
        Act::Reply(ClientResponse::Refused(Refusal::Unavailable {
            reason: String::from("no quorum"),
        }))
    };
    fake.on_call(move |_, _| unavailable());
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.mutate(make("b"), &[]).await }
    });
    tokio::time::sleep(300 * MS).await;
    {
        let mut world = fake.world.lock();
        assert!(world.received.len() < 20, "{} sendings", world.received.len());
        world.beliefs = vec![Some(0), Some(1), Some(1)];
        world.leader = Some(1);
        world.on_call = Box::new(|_, _| Act::Normal);
    }
    // Node 0 would now answer that it does not lead: it is muted, so that only the answers of the others help.
    fake.freeze(0);
    created(tokio::time::timeout(PAUSE_MAX, pending).await.unwrap().unwrap());
    assert_eq!(client.leader(), Some(fake.addresses()[1].clone()));
    assert_once_and_in_order(&fake, 2);
}

#[tokio::test]
async fn a_slow_leader_is_not_left() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    fake.on_call(first_mutation(|| Act::After(1_800 * MS)));
    created(client.mutate(make("a"), &[]).await);
    assert_eq!(client.leader(), Some(fake.addresses()[0].clone()));
    let world = fake.world.lock();
    assert_eq!(world.received.len(), 1, "sent once");
    assert_eq!(world.calls_streams, 1, "over one stream");
}

#[tokio::test]
async fn lanes_bound_what_is_under_way() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    fake.on_call(|_, call| match call {
        ClientRequest::Mutate(_) => Act::After(20 * MS),
        _ => Act::Normal,
    });
    let calls = (0..300).map(|call| {
        let client = client.clone();
        tokio::spawn(async move { client.mutate(make(format!("{call}")), &[]).await })
    });
    for call in calls.collect::<Vec<_>>() {
        created(call.await.unwrap());
    }
    assert_once_and_in_order(&fake, 300);
    let world = fake.world.lock();
    assert_eq!(world.mutations_under_way_max, usize::from(LANES_MAX));
    assert_eq!(world.lanes.len(), usize::from(LANES_MAX));
}

#[tokio::test]
async fn a_dropped_call_is_decided_and_frees_its_lane() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    fake.on_call(first_mutation(|| Act::DoAndBreak));
    for dropped in 0..100 {
        let call = client.mutate(make(format!("{dropped}")), &[]);
        let _ = tokio::time::timeout(Duration::from_micros(dropped * 20), call).await;
    }
    created(client.mutate(make("last"), &[]).await);
    tokio::time::sleep(500 * MS).await;
    let started = fake.world.lock().executed.len();
    assert_once_and_in_order(&fake, started);
    // All lanes are free again.
    fake.on_call(|_, call| match call {
        ClientRequest::Mutate(_) => Act::After(300 * MS),
        _ => Act::Normal,
    });
    let calls = (0..usize::from(LANES_MAX)).map(|call| {
        let client = client.clone();
        tokio::spawn(async move { client.mutate(make(format!("full-{call}")), &[]).await })
    });
    for call in calls.collect::<Vec<_>>() {
        created(call.await.unwrap());
    }
    assert_eq!(
        fake.world.lock().mutations_under_way_max,
        usize::from(LANES_MAX),
        "no lane was lost"
    );
}

#[tokio::test]
async fn without_a_leader_calls_wait_or_end_at_the_time_out() {
    let fake = Fake::start(3).await;
    let patient = connect(&fake, None).await;
    let hasty = connect(&fake, Some(400 * MS)).await;
    fake.world.lock().elect(None);
    let waiting = tokio::spawn(async move {
        created(patient.mutate(make("a"), &[]).await);
        patient.query(Query::Space).await
    });
    assert_eq!(hasty.query(Query::Space).await, Err(FsError::TimedOut));
    assert_eq!(hasty.mutate(make("b"), &[]).await, Err(FsError::TimedOut));
    assert!(!waiting.is_finished());
    fake.world.lock().elect(Some(1));
    assert!(waiting.await.unwrap().is_ok());
}

#[tokio::test]
async fn chunks_are_put_again_when_a_new_leader_is_not_sure_of_them() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    let chunk = client.new_chunk(Bytes::from_static(b"content"));
    client.put_chunk(&chunk).await.unwrap();
    fake.world.lock().elect(Some(1));
    created(
        client
            .mutate(write(chunk.stored()), std::slice::from_ref(&chunk))
            .await,
    );
    {
        let world = fake.world.lock();
        assert_eq!(world.puts.first().map(|put| put.0), Some(0));
        assert_eq!(world.puts.last(), Some(&(1, chunk.id())));
        assert_eq!(world.received.len(), 2);
        assert_eq!(
            world.received[0], world.received[1],
            "the same mutation, to the letter"
        );
    }
    assert_once_and_in_order(&fake, 1);
}

#[tokio::test]
async fn a_call_that_cannot_go_on_is_voided_so_that_its_lane_counts_on() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    let chunk = client.new_chunk(Bytes::from_static(b"content"));
    // The caller did not pass the chunk.
    assert_eq!(client.mutate(write(chunk.stored()), &[]).await, Err(FsError::Io));
    // The leader is full, and refuses before the state machine could.
    let full = || Act::Reply(ClientResponse::Outcome(Err(FsError::NoSpace)));
    fake.on_call(first_mutation(full));
    assert_eq!(client.mutate(make("a"), &[]).await, Err(FsError::NoSpace));
    let invalid = || {
        Act::Reply(ClientResponse::Refused(Refusal::Invalid {
            reason: String::from("test"),
        }))
    };
    fake.on_call(first_mutation(invalid));
    assert_eq!(client.mutate(make("a"), &[]).await, Err(FsError::InvalidArgument));
    created(client.mutate(make("a"), &[]).await);
    let world = fake.world.lock();
    let effective = world
        .executed
        .iter()
        .filter(|mutation| mutation.command == make("a"));
    assert_eq!(effective.count(), 1);
    let lane = world
        .executed
        .iter()
        .map(|mutation| (mutation.request.lane.0, mutation.request.sequence));
    assert_eq!(lane.collect::<Vec<_>>(), [(0, 1), (0, 2), (0, 3), (0, 4)]);
}

#[tokio::test]
async fn a_void_that_comes_late_answers_what_happened() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    // Executed, but the answer is lost; a full leader refuses the second sending from its own check.
    let mut times = 0;
    fake.on_call(move |_, call| match call {
        ClientRequest::Mutate(_) => {
            times += 1;
            match times {
                1 => Act::DoAndSwallow,
                2 => Act::Reply(ClientResponse::Outcome(Err(FsError::NoSpace))),
                _ => Act::Normal,
            }
        }
        _ => Act::Normal,
    });
    created(client.mutate(make("a"), &[]).await);
    assert_once_and_in_order(&fake, 1);
}

#[tokio::test]
async fn a_forgotten_session_is_replaced_and_unsent_work_goes_on() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    let first = client.session();
    let chunk = client.new_chunk(Bytes::from_static(b"content"));
    fake.world.lock().sessions.clear();
    created(client.mutate(make("a"), &[]).await);
    assert_ne!(client.session(), first);
    assert_eq!(client.generation(), 2);
    assert!(!client.session_lost());
    assert_eq!(client.put_chunk(&chunk).await, Err(FsError::ChunkDead));
    assert_eq!(
        client.mutate(write(chunk.inline()), &[]).await,
        Err(FsError::ChunkDead)
    );
    let again = client.new_chunk(chunk.payload().clone());
    created(client.mutate(write(again.inline()), &[]).await);
    assert_once_and_in_order(&fake, 2);
}

#[tokio::test]
async fn a_call_of_unknown_outcome_is_never_sent_under_another_session() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    let first = client.session();
    fake.on_call(first_mutation(|| Act::DoAndSwallow));
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.mutate(make("a"), &[]).await }
    });
    tokio::time::sleep(500 * MS).await;
    fake.world.lock().sessions.clear();
    assert_eq!(pending.await.unwrap(), Err(FsError::Io));
    created(client.mutate(make("b"), &[]).await);
    assert_eq!(client.generation(), 2);
    let world = fake.world.lock();
    let of_first = world
        .received
        .iter()
        .filter(|mutation| mutation.command == make("a"));
    assert!(
        of_first
            .map(|mutation| mutation.request.session)
            .all(|session| session == first)
    );
}

#[tokio::test]
async fn the_low_water_mark_follows_what_is_held() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    let marks = || {
        let world = fake.world.lock();
        world.executed.last().unwrap().chunk_low_water
    };
    let (first, second) = (
        client.new_chunk(Bytes::from_static(b"1")),
        client.new_chunk(Bytes::from_static(b"2")),
    );
    created(client.mutate(make("a"), &[]).await);
    assert_eq!(marks(), 1);
    created(client.mutate(write(first.inline()), &[]).await);
    assert_eq!(marks(), 1, "the command itself names it");
    drop(first);
    created(client.mutate(make("b"), &[]).await);
    assert_eq!(marks(), 2);
    // The caller drops the chunk, but a mutation that names it is pending.
    fake.on_call(first_mutation(|| Act::After(500 * MS)));
    let pending = tokio::spawn({
        let client = client.clone();
        {
            let command = write(second.inline());
            drop(second);
            async move { client.mutate(command, &[]).await }
        }
    });
    tokio::time::sleep(100 * MS).await;
    created(client.mutate(make("c"), &[]).await);
    assert_eq!(marks(), 2);
    created(pending.await.unwrap());
    created(client.mutate(make("d"), &[]).await);
    assert_eq!(marks(), 3);
}

#[tokio::test]
async fn keep_alives_release_what_is_not_open_and_notice_a_lost_session() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    fake.world.lock().unlinked = vec![InodeNumber(5), InodeNumber(6)];
    client.set_unlinked_handler(|inodes| {
        assert_eq!(inodes, [InodeNumber(5), InodeNumber(6)]);
        vec![InodeNumber(6)]
    });
    tokio::time::sleep(5_500 * MS).await;
    {
        let mut world = fake.world.lock();
        let released = Operation::ReleaseUnlinked {
            inodes: vec![InodeNumber(6)],
        };
        assert_eq!(world.executed.len(), 1);
        assert_eq!(world.executed[0].command, Command::single(released));
        world.unlinked.clear();
        world.sessions.clear();
    }
    tokio::time::sleep(5_500 * MS).await;
    assert_eq!(client.generation(), 2, "without any call of ours");
    client.close().await;
    assert_eq!(fake.world.lock().closed, [client.session()]);
    assert_eq!(client.mutate(make("a"), &[]).await, Err(FsError::Io));
    assert_eq!(client.query(Query::Space).await, Err(FsError::Io));
}

#[tokio::test]
async fn an_idle_client_is_quiet() {
    let fake = Fake::start(3).await;
    let client = connect(&fake, None).await;
    let before = fake.world.lock().discovers;
    tokio::time::sleep(1_500 * MS).await;
    assert_eq!(fake.world.lock().discovers, before);
    drop(client);
}
