//! Permits a node to give up its state.
//!
//! A node that has lost its promises, or whose state is damaged, could be rebuilt from the others; but only if these
//! are a majority without it. If two of three gave up their state at once, it would be unknown what was acknowledged,
//! although the state they discarded may have shown it. So such a node asks the leader, who permits it if a quorum that
//! does not include it answers from then on and has everything that is committed. The node stops taking part before it
//! asks for the last time: of two that ask at once, at most one finds the other among those that answer.

use std::time::{Duration, Instant};

use quorumfs_proto::NodeId;
use tracing::info;

use super::{ChangeError, MembershipChanges};

/// Time reserved for a node that was permitted, before another is: two nodes that stop at the same moment would both
/// find that a majority is missing, and both would have stopped in vain.
const GOING: Duration = Duration::from_secs(20);

impl MembershipChanges {
    /// Checks whether `node` may give up its state, which could not advance beyond entry `applied`. For the leader.
    ///
    /// # Errors
    /// [`ChangeError`] with the reason if it may not.
    pub async fn may_renounce(&self, node: NodeId, applied: u64) -> Result<(), ChangeError> {
        self.must_lead()?;
        let mut let_go = self.renouncing.lock().await;
        let unavailable = ChangeError::Unavailable;
        let reached = self.metadata.position().index;
        if reached < applied {
            return Err(unavailable(format!(
                "no other node has applied entry {applied} either; the leader has applied up to {reached}"
            )));
        }
        if let Some((before, at)) = *let_go
            && before != node
            && at.elapsed() < GOING
            && self.consensus.voter_sets().contains(&before)
        {
            return Err(unavailable(format!(
                "node {before} is being rebuilt, and only one node may be at a time"
            )));
        }
        self.consensus.quorum_without(node).await.map_err(unavailable)?;
        *let_go = Some((node, Instant::now()));
        info!(%node, "a majority is intact without this node: it may give up its state");
        Ok(())
    }
}
