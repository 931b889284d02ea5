//! How many connections there may be, in all and for each client, and which one has to go for a new one.
//!
//! When the places are taken, the connection that has been idle longest is closed for the one that comes; where none is idle,
//! one whose client does not read. A client at its own limit makes room among its own; at the limit of all, those with the
//! most connections do.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::activity::{Activity, ClientAddress};

/// The places.
#[derive(Debug)]
pub struct ConnectionSlots {
    connections_max: usize,
    per_client_max: usize,
    /// From when on a connection whose client does not read gives way.
    yields_after: Duration,
    // Locked for one look at all connections at most.
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
    leave: CancellationToken,
}

/// A connection's place; free again when this is dropped.
#[derive(Debug)]
pub struct ConnectionSlot {
    places: Arc<ConnectionSlots>,
    number: u64,
    /// What its client does.
    pub activity: Arc<Activity>,
    /// Cancelled when the place was given to another: the connection is to be closed.
    pub leave: CancellationToken,
}

impl ConnectionSlots {
    /// `connections_max` places, of which one client has `per_client_max` at most.
    pub fn new(
        connections_max: usize,
        per_client_max: usize,
        yields_after: Duration,
    ) -> Arc<ConnectionSlots> {
        Arc::new(ConnectionSlots {
            connections_max,
            per_client_max,
            yields_after,
            taken: Mutex::default(),
        })
    }

    /// A place for a connection from `address`; `None` where all are taken by connections that are in use.
    pub fn admit(self: &Arc<ConnectionSlots>, address: IpAddr) -> Option<ConnectionSlot> {
        let address = ClientAddress::from(address);
        let mut taken = self.taken.lock();
        let own = taken.per_client.get(&address).copied().unwrap_or(0);
        if own >= self.per_client_max || taken.connections.len() >= self.connections_max {
            let among = (own >= self.per_client_max).then_some(address);
            let victim = taken.expendable(among, self.yields_after)?;
            if let Some(connection) = taken.remove(victim) {
                connection.leave.cancel();
            }
        }
        let number = taken.next;
        taken.next += 1;
        let activity = Arc::new(Activity::new(address));
        let leave = CancellationToken::new();
        let connection = Connection {
            activity: Arc::clone(&activity),
            leave: leave.clone(),
        };
        taken.connections.insert(number, connection);
        *taken.per_client.entry(address).or_insert(0) += 1;
        Some(ConnectionSlot {
            places: Arc::clone(self),
            number,
            activity,
            leave,
        })
    }

    #[cfg(test)]
    fn taken(&self) -> usize {
        self.taken.lock().connections.len()
    }
}

impl Taken {
    /// Which connection can go: of `among`'s, if that is given.
    fn expendable(&self, among: Option<ClientAddress>, yields_after: Duration) -> Option<u64> {
        let candidates = self
            .connections
            .iter()
            .filter(|(_, connection)| among.is_none_or(|client| client == connection.activity.address()));
        candidates
            .filter_map(|(number, connection)| {
                let (is_idle, unused) = match connection.activity.idle() {
                    Some(idle) => (true, idle),
                    None => (false, connection.activity.stalled()),
                };
                let of_client = self.per_client.get(&connection.activity.address());
                (is_idle || unused >= yields_after).then_some((is_idle, of_client, unused, *number))
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
        self.places.taken.lock().remove(self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));
    const YIELDS_AFTER: Duration = Duration::from_millis(10);
    const PAUSE: Duration = Duration::from_millis(20);

    #[test]
    fn a_client_at_its_limit_loses_its_own_connection_that_is_idle_longest() {
        let places = ConnectionSlots::new(10, 2, YIELDS_AFTER);
        let other = places.admit(B).unwrap();
        std::thread::sleep(PAUSE);
        let first = places.admit(A).unwrap();
        std::thread::sleep(PAUSE);
        let second = places.admit(A).unwrap();
        std::thread::sleep(PAUSE);
        drop(first.activity.request());
        let third = places.admit(A).unwrap();
        assert!(
            second.leave.is_cancelled(),
            "it is idle longer than the first now"
        );
        assert!(!first.leave.is_cancelled() && !other.leave.is_cancelled());
        assert_eq!(places.taken(), 3);
        drop((first, second, third, other));
        assert_eq!(places.taken(), 0);
        assert!(places.taken.lock().per_client.is_empty());
    }

    #[test]
    fn at_the_limit_of_all_those_who_have_most_make_room() {
        let places = ConnectionSlots::new(3, 3, YIELDS_AFTER);
        let old = places.admit(B).unwrap();
        std::thread::sleep(PAUSE);
        let (first, _second) = (places.admit(A).unwrap(), places.admit(A).unwrap());
        let _new = places.admit(B).unwrap();
        assert!(first.leave.is_cancelled() && !old.leave.is_cancelled());
    }

    #[test]
    fn what_is_in_use_is_not_closed() {
        let places = ConnectionSlots::new(2, 2, YIELDS_AFTER);
        let taken = [places.admit(A).unwrap(), places.admit(A).unwrap()];
        let requests = taken.each_ref().map(|place| place.activity.request());
        std::thread::sleep(PAUSE);
        assert!(
            places.admit(A).is_none() && places.admit(B).is_none(),
            "the node is still at work on them"
        );
        drop(requests);
        assert!(places.admit(B).is_some());
    }
}
