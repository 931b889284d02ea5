//! The lease: while one session alone uses the filesystem, it may answer calls from its own memory.
//!
//! There is one lease, for the whole filesystem. A session gets it with the answers to its calls while no other session
//! calls. When another session calls, the holder's lease is no longer renewed, and the other's call waits until it has
//! expired; while two sessions keep calling, no session holds it. So a change is never made while a stale view of it
//! can be read, and no recall is needed.
//!
//! Why the clocks are safe: the holder counts from when it *sent* its request, the leader from when the request
//! arrived, both with monotonic clocks. A grant is only sent with an answer that a barrier or a commit has confirmed,
//! so none is given after another leader was elected. A new leader does not know the old one's grant: for the lifetime
//! of a lease it serves only the session that claims it (leases exclude each other, so there is one), and all others
//! wait.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use quorumfs_proto::SessionId;
use quorumfs_proto::limits::LEASE_MS;

/// Time for which the leader regards a grant as valid: the holder's own time ends earlier.
const HELD: Duration = Duration::from_millis(LEASE_MS as u64);
/// A session that has not called for this long no longer counts as a user.
const QUIET: Duration = Duration::from_secs(3);

/// The lease and the sessions that call; see the module documentation.
#[derive(Default)]
pub struct Leases {
    state: Mutex<LeaseState>,
}

#[derive(Default)]
struct LeaseState {
    /// The term of this state, and the end of a possible lease of an earlier term.
    term: u64,
    earlier_until: Option<Instant>,
    holder: Option<(SessionId, Instant)>,
    callers: HashMap<SessionId, Caller>,
}

#[derive(Default)]
struct Caller {
    in_flight: u32,
    last_done: Option<Instant>,
}

/// Whether a call's answer grants the lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The lease is granted for [`LEASE_MS`].
    Lease,
    /// The lease is not granted.
    Nothing,
}

impl Grant {
    /// Returns the value on the wire, in milliseconds.
    pub fn lease_ms(self) -> u32 {
        match self {
            Grant::Lease => LEASE_MS,
            Grant::Nothing => 0,
        }
    }
}

/// A call in progress. During it no other session is granted the lease.
pub struct Admission<'a> {
    leases: &'a Leases,
    session: SessionId,
    /// The grant that the answer carries.
    pub grant: Grant,
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        let mut state = self.leases.state.lock();
        if let Some(caller) = state.callers.get_mut(&self.session) {
            caller.in_flight = caller.in_flight.saturating_sub(1);
            caller.last_done = Some(Instant::now());
        }
    }
}

impl Leases {
    /// Waits until no other session may hold the lease, at most for [`LEASE_MS`]. `claims`: the session states that it
    /// holds the lease. Only the leader of `term` may call this.
    pub async fn admit(&self, session: SessionId, claims: bool, term: u64) -> Admission<'_> {
        // Counted from now on, so that the holder's lease is not renewed during the wait.
        self.state.lock().callers.entry(session).or_default().in_flight += 1;
        let mut admission = Admission {
            leases: self,
            session,
            grant: Grant::Nothing,
        };
        loop {
            let decided = self.state.lock().decide(session, claims, term, Instant::now());
            match decided {
                Ok(grant) => {
                    admission.grant = grant;
                    return admission;
                }
                Err(until) => tokio::time::sleep_until(until.into()).await,
            }
        }
    }
}

impl LeaseState {
    /// Returns the grant, or the time until which the call must wait.
    fn decide(
        &mut self,
        session: SessionId,
        claims: bool,
        term: u64,
        now: Instant,
    ) -> Result<Grant, Instant> {
        if self.term != term {
            // Also in the first term in which this process leads: an earlier leader's lease may be held.
            self.term = term;
            self.earlier_until = Some(now + HELD);
            self.holder = None;
        }
        if let Some((holder, until)) = self.holder
            && holder != session
        {
            if until > now {
                return Err(until);
            }
            self.holder = None;
        }
        if let Some(until) = self.earlier_until {
            if until <= now {
                self.earlier_until = None;
            } else if !claims && self.holder.is_none() {
                return Err(until);
            }
        }
        if self.shared(session, now) {
            return Ok(Grant::Nothing);
        }
        self.holder = Some((session, now + HELD));
        Ok(Grant::Lease)
    }

    /// Whether another session is calling, or has recently called.
    fn shared(&mut self, session: SessionId, now: Instant) -> bool {
        let active = |caller: &Caller| {
            caller.in_flight > 0
                || caller
                    .last_done
                    .is_some_and(|done| now.duration_since(done) < QUIET)
        };
        self.callers.retain(|_, caller| active(caller));
        self.callers.keys().any(|other| *other != session)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId(1);
    const B: SessionId = SessionId(2);

    /// Runs a call from start to end.
    fn call(
        state: &mut LeaseState,
        session: SessionId,
        claims: bool,
        term: u64,
        now: Instant,
    ) -> Result<Grant, Instant> {
        state.callers.entry(session).or_default().in_flight += 1;
        let decided = state.decide(session, claims, term, now);
        let caller = state.callers.entry(session).or_default();
        caller.in_flight -= 1;
        caller.last_done = Some(now);
        decided
    }

    /// Returns the state of a leader that has led for long enough.
    fn settled() -> LeaseState {
        LeaseState {
            term: 1,
            ..LeaseState::default()
        }
    }

    #[test]
    fn a_lone_session_holds_the_lease_and_another_waits_it_out() {
        let start = Instant::now();
        let mut state = settled();
        assert_eq!(call(&mut state, A, false, 1, start), Ok(Grant::Lease));
        let later = start + Duration::from_millis(400);
        assert_eq!(
            call(&mut state, B, false, 1, later),
            Err(start + HELD),
            "B waits for what A was granted"
        );
        assert_eq!(
            call(&mut state, A, true, 1, later),
            Ok(Grant::Nothing),
            "A's lease is not renewed meanwhile"
        );
        assert_eq!(
            call(&mut state, B, false, 1, start + HELD),
            Ok(Grant::Nothing),
            "A called a moment ago"
        );
        let quiet = start + HELD + QUIET;
        assert_eq!(
            call(&mut state, B, false, 1, quiet),
            Ok(Grant::Lease),
            "A has been quiet"
        );
    }

    #[test]
    fn nothing_is_granted_while_anothers_call_is_in_flight() {
        let start = Instant::now();
        let mut state = settled();
        state.callers.entry(B).or_default().in_flight = 1;
        assert_eq!(
            call(&mut state, A, false, 1, start + 10 * QUIET),
            Ok(Grant::Nothing)
        );
    }

    #[test]
    fn a_new_leader_serves_the_holder_at_once_and_others_after_the_lease() {
        let start = Instant::now();
        let mut state = settled();
        assert_eq!(call(&mut state, B, false, 2, start), Err(start + HELD));
        state.callers.clear();
        assert_eq!(call(&mut state, A, true, 2, start), Ok(Grant::Lease));
        assert_eq!(call(&mut state, B, false, 2, start), Err(start + HELD));
        // The claim to an earlier lease counts only as long as one may be held.
        let mut state = settled();
        assert_eq!(call(&mut state, A, false, 3, start), Err(start + HELD));
        assert_eq!(call(&mut state, A, false, 3, start + HELD), Ok(Grant::Lease));
    }
}
