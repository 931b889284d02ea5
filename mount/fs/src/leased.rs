//! A cluster behind a cache of what this session's lease keeps true.
//!
//! While this session holds the lease no other session changes anything. So attributes that were answered under it, and
//! the absence of names in directories that this mount created under it, are answered from memory. Nothing else is: not
//! content, which is versioned, and nothing after the lease has ended.
//!
//! Rules: an answer is cached only if the same lease was held when the query was sent and when the answer arrived, and
//! no change of this mount was in flight in between. If the outcome of a change cannot be cached for that reason, the
//! cached attributes of its inodes are removed. A name is recorded as possibly present before the command that creates
//! it is sent, whatever its outcome. A change without a known outcome (a timeout) may take effect at any time until it
//! is settled: the cache is cleared, and answers to queries sent before it is settled are not cached.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::command::{NewKind, RenameMode, Target};
use quorumfs_proto::query::{Answer, ExtentsPage};
use quorumfs_proto::{
    ChunkId, Command, FsError, InodeNumber, Name, Operation, OperationResult, Outcome, Query, Timestamp,
};

use crate::caches::lease_view::{LeaseNumber, LeaseView};
use quorumfs_client::{Cluster, UnlinkedHandler};

/// A cluster with a cache in front; see the module documentation.
pub struct Leased<C> {
    cluster: C,
    // Held for one access, never across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    view: LeaseView,
    /// Changes sent since the start, and how many of them are answered.
    sent: u64,
    answered: u64,
    /// Changes without a known outcome since the start. Each cleared the cache.
    undecided: u64,
}

/// The lease and the undecided changes at the time of a send.
struct LeaseContext {
    lease: Option<LeaseNumber>,
    undecided: u64,
}

impl<C: Cluster> Leased<C> {
    /// Puts a cache in front of `cluster`.
    pub fn new(cluster: C) -> Leased<C> {
        Leased {
            cluster,
            state: Mutex::default(),
        }
    }

    fn lease_number(&self) -> Option<LeaseNumber> {
        self.cluster.lease().map(|(_, number)| number)
    }

    /// Returns the context of a send. Must be called before a send whose answer may be cached.
    fn context(&self) -> LeaseContext {
        // In this order: a change that ends without an outcome in between is counted by one of the two.
        let undecided = self.state.lock().undecided;
        let may_change = self.cluster.has_unsettled_changes();
        LeaseContext {
            lease: self.lease_number().filter(|_| !may_change),
            undecided,
        }
    }

    /// Returns the lease under which an answer may be cached that was sent for with `context`. `state` is the locked
    /// state.
    fn current_lease(&self, context: &LeaseContext, state: &State) -> Option<LeaseNumber> {
        let now = self.lease_number().filter(|now| Some(*now) == context.lease);
        now.filter(|_| state.undecided == context.undecided)
    }

    fn cached_answer(&self, query: &Query) -> Option<Result<Answer, FsError>> {
        let number = self.lease_number()?;
        let mut state = self.state.lock();
        match query {
            Query::Attributes { inode } => {
                let attributes = state.view.attributes(number, *inode)?;
                Some(Ok(Answer::Attributes(attributes)))
            }
            Query::Lookup { parent, name } => {
                let is_absent = state.view.is_absent(number, *parent, name);
                is_absent.then_some(Err(FsError::NotFound))
            }
            _ => None,
        }
    }
}

impl<C: Cluster> Cluster for Leased<C> {
    type Chunk = C::Chunk;

    async fn mutate(&self, command: Command, stored: &[C::Chunk]) -> Result<Outcome, FsError> {
        let context = self.context();
        let names = created_names(&command);
        let directories = created_directories(&command);
        {
            let mut state = self.state.lock();
            state.sent += 1;
            for (parent, name) in &names {
                state.view.add_name(*parent, name);
            }
            if creates_in_created_directory(&command) {
                state.view = LeaseView::default();
            }
        }
        let mut pending = PendingChange {
            leased: self,
            decided: false,
        };
        let result = self.cluster.mutate(command, stored).await;
        pending.decided = !matches!(result, Err(FsError::TimedOut | FsError::Io));
        drop(pending);
        if let Ok(outcome) = &result {
            let mut state = self.state.lock();
            match self.current_lease(&context, &state) {
                Some(number) => {
                    state.view.insert(number, &outcome.touched);
                    for at in directories {
                        if let Some(OperationResult::Entry { inode, created: true }) = outcome.results.get(at)
                        {
                            state.view.add_empty_directory(number, *inode);
                        }
                    }
                }
                // The outcome cannot be cached, and what is cached of its inodes may be outdated: a lease that began
                // meanwhile may have cached other answers.
                None => {
                    for attributes in &outcome.touched {
                        state.view.forget(attributes.inode);
                    }
                    for (parent, name) in &names {
                        state.view.add_name(*parent, name);
                    }
                }
            }
            for result in &outcome.results {
                if let OperationResult::Removed { inode, last: true } = result {
                    state.view.forget(*inode);
                }
            }
        }
        result
    }

