//! Connections to the other nodes.
//!
//! There is one connection for each purpose, because a connection shares one flow-control window and one driver task: a
//! gigabyte of chunks must not delay a heartbeat. Connections are made on first use and reconnect automatically.
//!
//! This module does not know the messages.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use parking_lot::Mutex;
use quorumfs_proto::limits::MESSAGE_BYTES_MAX;
use quorumfs_proto::{Addresses, ClusterId, Member, NodeId, Sha256};
use quorumfs_wire::peer_client::PeerClient;
use subtle::ConstantTimeEq as _;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

/// The metadata key of the cluster in every request between nodes.
pub const CLUSTER_KEY: &str = "quorumfs-cluster";

/// The metadata key of the node that a request is for, used if the answer counts as that node's: a wiped node has
/// another incarnation at the same address. Without it nothing is compared.
pub const NODE_KEY: &str = "quorumfs-node";

/// Most time for a connection attempt; after that the node is unreachable.
const CONNECT_TIMEOUT_MS: u64 = 1_000;
/// Windows for bulk transfer: with the defaults 1 MiB messages reach half the throughput (measured).
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;

/// The purpose of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// Messages of the consensus.
    Raft,
    /// Small requests and their responses.
    Control,
    /// Chunks and snapshots.
    Bulk,
}

/// The files for mutual TLS, in PEM format.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authority that signs the certificates of nodes and clients.
    pub authority: PathBuf,
    /// This program's certificate.
    pub certificate: PathBuf,
    /// The private key of the certificate.
    pub key: PathBuf,
}

impl TlsFiles {
    /// Reads the files for the client's side of a connection.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn client_config(&self) -> std::io::Result<ClientTlsConfig> {
        Ok(ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(std::fs::read(&self.authority)?))
            .identity(Identity::from_pem(
                std::fs::read(&self.certificate)?,
                std::fs::read(&self.key)?,
            )))
    }
}

/// A client of a peer that adds the cluster's id to every request.
pub type Peer = PeerClient<InterceptedService<Channel, AddressHeaders>>;

/// Adds [`CLUSTER_KEY`] and [`NODE_KEY`] to requests.
#[derive(Clone, Debug)]
pub struct AddressHeaders {
    cluster: Option<MetadataValue<Ascii>>,
    node: Option<MetadataValue<Ascii>>,
}

impl Interceptor for AddressHeaders {
    fn call(&mut self, mut request: tonic::Request<()>) -> Result<tonic::Request<()>, tonic::Status> {
        for (key, value) in [(CLUSTER_KEY, &self.cluster), (NODE_KEY, &self.node)] {
            if let Some(value) = value {
                request.metadata_mut().insert(key, value.clone());
            }
        }
        Ok(request)
    }
}

/// The connections of this node to other nodes.
#[derive(Debug)]
pub struct Transport {
    tls: Option<ClientTlsConfig>,
    cluster: Mutex<Option<ClusterId>>,
    channels: Mutex<HashMap<(String, Purpose), Channel>>,
}

impl Transport {
    /// Makes a transport without connections.
    pub fn new(tls: Option<ClientTlsConfig>) -> Transport {
        Transport {
            tls,
            cluster: Mutex::new(None),
            channels: Mutex::new(HashMap::new()),
        }
    }

    /// From now on requests carry the id of `cluster`.
    pub fn set_cluster(&self, cluster: ClusterId) {
        *self.cluster.lock() = Some(cluster);
    }

    /// Returns a client of `member`; another node at its address refuses its requests.
    ///
    /// # Errors
    /// If the address is not valid.
    pub fn member(&self, member: &Member, purpose: Purpose) -> Result<Peer, tonic::transport::Error> {
        self.client(&member.addresses.grpc, Some(member.id), purpose)
    }

    /// Returns a client of the node at `addresses`.
    ///
    /// # Errors
    /// If an address is not valid.
    pub fn peer(&self, addresses: &Addresses, purpose: Purpose) -> Result<Peer, tonic::transport::Error> {
        self.peer_at(&addresses.grpc, purpose)
    }

    /// Like [`Transport::peer`], for a `host:port` of which no more is known.
    pub fn peer_at(&self, address: &str, purpose: Purpose) -> Result<Peer, tonic::transport::Error> {
        self.client(address, None, purpose)
    }

    fn client(
        &self,
        address: &str,
        node: Option<NodeId>,
        purpose: Purpose,
    ) -> Result<Peer, tonic::transport::Error> {
        let channel = self.channel(address, purpose)?;
        let header = |text: String| {
            text.parse()
                .expect("hexadecimal digits and an @ are a header value")
        };
        let headers = AddressHeaders {
            cluster: self.cluster.lock().map(|id| header(id.to_string())),
            node: node.map(|id| header(id.to_string())),
        };
        Ok(PeerClient::with_interceptor(channel, headers)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }

    fn channel(&self, address: &str, purpose: Purpose) -> Result<Channel, tonic::transport::Error> {
        let mut channels = self.channels.lock();
        let key = (address.to_string(), purpose);
        if let Some(channel) = channels.get(&key) {
            return Ok(channel.clone());
        }
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?
            .connect_timeout(Duration::from_millis(CONNECT_TIMEOUT_MS))
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(2))
            .keep_alive_timeout(Duration::from_secs(4))
            .keep_alive_while_idle(true);
        if purpose == Purpose::Bulk {
            endpoint = endpoint
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES);
        }
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.clone())?;
        }
        let channel = endpoint.connect_lazy();
        channels.insert(key, channel.clone());
        Ok(channel)
    }
}

/// The secret of the internal endpoints of REST: the content of a file that every node is given.
#[derive(Clone)]
pub struct ClusterSecret(Sha256);

impl ClusterSecret {
    /// Least number of bytes; a shorter secret can be guessed.
    pub const BYTES_MIN: usize = 16;

    /// Makes a secret of the content of a file, without surrounding white space; `None` if it is too short.
    pub fn new(content: &[u8]) -> Option<ClusterSecret> {
        let content = content.trim_ascii();
        (content.len() >= ClusterSecret::BYTES_MIN).then(|| ClusterSecret(Sha256::of(content)))
    }

    /// Whether `shown` is the secret, compared in constant time.
    pub fn is(&self, shown: &[u8]) -> bool {
        self.0.0.ct_eq(&Sha256::of(shown).0).into()
    }
}

impl std::fmt::Debug for ClusterSecret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterSecret(…)")
    }
}
