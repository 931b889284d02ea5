//! The client as its users see it.

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

use crate::calls::QUERIES_MAX;
use crate::chunk::FreshChunk;
use crate::chunk_reader::ChunkReader;
use crate::chunk_writer::ChunkWriter;
use crate::cluster::Cluster;
use crate::connector::{Connector, Purpose};
use crate::keep_alive::KeepAlive;
use crate::leader_link::{LeaderLink, Protocol};
use crate::mutation::{Abandoned, Mutator};
use crate::session::Sessions;

/// How long [`Client::connect`] looks for a leader where no `call_timeout` says otherwise: a mistyped address must
/// come to light, and a cluster that is just starting must be waited for.
const CONNECT_TIMEOUT_MS: u64 = 30_000;
/// How long [`Client::close`] waits for the cluster to hear of it; if it does not, the session lapses.
const CLOSE_TIMEOUT_MS: u64 = 3_000;
/// The default budget of bytes under way, each for puts and for gets: fills a fast connection, and is what a client
/// may cost in memory.
const BYTES_IN_FLIGHT_MAX: usize = 32 << 20;

/// How a client finds and uses its cluster.
#[derive(Clone, Debug)]
pub struct ClientOptions {
    /// `host:port` of some nodes, nearest first; the others are learned from them.
    pub addresses: Vec<String>,
    /// For people who look at the cluster: host, process, mount point.
    pub description: String,
    /// How long a call may take before it ends as [`FsError::TimedOut`]; `None`: as long as it must (P6).
    pub call_timeout: Option<Duration>,
    /// Mutual TLS; `None`: plain text.
    pub tls: Option<ClientTlsConfig>,
    /// Most bytes of chunks under way in either direction; at least one chunk's worth helps.
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

/// Why there is no client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// The list is empty.
    #[error("no address of a node is given")]
    NoAddress,
    /// An address cannot be one.
    #[error("{address:?} is not the host:port of a node: {reason}")]
    BadAddress {
        /// What was given.
        address: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No node led in time.
    #[error("found no leader within {} s ({problems})", .waited.as_secs())]
    NoLeader {
        /// How long it was looked for.
        waited: Duration,
        /// What the nodes said, or why they said nothing.
        problems: String,
    },
    /// The leader does not open a session.
    #[error("the cluster refuses a session: {reason}")]
    Refused {
        /// Why.
        reason: String,
    },
}

/// A client of a cluster: one session, its calls and its chunks. Cloning shares it; it ends with
/// [`Client::close`], or, unannounced, when the last clone is dropped.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
}