    async fn query(&self, query: Query) -> Result<Answer, FsError> {
        if let Some(known) = self.cached_answer(&query) {
            return known;
        }
        let changes = {
            let state = self.state.lock();
            (state.sent == state.answered).then_some(state.sent)
        };
        let context = self.context();
        let answer = self.cluster.query(query).await?;
        let mut state = self.state.lock();
        if changes == Some(state.sent)
            && let Some(number) = self.current_lease(&context, &state)
            && let Answer::Attributes(attributes) | Answer::Extents(ExtentsPage { attributes, .. }) = &answer
        {
            state.view.insert(number, std::slice::from_ref(attributes));
        }
        drop(state);
        Ok(answer)
    }

    fn new_chunk(&self, payload: Bytes) -> C::Chunk {
        self.cluster.new_chunk(payload)
    }

    async fn put_chunk(&self, chunk: &C::Chunk) -> Result<(), FsError> {
        self.cluster.put_chunk(chunk).await
    }

    async fn get_chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        self.cluster.get_chunk(id, offset, length).await
    }

    fn lease(&self) -> Option<(Duration, u64)> {
        self.cluster.lease()
    }

    fn now(&self) -> Timestamp {
        self.cluster.now()
    }

    fn has_unsettled_changes(&self) -> bool {
        self.cluster.has_unsettled_changes()
    }

    fn set_unlinked_handler(&self, handler: UnlinkedHandler) {
        self.cluster.set_unlinked_handler(handler);
    }
}

/// A change in flight. Dropping it counts it as answered, even if its caller is gone.
struct PendingChange<'a, C> {
    leased: &'a Leased<C>,
    decided: bool,
}

impl<C> Drop for PendingChange<'_, C> {
    fn drop(&mut self) {
        let mut state = self.leased.state.lock();
        state.answered += 1;
        if !self.decided {
            state.undecided += 1;
            state.view = LeaseView::default();
        }
    }
}

/// Returns the names that `command` may create.
fn created_names(command: &Command) -> BTreeSet<(InodeNumber, Name)> {
    let mut names = BTreeSet::new();
    let mut add = |parent: &Target, name: &Name| {
        if let Target::Inode(parent) = parent {
            names.insert((*parent, name.clone()));
        }
    };
    for operation in &command.operations {
        match operation {
            Operation::Create { parent, name, .. } | Operation::Link { parent, name, .. } => {
                add(parent, name)
            }
            Operation::Rename {
                from_parent,
                from_name,
                to_parent,
                to_name,
                mode,
                ..
            } => {
                add(to_parent, to_name);
                if *mode == RenameMode::Exchange {
                    add(from_parent, from_name);
                }
            }
            _ => {}
        }
    }
    names
}

/// Whether `command` creates names in directories that it creates or, if they exist, opens. Which inodes these are is
/// unknown before the outcome.
fn creates_in_created_directory(command: &Command) -> bool {
    command.operations.iter().any(|operation| {
        matches!(
            operation,
            Operation::Create {
                parent: Target::Created(_),
                ..
            } | Operation::Link {
                parent: Target::Created(_),
                ..
            }
        )
    })
}

/// Returns the indices of the operations of `command` that create directories which are empty after it.
fn created_directories(command: &Command) -> Vec<usize> {
    let makes = |operation: &Operation| matches!(operation, Operation::Create { inode, .. } if inode.kind == NewKind::Directory);
    let is_named_in = |at: usize| {
        let parents = command.operations.iter().filter_map(|operation| match operation {
            Operation::Create { parent, .. } | Operation::Link { parent, .. } => Some(parent),
            _ => None,
        });
        parents
            .into_iter()
            .any(|parent| matches!(parent, Target::Created(index) if usize::from(*index) == at))
    };
    let numbered = command.operations.iter().enumerate();
    numbered
        .filter(|(at, operation)| makes(operation) && !is_named_in(*at))
        .map(|(at, _)| at)
        .collect()
}
