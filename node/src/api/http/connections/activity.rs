//! What is known of one connection's client: when it last took or sent a byte, and whether it has a request under way.
//!
//! Whether a client reads is not seen by writing alone: the kernel buffers megabytes, and lets the next bytes in only when a
//! third of them have gone. So the bytes that the client has not acknowledged yet are asked for (SIOCOUTQ, tcp(7)).
//!
//! Knows nothing of HTTP.

use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Whom limits are counted for: an IPv4 address, or the /64 network of an IPv6 address, all of which one machine may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ClientAddress(IpAddr);

impl From<IpAddr> for ClientAddress {
    fn from(address: IpAddr) -> ClientAddress {
        const NETWORK: u128 = !(u64::MAX as u128);
        ClientAddress(match address.to_canonical() {
            IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & NETWORK)),
            v4 => v4,
        })
    }
}

/// No descriptor: the connection is closed.
const CLOSED: RawFd = -1;

/// What one connection does. Times are milliseconds since it began.
#[derive(Debug)]
pub struct Activity {
    address: ClientAddress,
    began: Instant,
    requests: AtomicU32,
    /// When the last request ended; at first, when the connection began.
    quiet_since_ms: AtomicU64,
    /// When the client last sent a byte or acknowledged one.
    moved_at_ms: AtomicU64,
    written_bytes: AtomicU64,
    acknowledged_bytes: AtomicU64,
    /// Whether there are bytes that the client has not acknowledged.
    owed: AtomicBool,
    descriptor: AtomicI32,
}

impl Activity {
    /// Of a connection that begins now.
    pub fn new(address: ClientAddress) -> Activity {
        Activity {
            address,
            began: Instant::now(),
            requests: AtomicU32::new(0),
            quiet_since_ms: AtomicU64::new(0),
            moved_at_ms: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            acknowledged_bytes: AtomicU64::new(0),
            owed: AtomicBool::new(false),
            descriptor: AtomicI32::new(CLOSED),
        }
    }

    /// Where the client is.
    pub fn address(&self) -> ClientAddress {
        self.address
    }

    /// A request has begun; it ends when the guard is dropped.
    pub fn request(self: &Arc<Activity>) -> RequestGuard {
        self.requests.fetch_add(1, Ordering::Relaxed);
        RequestGuard(Arc::clone(self))
    }

    /// How long nothing has been asked and nothing has been left to send; `None` while something is.
    pub fn idle(&self) -> Option<Duration> {
        let busy = self.requests.load(Ordering::Relaxed) > 0 || self.owed.load(Ordering::Relaxed);
        (!busy).then(|| self.since(&self.quiet_since_ms))
    }

    /// How long the client has taken nothing of what was sent to it; zero if all was taken.
    pub fn stalled(&self) -> Duration {
        match self.owed.load(Ordering::Relaxed) {
            true => self.since_moved(),
            false => Duration::ZERO,
        }
    }

    /// How long ago the client last sent or took a byte.
    pub fn since_moved(&self) -> Duration {
        self.since(&self.moved_at_ms)
    }

    /// Asks the kernel what the client has taken meanwhile. Called now and then by the connection's task.
    pub fn look(&self) {
        let queued = match self.descriptor.load(Ordering::Relaxed) {
            CLOSED => 0,
            descriptor => unacknowledged_bytes(descriptor),
        };
        let acknowledged = self.written_bytes.load(Ordering::Relaxed).saturating_sub(queued);
        if self.acknowledged_bytes.swap(acknowledged, Ordering::Relaxed) < acknowledged {
            self.moved();
        }
        self.owed.store(queued > 0, Ordering::Relaxed);
    }

    fn moved(&self) {
        self.moved_at_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn since(&self, at_ms: &AtomicU64) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(at_ms.load(Ordering::Relaxed)))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A request under way.
#[derive(Debug)]
pub struct RequestGuard(Arc<Activity>);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        // Before the request is taken off, so that the connection is never seen idle since long ago.
        self.0.quiet_since_ms.store(self.0.now_ms(), Ordering::Relaxed);
        self.0.requests.fetch_sub(1, Ordering::Release);
    }
}

/// What lies in the kernel for the client and was not acknowledged; none where the kernel does not say.
fn unacknowledged_bytes(descriptor: RawFd) -> u64 {
    let mut bytes: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (SIOCOUTQ on a socket) writes one int, to `bytes`. The descriptor is open: `Metered` takes it back
    // before it closes it, in the task that calls this.
    let result = unsafe { libc::ioctl(descriptor, libc::TIOCOUTQ, &raw mut bytes) };
    if result == 0 {
        u64::try_from(bytes).unwrap_or(0)
    } else {
        0
    }
}

/// A connection whose bytes are counted.
#[derive(Debug)]
pub struct Metered {
    stream: TcpStream,
    activity: Arc<Activity>,
}

impl Metered {
    /// `stream`, counted in `activity`.
    pub fn new(stream: TcpStream, activity: Arc<Activity>) -> Metered {
        activity.descriptor.store(stream.as_raw_fd(), Ordering::Relaxed);
        Metered { stream, activity }
    }

    fn wrote(&self, polled: &Poll<std::io::Result<usize>>) {
        if let Poll::Ready(Ok(bytes)) = polled {
            self.activity
                .written_bytes
                .fetch_add(*bytes as u64, Ordering::Relaxed);
            // Until the kernel is asked: as if all of it had yet to go.
            if !self.activity.owed.swap(true, Ordering::Relaxed) {
                self.activity.moved();
            }
        }
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        self.activity.descriptor.store(CLOSED, Ordering::Relaxed);
    }
}

impl AsyncRead for Metered {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.activity.moved();
        }
        polled
    }
}

impl AsyncWrite for Metered {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.wrote(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.wrote(&polled);
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_addresses_of_one_ipv6_network_are_one_client() {
        let client = |text: &str| ClientAddress::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(client("2001:db8:1:2::7"), client("2001:db8:1:2:ffff::9"));
        assert_ne!(client("2001:db8:1:2::7"), client("2001:db8:1:3::7"));
        assert_eq!(client("::ffff:10.0.0.1"), client("10.0.0.1"));
        assert_ne!(client("10.0.0.2"), client("10.0.0.1"));
    }

    #[test]
    fn a_connection_is_idle_between_requests() {
        const PAUSE: Duration = Duration::from_millis(20);
        let activity = Arc::new(Activity::new(IpAddr::from([10, 0, 0, 1]).into()));
        std::thread::sleep(PAUSE);
        assert!(activity.idle() >= Some(PAUSE));
        let request = activity.request();
        assert_eq!(activity.idle(), None);
        std::thread::sleep(PAUSE);
        let ended = Instant::now();
        drop(request);
        let idle = activity.idle().expect("it has no request");
        assert!(idle <= ended.elapsed() + Duration::from_millis(1), "{idle:?}");
    }
}
