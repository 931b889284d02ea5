//! The activity of the client of one connection: when it last read or sent a byte, and whether it has a request in
//! progress.
//!
//! Writes alone do not show whether a client reads: the kernel buffers megabytes, and accepts more only after a third
//! of them was sent. So the number of bytes that the client has not acknowledged is queried (SIOCOUTQ, tcp(7)).
//!
//! Does not know HTTP.

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

/// The client to which limits apply: an IPv4 address, or the /64 network of an IPv6 address, which usually belongs to
/// one machine.
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

/// The value of [`Activity::descriptor`] after the connection was closed.
const CLOSED: RawFd = -1;

/// The activity of one connection. Times are in milliseconds since it began.
#[derive(Debug)]
pub struct Activity {
    address: ClientAddress,
    began: Instant,
    requests: AtomicU32,
    /// End of the last request; before the first, the start of the connection.
    idle_since_ms: AtomicU64,
    /// Time at which the client last sent or acknowledged a byte.
    progress_at_ms: AtomicU64,
    written_bytes: AtomicU64,
    acknowledged_bytes: AtomicU64,
    /// Whether some bytes are not acknowledged.
    has_unacknowledged: AtomicBool,
    descriptor: AtomicI32,
}

impl Activity {
    /// Creates the activity of a connection that begins now.
    pub fn new(address: ClientAddress) -> Activity {
        Activity {
            address,
            began: Instant::now(),
            requests: AtomicU32::new(0),
            idle_since_ms: AtomicU64::new(0),
            progress_at_ms: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            acknowledged_bytes: AtomicU64::new(0),
            has_unacknowledged: AtomicBool::new(false),
            descriptor: AtomicI32::new(CLOSED),
        }
    }

    /// Returns the address of the client.
    pub fn address(&self) -> ClientAddress {
        self.address
    }

    /// Notes the start of a request; it ends when the guard is dropped.
    pub fn request(self: &Arc<Activity>) -> RequestGuard {
        self.requests.fetch_add(1, Ordering::Relaxed);
        RequestGuard(Arc::clone(self))
    }

    /// Returns the time since the last request ended; `None` while a request is in progress or bytes are not
    /// acknowledged.
    pub fn idle(&self) -> Option<Duration> {
        let busy =
            self.requests.load(Ordering::Relaxed) > 0 || self.has_unacknowledged.load(Ordering::Relaxed);
        (!busy).then(|| self.since(&self.idle_since_ms))
    }

    /// Returns the time for which the client has acknowledged nothing; zero if nothing is outstanding.
    pub fn stalled(&self) -> Duration {
        match self.has_unacknowledged.load(Ordering::Relaxed) {
            true => self.since_progress(),
            false => Duration::ZERO,
        }
    }

    /// Returns the time since the client last sent or acknowledged a byte.
    pub fn since_progress(&self) -> Duration {
        self.since(&self.progress_at_ms)
    }

    /// Queries the kernel for acknowledged bytes. Called periodically by the task of the connection.
    pub fn update(&self) {
        let queued = match self.descriptor.load(Ordering::Relaxed) {
            CLOSED => 0,
            descriptor => unacknowledged_bytes(descriptor),
        };
        let acknowledged = self.written_bytes.load(Ordering::Relaxed).saturating_sub(queued);
        if self.acknowledged_bytes.swap(acknowledged, Ordering::Relaxed) < acknowledged {
            self.note_progress();
        }
        self.has_unacknowledged.store(queued > 0, Ordering::Relaxed);
    }

    fn note_progress(&self) {
        self.progress_at_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn since(&self, at_ms: &AtomicU64) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(at_ms.load(Ordering::Relaxed)))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A request in progress.
#[derive(Debug)]
pub struct RequestGuard(Arc<Activity>);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        // Stored before the count is reduced, so that the connection never appears to have been idle for a long time.
        self.0.idle_since_ms.store(self.0.now_ms(), Ordering::Relaxed);
        self.0.requests.fetch_sub(1, Ordering::Release);
    }
}

/// Returns the number of bytes that the kernel holds for the client and that are not acknowledged; 0 if the query
/// fails.
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

/// A stream whose bytes are counted in an [`Activity`].
#[derive(Debug)]
pub struct Metered {
    stream: TcpStream,
    activity: Arc<Activity>,
}

impl Metered {
    /// Wraps `stream`; its bytes are counted in `activity`.
    pub fn new(stream: TcpStream, activity: Arc<Activity>) -> Metered {
        activity.descriptor.store(stream.as_raw_fd(), Ordering::Relaxed);
        Metered { stream, activity }
    }

    fn note_write(&self, polled: &Poll<std::io::Result<usize>>) {
        if let Poll::Ready(Ok(bytes)) = polled {
            self.activity
                .written_bytes
                .fetch_add(*bytes as u64, Ordering::Relaxed);
            // Until the next query, all written bytes count as not acknowledged.
            if !self.activity.has_unacknowledged.swap(true, Ordering::Relaxed) {
                self.activity.note_progress();
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
            self.activity.note_progress();
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
        self.note_write(&polled);
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[std::io::IoSlice<'_>],
    ) -> Poll<std::io::Result<usize>> {
        let polled = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.note_write(&polled);
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
        let idle = activity.idle().expect("no request is in progress");
        assert!(idle <= ended.elapsed() + Duration::from_millis(1), "{idle:?}");
    }
}
