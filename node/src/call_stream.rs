//! One stream of calls: for which sessions it may speak, and how its client is asked for a keep-alive.
//!
//! A session is proven by the secret with which it was opened, shown once on each stream (and by the certificate shown
//! then, where there was one). The state keeps the secret's digest. Sessions of clients without a secret are known by
//! their number alone. One that was opened before all nodes knew of keys gets its key with a keep-alive on the stream that
//! opened it; on any other nothing tells its client from one that has heard its number, and it stays without.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use quorumfs_proto::{Refusal, SessionId, SessionSecret, Sha256};
use quorumfs_wire as wire;
use subtle::ConstantTimeEq as _;
use tokio::sync::mpsc;

use crate::incoming::Connection;
use quorumfs_metadata::{Failure, MetadataStore, SessionKey};

/// Sessions that one stream may claim: a client has one at a time, and the next when that is lost.
const CLAIMS_MAX: usize = 4;

/// See the module.
pub struct CallStream {
    /// The newest last.
    claims: Mutex<Vec<Claim>>,
    /// The session that was proven last; 0: none.
    proven: AtomicU64,
    certificate: Option<Sha256>,
    connection: Option<Connection>,
    /// Whether the connection ends at the client itself.
    is_direct: AtomicBool,
    nudges: mpsc::Sender<()>,
}

/// That a client speaks for a session.
#[derive(Clone, Copy)]
struct Claim {
    session: SessionId,
    secret: Sha256,
    /// Whether the session was opened on this stream, with this secret.
    has_opened: bool,
}

/// What is known of the session for which a call speaks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// The call speaks for it.
    Proven,
    /// It is not known.
    Unknown,
    /// The call does not speak for it, or nobody can tell now.
    Refused(Refusal),
}

impl CallStream {
    /// A stream that has shown nothing yet, and the requests for a keep-alive that it passes on.
    pub fn new(
        certificate: Option<Sha256>,
        connection: Option<Connection>,
    ) -> (CallStream, mpsc::Receiver<()>) {
        // One that has not been sent yet is enough.
        let (nudges, requests) = mpsc::channel(1);
        let stream = CallStream {
            claims: Mutex::new(Vec::new()),
            proven: AtomicU64::new(0),
            certificate,
            connection,
            is_direct: AtomicBool::new(false),
            nudges,
        };
        (stream, requests)
    }

    /// The client says for whom it speaks.
    pub fn hello(&self, hello: &wire::SessionHello) {
        self.claim(SessionId(hello.session), Sha256::of(&hello.secret));
    }

    /// How a session that is opened on this stream proves itself from now on.
    pub fn key_of_new(&self, session: SessionId, secret: &SessionSecret) -> SessionKey {
        let secret = Sha256::of(&secret.0);
        self.claim(session, secret);
        SessionKey {
            secret,
            certificate: self.certificate,
        }
    }

    fn claim(&self, session: SessionId, secret: Sha256) {
        let mut claims = self.claims.lock();
        let has_opened = claims
            .iter()
            .any(|claim| claim.session == session && claim.secret == secret && claim.has_opened);
        claims.retain(|claim| claim.session != session);
        if claims.len() >= CLAIMS_MAX {
            claims.remove(0);
        }
        claims.push(Claim {
            session,
            secret,
            has_opened,
        });
    }

    /// `session`, which was not known before, was opened on this stream.
    pub fn has_opened(&self, session: SessionId) {
        for claim in &mut *self.claims.lock() {
            claim.has_opened |= claim.session == session;
        }
    }

    /// Whether calls of this stream speak for `session`, as far as this node's state tells.
    pub fn standing(&self, metadata: &MetadataStore, session: SessionId) -> Result<Standing, Failure> {
        // A key never changes.
        if session.0 != 0 && self.proven.load(Ordering::Relaxed) == session.0 {
            return Ok(Standing::Proven);
        }
        let view = metadata.view()?;
        if view.session(session)?.is_none() {
            return Ok(Standing::Unknown);
        }
        match view.session_key(session)? {
            Some(key) if self.shows(session, &key) => self.proven.store(session.0, Ordering::Relaxed),
            Some(_) => {
                return Ok(Standing::Refused(Refusal::Invalid {
                    reason: format!("session {session} is another client's"),
                }));
            }
            // It may get a key.
            None => {}
        }
        Ok(Standing::Proven)
    }

