//! What ends a node's session after the node: a file in its data folder, of which there is one user at a time.

use std::path::Path;
use std::time::Duration;

use quorumfs_client::Client;
use quorumfs_proto::codec;
use tracing::warn;

/// The session's number and its secret.
const SESSION_FILE: &str = "session";
/// How often it is looked whether the session is another.
const LOOK_INTERVAL_MS: u64 = 5_000;

/// Ends the session of this folder's last process, which is gone for certain as this one has the folder; then keeps what
/// the next process needs to end this one's, until the client is closed.
pub async fn keep(folder: &Path, client: Client) {
    let file = &folder.join(SESSION_FILE);
    match std::fs::read(file).ok().as_deref().map(codec::decode) {
        Some(Ok(predecessor)) => client.end_predecessor(predecessor).await,
        Some(Err(error)) => warn!(%error, file = %file.display(), "the last session is not known; it lapses"),
        None => {}
    }
    let mut kept = None;
    loop {
        let generation = client.generation();
        if kept != Some(generation) {
            match write_private(file, &codec::encode(&client.credential())) {
                Ok(()) => kept = Some(generation),
                Err(error) => warn!(%error, file = %file.display(), "cannot keep what ends the session"),
            }
        }
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
    }
}

/// The session was ended: the next process need not.
pub fn forget(folder: &Path) {
    // One that stays is tried in vain, and harms nobody.
    let _ = std::fs::remove_file(folder.join(SESSION_FILE));
}

/// Writes a file that only its owner reads, in place of what was there.
fn write_private(file: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let beside = file.with_extension("new");
    let mut options = std::fs::OpenOptions::new();
    let mut written = options
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    written.write_all(bytes)?;
    std::fs::rename(&beside, file)
}