struct Inner {
    cluster_id: ClusterId,
    cluster: Arc<Cluster>,
    mutator: Arc<Mutator>,
    getter: ChunkReader,
    keeper: Arc<KeepAlive>,
    queries: Semaphore,
    call_timeout: Option<Duration>,
    closing: CancellationToken,
    /// Ends the background tasks with the last clone.
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
    /// Finds the leader and opens a session. Needs a tokio runtime, which then carries the client's tasks.
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
        let putter = ChunkWriter::new(cluster.clone(), options.bytes_in_flight_max);
        let tasks = &options.tasks;
        let following = (closing.clone(), cluster.clone());
        tasks.supervise_until_done("client-leader", following, |(closing, cluster)| async move {
            closing.run_until_cancelled(cluster.follow_leader()).await;
        });
        run_link("client-calls", tasks, &calls, &closing);
        run_link("client-puts", tasks, putter.link(), &closing);

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
            putter,
            sessions,
            runtime: tokio::runtime::Handle::current(),
            abandoned: Abandoned::default(),
            answering: tokio::sync::Mutex::default(),
        });
        let keeper = Arc::new(KeepAlive::new(mutator.clone()));
        let keeping = (closing.clone(), keeper.clone());
        tasks.supervise_until_done("client-keep-alive", keeping, |(closing, keeper)| async move {
            closing.run_until_cancelled(keeper.run()).await;
        });
        Ok(Client {
            inner: Arc::new(Inner {
                cluster_id,
                getter: ChunkReader::new(cluster.clone(), options.bytes_in_flight_max),
                cluster,
                mutator,
                keeper,
                queries: Semaphore::new(QUERIES_MAX),
                call_timeout: options.call_timeout,
                closing,
                _guard: guard,
            }),
        })
    }

    /// The current session.
    pub fn session(&self) -> SessionId {
        self.inner.mutator.sessions.current().session
    }

    /// Counts the sessions of this client, from 1. When it has changed, the cluster has let go of what the earlier session
    /// held: chunks that no file names, and inodes without a name.
    pub fn generation(&self) -> u64 {
        self.inner.mutator.sessions.current().generation
    }

    /// Whether the session is known to be lost and the next one is not open yet.
    pub fn session_lost(&self) -> bool {
        self.inner.mutator.sessions.current().is_lost()
    }

    /// Which cluster this is a client of.
    pub fn cluster(&self) -> ClusterId {
        self.inner.cluster_id
    }

    /// `host:port` of the leader as last found; `None` while there is none.
    pub fn leader(&self) -> Option<String> {
        let finding = self.inner.cluster.findings().borrow().clone();
        finding.address.map(|address| address.to_string())
    }

    /// How long this client alone uses the filesystem, from now, and the lease's number: what was learned under one number
    /// holds as long as that lease is held. `None`: others may change everything at any time.
    pub fn lease(&self) -> Option<(Duration, u64)> {
        self.inner.cluster.lease().held()
    }

    /// What the leader's clock shows: what this client does itself is stamped with it. Never before the stamp of a change
    /// that was answered, and never before what it was earlier.
    pub fn now(&self) -> Timestamp {
        self.inner.cluster.clock().now()
    }

    /// Whether a change whose caller was told that it timed out may still take effect.
    pub fn has_unsettled_changes(&self) -> bool {
        self.inner.mutator.abandoned.any()
    }

    /// Changes metadata, once, however often it must be sent. `stored` are the chunks it names as stored; they are put
    /// again if a new leader asks for that.
    ///
    /// Waits for a lane and while there is no leader. [`FsError::TimedOut`]: the change may have taken effect or not; that
    /// is settled in the background, before any later change of this client is sent. [`FsError::Io`]: the client is
    /// closed, or the session was lost and forgotten under way, and nobody knows. (A session that has ended is remembered
    /// for a day: what it decided is told, and what it did not is sent again under the next.) [`FsError::ChunkDead`]:
    /// nothing was done; make the chunks anew. Dropping the future is like a time-out.
    pub async fn mutate(&self, command: Command, stored: &[FreshChunk]) -> Result<Outcome, FsError> {
        self.bounded(self.inner.mutator.mutate(command, stored)).await
    }

    /// Reads metadata.
    pub async fn query(&self, query: Query) -> Result<Answer, FsError> {
        self.bounded(async {
            let permit = self.inner.queries.acquire().await;
            let _permit = permit.expect("never closed");
            match self.inner.mutator.calls.ask(&ClientRequest::Query(query)).await {
                Some(ClientResponse::Answer(answer)) => answer,
                Some(ClientResponse::Refused(Refusal::Invalid { reason })) => {
                    tracing::error!(reason, "the cluster refuses a query");
                    Err(FsError::InvalidArgument)
                }
                Some(reply) => {
                    tracing::error!(?reply, "not an answer to a query");
                    Err(FsError::Io)
                }
                None => Err(FsError::Io),
            }
        })
        .await
    }

    /// Gives `payload` an identity and checksums. Takes about a millisecond for 1 MiB.
    ///
    /// # Panics
    /// If `payload` is empty or longer than [`quorumfs_proto::limits::CHUNK_BYTES_MAX`].
    pub fn new_chunk(&self, payload: Bytes) -> FreshChunk {
        FreshChunk::new(&self.inner.mutator.sessions.current().chunks, payload)
    }

    /// Brings `chunk` to the cluster; returns when f + 1 voters have it on disk. [`FsError::NoSpace`] at once when
    /// they have no room, [`FsError::ChunkDead`] when the session it was made in is over.
    pub async fn put_chunk(&self, chunk: &FreshChunk) -> Result<(), FsError> {
        if chunk.id().session != self.session() {
            return Err(FsError::ChunkDead);
        }
        self.bounded(self.inner.mutator.putter.put(chunk)).await
    }

    /// `length` bytes of a chunk from `offset` on, verified. [`FsError::Stale`]: the nodes do not have it (any more);
    /// look the extents up again. [`FsError::Io`]: every copy is damaged.
    pub async fn get_chunk(&self, id: ChunkId, offset: u32, length: u32) -> Result<Bytes, FsError> {
        self.bounded(self.inner.getter.get(id, offset, length)).await
    }

    /// `handler` tells which of the unlinked inodes it is given are not open here, and from then on refuses cached
    /// opens of them. Without one, none is released before the session ends. It must not block.
    pub fn set_unlinked_handler(
        &self,
        handler: impl Fn(&[InodeNumber]) -> Vec<InodeNumber> + Send + Sync + 'static,
    ) {
        self.inner.keeper.set_unlinked_handler(Arc::new(handler));
    }

    /// `source` tells what this client has done so far; it is sent with every keep-alive, for the cluster's metrics. It
    /// must not block.
    pub fn set_statistics_source(&self, source: impl Fn() -> ClientStatistics + Send + Sync + 'static) {
        self.inner.keeper.set_statistics_source(Arc::new(source));
    }

    /// The current session and what proves it: for whoever ends it after this process, by [`Client::end_predecessor`].
    pub fn credential(&self) -> (SessionId, SessionSecret) {
        let epoch = self.inner.mutator.sessions.current();
        (epoch.session, epoch.secret)
    }

    /// Ends the session of a process that is known to be gone, so that what it held is free at once.
    pub async fn end_predecessor(&self, (session, secret): (SessionId, SessionSecret)) {
        let call = ClientRequest::CloseSessionWithKey { session, secret };
        match self.inner.mutator.calls.ask(&call).await {
            Some(ClientResponse::Session(_)) => {
                tracing::info!(%session, "ended the session of this one's predecessor")
            }
            // It has ended by itself.
            Some(ClientResponse::Refused(Refusal::UnknownSession)) | None => {}
            Some(reply) => {
                tracing::warn!(%session, ?reply, "could not end the session of this one's predecessor")
            }
        }
    }

    /// Ends the session, so that what it held is free at once. Calls under way and later ones end as
    /// [`FsError::Io`].
    pub async fn close(&self) {
        let session = self.session();
        let call = ClientRequest::CloseSession { session };
        let ask = self.inner.mutator.calls.ask(&call);
        match timeout(Duration::from_millis(CLOSE_TIMEOUT_MS), ask).await {
            Ok(_) => tracing::info!(%session, "closed the session"),
            Err(_) => tracing::warn!(%session, "no leader heard that the session is over; it will lapse"),
        }
        self.inner.closing.cancel();
        self.inner.getter.close();
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

/// Keeps a link alive until the client is closed, and then lets nobody wait for it.
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
