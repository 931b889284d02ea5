//! The identity of this node, stored in its data folder.
//!
//! A data folder has the slot, the incarnation and, once the cluster was created, the cluster's id and first members.
//! The incarnation is drawn when the folder is first used, so a wiped folder is a new voter, never an old one that has
//! lost its vote. The folder is locked while a process uses it.
//!
//! This module does not know the consensus; it only decides whether there may be one.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use quorumfs_proto::{Addresses, ClusterId, Member, NodeId};
use serde::{Deserialize, Serialize};

use crate::private_files::{FILE_MODE, FOLDER_MODE, make_private};

/// The version of the folder's layout.
const FOLDER_VERSION: u32 = 2;
/// The oldest version that is converted: its metadata are in a plain redb file (version 2 has them in blocks with
/// checksums, which a program of version 1 would take for damage).
const FOLDER_VERSION_MIN: u32 = 1;
const IDENTITY_FILE: &str = "identity.toml";
const LOCK_FILE: &str = "lock";

/// Why a data folder cannot be used. Each message includes its cause.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A system call failed.
    #[error("cannot {what} {}: {error}", path.display())]
    Io {
        /// The action that failed.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The error of the system.
        error: std::io::Error,
    },
    /// Another process uses the folder.
    #[error("data folder {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// The folder belongs to another slot.
    #[error("data folder {} belongs to slot {found}, but this node was started with --slot {wanted}; give it its own folder", path.display())]
    OtherSlot {
        /// Path of the folder.
        path: PathBuf,
        /// The slot it belongs to.
        found: u16,
        /// The slot configured.
        wanted: u16,
    },
    /// The folder has content but no identity.
    #[error("data folder {} is not empty but holds no {IDENTITY_FILE}; it is not a QuorumFS data folder, or it is damaged", .0.display())]
    NoIdentity(PathBuf),
    /// The identity cannot be read.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// Path of the identity file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct IdentityFile {
    version: u32,
    slot: u16,
    incarnation: String,
    /// Whether the folder belonged to another incarnation before; such a node joins, it never creates a cluster.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    reborn: bool,
    /// Whether this incarnation has had a log: if the log is empty later, it has lost its promises.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    took_part: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    /// The entry at which a majority had other metadata than this incarnation: its metadata must not be used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    contradicted_at: Option<u64>,
    /// What the previous incarnation left and has not been set aside yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    leaves_behind: Option<Remains>,
    /// Clusters that lost their majority and from which this one was created by hand.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    replaces: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    members: Vec<MemberEntry>,
}

/// Files of an incarnation that gave itself up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remains {
    /// Names in the folder.
    names: Vec<String>,
    /// The sub-folder to which they are moved.
    to: String,
}

/// The contents of the identity file.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Identity {
    id: NodeId,
    reborn: bool,
    took_part: bool,
    contradicted_at: Option<u64>,
    leaves_behind: Option<Remains>,
    replaces: Vec<ClusterId>,
    membership: Option<Membership>,
    /// The version of the file that was read.
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemberEntry {
    slot: u16,
    incarnation: String,
    grpc: String,
    http: String,
}

/// The cluster a data folder belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// The cluster's id.
    pub cluster: ClusterId,
    /// The members with which it was created, including this node; none if the node was accepted later. Later changes
    /// are in the consensus, not here.
    pub founders: Vec<Member>,
}

/// A locked data folder and its identity.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    id: NodeId,
    // Locked for reading, and while the file is written.
    identity: Mutex<Identity>,
    _lock: nix::fcntl::Flock<File>,
}

impl DataFolder {
    /// Opens the folder; creates it and its identity if it does not exist or is empty.
    ///
    /// # Errors
    /// [`IdentityError`].
    pub fn open(path: &Path, slot: u16) -> Result<DataFolder, IdentityError> {
        let io = |what, at: &Path| {
            let at = at.to_path_buf();
            move |error| IdentityError::Io {
                what,
                path: at,
                error,
            }
        };
        make_folder(path).map_err(io("create data folder", path))?;
        let lock_path = path.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(FILE_MODE)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock)
            .map_err(|_| IdentityError::InUse(path.to_path_buf()))?;
        make_private(path);

