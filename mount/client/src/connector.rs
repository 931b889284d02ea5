//! Connections to nodes, and the backoff between attempts.
//!
//! Invariant: a channel is never shared between purposes (a connection has one flow-control window and one driver
//! task: a gigabyte of chunks must not delay a call). A channel that breaks is dropped, and the next user of the node
//! requests a new one, so that no request waits on a connection whose peer has stopped.
//!
//! Does not know the messages on a connection.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;

use backon::{BackoffBuilder as _, ExponentialBackoff, ExponentialBuilder};
use quorumfs_proto::limits::MESSAGE_BYTES_MAX;
use quorumfs_wire::file_system_client::FileSystemClient;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint, Error, Uri};

/// Time to establish a connection; far below the 3 s that a failover may take.
const CONNECT_TIMEOUT_MS: u64 = 1_000;
/// Interval of HTTP/2 pings and the time for the answer. TCP does not notice a stopped node or a cut cable; these
/// pings do within their sum.
const KEEP_ALIVE_PING_INTERVAL_MS: u64 = 1_000;
const KEEP_ALIVE_PING_TIMEOUT_MS: u64 = 2_000;
/// HTTP/2 windows for bulk transfer; with the default windows 1 MiB messages reach half the throughput (measured).
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
const FRAME_BYTES_MAX: u32 = 256 << 10;
/// Local addresses that are kept: one connection for calls, and one for discovery to each of seven nodes.
const LOCAL_ADDRESSES_MAX: usize = 8;
/// First and longest delay between attempts, before jitter. Jitter adds up to the same time again, so that no delay
/// exceeds 500 ms and clients that lost the same leader do not retry in step.
const BACKOFF_MS_MIN: u64 = 10;
const BACKOFF_MS_MAX: u64 = 250;

/// The use of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Small messages with low latency.
    Calls,
    /// Chunks, with large flow-control windows.
    Bulk,
}

/// Makes connections to the nodes of one cluster.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    tls: Option<ClientTlsConfig>,
    /// Local addresses of the newest [`LOCAL_ADDRESSES_MAX`] connections for calls.
    local: Arc<Mutex<VecDeque<SocketAddr>>>,
}

impl Connector {
    pub(crate) fn new(tls: Option<ClientTlsConfig>) -> Connector {
        Connector {
            tls,
            local: Arc::default(),
        }
    }

    /// Returns the local addresses of the newest connections for calls.
    pub(crate) fn local_addresses(&self) -> Vec<String> {
        self.local.lock().iter().map(SocketAddr::to_string).collect()
    }

    /// Returns a client of the node at `address` (`host:port`), over a separate connection that is established with
    /// the first request.
    ///
    /// # Errors
    /// `address` is not a valid authority of a URI, or the TLS settings are invalid.
    pub(crate) fn client(&self, address: &str, purpose: Purpose) -> Result<FileSystemClient<Channel>, Error> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?
            .connect_timeout(Duration::from_millis(CONNECT_TIMEOUT_MS))
            .http2_keep_alive_interval(Duration::from_millis(KEEP_ALIVE_PING_INTERVAL_MS))
            .keep_alive_timeout(Duration::from_millis(KEEP_ALIVE_PING_TIMEOUT_MS))
            .keep_alive_while_idle(true);
        if purpose == Purpose::Bulk {
            endpoint = endpoint
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .max_frame_size(FRAME_BYTES_MAX);
        }
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.clone())?;
        }
        let local = self.local.clone();
        let connect = move |uri: Uri| {
            let local = local.clone();
            async move {
                let stream = connect(&uri).await?;
                if purpose == Purpose::Calls {
                    let mut local = local.lock();
                    local.push_front(stream.local_addr()?);
                    local.truncate(LOCAL_ADDRESSES_MAX);
                }
                std::io::Result::Ok(TokioIo::new(stream))
            }
        };
        let channel = endpoint.connect_with_connector_lazy(tower::service_fn(connect));
        Ok(FileSystemClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX))
    }
}

/// Opens a TCP connection to the host and port of `uri`.
async fn connect(uri: &Uri) -> std::io::Result<TcpStream> {
    let authority = uri.authority().ok_or(std::io::ErrorKind::InvalidInput)?;
    // The default port of the scheme, as in tonic's own connector.
    let default_port = if uri.scheme_str() == Some("https") {
        443
    } else {
        80
    };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, authority.port_u16().unwrap_or(default_port))).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// The delays between attempts: 10 ms, doubling, with jitter, at most 500 ms, without end (P6).
pub(crate) struct Backoff(ExponentialBackoff);

impl Backoff {
    pub(crate) fn new() -> Backoff {
        Backoff(
            ExponentialBuilder::new()
                .with_min_delay(Duration::from_millis(BACKOFF_MS_MIN))
                .with_max_delay(Duration::from_millis(BACKOFF_MS_MAX))
                .with_factor(2.0)
                .with_jitter()
                .without_max_times()
                .build(),
        )
    }

    /// Returns the next delay.
    pub(crate) fn next_delay(&mut self) -> Duration {
        self.0.next().unwrap_or(Duration::from_millis(BACKOFF_MS_MAX))
    }

    /// Waits for the next delay.
    pub(crate) async fn pause(&mut self) {
        tokio::time::sleep(self.next_delay()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_from_ten_to_at_most_five_hundred_milliseconds_for_ever() {
        let mut backoff = Backoff::new();
        let delays: Vec<u128> = (0..200).map(|_| backoff.next_delay().as_millis()).collect();
        assert!((10..=20).contains(&delays[0]), "{delays:?}");
        assert!((20..=40).contains(&delays[1]), "{delays:?}");
        assert!(delays.iter().all(|ms| *ms <= 500), "{delays:?}");
        assert!(delays[10..].iter().all(|ms| *ms >= 250), "{delays:?}");
    }

    #[test]
    fn an_address_that_cannot_be_one_is_refused() {
        let connector = Connector::new(None);
        assert!(connector.client("no address", Purpose::Calls).is_err());
    }
}
