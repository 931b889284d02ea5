//! How many requests of a kind may be under way, in all and for each client, and who gives way when others wait.
//!
//! A request has its turn for as long as it holds memory. When all turns are taken, a new request takes that of the one whose
//! client has done nothing for longest; where all clients keep up, it waits. One client has three quarters at most: the rest
//! is for others.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::error::ApiError;
use crate::api::http::connections::Pace;

/// The turns of one kind of request.
#[derive(Debug)]
pub(super) struct Turns {
    /// Whose turns they are, for messages.
    what: &'static str,
    turns_max: usize,
    per_client_max: usize,
    // Locked for one look at all turns at most.
    taken: Mutex<Taken>,
    freed: Notify,
}

#[derive(Debug, Default)]
struct Taken {
    holders: BTreeMap<u64, Arc<Pace>>,
    next: u64,
}

/// A request's turn, over when this is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Arc<Turns>,
    number: u64,
}

impl Turns {
    /// `turns_max` for `what`.
    pub(super) fn new(what: &'static str, turns_max: usize) -> Arc<Turns> {
        Arc::new(Turns {
            what,
            turns_max,
            per_client_max: turns_max - turns_max / 4,
            taken: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// A turn for the request of `pace`; 503 when none is free within `timeout`.
    pub(super) async fn take(
        self: &Arc<Turns>,
        pace: &Arc<Pace>,
        timeout: Duration,
    ) -> Result<Turn, ApiError> {
        let taking = async {
            loop {
                let freed = self.freed.notified();
                tokio::pin!(freed);
                freed.as_mut().enable();
                if let Some(number) = self.try_take(pace) {
                    return number;
                }
                // A client that keeps up now may stall in a moment.
                let _ = tokio::time::timeout(pace.patience().yields_after / 4, freed).await;
            }
        };
        match tokio::time::timeout(timeout, taking).await {
            Ok(number) => Ok(Turn {
                turns: Arc::clone(self),
                number,
            }),
            Err(_) => Err(ApiError::unavailable(format!(
                "this node has as many {} under way as it may, in all or from this client",
                self.what
            ))),
        }
    }

    fn try_take(&self, pace: &Arc<Pace>) -> Option<u64> {
        let client = pace.address();
        let mut taken = self.taken.lock();
        let of_client = |holder: &Pace| client.is_some() && holder.address() == client;
        let own = taken.holders.values().filter(|holder| of_client(holder)).count();
        let client_is_full = own >= self.per_client_max;
        if client_is_full || taken.holders.len() >= self.turns_max {
            let candidates = taken
                .holders
                .iter()
                .filter(|(_, holder)| !client_is_full || of_client(holder))
                .map(|(number, holder)| (holder.stalled(), *number));
            let (stalled, slowest) = candidates.max()?;
            if stalled < pace.patience().yields_after {
                return None;
            }
            if let Some(holder) = taken.holders.remove(&slowest) {
                holder.give_way();
            }
        }
        let number = taken.next;
        taken.next += 1;
        taken.holders.insert(number, Arc::clone(pace));
        Some(number)
    }
}

impl Turn {
    /// How many turns of this kind are taken.
    pub(super) fn taken(&self) -> usize {
        self.turns.taken.lock().holders.len()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.turns.taken.lock().holders.remove(&self.number);
        self.turns.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::api::http::connections::Patience;

    const PATIENCE: Patience = Patience {
        let_go_after: Duration::from_secs(600),
        yields_after: Duration::from_millis(40),
    };
    const SOON: Duration = Duration::from_millis(10);

    fn request(of: u8) -> Arc<Pace> {
        Arc::new(Pace::new(
            PATIENCE,
            Some(IpAddr::from([10, 0, 0, of]).into()),
            None,
        ))
    }

    #[tokio::test]
    async fn one_client_leaves_a_quarter_to_others() {
        let turns = Turns::new("tests", 4);
        let mut held = Vec::new();
        for _ in 0..3 {
            held.push(turns.take(&request(1), SOON).await.unwrap());
        }
        let refused = turns.take(&request(1), SOON).await.unwrap_err();
        assert_eq!(refused.status.as_u16(), 503);
        let other = turns.take(&request(2), SOON).await.unwrap();
        assert!(turns.take(&request(2), SOON).await.is_err(), "all are taken");
        drop(other);
        turns.take(&request(2), SOON).await.unwrap();
    }

    #[tokio::test]
    async fn who_waits_has_the_turn_that_is_over() {
        let turns = Turns::new("tests", 1);
        let held = turns.take(&request(1), SOON).await.unwrap();
        let (one, two) = (request(1), request(2));
        let waiting = turns.take(&one, PATIENCE.let_go_after);
        let ending = async {
            tokio::time::sleep(SOON).await;
            drop(held);
        };
        let (turn, ()) = tokio::join!(waiting, ending);
        assert!(turns.take(&two, SOON).await.is_err());
        drop(turn.unwrap());
        assert!(turns.taken.lock().holders.is_empty());
    }

    #[tokio::test]
    async fn who_stalls_gives_way_and_who_keeps_up_does_not() {
        let turns = Turns::new("tests", 2);
        let (busy, stalled) = (request(1), request(2));
        let _busy_turn = turns.take(&busy, SOON).await.unwrap();
        let stalled_turn = turns.take(&stalled, SOON).await.unwrap();
        let never = {
            let stalled = Arc::clone(&stalled);
            tokio::spawn(async move { stalled.client_does(std::future::pending::<()>()).await })
        };
        let _turn = turns.take(&request(3), PATIENCE.let_go_after).await.unwrap();
        assert_eq!(never.await.unwrap(), None, "it was given up");
        // Its turn is over already; the one that has it now keeps it.
        drop(stalled_turn);
        assert!(turns.take(&request(4), PATIENCE.yields_after * 3).await.is_err());
        assert_eq!(busy.client_does(async { 7 }).await, Some(7));
    }
}
