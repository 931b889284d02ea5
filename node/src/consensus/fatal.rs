//! The one way in which this layer reports that the node must stop.
//!
//! A failed flush is never retried (the kernel may have dropped the pages and would report success the next time), and
//! a state machine that could not apply an entry has no next state. The code that runs the node waits for
//! [`FatalSignal::wait`] and exits with its message.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use quorumfs_metadata::StorageFault;

/// Why the node must stop. The message includes the cause.
#[derive(Clone, Debug)]
pub struct FatalError {
    /// The action that failed.
    pub doing: &'static str,
    /// The error that caused it.
    pub source: Arc<dyn Error + Send + Sync>,
    /// The log entry that could not be applied, if that is the cause.
    pub entry: Option<u64>,
}

impl FatalError {
    /// Whether only this node's state is lost, while the log, and with it the vote, is intact: the metadata is damaged,
    /// or an entry cannot be applied to it. The node can rebuild the state if other nodes have it.
    pub fn costs_state(&self) -> bool {
        let fault = self.source.downcast_ref::<StorageFault>();
        fault.is_some_and(|fault| fault.is_damage() || matches!(fault, StorageFault::Inconsistent { .. }))
    }
}

/// A reason to stop after which the node only has to start again: nothing on its disk is in doubt.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartAnew(pub String);

impl FatalError {
    /// Whether the node is intact and only has to start again.
    pub fn is_over_after_start(&self) -> bool {
        self.source.is::<StartAnew>()
    }
}

impl fmt::Display for FatalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot {}: {}", self.doing, self.source)
    }
}

// Without `source`: the message includes it, and it must not be printed twice.
impl Error for FatalError {}

/// The signal holds the first reason, unless that one only costs the state and a later one costs more. Clones share it.
#[derive(Clone, Debug)]
pub struct FatalSignal(Arc<watch::Sender<Option<FatalError>>>);

impl Default for FatalSignal {
    fn default() -> FatalSignal {
        FatalSignal(Arc::new(watch::Sender::new(None)))
    }
}

impl FatalSignal {
    /// Raises the signal for this reason, and returns the error.
    pub fn raise(&self, doing: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> FatalError {
        self.raise_error(FatalError {
            doing,
            source: Arc::from(source.into()),
            entry: None,
        })
    }

    /// Raises the signal because entry `entry` cannot be applied.
    pub fn raise_at(&self, entry: u64, fault: StorageFault) -> FatalError {
        // Damage is local to this node. A contradiction may be an error of the program, which other nodes have too.
        let is_damage = fault.is_damage();
        self.raise_error(FatalError {
            doing: "apply a command",
            source: Arc::new(fault),
            entry: (!is_damage).then_some(entry),
        })
    }

    fn raise_error(&self, error: FatalError) -> FatalError {
        self.0.send_if_modified(|current| {
            let is_worse = match current {
                None => true,
                Some(current) => current.costs_state() && !error.costs_state(),
            };
            if is_worse {
                *current = Some(error.clone());
            }
            is_worse
        });
        error
    }

    /// Returns the reason, if the signal was raised.
    pub fn raised(&self) -> Option<FatalError> {
        self.0.borrow().clone()
    }

    /// Waits until the signal is raised.
    pub async fn wait(&self) -> FatalError {
        let mut receiver = self.0.subscribe();
        loop {
            if let Some(error) = self.raised() {
                return error;
            }
            // Cannot fail: `self` holds the sender, so the channel stays open.
            let _ = receiver.changed().await;
        }
    }
}

impl From<FatalError> for std::io::Error {
    fn from(error: FatalError) -> std::io::Error {
        std::io::Error::other(error)
    }
}
