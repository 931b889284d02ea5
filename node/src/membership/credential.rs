//! The means to end a node's session after its process has ended: a file in its data folder, which has one user at a
//! time.

use std::path::Path;
use std::time::Duration;

use quorumfs_client::Client;
use quorumfs_proto::codec;
use tracing::warn;

/// File with the session's id and secret.
const SESSION_FILE: &str = "session";
/// Interval at which a change of the session is looked for.
const LOOK_INTERVAL_MS: u64 = 5_000;

/// Ends the session of this folder's last process, which has certainly ended because this one has locked the folder.
/// Then stores what the next process needs to end this one's session, until the client is closed.
pub async fn keep(folder: &Path, client: Client) {
    let file = &folder.join(SESSION_FILE);
    match std::fs::read(file).ok().as_deref().map(codec::decode) {
        Some(Ok(predecessor)) => client.end_predecessor(predecessor).await,
        Some(Err(error)) => {
            warn!(%error, file = %file.display(), "cannot read the last session of this node; it lapses")
        }
        None => {}
    }
    let mut kept = None;
    loop {
        let generation = client.generation();
        if kept != Some(generation) {
            match write_private(file, &codec::encode(&client.credential())) {
                Ok(()) => kept = Some(generation),
                Err(error) => {
                    warn!(%error, file = %file.display(), "cannot store the session's secret; after a restart the session lapses")
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(LOOK_INTERVAL_MS)).await;
    }
}

/// Removes the file, because the session was ended.
pub fn forget(folder: &Path) {
    // A file that stays does no harm: the next process tries in vain to end the session.
    let _ = std::fs::remove_file(folder.join(SESSION_FILE));
}

/// Writes a file that only its owner can read, in place of an existing one.
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
