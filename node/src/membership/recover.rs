//! The last resort: a cluster that has lost its majority for good is continued from one node, by hand.
//!
//! The state of that node becomes the agreed state. It is a new cluster: nodes of the old one that come back do not mix
//! with it (each request names its cluster), and those that wait to be rebuilt may give up their state for it.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use quorumfs_proto::{ClusterId, Member};
use quorumfs_wire as wire;

use super::identity::DataFolder;
use crate::config::Config;
use crate::consensus::{ConsensusOptions, Remains};
use crate::transport::{Purpose, TlsFiles, Transport};
use quorumfs_metadata::{MetadataOptions, MetadataStore};

/// Most time for a member to answer about its state.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(2_000);
/// Bytes of metadata checked per step.
const CHECK_BYTES: u64 = 16 << 20;

/// Whether changes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// Only report what would be done.
    Look,
    /// The administrator accepts that changes may be missing.
    AcceptLoss,
}

/// Examines the node of `config`, which must be down, and, with consent, creates a cluster of it alone. Returns a
/// report for people.
///
/// # Errors
/// Refused if a majority is alive, or if the node's log or metadata are not intact.
pub async fn recover(
    config: &Config,
    log_folder: &str,
    metadata_file: &str,
    consent: Consent,
) -> anyhow::Result<String> {
    let folder = DataFolder::open(&config.data, config.slot)?;
    let membership = folder.membership().context(
        "this data folder belongs to no cluster yet, so there is nothing to recover. Choose the node with the \
         newest last entry",
    )?;
    let own = Member {
        id: folder.id(),
        addresses: quorumfs_proto::Addresses {
            grpc: config.grpc.clone(),
            http: config.http.clone(),
        },
    };
    let path = config.data.join(metadata_file);
    ensure!(
        path.exists(),
        "the metadata are gone ({}): do not continue from this node",
        path.display()
    );
    let metadata = tokio::task::spawn_blocking(move || open_whole(&path)).await??;
    let mut options = ConsensusOptions::new(own.id, membership.cluster, config.data.join(log_folder));
    options.had_log = folder.took_part();
    let remains = Remains::open(&options, &metadata)
        .await
        .context("do not continue from this node")?;

    let mut report = String::new();
    let (term, index) = remains.last.unwrap_or_default();
    writeln!(
        report,
        "node {} of cluster {}: last entry {index} of term {term}, applied on disk up to {}",
        own.id, membership.cluster, remains.applied
    )?;
    if let Some(index) = folder.contradicted_at() {
        writeln!(
            report,
            "A majority found that its metadata at entry {index} differ from the agreed state: choose another node if one is \
             left. If none is, what this one has counts from then on, right or wrong."
        )?;
    }
    let transport = Transport::new(
        config
            .tls
            .as_ref()
            .map(TlsFiles::client_config)
            .transpose()
            .context("cannot read the TLS files")?,
    );
    let mut living = Vec::new();
    for other in remains.members.iter().filter(|other| other.id != own.id) {
        let said = ask(&transport, other, membership.cluster).await;
        writeln!(
            report,
            "  {} at {}: {}",
            other.id,
            other.addresses.grpc,
            match &said {
                Ok(()) => "is alive, and reports no problem with its state",
                Err(reason) => reason,
            }
        )?;
        if said.is_ok() {
            living.push(other.id);
        }
    }
    for voters in &remains.voters {
        let with_own = living.iter().chain([&own.id]);
        let count = with_own.filter(|id| voters.contains(id)).count();
        if count > voters.len() / 2 {
            bail!(
                "{report}{count} of {} voters are alive with this node, a majority: nothing is lost, start it as usual",
                voters.len()
            );
        }
    }
    writeln!(
        report,
        "What may be missing after this: every change that was acknowledged after entry {index}, by voters that are lost; \
         and content that none of the nodes that join later has kept. Of the nodes that are left, the one with the \
         highest term, and of these the one with the highest entry, has the most: ask each."
    )?;
    if consent == Consent::Look {
        writeln!(
            report,
            "Nothing was changed. With --accept-loss this node becomes a cluster of one."
        )?;
        return Ok(report);
    }
    drop(metadata);
    let cluster = ClusterId(rand::random());
    // First: if it were last, a crash in between would leave a node that alone decides for the old cluster.
    folder.replace(cluster)?;
    remains.make_only_voter(&own).await?;
    writeln!(
        report,
        "This node is cluster {cluster} now, and its only voter. Start it as usual. Nodes that wait to be rebuilt join \
         by themselves; give the others empty data folders. Mounts must be mounted anew."
    )?;
    Ok(report)
}

/// Opens the metadata, if all of it is intact.
fn open_whole(path: &std::path::Path) -> anyhow::Result<MetadataStore> {
    let metadata =
        MetadataStore::open(path, MetadataOptions::default()).context("do not continue from this node")?;
    let mut from = None;
    loop {
        let read = metadata.check(from, CHECK_BYTES);
        from = read.context("do not continue from this node")?.next;
        if from.is_none() {
            return Ok(metadata);
        }
    }
}

/// Checks that `member` is alive with the same incarnation in the same cluster, and reports no problem with its state.
///
/// # Errors
/// The reason if not.
async fn ask(transport: &Transport, member: &Member, cluster: ClusterId) -> Result<(), String> {
    let ask = async {
        let mut peer = transport
            .peer_at(&member.addresses.grpc, Purpose::Control)
            .map_err(|error| error.to_string())?;
        let answer = peer.hello(wire::HelloRequest::default()).await;
        let answer = answer
            .map_err(|status| format!("does not answer ({})", status.message()))?
            .into_inner();
        let found = answer.node.and_then(|node| Member::try_from(node).ok());
        if found.map(|found| found.id) != Some(member.id) {
            return Err("another incarnation is there: this one is lost".to_string());
        }
        if ClusterId::from_bytes(&answer.cluster_id) != Some(cluster) {
            return Err("it belongs to another cluster".to_string());
        }
        match answer.trouble.is_empty() {
            true => Ok(()),
            false => Err(format!("its state is unreliable ({})", answer.trouble)),
        }
    };
    let asked = tokio::time::timeout(ANSWER_TIMEOUT, ask).await;
    asked.unwrap_or_else(|_| Err("does not answer".to_string()))
}
