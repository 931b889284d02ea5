//! Letting a node go that must give up its state.
//!
//! A node that has lost what it had promised, or whose state is damaged, could be made anew from the others; but only if
//! these are a majority without it. If two of three went at once, nobody could tell any more what was acknowledged, though
//! what they threw away may have said it. So such a node asks the leader, who lets it go if a quorum in which it does not
//! count answers from then on and holds all that is committed. The node stops taking part before it asks for the last
//! time: of two that ask at once at most one finds the other among those that answer.

use std::time::{Duration, Instant};

use quorumfs_proto::NodeId;
use tracing::info;

use super::{ChangeError, MembershipChanges};

/// Who was let go has so long for itself before another is: two that stop at the same moment both find that a majority
/// is missing, and both come back for nothing.
const GOING: Duration = Duration::from_secs(20);

impl MembershipChanges {
    /// Whether `node` may give its state up, which could not be moved on beyond entry `applied`. For the leader.
    pub async fn may_renounce(&self, node: NodeId, applied: u64) -> Result<(), ChangeError> {
        self.must_lead()?;
        let mut let_go = self.renouncing.lock().await;
        let unavailable = ChangeError::Unavailable;
        let reached = self.metadata.position().index;
        if reached < applied {
            return Err(unavailable(format!(
                "no other node has applied entry {applied} either; the leader is at {reached}"
            )));
        }
        if let Some((before, at)) = *let_go
            && before != node
            && at.elapsed() < GOING
            && self.consensus.voter_sets().contains(&before)
        {
            return Err(unavailable(format!(
                "node {before} is being made anew, one at a time"
            )));
        }
        self.consensus.quorum_without(node).await.map_err(unavailable)?;
        *let_go = Some((node, Instant::now()));
        info!(%node, "a majority lives without this node: it may give its state up");
        Ok(())
    }
}
