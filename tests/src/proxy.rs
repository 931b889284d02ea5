//! A TCP proxy that loses answers, cuts and delays: the network at its worst, between a node and those who call it.
//!
//! A node listens behind the proxy and the cluster knows the proxy's address, so other nodes come through it too. A
//! fault therefore names whose connections it hits: all, or those of one process (found as `ss -p` does, by the
//! inode of the caller's socket).

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What befalls the connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Requests arrive, answers do not.
    SwallowReplies,
    /// Answers come so much later.
    DelayReplies(Duration),
    /// Connections are closed, new ones too.
    Refuse,
}

/// Whose connections a fault hits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Victim {
    /// Everybody's.
    All,
    /// Those of the process with this id.
    Process(i32),
}

/// A caller's connection to the proxy. One port of the caller may serve several connections, to different addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Ends {
    caller: SocketAddr,
    proxy: SocketAddr,
}

#[derive(Debug)]
struct Connection {
    ends: Ends,
    caller: TcpStream,
    node: TcpStream,
    hit: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Shared {
    target: String,
    fault: Mutex<(Fault, Victim)>,
    connections: Mutex<Vec<Connection>>,
    over: AtomicBool,
}

/// A running proxy. Ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Takes connections at `address` and passes them on to `target`.
    pub fn start(address: &str, target: &str) -> Proxy {
        let listener = TcpListener::bind(address).unwrap_or_else(|e| panic!("listen at {address}: {e}"));
        let shared = Arc::new(Shared {
            target: target.to_string(),
            fault: Mutex::new((Fault::None, Victim::All)),
            connections: Mutex::new(Vec::new()),
            over: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                if accepting.over.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok(stream) = stream {
                    accepting.pass_on(stream);
                }
            }
        });
        Proxy {
            address: address.to_string(),
            shared,
        }
    }

    /// From now on, until the next call, `fault` befalls the connections of `victim`, those that exist and new ones.
    pub fn set(&self, fault: Fault, victim: Victim) {
        // Held until the existing connections are marked: one that is made meanwhile sees the new fault.
        let mut current = self.shared.fault.lock().expect("no panic under the lock");
        *current = (fault, victim);
        let mut connections = self.shared.connections.lock().expect("no panic under the lock");
        connections.retain(|connection| {
            let hit = fault != Fault::None && is_of(connection.ends, victim);
            connection.hit.store(hit, Ordering::SeqCst);
            if hit && fault == Fault::Refuse {
                connection.cut();
            }
            !(hit && fault == Fault::Refuse)
        });
    }

    /// No fault any more; connections that lost bytes are cut (they are beyond repair).
    pub fn heal(&self) {
        let mut current = self.shared.fault.lock().expect("no panic under the lock");
        let lossy = matches!(current.0, Fault::SwallowReplies | Fault::Refuse);
        *current = (Fault::None, Victim::All);
        let mut connections = self.shared.connections.lock().expect("no panic under the lock");
        connections.retain(|connection| {
            let hit = connection.hit.load(Ordering::SeqCst);
            if hit && lossy {
                connection.cut();
            } else {
                connection.hit.store(false, Ordering::SeqCst);
            }
            !(hit && lossy)
        });
    }

    /// Cuts every connection that exists.
    pub fn cut(&self) {
        let mut connections = self.shared.connections.lock().expect("no panic under the lock");
        connections.drain(..).for_each(|connection| connection.cut());
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Relaxed);
        self.cut();
        // Wakes the thread that accepts, so that it sees that it is over.
        let _ = TcpStream::connect(&self.address);
    }
}

impl Connection {
    fn cut(&self) {
        // Already closed is as good.
        let _ = self.caller.shutdown(Shutdown::Both);
        let _ = self.node.shutdown(Shutdown::Both);
    }
}

