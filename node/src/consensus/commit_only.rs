//! Requests to a follower that only carry the commit index.
//!
//! openraft sends one after every commit, so that a single call costs each follower two messages and two answers. A
//! follower does not need the second urgently: it serves no reads, and a new leader determines the commit index itself.
//! So such a request waits a little for the next one, which includes it. openraft takes the answer to a later request
//! for the answers to all earlier ones.

use std::time::Duration;

use futures::{Stream, StreamExt as _};
use openraft::raft::AppendEntriesRequest;
use tokio::time::Instant;

use super::types::TypeConfig;

/// Longest delay of a request without entries. Far below a heartbeat, far above the time between two calls of one busy
/// client.
const WAIT: Duration = Duration::from_millis(5);

/// Returns `requests` without those that a later one includes. No request is delayed by more than [`WAIT`], and none is
/// lost when `requests` ends.
pub fn merged<S>(requests: S) -> impl Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + 'static
where
    S: Stream<Item = AppendEntriesRequest<TypeConfig>> + Send + Unpin + 'static,
{
    let requests = requests.fuse();
    async_stream::stream! {
        let mut requests = requests;
        // The newest request without entries, and the time at which the oldest that it replaces must be sent.
        let mut held: Option<(AppendEntriesRequest<TypeConfig>, Instant)> = None;
        loop {
            let next = match &held {
                None => requests.next().await,
                Some((_, due)) => match tokio::time::timeout_at(*due, requests.next()).await {
                    Ok(next) => next,
                    Err(_) => {
                        if let Some((request, _)) = held.take() {
                            yield request;
                        }
                        continue;
                    }
                },
            };
            match next {
                None => {
                    if let Some((request, _)) = held.take() {
                        yield request;
                    }
                    return;
                }
                Some(request) if request.entries.is_empty() => {
                    let due = held.take().map_or_else(|| Instant::now() + WAIT, |(_, due)| due);
                    held = Some((request, due));
                }
                Some(request) => {
                    held = None;
                    yield request;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::types::{Entry, LogId, Vote, VoterId};
    use openraft::EntryPayload;
    use tokio::sync::mpsc;
    use tokio_stream::wrappers::UnboundedReceiverStream;

    fn request(entries: usize) -> AppendEntriesRequest<TypeConfig> {
        let entry = Entry {
            log_id: LogId::new_term_index(1, 1),
            payload: EntryPayload::Blank,
        };
        AppendEntriesRequest {
            vote: Vote::new_committed(1, VoterId::from(1)),
            prev_log_id: None,
            entries: vec![entry; entries],
            leader_commit: None,
        }
    }

    #[tokio::test]
    async fn one_without_entries_goes_alone_only_if_none_follows() {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut sent = Box::pin(merged(UnboundedReceiverStream::new(receiver)));
        for entries in [0, 1, 0, 0] {
            sender.send(request(entries)).unwrap();
        }
        let start = Instant::now();
        assert_eq!(sent.next().await.unwrap().entries.len(), 1);
        assert_eq!(sent.next().await.unwrap().entries.len(), 0);
        assert!(start.elapsed() >= WAIT, "it waited for company");

        sender.send(request(2)).unwrap();
        sender.send(request(0)).unwrap();
        drop(sender);
        assert_eq!(sent.next().await.unwrap().entries.len(), 2);
        assert_eq!(sent.next().await.unwrap().entries.len(), 0);
        assert!(sent.next().await.is_none());
    }
}
