//! Abandoned calls: they are decided before later ones are sent (P1, P4).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::calls::{
    assert_once_and_in_order, connect, created, first_mutation, make, received_requests, write,
};
use crate::fake::{Act, Fake};
use bytes::Bytes;
use quorumfs_proto::limits::LANES_MAX;
use quorumfs_proto::{ClientRequest, ClientResponse, Command, FsError, Operation, Refusal};

const MS: Duration = Duration::from_millis(1);

fn unavailable() -> Act {
    Act::Reply(ClientResponse::Refused(Refusal::Unavailable {
        reason: String::from("no quorum"),
    }))
}

fn is_of(call: &ClientRequest, command: &Command) -> bool {
    matches!(call, ClientRequest::Mutate(mutation) if mutation.command == *command)
}

fn executed(fake: &Fake) -> Vec<Command> {
    let world = fake.world.lock();
    world
        .executed
        .iter()
        .map(|mutation| mutation.command.clone())
        .collect()
}

fn void() -> Command {
    Command::single(Operation::ReleaseUnlinked { inodes: Vec::new() })
}

#[tokio::test]
async fn a_timed_out_call_that_took_effect_is_settled_before_the_next_is_sent() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, Some(300 * MS)).await;
    fake.on_call(first_mutation(|| Act::DoAndSwallow));
    assert_eq!(client.mutate(make("a"), &[]).await, Err(FsError::TimedOut));
    created(client.mutate(make("b"), &[]).await);
    assert_eq!(executed(&fake), [make("a"), make("b")]);
    let requests = received_requests(&fake);
    assert_eq!(requests[0], requests[1], "the void asks under the same name");
    assert_once_and_in_order(&fake, 2);
}

#[tokio::test]
async fn a_timed_out_call_that_was_lost_takes_effect_never() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, Some(300 * MS)).await;
    for name in ["a", "b"] {
        fake.on_call(first_mutation(|| Act::Lose));
        assert_eq!(client.mutate(make(name), &[]).await, Err(FsError::TimedOut));
        created(client.mutate(make(name), &[]).await);
    }
    assert_eq!(executed(&fake), [void(), make("a"), void(), make("b")]);
    assert_once_and_in_order(&fake, 4);
}

/// As when a cluster regains its quorum: an abandoned call would be sent again after later ones.
#[tokio::test]
async fn a_call_in_back_off_that_timed_out_is_not_sent_again() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, Some(1_500 * MS)).await;
    fake.on_call(|_, call| match is_of(call, &make("old")) {
        true => unavailable(),
        false => Act::Normal,
    });
    assert_eq!(client.mutate(make("old"), &[]).await, Err(FsError::TimedOut));
    fake.on_call(|_, _| Act::Normal);
    created(client.mutate(make("new"), &[]).await);
    tokio::time::sleep(1_000 * MS).await;
    assert_eq!(executed(&fake), [void(), make("new")]);
}

#[tokio::test]
async fn as_long_as_nothing_is_decided_later_calls_time_out_unsent() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, Some(300 * MS)).await;
    fake.on_call(|_, call| match call {
        ClientRequest::Mutate(_) => unavailable(),
        _ => Act::Normal,
    });
    for name in ["a", "b", "c"] {
        assert_eq!(client.mutate(make(name), &[]).await, Err(FsError::TimedOut));
    }
    fake.on_call(|_, _| Act::Normal);
    // The void may be in a backoff that is longer than the time-out of a call; this call is not sent either then.
    let created_last = loop {
        match client.mutate(make("d"), &[]).await {
            Err(FsError::TimedOut) => continue,
            decided => break decided,
        }
    };
    created(created_last);
    assert_eq!(executed(&fake), [void(), make("d")], "two were never sent");
}

#[tokio::test]
async fn a_call_that_was_given_up_puts_no_chunk_again() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, Some(300 * MS)).await;
    let chunk = client.new_chunk(Bytes::from(vec![7; 5000]));
    client.put_chunk(&chunk).await.unwrap();
    fake.world.lock().confirmed.clear();
    // The chunk must be put again, which takes too long.
    fake.on_put(|_, _| crate::fake::PutAct::Swallow);
    let stored = [chunk.clone()];
    assert_eq!(
        client.mutate(write(chunk.stored()), &stored).await,
        Err(FsError::TimedOut)
    );
    created(client.mutate(make("later"), &[]).await);
    tokio::time::sleep(500 * MS).await;
    assert_eq!(executed(&fake), [void(), make("later")]);
}

#[tokio::test]
async fn a_call_that_waits_for_a_lane_is_sent_after_what_was_given_up_meanwhile() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    let call = |command: Command| {
        let client = client.clone();
        tokio::spawn(async move { client.mutate(command, &[]).await })
    };
    let busy = |number: u16| make(format!("busy {number}"));
    let undecided = Arc::new(AtomicBool::new(true));
    fake.on_call({
        let undecided = Arc::clone(&undecided);
        move |_, call| match call {
            call if is_of(call, &make("given up")) => Act::Lose,
            call if is_of(call, &void()) && undecided.load(Ordering::SeqCst) => unavailable(),
            call if (1..LANES_MAX).any(|number| is_of(call, &busy(number))) => Act::After(2_000 * MS),
            _ => Act::Normal,
        }
    });
    let given_up = call(make("given up"));
    let others: Vec<_> = (1..LANES_MAX).map(|number| call(busy(number))).collect();
    while received_requests(&fake).len() < usize::from(LANES_MAX) {
        tokio::time::sleep(MS).await;
    }
    let waiting = call(make("later"));
    tokio::time::sleep(50 * MS).await;
    given_up.abort();
    assert!(given_up.await.unwrap_err().is_cancelled());
    for other in others {
        created(other.await.unwrap());
    }
    // Lanes are free again.
    tokio::time::sleep(200 * MS).await;
    assert!(
        !executed(&fake).contains(&make("later")),
        "the one given up may still take effect"
    );
    undecided.store(false, Ordering::SeqCst);
    created(waiting.await.unwrap());
    let decided = executed(&fake);
    assert_eq!(decided[usize::from(LANES_MAX) - 1..], [void(), make("later")]);
    // The unused lane is free for other calls.
    for round in 0..2 {
        let all: Vec<_> = (0..LANES_MAX)
            .map(|number| call(make(format!("{round} {number}"))))
            .collect();
        for each in all {
            created(each.await.unwrap());
        }
    }
    assert_once_and_in_order(&fake, 3 * usize::from(LANES_MAX) + 1);
}
