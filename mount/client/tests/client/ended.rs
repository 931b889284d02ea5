//! Mutations whose session ends while they are pending: its lanes show their outcome (P4, P6).

use std::time::Duration;

use crate::calls::{connect, created, first_mutation, make};
use crate::fake::{Act, Fake};
use quorumfs_client::Client;
use quorumfs_proto::{FsError, Outcome, SessionId};

const MS: Duration = Duration::from_millis(1);

/// Sends a mutation whose first sending is handled with `act`, then ends its session. Returns the verdict and the
/// session of the first sending.
async fn through_the_end_of_its_session(
    fake: &Fake,
    client: &Client,
    act: fn() -> Act,
) -> (Result<Outcome, FsError>, SessionId) {
    let first = client.session();
    fake.on_call(first_mutation(act));
    let before = fake.world.lock().received.len();
    let pending = tokio::spawn({
        let client = client.clone();
        async move { client.mutate(make("a"), &[]).await }
    });
    while fake.world.lock().received.len() == before {
        tokio::time::sleep(MS).await;
    }
    fake.world.lock().end_sessions();
    (pending.await.unwrap(), first)
}

#[tokio::test]
async fn what_an_ended_session_never_decided_is_sent_again_under_the_next() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    let (told, first) = through_the_end_of_its_session(&fake, &client, || Act::Lose).await;
    created(told);
    let world = fake.world.lock();
    let sessions = world
        .received
        .iter()
        .map(|mutation| mutation.request.session == first);
    assert_eq!(
        sessions.collect::<Vec<_>>(),
        [true, true, false],
        "asked for once more before it is sent anew"
    );
    assert_eq!(world.executed.len(), 1);
}

#[tokio::test]
async fn what_an_ended_session_decided_is_told_and_not_done_again() {
    let fake = Fake::start(1).await;
    let client = connect(&fake, None).await;
    let (told, first) = through_the_end_of_its_session(&fake, &client, || Act::DoAndSwallow).await;
    created(told);
    let world = fake.world.lock();
    assert!(
        world
            .received
            .iter()
            .all(|mutation| mutation.request.session == first)
    );
    assert_eq!(world.executed.len(), 1);
}
