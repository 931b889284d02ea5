//! A cluster that is not asked what this mount knows for certain.
//!
//! As long as this session holds the lease nobody else changes anything, so attributes that were answered under it, and
//! the absence of names in directories that this mount made under it, are answered from memory. Nothing else is: not
//! content, which is versioned, nor anything once the lease has lapsed.
//!
//! Rules: an answer counts as learned under a lease only if the same lease was held when the question was sent and when
//! its answer came, and no change of this mount was under way in between. The outcome of a change that cannot be learned
//! so makes what was known of its inodes forgotten. A name is noted as possible before the command that makes it is
//! sent, whatever becomes of it. A change that ends without a verdict (a time-out) may take effect whenever it likes until
//! it is settled: everything is forgotten, and nothing counts as learned that was asked for before it is settled.

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

/// See the module.
pub struct Leased<C> {
    cluster: C,
    // Held for a look-up, never across an await.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    view: LeaseView,
    /// Changes sent since the start, and those of them that are answered.
    sent: u64,
    answered: u64,
    /// Changes that ended without a verdict. Each made everything forgotten.
    undecided: u64,
}

/// What was known of the lease and of this mount's changes when something was sent.
struct LeaseContext {
    lease: Option<LeaseNumber>,
    undecided: u64,
}

impl<C: Cluster> Leased<C> {
    /// `cluster`, with what is known of it in front.
    pub fn new(cluster: C) -> Leased<C> {
        Leased {
            cluster,
            state: Mutex::default(),
        }
    }

    fn lease_number(&self) -> Option<LeaseNumber> {
        self.cluster.lease().map(|(_, number)| number)
    }

    /// To be asked for before something is sent whose answer is to be learned from.
    fn context(&self) -> LeaseContext {
        // In this order: a change that ends without a verdict in between is counted by one of the two.
        let undecided = self.state.lock().undecided;
        let may_change = self.cluster.has_unsettled_changes();
        LeaseContext {
            lease: self.lease_number().filter(|_| !may_change),
            undecided,
        }
    }

    /// The lease under which the answer to what was `sent` may be learned; `state` is this one's own, locked.
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
                // Not known for certain, and what was known of these before is no longer true: a lease that began while
                // this was under way may have other answers to it.
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

/// A change under way; it is answered when this is dropped, even if nobody waits for it any more.
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

/// The names that `command` may make.
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

/// Whether `command` makes names in directories that it creates or, where they exist, opens: which these are is not known
/// before its outcome.
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

/// Which operations of `command` make directories that are empty after it.
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
