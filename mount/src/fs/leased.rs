//! A cluster that is not asked what this mount knows for certain.
//!
//! As long as this session holds the lease nobody else changes anything, so attributes that were answered under it, and
//! the absence of names in directories that this mount made under it, are answered from memory. Nothing else is: not
//! content, which is versioned, nor anything once the lease has lapsed.
//!
//! Rules: an answer counts as learned under a lease only if the same lease was held when the question was sent and when
//! its answer came, and no change of this mount was under way in between. The outcome of a change that cannot be learned
//! so makes what was known of its inodes forgotten. A name is noted as possible before the command that makes it is
//! sent, whatever becomes of it.

use std::collections::BTreeSet;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use quorumfs_proto::command::{NewKind, RenameMode, Target};
use quorumfs_proto::query::Answer;
use quorumfs_proto::{
    ChunkId, Command, FsError, InodeNumber, Name, Operation, OperationResult, Outcome, Query,
};

use super::cluster::{Cluster, UnlinkedHandler};
use crate::caches::lease_view::{LeaseNumber, LeaseView};

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
    /// A change ended without a verdict and may still take effect, whenever: from then on nothing is certain.
    unsure: bool,
}

impl<C: Cluster> Leased<C> {
    /// `cluster`, with what is known of it in front.
    pub fn new(cluster: C) -> Leased<C> {
        Leased {
            cluster,
            state: Mutex::default(),
        }
    }

    fn number(&self) -> Option<LeaseNumber> {
        self.cluster.lease().map(|(_, number)| number)
    }

    fn known(&self, query: &Query) -> Option<Result<Answer, FsError>> {
        let number = self.number()?;
        let mut state = self.state.lock();
        if state.unsure {
            return None;
        }
        match query {
            Query::Attributes { inode } => {
                let attributes = state.view.attributes(number, *inode)?;
                Some(Ok(Answer::Attributes(attributes)))
            }
            Query::Lookup { parent, name } => {
                let lacks = state.view.lacks(number, *parent, name);
                lacks.then_some(Err(FsError::NotFound))
            }
            _ => None,
        }
    }
}

impl<C: Cluster> Cluster for Leased<C> {
    type Chunk = C::Chunk;

    async fn mutate(&self, command: Command, stored: &[C::Chunk]) -> Result<Outcome, FsError> {
        let before = self.number();
        let named = names_made(&command);
        let directories = directories_made(&command);
        {
            let mut state = self.state.lock();
            state.sent += 1;
            for (parent, name) in &named {
                state.view.may_name(*parent, name);
            }
        }
        let mut under_way = UnderWay {
            leased: self,
            decided: false,
        };
        let result = self.cluster.mutate(command, stored).await;
        under_way.decided = !matches!(result, Err(FsError::TimedOut | FsError::Io));
        drop(under_way);
        let after = self.number().filter(|after| Some(*after) == before);
        if let Ok(outcome) = &result {
            let mut state = self.state.lock();
            match after {
                Some(number) => {
                    state.view.learn(number, &outcome.touched);
                    for at in directories {
                        if let Some(OperationResult::Entry { inode, created: true }) = outcome.results.get(at)
                        {
                            state.view.made(number, *inode);
                        }
                    }
                }
                // Not known for certain, and what was known of these before is no longer true: a lease that began while
                // this was under way may have other answers to it.
                None => {
                    for attributes in &outcome.touched {
                        state.view.forget(attributes.inode);
                    }
                    for (parent, name) in &named {
                        state.view.may_name(*parent, name);
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
        if let Some(known) = self.known(&query) {
            return known;
        }
        let before = self.number();
        let sent = {
            let state = self.state.lock();
            (state.sent == state.answered).then_some(state.sent)
        };
        let answer = self.cluster.query(query).await?;
        let after = self.number().filter(|after| Some(*after) == before);
        if let (Some(number), Some(sent)) = (after, sent) {
            let mut state = self.state.lock();
            if state.sent == sent {
                match &answer {
                    Answer::Attributes(attributes) | Answer::Extents { attributes, .. } => {
                        state.view.learn(number, std::slice::from_ref(attributes));
                    }
                    _ => {}
                }
            }
        }
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

    fn set_unlinked_handler(&self, handler: UnlinkedHandler) {
        self.cluster.set_unlinked_handler(handler);
    }
}

/// A change under way; it is answered when this is dropped, even if nobody waits for it any more.
struct UnderWay<'a, C> {
    leased: &'a Leased<C>,
    decided: bool,
}

impl<C> Drop for UnderWay<'_, C> {
    fn drop(&mut self) {
        let mut state = self.leased.state.lock();
        state.answered += 1;
        state.unsure |= !self.decided;
    }
}

/// The names that `command` may make.
fn names_made(command: &Command) -> BTreeSet<(InodeNumber, Name)> {
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

/// Which operations of `command` make directories.
fn directories_made(command: &Command) -> Vec<usize> {
    let makes = |operation: &Operation| matches!(operation, Operation::Create { inode, .. } if inode.kind == NewKind::Directory);
    let numbered = command.operations.iter().enumerate();
    numbered
        .filter(|(_, operation)| makes(operation))
        .map(|(at, _)| at)
        .collect()
}
