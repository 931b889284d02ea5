//! The public client.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quorumfs_proto::statistics::ClientStatistics;
use quorumfs_proto::{
    Answer, ChunkId, ClientRequest, ClientResponse, ClusterId, Command, FsError, InodeNumber, Outcome, Query,
    Refusal, SessionId, SessionSecret, Timestamp,
};
use quorumfs_tasks::Tasks;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::transport::ClientTlsConfig;

use crate::calls::{QUERIES_MAX, describe_reply};
use crate::chunk::FreshChunk;
use crate::chunk_reader::ChunkReader;
use crate::chunk_writer::ChunkWriter;
use crate::cluster::Cluster;
use crate::connector::{Connector, Purpose};
use crate::keep_alive::KeepAlive;
use crate::leader_link::{LeaderLink, Protocol};
use crate::mutation::{Abandoned, Mutator};
use crate::session::Sessions;

/// Time for which [`Client::connect`] looks for a leader if no `call_timeout` is set: long enough for a cluster that
/// is starting, short enough to report a mistyped address.
const CONNECT_TIMEOUT_MS: u64 = 30_000;
/// Time for which [`Client::close`] waits for the cluster. If it does not answer, the session expires by itself.
const CLOSE_TIMEOUT_MS: u64 = 3_000;
/// Default budget of bytes in flight, separate for puts and gets: enough to fill a fast connection, and an upper bound
/// of memory use.
const BYTES_IN_FLIGHT_MAX: usize = 32 << 20;

/// How a client connects to its cluster.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// `host:port` of some nodes, nearest first; the client learns the others from them.
    pub addresses: Vec<String>,
    /// Description for administrators: host, process, mount point.
    pub description: String,
    /// Longest time of a call, after which it fails with [`FsError::TimedOut`]; `None` means no limit (P6).
    pub call_timeout: Option<Duration>,
    /// Mutual TLS; `None` means plain text.
    pub tls: Option<ClientTlsConfig>,
    /// Most bytes of chunks in flight in each direction, clamped to 32 KiB to 256 MiB; less than one chunk (1 MiB) is
    /// slow.
    pub bytes_in_flight_max: usize,
    /// The client's background tasks run under it.
    pub tasks: Arc<Tasks>,
}

impl Default for ClientOptions {
    fn default() -> ClientOptions {
        ClientOptions {
            addresses: Vec::new(),
            description: String::new(),
            call_timeout: None,
            tls: None,
            bytes_in_flight_max: BYTES_IN_FLIGHT_MAX,
            tasks: Arc::default(),
        }
    }
}

/// Why [`Client::connect`] failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The list of addresses is empty.
    #[error("no node address is given")]
    NoAddress,
    /// An address is malformed.
    #[error("invalid node address '{address}', expected host:port: {reason}")]
    BadAddress {
        /// The address as given.
        address: String,
        /// What is wrong with the address.
        reason: String,
    },
    /// No leader was found in time.
    #[error("found no leader within {} s ({problems})", .waited.as_secs())]
    NoLeader {
        /// Time spent looking for a leader.
        waited: Duration,
        /// The state of each node: its answer, or why it did not answer.
        problems: String,
    },
    /// The leader refused to open a session.
    #[error("the cluster refused to open a session: {reason}")]
    Refused {
        /// The reason that the leader gave.
        reason: String,
    },
}

/// A client of a cluster: one session, its calls and its chunks. Clones share it. It ends with [`Client::close`], or
/// when the last clone is dropped; the session then expires in the cluster.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    cluster_id: ClusterId,
    cluster: Arc<Cluster>,
    mutator: Arc<Mutator>,
    chunk_reader: ChunkReader,
    keep_alive: Arc<KeepAlive>,
    queries: Semaphore,
    call_timeout: Option<Duration>,
    closing: CancellationToken,
    /// Ends the background tasks when the last clone is dropped.
    _guard: DropGuard,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("cluster", &self.inner.cluster_id)
            .field("session", &self.session())
            .finish_non_exhaustive()
    }
}

