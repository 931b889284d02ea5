//! A proxy between a client and a node of a fake cluster, whose connections can be frozen or cut.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::fake::Wire;

/// Starts a proxy for `behind`; returns its address and the sender that sets its state.
pub async fn proxy(behind: SocketAddr) -> (SocketAddr, watch::Sender<Wire>) {
    let (wire, states) = watch::channel(Wire::Open);
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let Ok((outer, _)) = listener.accept().await else {
                return;
            };
            if *states.borrow() == Wire::Cut {
                // The closest to a refused connection for a listener that must keep its port.
                outer.set_zero_linger().unwrap();
                continue;
            }
            let mut states = states.clone();
            tokio::spawn(async move {
                let Ok(inner) = TcpStream::connect(behind).await else {
                    return;
                };
                let (outer_in, outer_out) = outer.into_split();
                let (inner_in, inner_out) = inner.into_split();
                let mut cut = states.clone();
                tokio::select! {
                    _ = cut.wait_for(|state| *state == Wire::Cut) => {}
                    _ = pump(outer_in, inner_out, states.clone()) => {}
                    _ = pump(inner_in, outer_out, states.clone()) => {}
                }
                // A frozen connection stays open until it is cut or restored.
                let _ = states.wait_for(|state| *state != Wire::Frozen).await;
            });
        }
    });
    (address, wire)
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut states: watch::Receiver<Wire>,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        if states.wait_for(|state| *state == Wire::Open).await.is_err() {
            return;
        }
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        if states.wait_for(|state| *state == Wire::Open).await.is_err() {
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