        let file_path = path.join(IDENTITY_FILE);
        let mut identity = match std::fs::read_to_string(&file_path) {
            Ok(text) => parse(&text).map_err(|reason| IdentityError::Malformed {
                path: file_path.clone(),
                reason,
            })?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let entries = std::fs::read_dir(path).map_err(io("list", path))?;
                for entry in entries {
                    let name = entry.map_err(io("list", path))?.file_name();
                    let ours = name == LOCK_FILE || name == "lost+found" || name == temporary_name().as_str();
                    if !ours {
                        return Err(IdentityError::NoIdentity(path.to_path_buf()));
                    }
                }
                let identity = Identity::new(slot);
                write(path, &identity).map_err(io("write identity in", path))?;
                identity
            }
            Err(error) => return Err(io("read", &file_path)(error)),
        };
        if identity.id.slot != slot {
            return Err(IdentityError::OtherSlot {
                path: path.to_path_buf(),
                found: identity.id.slot,
                wanted: slot,
            });
        }
        let remains = identity.leaves_behind.take();
        if let Some(remains) = &remains {
            set_aside(path, remains)?;
        }
        // First of all changes: from then on no older program misreads the folder.
        if remains.is_some() || identity.version != FOLDER_VERSION {
            identity.version = FOLDER_VERSION;
            write(path, &identity).map_err(io("write identity in", path))?;
        }
        Ok(DataFolder {
            path: path.to_path_buf(),
            id: identity.id,
            identity: Mutex::new(identity),
            _lock: lock,
        })
    }

    /// Returns the id of this node.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Returns the path of the folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the folder has no content of an earlier incarnation and no cluster.
    pub fn is_fresh(&self) -> bool {
        let identity = self.identity.lock();
        !identity.reborn && identity.membership.is_none()
    }

    /// Whether this incarnation has had a log ([`DataFolder::note_took_part`]).
    pub fn took_part(&self) -> bool {
        self.identity.lock().took_part
    }

    /// Records that this incarnation has a log. Durable when it returns.
    pub fn note_took_part(&self) -> Result<(), IdentityError> {
        self.change(|identity| identity.took_part = true)
    }

    /// Returns the entry at which a majority had other metadata ([`DataFolder::note_contradicted`]).
    pub fn contradicted_at(&self) -> Option<u64> {
        self.identity.lock().contradicted_at
    }

    /// Records that a majority has other metadata at entry `index`: this incarnation's metadata must not be used again
    /// until they are rebuilt. Durable when it returns.
    pub fn note_contradicted(&self, index: u64) -> Result<(), IdentityError> {
        self.change(|identity| identity.contradicted_at = Some(index))
    }

    /// Gives up the incarnation, because its promises are lost: writes a new identity without a cluster, and sets
    /// `lost` (names in the folder) aside. Content stays. Nothing else may use the folder; it must be opened again
    /// afterwards.
    ///
    /// The identity is written first: a crash in between never leaves the old identity without its log, so that it
    /// could vote. Files that are not set aside then are set aside when the folder is opened next.
    ///
    /// # Errors
    /// [`IdentityError::Io`]; the node may try again.
    pub fn renounce(&self, lost: &[&str]) -> Result<(), IdentityError> {
        let remains = Remains {
            names: lost.iter().map(|name| name.to_string()).collect(),
            to: format!("damaged-{:016x}", self.id.incarnation),
        };
        let next = Identity {
            reborn: true,
            leaves_behind: Some(remains),
            ..Identity::new(self.id.slot)
        };
        self.change(|identity| *identity = next)
    }

    /// Returns the cluster of the folder; `None` if it has never had a vote or a log entry.
    pub fn membership(&self) -> Option<Membership> {
        self.identity.lock().membership.clone()
    }

    /// Whether its cluster was created by hand from `cluster`, which had lost its majority.
    pub fn replaces(&self, cluster: ClusterId) -> bool {
        self.identity.lock().replaces.contains(&cluster)
    }

    /// Moves the folder to `cluster`, from the cluster it belonged to, which has lost its majority. Durable.
    pub fn replace(&self, cluster: ClusterId) -> Result<(), IdentityError> {
        self.change(|identity| {
            let next = Membership {
                cluster,
                founders: Vec::new(),
            };
            // The majority that decided so was that of the old cluster, which is lost.
            identity.contradicted_at = None;
            let before = identity.membership.replace(next);
            identity.replaces.extend(before.map(|before| before.cluster));
        })
    }

    /// Binds the folder to a cluster for ever, durably.
    pub fn bind(&self, membership: Membership) -> Result<(), IdentityError> {
        self.change(|identity| identity.membership = Some(membership))
    }

    fn change(&self, change: impl FnOnce(&mut Identity)) -> Result<(), IdentityError> {
        let mut identity = self.identity.lock();
        let mut next = identity.clone();
        change(&mut next);
        write(&self.path, &next).map_err(|error| IdentityError::Io {
            what: "write identity in",
            path: self.path.clone(),
            error,
        })?;
        *identity = next;
        Ok(())
    }
}

