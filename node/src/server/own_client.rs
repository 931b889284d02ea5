//! The node's own session, which REST uses for reads and writes: opened when there is a leader, closed when the node
//! stops.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use quorumfs_client::{Client, ClientOptions};
use quorumfs_fs::Filesystem;
use tokio::sync::watch;
use tracing::info;

use crate::api::http::files::{ClientHandle, filesystem_options};
use crate::config::Config;
use crate::membership::credential;
use crate::observe::metrics::kinds::REST_DESCRIPTION;
use quorumfs_tasks::Tasks;

/// Pause after a failed attempt to open the session.
const CLIENT_RETRY_INTERVAL_MS: u64 = 500;
/// Longest time that a stopping node waits for the cluster to end its session.
const CLOSE_TIMEOUT_MS: u64 = 2_500;

/// Has the session that REST uses opened in the background.
pub fn start_client(
    tasks: &Arc<Tasks>,
    config: Config,
    tls: Option<tonic::transport::ClientTlsConfig>,
    client: watch::Sender<ClientHandle>,
) {
    let session = (config, tls, client, tasks.clone());
    tasks.supervise_until_done("own-session", session, |(config, tls, client, tasks)| {
        open_client(config, tls, client, tasks)
    });
}

/// Opens the session through which REST reads and writes, trying until there is a leader.
async fn open_client(
    config: Config,
    tls: Option<tonic::transport::ClientTlsConfig>,
    client: watch::Sender<ClientHandle>,
    tasks: Arc<Tasks>,
) {
    let mut addresses = vec![config.grpc.clone()];
    addresses.extend(
        config
            .members
            .iter()
            .filter(|member| **member != config.grpc)
            .cloned(),
    );
    loop {
        let options = ClientOptions {
            addresses: addresses.clone(),
            description: format!("{REST_DESCRIPTION} {} at {}", config.slot, config.http),
            call_timeout: Some(Duration::from_millis(config.request_timeout_ms)),
            tls: tls.clone(),
            tasks: tasks.clone(),
            ..ClientOptions::default()
        };
        match Client::connect(options).await {
            Ok(connected) => {
                let filesystem = Filesystem::new(connected.clone(), filesystem_options(), &tasks);
                client.send_replace(ClientHandle::Ready(filesystem));
                let keeping = (config.data.clone(), connected);
                tasks.supervise("session-credential", keeping, |(folder, client)| async move {
                    credential::keep(&folder, client).await;
                });
                return;
            }
            Err(error) => {
                client.send_replace(ClientHandle::Connecting {
                    reason: error.to_string(),
                });
            }
        }
        tokio::time::sleep(Duration::from_millis(CLIENT_RETRY_INTERVAL_MS)).await;
    }
}

/// Ends this node's session, so that nothing waits for it.
pub async fn close_session(folder: &Path, client: &watch::Receiver<ClientHandle>) {
    let ClientHandle::Ready(filesystem) = client.borrow().clone() else {
        return;
    };
    let limit = Duration::from_millis(CLOSE_TIMEOUT_MS);
    match tokio::time::timeout(limit, filesystem.cluster().close()).await {
        Ok(()) => credential::forget(folder),
        Err(_) => info!("no leader could be told that the session of this node is over; it lapses"),
    }
}
