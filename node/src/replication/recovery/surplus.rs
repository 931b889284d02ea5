//! What this node holds although it is for others to hold: copies it took in the place of a node that did not answer,
//! content that rode inside commands, and what placement has moved elsewhere. It is let go once every node that should
//! hold it says that it does, on disk and under the same placement.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use parking_lot::Mutex;
use quorumfs_proto::{ChunkId, NodeId};
use tokio::sync::Notify;
use tracing::{debug, info, warn};

use super::Recovery;
use super::ledger::WalkReason;
use crate::replication::peers::HELD_IDS_MAX;
use crate::replication::placement::{Layout, PlacementSnapshot};
use quorumfs_metadata::Failure;

/// Chunks known by name; a walk finds the rest when these are gone.
const SURPLUS_MAX: usize = 256 << 10;
/// Chunks let go in one go: others' questions about what is held wait for it.
const BATCH_CHUNKS: usize = 256;
const _: () = assert!(BATCH_CHUNKS <= HELD_IDS_MAX);
/// How long they are gathered: what was just written has not reached its places yet.
const GATHER_MS: u64 = 1_000;
/// After a round in which somebody did not have all it should.
const RETRY_MS: u64 = 5_000;

/// The books.
#[derive(Default)]
pub(super) struct Surplus {
    // Locked for one entry or a batch of them.
    book: Mutex<State>,
    added: Notify,
}

#[derive(Default)]
struct State {
    chunks: BTreeSet<ChunkId>,
    overflowed: bool,
}

impl Surplus {
    /// `id` is held and for others to hold.
    pub(super) fn add(&self, id: ChunkId) {
        let mut book = self.book.lock();
        if book.chunks.len() < SURPLUS_MAX {
            book.chunks.insert(id);
        } else {
            book.overflowed = true;
        }
        drop(book);
        self.added.notify_one();
    }

    /// How many are known.
    pub(super) fn count(&self) -> u64 {
        self.book.lock().chunks.len() as u64
    }

    /// Up to `max` of those after `after`.
    fn after(&self, after: Option<ChunkId>, max: usize) -> Vec<ChunkId> {
        use std::ops::Bound::{Excluded, Unbounded};
        let book = self.book.lock();
        let from = after.map_or(Unbounded, Excluded);
        book.chunks.range((from, Unbounded)).take(max).copied().collect()
    }

    /// These are surplus no more.
    fn settled(&self, ids: impl IntoIterator<Item = ChunkId>) {
        let mut book = self.book.lock();
        for id in ids {
            book.chunks.remove(&id);
        }
    }

    /// Whether there were more than are known; asked once they are gone.
    fn take_overflowed(&self) -> bool {
        let mut book = self.book.lock();
        book.chunks.is_empty() && std::mem::take(&mut book.overflowed)
    }
}

impl Recovery {
    /// Lets go of what others hold, for ever.
    pub(super) async fn run_letting_go(self: Arc<Self>) {
        loop {
            if self.surplus.count() == 0 {
                self.surplus.added.notified().await;
            }
            tokio::time::sleep(Duration::from_millis(GATHER_MS)).await;
            match self.let_surplus_go().await {
                Ok(0) => {}
                Ok(chunks) => info!(chunks, "let go of content that the nodes it is for hold"),
                Err(reason) => debug!(%reason, "surplus content stays"),
            }
            if self.surplus.take_overflowed() {
                self.compare_soon(WalkReason::MoreMissing);
            }
            if self.surplus.count() > 0 {
                tokio::time::sleep(Duration::from_millis(RETRY_MS)).await;
            }
        }
    }

    /// Tries each surplus chunk once; answers how many went.
    async fn let_surplus_go(self: &Arc<Self>) -> Result<u64, String> {
        let (mut after, mut gone) = (None, 0);
        loop {
            let batch = self.surplus.after(after, BATCH_CHUNKS);
            let Some(last) = batch.last() else { return Ok(gone) };
            after = Some(*last);
            let picture = self.placement.picture();
            let surplus = self
                .still_surplus(batch, &picture)
                .map_err(|error| error.to_string())?;
            // While voters change, and for who does not vote, everything stays.
            let own = self.consensus.id();
            let Some(layout) = picture.settled().filter(|layout| layout.voters().contains(&own)) else {
                return Err("the voters are changing".to_string());
            };
            let confirmed = self.confirmed(surplus, layout, picture.epoch).await;
            let (recovery, epoch) = (Arc::clone(self), picture.epoch);
            let let_go = tokio::task::spawn_blocking(move || {
                let dropped = recovery
                    .placement
                    .let_go(epoch, || recovery.content.discard(&confirmed));
                match dropped {
                    Some(Ok(_)) => {
                        let count = confirmed.len() as u64;
                        recovery.surplus.settled(confirmed);
                        count
                    }
                    Some(Err(error)) => {
                        warn!(%error, "surplus content could not be freed");
                        0
                    }
                    None => 0,
                }
            });
            gone += let_go.await.map_err(|panic| panic.to_string())?;
        }
    }

    /// Those of `batch` that are held, named and for others still; the rest is taken off the books. What no file names
    /// is the sweeper's.
    fn still_surplus(
        &self,
        batch: Vec<ChunkId>,
        picture: &PlacementSnapshot,
    ) -> Result<Vec<ChunkId>, Failure> {
        let own = self.consensus.id();
        let view = self.metadata.view()?;
        let (mut surplus, mut settled) = (Vec::new(), Vec::new());
        for id in batch {
            let is_surplus =
                !picture.should_hold(id, own) && self.content.contains(id) && view.chunk(id)?.is_some();
            if is_surplus { &mut surplus } else { &mut settled }.push(id);
        }
        self.surplus.settled(settled);
        Ok(surplus)
    }

    /// Those of `ids` that all their places hold under `epoch`.
    async fn confirmed(&self, ids: Vec<ChunkId>, layout: &Layout, epoch: u64) -> Vec<ChunkId> {
        let mut asked: BTreeMap<NodeId, Vec<ChunkId>> = BTreeMap::new();
        for id in &ids {
            for place in layout.places(*id) {
                asked.entry(place).or_default().push(*id);
            }
        }
        let members = self.consensus.members();
        let asking = asked.iter().map(|(place, ids)| async {
            let member = members.iter().find(|member| member.id == *place);
            let answer = match member {
                Some(member) => self.peers.held_under_epoch(member, ids).await,
                None => return Vec::new(),
            };
            match answer {
                Ok((theirs, held)) if theirs == epoch => ids
                    .iter()
                    .zip(held)
                    .filter(|(_, held)| *held)
                    .map(|(id, _)| *id)
                    .collect(),
                Ok((theirs, _)) => {
                    debug!(node = place.slot, epoch, theirs, "a node knows another placement");
                    Vec::new()
                }
                Err(error) => {
                    debug!(%error, "a node does not say whether it holds what it should");
                    Vec::new()
                }
            }
        });
        let mut copies: BTreeMap<ChunkId, usize> = BTreeMap::new();
        for id in join_all(asking).await.into_iter().flatten() {
            *copies.entry(id).or_default() += 1;
        }
        copies.retain(|_, count| *count == layout.copies());
        copies.into_keys().collect()
    }
}
