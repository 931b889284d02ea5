//! Limits the number of connections, in total and for each client, and selects the connection to evict for a new one.
//!
//! At a limit, the connection that has been idle longest is evicted; without idle ones, one whose client does not
//! read. At the limit of a client, one of its own connections is evicted; at the total limit, one of the client with
//! most connections.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::activity::{Activity, ClientAddress};

/// The connections of a server.
#[derive(Debug)]
pub struct ConnectionSlots {
    connections_max: usize,
    per_client_max: usize,
    /// Time without reading after which a connection may be evicted.
    preempt_after: Duration,
    // Locked at most for one iteration over all connections.
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    connections: HashMap<u64, Connection>,
    per_client: HashMap<ClientAddress, usize>,
    next: u64,
}

#[derive(Debug)]
struct Connection {
    activity: Arc<Activity>,
    evicted: CancellationToken,
}

/// A slot of a connection; released when it is dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    slots: Arc<ConnectionSlots>,
    number: u64,
    /// The activity of the client.
    pub activity: Arc<Activity>,
    /// Cancelled when the slot was given to another connection: this one is to be closed.
    pub evicted: CancellationToken,
}

impl ConnectionSlots {
    /// Creates `connections_max` slots, at most `per_client_max` of them for one client.
    pub fn new(
        connections_max: usize,
        per_client_max: usize,
        preempt_after: Duration,
    ) -> Arc<ConnectionSlots> {
        Arc::new(ConnectionSlots {
            connections_max,
            per_client_max,
            preempt_after,
            taken: Mutex::default(),
        })
    }

    /// Returns a slot for a connection from `address`; `None` if all connections that could be evicted are in use.
    pub fn admit(self: &Arc<ConnectionSlots>, address: IpAddr) -> Option<ConnectionSlot> {
        let address = ClientAddress::from(address);
        let mut taken = self.taken.lock();
        let own = taken.per_client.get(&address).copied().unwrap_or(0);
        if own >= self.per_client_max || taken.connections.len() >= self.connections_max {
            let client = (own >= self.per_client_max).then_some(address);
            let victim = taken.eviction_candidate(client, self.preempt_after)?;
            if let Some(connection) = taken.remove(victim) {
                connection.evicted.cancel();
            }
        }
        let number = taken.next;
        taken.next += 1;
        let activity = Arc::new(Activity::new(address));
        let evicted = CancellationToken::new();
        let connection = Connection {
            activity: Arc::clone(&activity),
            evicted: evicted.clone(),
        };
        taken.connections.insert(number, connection);
        *taken.per_client.entry(address).or_insert(0) += 1;
        Some(ConnectionSlot {
            slots: Arc::clone(self),
            number,
            activity,
            evicted,
        })
    }

    #[cfg(test)]
    fn taken(&self) -> usize {
        self.taken.lock().connections.len()
    }
}

impl Taken {
    /// Returns the connection to evict, among those of `client` if it is given.
    fn eviction_candidate(&self, client: Option<ClientAddress>, preempt_after: Duration) -> Option<u64> {
        let candidates = self
            .connections
            .iter()
            .filter(|(_, connection)| client.is_none_or(|client| client == connection.activity.address()));
        candidates
            .filter_map(|(number, connection)| {
                let (is_idle, unused) = match connection.activity.idle() {
                    Some(idle) => (true, idle),
                    None => (false, connection.activity.stalled()),
                };
                let of_client = self.per_client.get(&connection.activity.address());
                (is_idle || unused >= preempt_after).then_some((is_idle, of_client, unused, *number))
            })
            .max_by_key(|(is_idle, of_client, unused, number)| {
                (*is_idle, *of_client, *unused, std::cmp::Reverse(*number))
            })
            .map(|(.., number)| number)
    }

    fn remove(&mut self, number: u64) -> Option<Connection> {
        let connection = self.connections.remove(&number)?;
        let address = connection.activity.address();
        if let Some(count) = self.per_client.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                self.per_client.remove(&address);
            }
        }
        Some(connection)
    }
}

impl Drop for ConnectionSlot {
    fn drop(&mut self) {
        self.slots.taken.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));
    const PREEMPT_AFTER: Duration = Duration::from_millis(10);
    const PAUSE: Duration = Duration::from_millis(20);

    #[test]
    fn a_client_at_its_limit_loses_its_own_connection_that_is_idle_longest() {
        let slots = ConnectionSlots::new(10, 2, PREEMPT_AFTER);
        let other = slots.admit(B).unwrap();
        std::thread::sleep(PAUSE);
        let first = slots.admit(A).unwrap();
        std::thread::sleep(PAUSE);
        let second = slots.admit(A).unwrap();
        std::thread::sleep(PAUSE);
        drop(first.activity.request());
        let third = slots.admit(A).unwrap();
        assert!(
            second.evicted.is_cancelled(),
            "it has been idle longer than the first"
        );
        assert!(!first.evicted.is_cancelled() && !other.evicted.is_cancelled());
        assert_eq!(slots.taken(), 3);
        drop((first, second, third, other));
        assert_eq!(slots.taken(), 0);
        assert!(slots.taken.lock().per_client.is_empty());
    }

    #[test]
    fn at_the_total_limit_the_client_with_most_connections_is_evicted() {
        let slots = ConnectionSlots::new(3, 3, PREEMPT_AFTER);
        let old = slots.admit(B).unwrap();
        std::thread::sleep(PAUSE);
        let (first, _second) = (slots.admit(A).unwrap(), slots.admit(A).unwrap());
        let _new = slots.admit(B).unwrap();
        assert!(first.evicted.is_cancelled() && !old.evicted.is_cancelled());
    }

    #[test]
    fn connections_in_use_are_not_evicted() {
        let slots = ConnectionSlots::new(2, 2, PREEMPT_AFTER);
        let taken = [slots.admit(A).unwrap(), slots.admit(A).unwrap()];
        let requests = taken.each_ref().map(|slot| slot.activity.request());
        std::thread::sleep(PAUSE);
        assert!(
            slots.admit(A).is_none() && slots.admit(B).is_none(),
            "the node is processing their requests"
        );
        drop(requests);
        assert!(slots.admit(B).is_some());
    }
}