impl Identity {
    /// Returns a new identity without a cluster.
    fn new(slot: u16) -> Identity {
        let incarnation = rand::random_range(1..=u64::MAX);
        Identity {
            id: NodeId { slot, incarnation },
            reborn: false,
            took_part: false,
            contradicted_at: None,
            leaves_behind: None,
            replaces: Vec::new(),
            membership: None,
            version: FOLDER_VERSION,
        }
    }
}

/// Moves the files of an earlier incarnation away; missing ones were moved before. Durable when it returns.
fn set_aside(folder: &Path, remains: &Remains) -> Result<(), IdentityError> {
    let io = |what, path: &Path| {
        let path = path.to_path_buf();
        move |error| IdentityError::Io { what, path, error }
    };
    let to = folder.join(&remains.to);
    make_folder(&to).map_err(io("create", &to))?;
    for name in &remains.names {
        let from = folder.join(name);
        match std::fs::rename(&from, to.join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(io("set aside", &from)(error));
            }
            _ => {}
        }
    }
    for changed in [&to, folder] {
        File::open(changed)
            .and_then(|changed| changed.sync_all())
            .map_err(io("flush", changed))?;
    }
    Ok(())
}

/// Creates a folder for this user alone; its parents have the usual permissions.
fn make_folder(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(FOLDER_MODE)
        .create(path)
}

fn temporary_name() -> String {
    format!("{IDENTITY_FILE}.new")
}

fn write(folder: &Path, identity: &Identity) -> std::io::Result<()> {
    let membership = identity.membership.as_ref();
    let file = IdentityFile {
        version: FOLDER_VERSION,
        slot: identity.id.slot,
        incarnation: format!("{:016x}", identity.id.incarnation),
        reborn: identity.reborn,
        took_part: identity.took_part,
        contradicted_at: identity.contradicted_at,
        leaves_behind: identity.leaves_behind.clone(),
        replaces: identity.replaces.iter().map(ClusterId::to_string).collect(),
        cluster: membership.map(|m| m.cluster.to_string()),
        members: membership
            .map(|m| m.founders.iter().map(entry_of).collect())
            .unwrap_or_default(),
    };
    let text = toml::to_string(&file).map_err(std::io::Error::other)?;
    let temporary = folder.join(temporary_name());
    let mut out = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(FILE_MODE)
        .open(&temporary)?;
    out.write_all(text.as_bytes())?;
    out.sync_all()?;
    std::fs::rename(&temporary, folder.join(IDENTITY_FILE))?;
    File::open(folder)?.sync_all()
}

fn entry_of(member: &Member) -> MemberEntry {
    MemberEntry {
        slot: member.id.slot,
        incarnation: format!("{:016x}", member.id.incarnation),
        grpc: member.addresses.grpc.clone(),
        http: member.addresses.http.clone(),
    }
}