impl Shared {
    fn pass_on(self: &Arc<Self>, caller: TcpStream) {
        let ends = (
            caller.peer_addr(),
            caller.local_addr(),
            TcpStream::connect(&self.target),
        );
        let (Ok(peer), Ok(proxy), Ok(node)) = ends else {
            return; // Dropping the caller's side tells it that nobody is there.
        };
        let ends = Ends { caller: peer, proxy };
        let (Ok(caller_copy), Ok(node_copy)) = (caller.try_clone(), node.try_clone()) else {
            return;
        };
        let _ = caller.set_nodelay(true);
        let _ = node.set_nodelay(true);
        let hit = Arc::new(AtomicBool::new(false));
        {
            let current = self.fault.lock().expect("no panic under the lock");
            let (fault, victim) = *current;
            if fault != Fault::None && is_of(ends, victim) {
                if fault == Fault::Refuse {
                    return;
                }
                hit.store(true, Ordering::SeqCst);
            }
            self.connections
                .lock()
                .expect("no panic under the lock")
                .push(Connection {
                    ends,
                    caller: caller_copy,
                    node: node_copy,
                    hit: Arc::clone(&hit),
                });
        }
        if let (Ok(mut from), Ok(mut to)) = (caller.try_clone(), node.try_clone()) {
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
        let shared = Arc::clone(self);
        std::thread::spawn(move || {
            shared.pass_answers(node, caller, &hit);
            let mut connections = shared.connections.lock().expect("no panic under the lock");
            connections.retain(|connection| connection.ends != ends);
        });
    }

    fn pass_answers(&self, mut node: TcpStream, mut caller: TcpStream, hit: &AtomicBool) {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(length @ 1..) = node.read(&mut buffer) {
            if hit.load(Ordering::SeqCst) {
                let fault = self.fault.lock().expect("no panic under the lock").0;
                match fault {
                    Fault::SwallowReplies => continue,
                    Fault::DelayReplies(time) => std::thread::sleep(time),
                    Fault::None | Fault::Refuse => {}
                }
            }
            if caller.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
        let _ = caller.shutdown(Shutdown::Both);
        let _ = node.shutdown(Shutdown::Both);
    }
}

/// Whether the connection is `victim`'s.
fn is_of(ends: Ends, victim: Victim) -> bool {
    match victim {
        Victim::All => true,
        // Whoever has closed it already may take it for a victim's.
        Victim::Process(id) => socket_inode(ends).is_none_or(|inode| holds_socket(id, inode)),
    }
}

/// The inode of the caller's socket, from `/proc/net/tcp`. Sockets come and go while that is read, so that it may lack one
/// that is there: it is read again then.
fn socket_inode(ends: Ends) -> Option<u64> {
    const READS_MAX: u32 = 10;
    (0..READS_MAX).find_map(|_| listed_inode(ends))
}

fn listed_inode(ends: Ends) -> Option<u64> {
    let (caller, proxy) = (listed_address(ends.caller)?, listed_address(ends.proxy)?);
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    table.lines().skip(1).find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let is_it = fields.get(1) == Some(&caller.as_str()) && fields.get(2) == Some(&proxy.as_str());
        let inode = is_it.then(|| fields.get(9)?.parse().ok())?;
        // One that nobody has any more (TIME_WAIT) has none.
        inode.filter(|inode| *inode != 0)
    })
}

/// As `/proc/net/tcp` shows it (IPv4: the address in host order, hexadecimal).
fn listed_address(address: SocketAddr) -> Option<String> {
    let SocketAddr::V4(address) = address else {
        return None;
    };
    let ip = u32::from_ne_bytes(address.ip().octets());
    Some(format!("{ip:08X}:{:04X}", address.port()))
}

fn holds_socket(id: i32, inode: u64) -> bool {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{id}/fd")) else {
        return false;
    };
    let name = format!("socket:[{inode}]");
    descriptors
        .flatten()
        .any(|entry| std::fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str() == name.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Sandbox;

    /// Answers each byte with the same byte.
    fn echo(address: &str) {
        let listener = TcpListener::bind(address).unwrap();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                std::thread::spawn(move || {
                    let mut from = stream.try_clone().unwrap();
                    std::io::copy(&mut from, &mut stream)
                });
            }
        });
    }

    fn ask(stream: &mut TcpStream) -> std::io::Result<usize> {
        stream.set_read_timeout(Some(Duration::from_millis(300)))?;
        stream.write_all(b"x")?;
        stream.read(&mut [0; 1])
    }

    #[test]
    fn answers_are_lost_only_for_the_victim_and_only_until_healed() {
        let sandbox = Sandbox::light("proxy");
        let (behind, before) = (sandbox.address(), sandbox.address());
        echo(&behind);
        let proxy = Proxy::start(&before, &behind);
        let mut stream = TcpStream::connect(&before).unwrap();
        assert_eq!(ask(&mut stream).unwrap(), 1);
        proxy.set(Fault::SwallowReplies, Victim::Process(1));
        assert_eq!(ask(&mut stream).unwrap(), 1, "not ours");
        proxy.set(Fault::SwallowReplies, Victim::Process(std::process::id() as i32));
        assert!(ask(&mut stream).is_err(), "the answer is lost");
        proxy.heal();
        assert!(
            matches!(ask(&mut stream), Ok(0) | Err(_)),
            "the connection that lost bytes is cut"
        );
        assert_eq!(ask(&mut TcpStream::connect(&before).unwrap()).unwrap(), 1);
        proxy.set(Fault::Refuse, Victim::All);
        assert!(matches!(
            ask(&mut TcpStream::connect(&before).unwrap()),
            Ok(0) | Err(_)
        ));
    }
}
