//! A node as its edges see it: who it is and, once it knows its cluster, what it is made of.
//!
//! Knows nothing of the edges, nor of how the parts are built.

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use quorumfs_proto::{ClusterId, Member};

use crate::consensus::Consensus;
use crate::integrity::audit::Auditor;
use crate::integrity::repair::Repair;
use crate::integrity::sweep::Sweeper;
use crate::leader::leases::Leases;
use crate::leader::read::Reader;
use crate::leader::rewrite::Rewriter;
use crate::leader::sessions::SessionKeeper;
use crate::leader::write::Writer;
use crate::membership::bootstrap::{Invitation, WaitReason};
use crate::membership::changes::MembershipChanges;
use crate::membership::identity::{DataFolder, Membership};
use crate::observe::health::HealthMonitor;
use crate::observe::metrics::Metrics;
use crate::replication::placement::Placement;
use crate::replication::recovery::Recovery;
use crate::replication::space::SpaceMonitor;
use crate::tasks::Tasks;
use quorumfs_content::ContentStore;
use quorumfs_metadata::MetadataStore;

/// A node as its edges see it.
pub struct Node {
    own: Member,
    folder: DataFolder,
    waiting_for: WaitReason,
    /// What is wrong with it, while it waits to be made anew.
    trouble: Mutex<Option<String>>,
    invitation: Invitation,
    metrics: Arc<Metrics>,
    tasks: Arc<Tasks>,
    parts: OnceLock<Parts>,
    /// In the place of the parts, where the state is lost and the log is not: it votes.
    log_only: OnceLock<(ClusterId, Consensus)>,
}

/// What a node is made of, once it knows its cluster.
pub struct Parts {
    /// The cluster's name.
    pub cluster: ClusterId,
    /// The replicated log.
    pub consensus: Consensus,
    /// The state the log builds.
    pub metadata: Arc<MetadataStore>,
    /// The bytes of files.
    pub content: Arc<ContentStore>,
    /// The write path.
    pub writer: Arc<Writer>,
    /// Puts small extents together, so that there is room for writes.
    pub rewriter: Arc<Rewriter>,
    /// The read path.
    pub reader: Arc<Reader>,
    /// Fetches what is missing.
    pub recovery: Arc<Recovery>,
    /// Verifies what is held and makes bad copies anew.
    pub repair: Arc<Repair>,
    /// Compares the metadata of all nodes.
    pub auditor: Arc<Auditor>,
    /// Frees what is dead.
    pub sweeper: Arc<Sweeper>,
    /// Knows who holds what.
    pub placement: Arc<Placement>,
    /// Knows who has room.
    pub space: Arc<SpaceMonitor>,
    /// Knows who may answer from what it knows.
    pub leases: Leases,
    /// Takes members in and out.
    pub roster: Arc<MembershipChanges>,
    /// Knows which clients live.
    pub sessions: Arc<SessionKeeper>,
    /// Knows who answers, and how this node's clock is.
    pub health: Arc<HealthMonitor>,
}

impl Node {
    /// A node that does not know its cluster yet.
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

    /// The node knows its cluster: from now on its edges serve. Only the first call counts.
    pub fn begin(&self, parts: Parts) {
        let _ = self.parts.set(parts);
    }

    /// The node has nothing but its log: it takes part in the consensus of its cluster, and its edges serve nothing else.
    pub fn begin_with_log_only(&self, cluster: ClusterId, consensus: Consensus) {
        let _ = self.log_only.set((cluster, consensus));
    }

    /// The part that it takes in the consensus of its cluster, with its state or without.
    pub fn consensus(&self) -> Option<(ClusterId, &Consensus)> {
        let of_parts = self.parts().map(|parts| (parts.cluster, &parts.consensus));
        let alone = || self.log_only.get();
        of_parts.or_else(|| alone().map(|(cluster, consensus)| (*cluster, consensus)))
    }

    /// What its administrator should know although it has begun.
    pub fn warning(&self) -> Option<String> {
        self.trouble().or_else(|| self.waiting_for.lock().clone())
    }

    /// What is wrong with its state, if it cannot be relied on.
    pub fn trouble(&self) -> Option<String> {
        self.trouble.lock().clone()
    }

    /// Its state cannot be relied on from now on.
    pub fn set_trouble(&self, trouble: String) {
        *self.trouble.lock() = Some(trouble);
    }

    /// Its data folder.
    pub fn folder(&self) -> &DataFolder {
        &self.folder
    }

    /// Where it is noted what the node waits for.
    pub fn waiting_for(&self) -> &WaitReason {
        &self.waiting_for
    }

    /// Where a leader's word that this node was taken in is left.
    pub fn invitation(&self) -> &Invitation {
        &self.invitation
    }

    /// Who this node is.
    pub fn own(&self) -> &Member {
        &self.own
    }

    /// What it does, counted.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Its loops.
    pub fn tasks(&self) -> &Arc<Tasks> {
        &self.tasks
    }

    /// The cluster this node's folder belongs to.
    pub fn membership(&self) -> Option<Membership> {
        self.folder.membership()
    }

    /// The parts, once the node knows its cluster and has opened its state.
    pub fn parts(&self) -> Option<&Parts> {
        self.parts.get()
    }

    /// Why there are no parts yet, in words.
    pub fn not_ready(&self) -> String {
        self.warning()
            .unwrap_or_else(|| "the node is starting".to_string())
    }
}
