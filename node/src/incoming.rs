//! What is known of an incoming gRPC connection: from where it comes, whether its other end has closed it, and, under TLS,
//! whose certificate was shown and what role it gives.
//!
//! A certificate gives a role by a URI among its subject alternative names. Only a node's may speak to the service for
//! nodes: whoever can speak Raft can overwrite the log.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use futures::{Stream, StreamExt as _};
use quorumfs_proto::Sha256;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::CertificateDer;
use tonic::transport::server::{Connected, TlsConnectInfo};
use tonic::{Extensions, Request, Status};
use webpki::EndEntityCert;

/// The URI in the certificate of a node.
const NODE_URI: &str = "quorumfs:node";

/// A connection from another program.
#[derive(Clone, Debug)]
pub struct Connection {
    peer: Option<SocketAddr>,
    ended: Arc<AtomicBool>,
}

impl Connection {
    /// Whether the other end has closed or reset it: the end of the process does, a cut network does not.
    pub fn was_ended_by_peer(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Whether both are the same connection.
    pub fn is(&self, other: &Connection) -> bool {
        Arc::ptr_eq(&self.ended, &other.ended)
    }

    /// Whether one of these addresses, as the other end knows itself, is the one seen here.
    pub fn comes_from(&self, addresses: &[String]) -> bool {
        // A listener for both families sees IPv4 addresses as mapped ones.
        let seen = self
            .peer
            .map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()));
        seen.is_some_and(|seen| addresses.contains(&seen.to_string()))
    }

    /// One that is over when `ended` says so.
    #[cfg(test)]
    pub fn for_tests(ended: Arc<AtomicBool>) -> Connection {
        Connection { peer: None, ended }
    }
}

/// The connection on which a request came, if it came over TCP.
pub fn connection_of(extensions: &Extensions) -> Option<Connection> {
    let plain = extensions.get::<Connection>();
    let protected = || {
        extensions
            .get::<TlsConnectInfo<Connection>>()
            .map(TlsConnectInfo::get_ref)
    };
    plain.or_else(protected).cloned()
}

/// The digest of the certificate that was shown for a request; `None` without TLS.
pub fn certificate_of(extensions: &Extensions) -> Option<Sha256> {
    let certificates = extensions.get::<TlsConnectInfo<Connection>>()?.peer_certs()?;
    Some(Sha256::of(certificates.first()?))
}

/// Refuses a request over TLS from whoever is no node.
pub fn only_from_nodes(request: Request<()>) -> Result<Request<()>, Status> {
    let Some(tls) = request.extensions().get::<TlsConnectInfo<Connection>>() else {
        return Ok(request);
    };
    let certificates = tls.peer_certs();
    let shown = certificates
        .as_ref()
        .and_then(|certificates| certificates.first());
    match shown.is_some_and(is_of_a_node) {
        true => Ok(request),
        false => Err(Status::permission_denied(format!(
            "the certificate is not a node's: a node's has the URI {NODE_URI} among its subject alternative names"
        ))),
    }
}

/// Whether a certificate gives the role of a node.
fn is_of_a_node(certificate: &CertificateDer<'_>) -> bool {
    // What cannot be read gives no role.
    EndEntityCert::try_from(certificate)
        .is_ok_and(|certificate| certificate.valid_uri_names().any(|uri| uri == NODE_URI))
}

/// The connections that arrive at `listener`.
pub fn incoming(listener: TcpListener) -> impl Stream<Item = io::Result<Incoming>> {
    TcpListenerStream::new(listener).map(|accepted| {
        let stream = accepted?;
        // Without it, small messages wait for the acknowledgement of earlier ones.
        let _ = stream.set_nodelay(true);
        let connection = Connection {
            peer: stream.peer_addr().ok(),
            ended: Arc::default(),
        };
        Ok(Incoming { stream, connection })
    })
}

/// A TCP stream that notes when its other end closes it.
#[derive(Debug)]
pub struct Incoming {
    stream: TcpStream,
    connection: Connection,
}

impl Incoming {
    fn note(&self, error: &io::Error) {
        use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset};
        if matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset) {
            self.connection.ended.store(true, Ordering::Relaxed);
        }
    }
}

impl Connected for Incoming {
    type ConnectInfo = Connection;

    fn connect_info(&self) -> Connection {
        self.connection.clone()
    }
}

impl AsyncRead for Incoming {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let (before, room) = (buffer.filled().len(), buffer.remaining());
        let read = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        match &read {
            Ok(()) if room > 0 && buffer.filled().len() == before => {
                self.connection.ended.store(true, Ordering::Relaxed);
            }
            Ok(()) => {}
            Err(error) => self.note(error),
        }
        Poll::Ready(read)
    }
}

impl AsyncWrite for Incoming {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(context, bytes));
        Poll::Ready(written.inspect_err(|error| self.note(error)))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(context, slices));
        Poll::Ready(written.inspect_err(|error| self.note(error)))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    #[tokio::test]
    async fn a_connection_that_its_other_end_closes_is_noted() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut arriving = Box::pin(incoming(listener));
        let client = TcpStream::connect(address).await.unwrap();
        let own = client.local_addr().unwrap().to_string();
        let mut accepted = arriving.next().await.unwrap().unwrap();
        let connection = accepted.connect_info();
        assert!(connection.comes_from(&[String::from("127.0.0.1:1"), own]));
        assert!(!connection.comes_from(&[]));
        assert!(!connection.was_ended_by_peer());
        drop(client);
        assert_eq!(accepted.read(&mut [0; 8]).await.unwrap(), 0);
        assert!(connection.was_ended_by_peer());
    }

    #[test]
    fn what_is_no_certificate_gives_no_role() {
        assert!(!is_of_a_node(&CertificateDer::from(&b"no certificate"[..])));
    }
}