    /// How the session proves itself from now on, if it was opened on this stream.
    pub fn key_of_opened(&self, session: SessionId) -> Option<SessionKey> {
        let claims = self.claims.lock();
        let claim = claims.iter().find(|claim| claim.session == session)?;
        claim.has_opened.then_some(SessionKey {
            secret: claim.secret,
            certificate: self.certificate,
        })
    }

    /// Whether this stream has shown what proves the session. How long it takes tells nothing of where secrets differ.
    pub fn shows(&self, session: SessionId, key: &SessionKey) -> bool {
        let claims = self.claims.lock();
        let claim = claims.iter().find(|claim| claim.session == session);
        let is_secret = claim.is_some_and(|claim| claim.secret.0.ct_eq(&key.secret.0).into());
        is_secret && (key.certificate.is_none() || key.certificate == self.certificate)
    }

    /// The client says which addresses its ends of connections have.
    pub fn comes_from(&self, addresses: &[String]) {
        let is_direct = self
            .connection
            .as_ref()
            .is_some_and(|connection| connection.comes_from(addresses));
        self.is_direct.store(is_direct, Ordering::Relaxed);
    }

    /// Whether the connection ends at the client itself, as far as it has said so.
    pub fn is_direct(&self) -> bool {
        self.is_direct.load(Ordering::Relaxed)
    }

    /// The connection that carries it.
    pub fn connection(&self) -> Option<&Connection> {
        self.connection.as_ref()
    }

    /// Asks the client for a keep-alive, as long as the stream lasts.
    pub fn nudges(&self) -> mpsc::WeakSender<()> {
        self.nudges.downgrade()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SESSION: SessionId = SessionId(7);
    const SECRET: SessionSecret = SessionSecret([1; 32]);

    fn hello(secret: &[u8]) -> wire::SessionHello {
        wire::SessionHello {
            session: SESSION.0,
            secret: bytes::Bytes::copy_from_slice(secret),
        }
    }

    #[test]
    fn a_session_is_shown_by_its_secret_and_its_certificate() {
        let certificate = Some(Sha256::of(b"certificate"));
        let (opened, _) = CallStream::new(certificate, None);
        let key = opened.key_of_new(SESSION, &SECRET);
        assert!(opened.shows(SESSION, &key));

        let (other, _) = CallStream::new(certificate, None);
        assert!(!other.shows(SESSION, &key), "nothing was shown");
        other.hello(&hello(&[2; 32]));
        assert!(!other.shows(SESSION, &key), "another secret");
        other.hello(&hello(&SECRET.0));
        assert!(other.shows(SESSION, &key));

        let (stolen, _) = CallStream::new(None, None);
        stolen.hello(&hello(&SECRET.0));
        assert!(!stolen.shows(SESSION, &key), "the certificate is missing");
    }

    #[test]
    fn a_session_without_a_key_gets_one_only_on_the_stream_that_opened_it() {
        let (opened, _) = CallStream::new(None, None);
        let key = opened.key_of_new(SESSION, &SECRET);
        assert_eq!(opened.key_of_opened(SESSION), None, "it was there before");
        opened.has_opened(SESSION);
        opened.hello(&hello(&SECRET.0));
        assert_eq!(opened.key_of_opened(SESSION), Some(key));

        // Whoever has heard its number.
        let (other, _) = CallStream::new(None, None);
        other.hello(&hello(&[2; 32]));
        assert_eq!(other.key_of_opened(SESSION), None);
        other.key_of_new(SESSION, &SessionSecret([2; 32]));
        assert_eq!(other.key_of_opened(SESSION), None);
        opened.hello(&hello(&[2; 32]));
        assert_eq!(opened.key_of_opened(SESSION), None, "another secret");
    }

    #[test]
    fn claims_are_bounded_and_the_oldest_go() {
        let (stream, _) = CallStream::new(None, None);
        let keys: Vec<SessionKey> = (1..=2 * CLAIMS_MAX as u64)
            .map(|session| stream.key_of_new(SessionId(session), &SECRET))
            .collect();
        let shown = (1..=keys.len()).filter(|at| stream.shows(SessionId(*at as u64), &keys[at - 1]));
        assert_eq!(shown.count(), CLAIMS_MAX);
        assert!(stream.shows(SessionId(keys.len() as u64), keys.last().unwrap()));
    }
}