impl Client {
    /// Finds the leader and opens a session. Must be called in a tokio runtime, which runs the client's tasks.
    ///
    /// # Errors
    /// A [`ConnectError`].
    pub async fn connect(options: ClientOptions) -> Result<Client, ConnectError> {
        if options.addresses.is_empty() {
            return Err(ConnectError::NoAddress);
        }
        let connector = Connector::new(options.tls);
        for address in &options.addresses {
            if let Err(error) = connector.client(address, Purpose::Calls) {
                return Err(ConnectError::BadAddress {
                    address: address.clone(),
                    reason: error.to_string(),
                });
            }
        }
        let closing = CancellationToken::new();
        let guard = closing.clone().drop_guard();
        let cluster = Cluster::new(options.addresses, connector);
        let calls = LeaderLink::new(cluster.clone());
        let chunk_writer = ChunkWriter::new(cluster.clone(), options.bytes_in_flight_max);
        let tasks = &options.tasks;
        let following = (closing.clone(), cluster.clone());
        tasks.supervise_until_done("client-leader", following, |(closing, cluster)| async move {
            closing.run_until_cancelled(cluster.follow_leader()).await;
        });
        run_link("client-calls", tasks, &calls, &closing);
        run_link("client-puts", tasks, chunk_writer.link(), &closing);

        let limit = options
            .call_timeout
            .unwrap_or(Duration::from_millis(CONNECT_TIMEOUT_MS));
        let no_leader = || ConnectError::NoLeader {
            waited: limit,
            problems: cluster.problems(),
        };
        let sessions = timeout(limit, Sessions::open(&calls, options.description))
            .await
            .map_err(|_| no_leader())?
            .map_err(|reason| ConnectError::Refused {
                reason: reason.unwrap_or_else(|| String::from("the client was closed")),
            })?;
        let cluster_id = cluster.id().ok_or_else(no_leader)?;
        let mutator = Arc::new(Mutator {
            calls,
            chunk_writer,
            sessions,
            runtime: tokio::runtime::Handle::current(),
            abandoned: Abandoned::default(),
            unlinked_answer: tokio::sync::Mutex::default(),
        });
        let keep_alive = Arc::new(KeepAlive::new(mutator.clone()));
        let keeping = (closing.clone(), keep_alive.clone());
        tasks.supervise_until_done("client-keep-alive", keeping, |(closing, keep_alive)| async move {
            closing.run_until_cancelled(keep_alive.run()).await;
        });
        Ok(Client {
            inner: Arc::new(Inner {
                cluster_id,
                chunk_reader: ChunkReader::new(cluster.clone(), options.bytes_in_flight_max),
                cluster,
                mutator,
                keep_alive,
                queries: Semaphore::new(QUERIES_MAX),
                call_timeout: options.call_timeout,
                closing,
                _guard: guard,
            }),
        })
    }

    /// Returns the id of the current session.
    pub fn session(&self) -> SessionId {
        self.inner.mutator.sessions.current().session
    }

    /// Returns the number of sessions of this client so far, starting at 1. When it changes, the cluster has released
    /// what the earlier session held: chunks that no file refers to, and unlinked inodes.
    pub fn generation(&self) -> u64 {
        self.inner.mutator.sessions.current().generation
    }

    /// Whether the session was lost and the next one is not open yet.
    pub fn session_lost(&self) -> bool {
        self.inner.mutator.sessions.current().is_lost()
    }

    /// Returns the id of the cluster.
    pub fn cluster(&self) -> ClusterId {
        self.inner.cluster_id
    }

    /// Returns `host:port` of the last known leader; `None` while there is none.
    pub fn leader(&self) -> Option<String> {
        let view = self.inner.cluster.watch_leader().borrow().clone();
        view.address.map(|address| address.to_string())
    }

    /// Returns the remaining time of exclusive use of the filesystem, and the number of the lease. Cached state that
    /// was read under a lease number is valid while a lease with this number is held. `None` if the client holds no
    /// lease: others may change everything at any time.
    pub fn lease(&self) -> Option<(Duration, u64)> {
        self.inner.cluster.lease().held()
    }

    /// Returns the time of the leader's clock, for changes that this client stamps itself. It is never before the
    /// stamp of an acknowledged change, and it never decreases.
    pub fn now(&self) -> Timestamp {
        self.inner.cluster.clock().now()
    }

    /// Whether a mutation that ended with a time-out may still take effect.
    pub fn has_unsettled_changes(&self) -> bool {
        self.inner.mutator.abandoned.any()
    }

    /// Applies `command` once, however often it is sent. `stored` are the chunks that it names as stored; they are put
    /// again if a new leader asks for them. Waits for a lane, and for a leader.
    ///
    /// Dropping the future has the same effect as a time-out.
    ///
    /// # Errors
    /// The verdict of the cluster, or one of these:
    /// - [`FsError::TimedOut`]: the outcome is unknown. The mutation is voided in the background before a later one of
    ///   this client is sent.
    /// - [`FsError::Io`]: the client is closed, or the cluster no longer knows the session, so the outcome is unknown.
    ///   (The cluster remembers an ended session for a day: it reports what the session decided, and what it did not
    ///   decide is sent again under the next session.)
    /// - [`FsError::ChunkDead`]: nothing was changed, because the chunks belong to an earlier session; create them
    ///   again.
    pub async fn mutate(&self, command: Command, stored: &[FreshChunk]) -> Result<Outcome, FsError> {
        self.bounded(self.inner.mutator.mutate(command, stored)).await
    }

    /// Reads metadata that includes every change acknowledged before (P5).
    ///
    /// # Errors
    /// The verdict on the query; [`FsError::TimedOut`], or [`FsError::Io`] if the client is closed.
    pub async fn query(&self, query: Query) -> Result<Answer, FsError> {
        self.bounded(async {
            let permit = self.inner.queries.acquire().await;
            let _permit = permit.expect("never closed");
            match self
                .inner
                .mutator
                .calls
                .execute(&ClientRequest::Query(query))
                .await
            {
                Some(ClientResponse::Answer(answer)) => answer,
                Some(ClientResponse::Refused(Refusal::Invalid { reason })) => {
                    tracing::error!(reason, "the cluster refused a query as invalid");
                    Err(FsError::InvalidArgument)
                }
                Some(reply) => {
                    tracing::error!(reply = describe_reply(&reply), "unexpected reply to a query");
                    Err(FsError::Io)
                }
                None => Err(FsError::Io),
            }
        })
        .await
    }

