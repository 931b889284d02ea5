//! A node as its edges see it: its identity and, once it knows its cluster, its parts.
//!
//! This module does not know the edges, nor how the parts are built.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use quorumfs_proto::{ClusterId, Member};

use crate::consensus::Consensus;
use crate::integrity::audit::Auditor;
use crate::integrity::repair::Repair;
use crate::integrity::sweep::Sweeper;
use crate::leader::leases::Leases;
use crate::leader::read::ReadPath;
use crate::leader::rewrite::Rewriter;
use crate::leader::sessions::SessionTracker;
use crate::leader::write::WritePath;
use crate::membership::bootstrap::{Invitation, WaitReason};
use crate::membership::changes::MembershipChanges;
use crate::membership::identity::{DataFolder, Membership};
use crate::observe::health::HealthMonitor;
use crate::observe::metrics::Metrics;
use crate::replication::placement::Placement;
use crate::replication::recovery::Recovery;
use crate::replication::space::SpaceMonitor;
use quorumfs_content::ContentStore;
use quorumfs_metadata::MetadataStore;
use quorumfs_tasks::Tasks;

/// A node as its edges see it.
pub struct Node {
    own: Member,
    folder: DataFolder,
    waiting_for: WaitReason,
    /// The problem with its state, while it waits to be rebuilt.
    trouble: Mutex<Option<String>>,
    invitation: Invitation,
    metrics: Arc<Metrics>,
    tasks: Arc<Tasks>,
    parts: OnceLock<Parts>,
    /// Set instead of the parts if the state is lost and the log is not: the node only votes.
    log_only: OnceLock<(ClusterId, Consensus)>,
}

/// The parts of a node that knows its cluster.
pub struct Parts {
    /// The cluster's id.
    pub cluster: ClusterId,
    /// The replicated log.
    pub consensus: Consensus,
    /// The state that results from the log.
    pub metadata: Arc<MetadataStore>,
    /// The content of files.
    pub content: Arc<ContentStore>,
    /// The write path.
    pub write_path: Arc<WritePath>,
    /// Combines small extents, so that writes are not refused.
    pub rewriter: Arc<Rewriter>,
    /// The read path.
    pub read_path: Arc<ReadPath>,
    /// Fetches missing chunks.
    pub recovery: Arc<Recovery>,
    /// Verifies held chunks and replaces bad copies.
    pub repair: Arc<Repair>,
    /// Compares the metadata of all nodes.
    pub auditor: Arc<Auditor>,
    /// Frees dead chunks.
    pub sweeper: Arc<Sweeper>,
    /// Knows which nodes should hold each chunk.
    pub placement: Arc<Placement>,
    /// Knows which nodes have space.
    pub space: Arc<SpaceMonitor>,
    /// Knows which session holds the lease.
    pub leases: Leases,
    /// Adds and removes members.
    pub membership_changes: Arc<MembershipChanges>,
    /// Knows which clients are alive.
    pub sessions: Arc<SessionTracker>,
    /// Knows which nodes answer, and the state of this node's clock.
    pub health: Arc<HealthMonitor>,
}

impl Node {
    /// Makes a node that does not know its cluster yet.
    pub fn new(own: Member, folder: DataFolder, tasks: Arc<Tasks>) -> Node {
        Node {
            own,
            folder,
            waiting_for: WaitReason::default(),
            trouble: Mutex::default(),
            invitation: Invitation::default(),
            metrics: Arc::default(),
            tasks,
            parts: OnceLock::new(),
            log_only: OnceLock::new(),
        }
    }

    /// Sets the parts once the node knows its cluster: from now on its edges serve. Only the first call has an effect.
    pub fn begin(&self, parts: Parts) {
        let _ = self.parts.set(parts);
    }

    /// Sets the consensus of a node that has only its log: it votes, and its edges serve nothing else.
    pub fn begin_with_log_only(&self, cluster: ClusterId, consensus: Consensus) {
        let _ = self.log_only.set((cluster, consensus));
    }

    /// Returns the cluster and the consensus in which the node takes part, with or without its state.
    pub fn consensus(&self) -> Option<(ClusterId, &Consensus)> {
        let of_parts = self.parts().map(|parts| (parts.cluster, &parts.consensus));
        let alone = || self.log_only.get();
        of_parts.or_else(|| alone().map(|(cluster, consensus)| (*cluster, consensus)))
    }

    /// Returns a warning for the administrator of a node that is running.
    pub fn warning(&self) -> Option<String> {
        self.trouble().or_else(|| self.waiting_for.lock().clone())
    }

    /// Returns why its state is unreliable, if it is.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().clone()
    }

    /// Records that its state is unreliable from now on.
    pub fn set_trouble(&self, trouble: String) {
        *self.trouble.lock() = Some(trouble);
    }

    /// Returns its data folder.
    pub fn folder(&self) -> &DataFolder {
        &self.folder
    }

    /// Returns the reason for which the node waits.
    pub fn waiting_for(&self) -> &WaitReason {
        &self.waiting_for
    }

    /// Returns the place for a leader's message that this node was accepted.
    pub fn invitation(&self) -> &Invitation {
        &self.invitation
    }

    /// Returns this node as a member.
    pub fn own(&self) -> &Member {
        &self.own
    }

    /// Returns its metrics.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Returns its background tasks.
    pub fn tasks(&self) -> &Arc<Tasks> {
        &self.tasks
    }

    /// Returns the cluster to which this node's folder belongs.
    pub fn membership(&self) -> Option<Membership> {
        self.folder.membership()
    }

    /// Returns the parts, once the node knows its cluster and has opened its state.
    pub fn parts(&self) -> Option<&Parts> {
        self.parts.get()
    }

    /// Returns why there are no parts yet.
    pub fn not_ready(&self) -> String {
        self.warning()
            .unwrap_or_else(|| "the node is starting".to_string())
    }
}