fn parse(text: &str) -> Result<Identity, String> {
    let file: IdentityFile = toml::from_str(text).map_err(|e| e.to_string())?;
    if !(FOLDER_VERSION_MIN..=FOLDER_VERSION).contains(&file.version) {
        return Err(format!(
            "folder version {} is not known; this program knows {FOLDER_VERSION_MIN} to {FOLDER_VERSION}",
            file.version
        ));
    }
    let cluster_of = |text: &String| {
        ClusterId::from_hex(text).ok_or_else(|| format!("cluster {text:?} is not 32 hex digits"))
    };
    let number = |text: &str| u64::from_str_radix(text, 16).map_err(|e| format!("incarnation {text:?}: {e}"));
    let id = NodeId {
        slot: file.slot,
        incarnation: number(&file.incarnation)?,
    };
    let mut identity = Identity {
        id,
        reborn: file.reborn,
        took_part: file.took_part,
        contradicted_at: file.contradicted_at,
        leaves_behind: file.leaves_behind,
        replaces: file.replaces.iter().map(cluster_of).collect::<Result<_, _>>()?,
        membership: None,
        version: file.version,
    };
    let Some(cluster) = file.cluster else {
        return Ok(identity);
    };
    let cluster = cluster_of(&cluster)?;
    let mut founders = Vec::new();
    for entry in file.members {
        founders.push(Member {
            id: NodeId {
                slot: entry.slot,
                incarnation: number(&entry.incarnation)?,
            },
            addresses: Addresses {
                grpc: entry.grpc,
                http: entry.http,
            },
        });
    }
    identity.membership = Some(Membership { cluster, founders });
    Ok(identity)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_identity_and_refuses_another_slot() {
        let dir = tempfile::tempdir().unwrap();
        let folder = DataFolder::open(dir.path(), 2).unwrap();
        assert!(matches!(
            DataFolder::open(dir.path(), 2),
            Err(IdentityError::InUse(_))
        ));
        let id = folder.id();
        let member = Member {
            id,
            addresses: Addresses {
                grpc: "a:1".into(),
                http: "a:2".into(),
            },
        };
        let membership = Membership {
            cluster: ClusterId([7; 16]),
            founders: vec![member],
        };
        folder.bind(membership.clone()).unwrap();
        drop(folder);
        let again = DataFolder::open(dir.path(), 2).unwrap();
        assert_eq!((again.id(), again.membership()), (id, Some(membership)));
        drop(again);
        assert!(matches!(
            DataFolder::open(dir.path(), 1),
            Err(IdentityError::OtherSlot {
                found: 2,
                wanted: 1,
                ..
            })
        ));
    }

    #[test]
    fn what_a_majority_contradicts_is_known_after_a_restart_until_the_node_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let folder = DataFolder::open(dir.path(), 1).unwrap();
        assert_eq!(folder.contradicted_at(), None);
        folder.note_contradicted(17).unwrap();
        drop(folder);
        let folder = DataFolder::open(dir.path(), 1).unwrap();
        assert_eq!(folder.contradicted_at(), Some(17));
        folder.renounce(&[]).unwrap();
        assert_eq!(folder.contradicted_at(), None);
        drop(folder);
        assert_eq!(DataFolder::open(dir.path(), 1).unwrap().contradicted_at(), None);
    }

    #[test]
    fn who_renounces_is_another_and_keeps_what_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let folder = DataFolder::open(dir.path(), 1).unwrap();
        assert!(folder.is_fresh());
        let first = folder.id();
        folder
            .bind(Membership {
                cluster: ClusterId([7; 16]),
                founders: vec![],
            })
            .unwrap();
        for name in ["wal", "content"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("file"), name).unwrap();
        }
        folder.renounce(&["wal", "metadata.redb"]).unwrap();
        drop(folder);
        // A kill at this point leaves the new identity, and the next opening sets the old files aside.
        let text = std::fs::read_to_string(dir.path().join(IDENTITY_FILE)).unwrap();
        let written = parse(&text).unwrap();
        assert_ne!(written.id, first);
        assert!(written.leaves_behind.is_some());
        assert!(dir.path().join("wal").exists());
        let reborn = DataFolder::open(dir.path(), 1).unwrap();
        assert_ne!(reborn.id(), first);
        assert_eq!(reborn.membership(), None);
        assert!(!reborn.took_part());
        assert!(!reborn.is_fresh(), "it must not make a cluster");
        assert!(dir.path().join("content/file").exists());
        assert!(!dir.path().join("wal").exists());
        let aside = dir.path().join(format!("damaged-{:016x}", first.incarnation));
        assert_eq!(std::fs::read_to_string(aside.join("wal/file")).unwrap(), "wal");
        // Once: the new incarnation's log is left in place.
        let second = reborn.id();
        reborn.note_took_part().unwrap();
        std::fs::create_dir(dir.path().join("wal")).unwrap();
        drop(reborn);
        let again = DataFolder::open(dir.path(), 1).unwrap();
        assert_eq!((again.id(), again.took_part()), (second, true));
        assert!(dir.path().join("wal").exists());
    }

    #[test]
    fn a_wiped_folder_is_a_new_incarnation_and_a_foreign_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let first = DataFolder::open(dir.path(), 1).unwrap().id();
        std::fs::remove_file(dir.path().join(IDENTITY_FILE)).unwrap();
        assert_ne!(
            DataFolder::open(dir.path(), 1).unwrap().id().incarnation,
            first.incarnation
        );
        std::fs::remove_file(dir.path().join(IDENTITY_FILE)).unwrap();
        std::fs::write(dir.path().join("holiday.jpg"), b"x").unwrap();
        assert!(matches!(
            DataFolder::open(dir.path(), 1),
            Err(IdentityError::NoIdentity(_))
        ));
    }
}