    /// Assigns a chunk id to `payload`, of 1 to [`quorumfs_proto::limits::CHUNK_BYTES_MAX`] bytes, and computes its
    /// checksums. Takes about a millisecond for 1 MiB.
    ///
    /// # Panics
    /// If `payload` is empty or longer than [`quorumfs_proto::limits::CHUNK_BYTES_MAX`].
    pub fn new_chunk(&self, payload: Bytes) -> FreshChunk {
        FreshChunk::new(&self.inner.mutator.sessions.current().chunks, payload)
    }

    /// Stores `chunk` in the cluster; returns when f + 1 voters have it on disk.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] at once if they have no space, [`FsError::ChunkDead`] if the session of the chunk has
    /// ended, [`FsError::TimedOut`], or [`FsError::Io`] if the client is closed.
    pub async fn put_chunk(&self, chunk: &FreshChunk) -> Result<(), FsError> {
        if chunk.id().session != self.session() {
            return Err(FsError::ChunkDead);
        }
        self.bounded(self.inner.mutator.chunk_writer.put(chunk)).await
    }

    /// Returns `length` bytes of a chunk from `offset` on, verified.
    ///
    /// # Errors
    /// [`FsError::Stale`] if the nodes do not have the chunk (any more): look up the extents again. [`FsError::Io`] if
    /// all copies are damaged. [`FsError::InvalidArgument`] if the range is out of bounds. [`FsError::TimedOut`].
    pub async fn get_chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        self.bounded(self.inner.chunk_reader.get(id, offset, length))
            .await
    }

    /// Sets the handler of questions about unlinked inodes. It gets unlinked inodes, returns those that this client
    /// does not have open, and from then on refuses to open them from a cache. Without a handler, unlinked inodes are
    /// released when the session ends. It must not block.
    pub fn set_unlinked_handler(
        &self,
        handler: impl Fn(&[InodeNumber]) -> Vec<InodeNumber> + Send + Sync + 'static,
    ) {
        self.inner.keep_alive.set_unlinked_handler(Arc::new(handler));
    }

    /// Sets the source of this client's statistics, which are sent with every keep-alive for the metrics of the
    /// cluster. It must not block.
    pub fn set_statistics_source(&self, source: impl Fn() -> ClientStatistics + Send + Sync + 'static) {
        self.inner.keep_alive.set_statistics_source(Arc::new(source));
    }

    /// Returns the current session and its secret, with which a later process can end it
    /// ([`Client::end_predecessor`]).
    pub fn credential(&self) -> (SessionId, SessionSecret) {
        let epoch = self.inner.mutator.sessions.current();
        (epoch.session, epoch.secret)
    }

    /// Ends the session of a process that is known to have ended, so that what the session held is released at once.
    pub async fn end_predecessor(&self, (session, secret): (SessionId, SessionSecret)) {
        let call = ClientRequest::CloseSessionWithKey { session, secret };
        match self.inner.mutator.calls.execute(&call).await {
            Some(ClientResponse::Session(_)) => {
                tracing::info!(%session, "ended the session of the previous process")
            }
            // The session has already ended.
            Some(ClientResponse::Refused(Refusal::UnknownSession)) | None => {}
            Some(reply) => {
                let reply = describe_reply(&reply);
                tracing::warn!(%session, reply, "could not end the session of the previous process; it expires by itself")
            }
        }
    }

    /// Ends the session, so that what it held is released at once. Pending and later calls fail with [`FsError::Io`].
    pub async fn close(&self) {
        let session = self.session();
        let call = ClientRequest::CloseSession { session };
        let ask = self.inner.mutator.calls.execute(&call);
        match timeout(Duration::from_millis(CLOSE_TIMEOUT_MS), ask).await {
            Ok(_) => tracing::info!(%session, "closed the session"),
            Err(_) => tracing::warn!(%session, "no leader answered to end the session; it expires by itself"),
        }
        self.inner.closing.cancel();
        self.inner.chunk_reader.close();
    }

    async fn bounded<T>(&self, work: impl Future<Output = Result<T, FsError>>) -> Result<T, FsError> {
        let open = self.inner.closing.run_until_cancelled(work);
        let done = match self.inner.call_timeout {
            None => open.await,
            Some(limit) => match timeout(limit, open).await {
                Ok(done) => done,
                Err(_) => return Err(FsError::TimedOut),
            },
        };
        done.unwrap_or(Err(FsError::Io))
    }
}

/// Runs `link` as the task `name` until the client is closed; then ends its pending calls.
fn run_link<P: Protocol>(
    name: &'static str,
    tasks: &Arc<Tasks>,
    link: &LeaderLink<P>,
    closing: &CancellationToken,
) {
    let part = (link.clone(), closing.clone());
    tasks.supervise_until_done(name, part, |(link, closing)| async move {
        closing.run_until_cancelled(link.clone().run()).await;
        link.close();
    });
}
