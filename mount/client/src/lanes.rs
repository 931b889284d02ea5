//! The lanes of a session. A lane carries one mutation at a time and numbers them (P4).
//!
//! Invariant: a lane is taken from [`Lanes::take`] until [`TakenLane::decided`], when its sequence number has a
//! verdict in the cluster, or [`TakenLane::unused`], when the number was never sent. A lane that is dropped otherwise
//! is never used again, because its number may still be decided.
//!
//! Lanes are taken last in, first out, so that a client with one call at a time uses one lane.

use std::sync::Arc;

use parking_lot::Mutex;
use quorumfs_proto::limits::LANES_MAX;
use quorumfs_proto::{Lane, RequestId, SessionId};
use tokio::sync::Semaphore;

/// The lanes of one session.
#[derive(Debug)]
pub(crate) struct Lanes {
    session: SessionId,
    /// Free lanes with the next sequence number of each.
    free: Mutex<Vec<(Lane, u64)>>,
    /// One permit for each free lane.
    permits: Semaphore,
}

/// A lane that carries a mutation.
#[derive(Debug)]
pub(crate) struct TakenLane {
    lanes: Arc<Lanes>,
    lane: Lane,
    sequence: u64,
}

impl Lanes {
    pub(crate) fn new(session: SessionId) -> Arc<Lanes> {
        Arc::new(Lanes {
            session,
            free: Mutex::new((0..LANES_MAX).rev().map(|lane| (Lane(lane), 1)).collect()),
            permits: Semaphore::new(usize::from(LANES_MAX)),
        })
    }

    /// Waits for a lane, in the order of the callers. `None` after the session was lost.
    pub(crate) async fn take(self: &Arc<Self>) -> Option<TakenLane> {
        // The permit returns with the lane; a lane without a verdict keeps it.
        self.permits.acquire().await.ok()?.forget();
        let (lane, sequence) = self.free.lock().pop().expect("as many permits as free lanes");
        Some(TakenLane {
            lanes: self.clone(),
            lane,
            sequence,
        })
    }

    /// Ends the lanes because the session is lost: [`Lanes::take`] returns `None`.
    pub(crate) fn close(&self) {
        self.permits.close();
    }
}

impl TakenLane {
    pub(crate) fn request(&self) -> RequestId {
        RequestId {
            session: self.lanes.session,
            lane: self.lane,
            sequence: self.sequence,
        }
    }

    /// Frees the lane for the next sequence number: the cluster has a verdict for [`TakenLane::request`].
    pub(crate) fn decided(self) {
        self.free_from(self.sequence + 1);
    }

    /// Frees the lane with the same sequence number: [`TakenLane::request`] was never sent.
    pub(crate) fn unused(self) {
        self.free_from(self.sequence);
    }

    fn free_from(&self, sequence: u64) {
        self.lanes.free.lock().push((self.lane, sequence));
        self.lanes.permits.add_permits(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    #[test]
    fn a_lane_is_taken_until_it_is_decided_and_counts() {
        let lanes = Lanes::new(SessionId(5));
        let take = || lanes.take().now_or_never().flatten();
        let first = take().unwrap();
        assert_eq!(
            first.request(),
            RequestId {
                session: SessionId(5),
                lane: Lane(0),
                sequence: 1
            }
        );
        let rest: Vec<TakenLane> = std::iter::from_fn(take).collect();
        assert_eq!(rest.len(), usize::from(LANES_MAX) - 1);
        let mut seen: Vec<Lane> = rest.iter().map(|taken| taken.lane).collect();
        seen.dedup();
        assert_eq!(seen.len(), rest.len(), "no lane twice");

        first.decided();
        let again = take().unwrap();
        assert_eq!((again.lane, again.sequence), (Lane(0), 2));
        again.unused();
        let again = take().unwrap();
        assert_eq!((again.lane, again.sequence), (Lane(0), 2));
        drop(again);
        assert!(
            take().is_none(),
            "a lane without a verdict is not used for anything else"
        );
    }

    #[tokio::test]
    async fn a_lost_session_ends_all_waits_for_lanes() {
        let lanes = Lanes::new(SessionId(5));
        let mut taken = Vec::new();
        while let Some(lane) = lanes.take().now_or_never().flatten() {
            taken.push(lane);
        }
        let waiting = tokio::spawn({
            let lanes = lanes.clone();
            async move { lanes.take().await.is_none() }
        });
        tokio::task::yield_now().await;
        lanes.close();
        assert!(waiting.await.unwrap());
    }
}
