//! How a session is maintained: its answers, and its authentication on streams.

use std::time::{Duration, Instant};

use bytes::Bytes;
use quorumfs_proto::{ClientRequest, ClientResponse, Command, InodeNumber, Operation, Refusal};
use quorumfs_wire::{CallResponse, SessionHello, UnlinkedQuestion};

use crate::calls::{connect, created, make};
use crate::fake::{Act, Fake};

const MS: Duration = Duration::from_millis(1);

#[tokio::test]
async fn a_client_that_is_nudged_answers_what_it_is_asked_at_once() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    client.set_unlinked_handler(|inodes| {
        let is_free = |inode: &InodeNumber| inode.0 != 7;
        inodes.iter().copied().filter(is_free).collect()
    });
    let began = Instant::now();
    let question = UnlinkedQuestion {
        from: 3,
        through: 9,
        inodes: vec![6, 7, 8],
    };
    nudge(&fake, question).await;
    while fake.world.lock().answers.is_empty() {
        assert!(began.elapsed() < 4_000 * MS, "it waited for its time");
        tokio::time::sleep(10 * MS).await;
    }
    assert_eq!(fake.world.lock().answers, [(3, 9, vec![InodeNumber(7)])]);
}

fn nudge(fake: &Fake, question: UnlinkedQuestion) -> impl Future<Output = ()> + use<> {
    let back = {
        let mut world = fake.world.lock();
        world.question = Some(question);
        world.back.as_ref().and_then(|back| back.upgrade()).unwrap()
    };
    async move {
        let nudge = CallResponse {
            keep_alive_now: true,
            ..CallResponse::default()
        };
        back.send(Ok(nudge)).await.unwrap();
    }
}

/// A release that overtakes the answer "held" would have no effect, and the inode would stay held.
#[tokio::test]
async fn a_release_does_not_overtake_the_answer_that_says_held() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    let taken = 300 * MS;
    let mut answered = None;
    let (released, mut is_released) = tokio::sync::mpsc::unbounded_channel();
    fake.on_call(move |_, call| match call {
        ClientRequest::AnswerUnlinked { .. } => {
            answered = Some(Instant::now());
            Act::After(taken)
        }
        ClientRequest::Mutate(_) => {
            released.send(answered.map(|since| since.elapsed())).unwrap();
            Act::Normal
        }
        _ => Act::Normal,
    });
    let (asked, mut is_asked) = tokio::sync::mpsc::unbounded_channel();
    client.set_unlinked_handler(move |_| {
        asked.send(()).unwrap();
        Vec::new()
    });
    let question = UnlinkedQuestion {
        from: 3,
        through: 9,
        inodes: vec![7],
    };
    nudge(&fake, question).await;
    is_asked.recv().await.unwrap();
    let release = Operation::ReleaseUnlinked {
        inodes: vec![InodeNumber(7)],
    };
    client.mutate(Command::single(release), &[]).await.unwrap();
    let after = is_released
        .recv()
        .await
        .unwrap()
        .expect("the answer was sent first");
    assert!(after >= taken, "after {after:?} it was not decided");
}

#[tokio::test]
async fn a_stream_is_told_once_for_whom_it_speaks() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    for name in ["a", "b", "c"] {
        created(client.mutate(make(name), &[]).await);
    }
    let (session, secret) = client.credential();
    let hello = SessionHello {
        session: session.0,
        secret: Bytes::copy_from_slice(&secret.0),
    };
    assert_eq!(fake.world.lock().hellos, std::slice::from_ref(&hello));
    fake.cut(0);
    let next = tokio::spawn({
        let client = client.clone();
        async move { client.mutate(make("d"), &[]).await }
    });
    while client.leader().is_some() {
        tokio::time::sleep(10 * MS).await;
    }
    fake.mend(0);
    created(next.await.unwrap());
    let hellos = fake.world.lock().hellos.clone();
    assert!(hellos.len() > 1, "the next stream is told too");
    assert!(hellos.iter().all(|told| *told == hello));
}

/// The leader behaves like one that has lost its quorum.
#[tokio::test]
async fn a_leader_that_answers_keep_alives_and_refuses_the_rest_is_not_called_without_pause() {
    const STREAMS_MAX: usize = 40;
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    fake.on_call(|_, call| match call {
        // It asks other nodes first, and answers a keep-alive meanwhile.
        ClientRequest::CloseSession { .. } => Act::ReplyAfter(
            5 * MS,
            ClientResponse::Refused(Refusal::NotLeader { leader: None }),
        ),
        _ => Act::Normal,
    });
    let before = fake.world.lock().calls_streams;
    client.close().await;
    let streams = fake.world.lock().calls_streams - before;
    println!("{streams} streams");
    assert!(streams < STREAMS_MAX, "{streams} streams until it gave up");
}
