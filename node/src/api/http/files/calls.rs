//! Calls to the cluster on behalf of HTTP requests: bounded in time.
//!
//! The client itself waits for as long as there is no leader (P6); an HTTP client wants to be told. Whoever gives up on
//! a mutation does not cancel it: it may be in the log already, and the client sees to it in the background.

use std::time::Duration;

use quorumfs_client::{Client, Cluster as _, FreshChunk};
use quorumfs_proto::limits::{DIRECTORY_ANSWER_BYTES_MAX, EXTENTS_ANSWER_MAX};
use quorumfs_proto::query::{DirectoryPage, EntryDetail, ExtentsPage, TypedQuery};
use quorumfs_proto::{Attributes, Command, FsError, InodeNumber, Name, Outcome, Query};

use super::StatusSource;
use super::error::{ApiError, CallError};

/// The cluster, as one request sees it.
#[derive(Clone)]
pub(super) struct Calls {
    pub(super) client: Client,
    pub(super) timeout: Duration,
    pub(super) status: StatusSource,
}

impl Calls {
    /// Sends `command`; `stored` are the chunks it names that were put before.
    pub(super) async fn mutate(&self, command: Command, stored: &[FreshChunk]) -> Result<Outcome, CallError> {
        match self.in_time(self.client.mutate(command, stored)).await {
            // The session ended under way, so nobody can be asked any more.
            Err(CallError::Verdict(FsError::Io)) => Err(CallError::Unavailable(
                "this node's session with the cluster ended meanwhile; it is not known whether the change took effect"
                    .to_string(),
            )),
            result => result,
        }
    }

    /// Waits for `call` no longer than the request's time-out.
    pub(super) async fn in_time<T>(
        &self,
        call: impl Future<Output = Result<T, FsError>>,
    ) -> Result<T, CallError> {
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Err(FsError::TimedOut)) | Err(_) => Err(CallError::Unavailable(self.why_unavailable())),
            Ok(result) => result.map_err(CallError::Verdict),
        }
    }

    /// What the node's status says, or at least what we saw.
    fn why_unavailable(&self) -> String {
        let status = (self.status)();
        match status.get("reason").and_then(|reason| reason.as_str()) {
            Some(reason) if !reason.is_empty() => reason.to_string(),
            _ => format!("no quorum answered within {} ms", self.timeout.as_millis()),
        }
    }

    async fn ask<A>(&self, query: TypedQuery<A>) -> Result<A, CallError> {
        self.in_time(self.client.ask(query)).await
    }

    pub(super) async fn lookup(&self, parent: InodeNumber, name: &Name) -> Result<Attributes, CallError> {
        self.ask(Query::lookup(parent, name.clone())).await
    }

    pub(super) async fn attributes(&self, inode: InodeNumber) -> Result<Attributes, CallError> {
        self.ask(Query::attributes(inode)).await
    }

    /// What lies at `path` from the root; symbolic links are not followed.
    pub(super) async fn resolve(&self, path: &[Name]) -> Result<Attributes, CallError> {
        self.ask(Query::resolve(InodeNumber::ROOT, path.to_vec())).await
    }

    pub(super) async fn read_link(&self, inode: InodeNumber) -> Result<Vec<u8>, CallError> {
        Ok(self.ask(Query::read_link(inode)).await?.as_bytes().to_vec())
    }

    /// Entries with their attributes.
    pub(super) async fn read_directory(
        &self,
        inode: InodeNumber,
        after: u64,
    ) -> Result<DirectoryPage, CallError> {
        let detail = EntryDetail::Attributes;
        self.ask(Query::read_directory(
            inode,
            after,
            DIRECTORY_ANSWER_BYTES_MAX,
            detail,
        ))
        .await
    }

    /// Where the bytes `from..to` of a file are.
    pub(super) async fn extents(
        &self,
        inode: InodeNumber,
        from: u64,
        to: u64,
    ) -> Result<ExtentsPage, CallError> {
        self.ask(Query::extents(inode, from, to, EXTENTS_ANSWER_MAX))
            .await
    }
}

/// Keeps a verdict where the caller has words of its own for it.
pub(super) fn verdict<T>(result: Result<T, CallError>) -> Result<Result<T, FsError>, ApiError> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(CallError::Verdict(verdict)) => Ok(Err(verdict)),
        Err(unavailable) => Err(unavailable.into()),
    }
}
