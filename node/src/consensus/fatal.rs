//! The one way in which this layer says that the node must stop.
//!
//! A flush that failed is never tried again (the kernel may have dropped the pages and will call the next one
//! a success), and a state machine that could not apply has no next state: whoever runs the node waits for
//! [`FatalSignal::wait`] and exits with what it says.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use tokio::sync::watch;

use quorumfs_metadata::StorageFault;

/// Why the node must stop.
#[derive(Clone, Debug)]
pub struct FatalError {
    /// What was being done.
    pub doing: &'static str,
    /// What came of it.
    pub source: Arc<dyn Error + Send + Sync>,
    /// The log entry that could not be applied, if it is that.
    pub entry: Option<u64>,
}

impl FatalError {
    /// Whether this node's state cannot be gone on from, while the log, and with it its vote, is in order: the metadata
    /// is damaged, or an entry cannot be applied to it. The node can make the state anew, if others have it.
    pub fn costs_state(&self) -> bool {
        let fault = self.source.downcast_ref::<StorageFault>();
        fault.is_some_and(|fault| fault.is_damage() || matches!(fault, StorageFault::Inconsistent { .. }))
    }
}

/// What a node stops for that need only start again: nothing on its disk is in doubt.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartAnew(pub String);

impl FatalError {
    /// Whether the node is as good as before once it has started again.
    pub fn is_over_after_start(&self) -> bool {
        self.source.is::<StartAnew>()
    }
}

impl fmt::Display for FatalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.doing, self.source)
    }
}

impl Error for FatalError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(self.source.as_ref())
    }
}

/// The first reason stands, unless it costs only the state and a later one costs more.
#[derive(Clone, Debug)]
pub struct FatalSignal(Arc<watch::Sender<Option<FatalError>>>);

impl Default for FatalSignal {
    fn default() -> FatalSignal {
        FatalSignal(Arc::new(watch::Sender::new(None)))
    }
}

impl FatalSignal {
    /// The node must stop, for this reason.
    pub fn raise(&self, doing: &'static str, source: impl Into<Box<dyn Error + Send + Sync>>) -> FatalError {
        self.raise_error(FatalError {
            doing,
            source: Arc::from(source.into()),
            entry: None,
        })
    }

    /// Entry `entry` cannot be applied, for `fault`.
    pub fn raise_at(&self, entry: u64, fault: StorageFault) -> FatalError {
        // What is damaged cannot be right elsewhere; a contradiction can be the program's fault, there too.
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

    /// The reason, if there is one already.
    pub fn raised(&self) -> Option<FatalError> {
        self.0.borrow().clone()
    }

    /// Waits until there is one.
    pub async fn wait(&self) -> FatalError {
        let mut receiver = self.0.subscribe();
        loop {
            if let Some(error) = self.raised() {
                return error;
            }
            // The sender lives in `self`, so the channel cannot close while we wait.
            let _ = receiver.changed().await;
        }
    }
}

impl From<FatalError> for std::io::Error {
    fn from(error: FatalError) -> std::io::Error {
        std::io::Error::other(error)
    }
}
