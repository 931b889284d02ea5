//! Access to the filesystem for HTTP requests, with a time limit.
//!
//! A mount waits while there is no leader (P6); an HTTP client needs an answer. A call whose request no longer waits
//! runs to its end in the background, so that nothing is left half done: pure waits in it are aborted, and a mutation
//! that was sent is voided, or its verdict awaited, before a later one is sent.
//!
//! Does not know HTTP.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use quorumfs_client::Client;
use quorumfs_fs::interrupt::run_interrupted;
use quorumfs_fs::{Filesystem, Handle};
use quorumfs_proto::query::DirectoryPage;
use quorumfs_proto::{Attributes, FsError, InodeNumber, Name};
use tokio::runtime;

use super::StatusSource;
use super::error::{ApiError, CallError};
use crate::to_end::ToEnd;

/// The filesystem as used by one request.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) filesystem: Arc<Filesystem<Client>>,
    pub(super) timeout: Duration,
    pub(super) status: StatusSource,
}

impl Access {
    /// Makes a call and waits for it, at most for the time-out of the request.
    pub(super) async fn call<T, Work>(
        &self,
        call: impl FnOnce(Arc<Filesystem<Client>>) -> Work,
    ) -> Result<T, CallError>
    where
        Work: Future<Output = Result<T, FsError>> + Send + 'static,
        T: 'static,
    {
        let call = call(Arc::clone(&self.filesystem));
        let call = ToEnd::with(call, |mut call| {
            Box::pin(async move { run_interrupted(Pin::new(&mut call)).await })
        });
        match tokio::time::timeout(self.timeout, call).await {
            Ok(Err(FsError::TimedOut)) | Err(_) => Err(CallError::Unavailable(self.unavailable_reason())),
            Ok(result) => result.map_err(CallError::Verdict),
        }
    }

    /// Like [`Access::call`], for a call that changes the filesystem.
    pub(super) async fn change<T, Work>(
        &self,
        call: impl FnOnce(Arc<Filesystem<Client>>) -> Work,
    ) -> Result<T, CallError>
    where
        Work: Future<Output = Result<T, FsError>> + Send + 'static,
        T: 'static,
    {
        match self.call(call).await {
            // The session ended during the call, so the cluster cannot report the outcome.
            Err(CallError::Verdict(FsError::Io)) => Err(CallError::Unavailable(
                "the session of this node ended during the request; it is unknown whether the change took effect"
                    .to_string(),
            )),
            result => result,
        }
    }

    /// Returns the reason in the status of the node, or else the time-out.
    fn unavailable_reason(&self) -> String {
        let status = (self.status)();
        match status.get("reason").and_then(|reason| reason.as_str()) {
            Some(reason) if !reason.is_empty() => reason.to_string(),
            _ => format!("no quorum answered in {} ms", self.timeout.as_millis()),
        }
    }

    pub(super) async fn lookup(&self, parent: InodeNumber, name: &Name) -> Result<Attributes, CallError> {
        let name = name.clone();
        self.call(|filesystem| async move { filesystem.lookup(parent, name.as_bytes()).await })
            .await
    }

    pub(super) async fn attributes(&self, inode: InodeNumber) -> Result<Attributes, CallError> {
        self.call(|filesystem| async move { filesystem.attributes(inode, None).await })
            .await
    }

    /// Returns the attributes of the inode at `path` from the root; symbolic links are not followed.
    pub(super) async fn resolve(&self, path: &[Name]) -> Result<Attributes, CallError> {
        let path = path.to_vec();
        self.call(|filesystem| async move { filesystem.resolve(&path).await })
            .await
    }

    pub(super) async fn read_link(&self, inode: InodeNumber) -> Result<Vec<u8>, CallError> {
        self.call(|filesystem| async move { filesystem.read_link(inode).await })
            .await
            .map(|target| target.as_bytes().to_vec())
    }

    /// Returns entries with their attributes, after the cookie `after`.
    pub(super) async fn list_directory(
        &self,
        inode: InodeNumber,
        after: u64,
    ) -> Result<DirectoryPage, CallError> {
        self.call(|filesystem| async move { filesystem.list_directory(inode, after).await })
            .await
    }
}

/// An open file. Dropping it closes the file and discards writes that were not committed.
pub(super) struct OpenFile {
    filesystem: Arc<Filesystem<Client>>,
    pub(super) handle: Handle,
}

impl OpenFile {
    pub(super) fn new(filesystem: Arc<Filesystem<Client>>, handle: Handle) -> OpenFile {
        OpenFile { filesystem, handle }
    }

    /// Returns why written bytes were lost, if they were.
    pub(super) fn failure(&self) -> Result<(), FsError> {
        self.filesystem.failure(self.handle)
    }

    /// Returns the last known attributes.
    pub(super) fn attributes(&self) -> Result<Attributes, FsError> {
        self.filesystem.known_attributes(self.handle)
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        if let Ok(runtime) = runtime::Handle::try_current() {
            let (filesystem, handle) = (Arc::clone(&self.filesystem), self.handle);
            runtime.spawn(async move {
                if let Err(error) = filesystem.discard(handle).await {
                    tracing::error!(%error, "cannot close a file of an HTTP request");
                }
            });
        }
    }
}

/// Separates verdicts, which the caller handles, from unavailability.
pub(super) fn verdict<T>(result: Result<T, CallError>) -> Result<Result<T, FsError>, ApiError> {
    match result {
        Ok(value) => Ok(Ok(value)),
        Err(CallError::Verdict(verdict)) => Ok(Err(verdict)),
        Err(unavailable) => Err(unavailable.into()),
    }
}
