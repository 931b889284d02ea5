//! Who this node is: the data folder's identity.
//!
//! A data folder holds slot, incarnation and, once the cluster was made, the cluster's id and first members. The
//! incarnation is drawn when the folder is first used, so a folder that was wiped is a new voter, never an old one
//! that has forgotten its vote (design, Rule identity). The folder is locked as long as a process uses it.
//!
//! Knows nothing of the consensus; it only says whether there may be one.

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use quorumfs_proto::{Addresses, ClusterId, Member, NodeId};
use serde::{Deserialize, Serialize};

/// The version of the folder's layout.
const FOLDER_VERSION: u32 = 1;
const IDENTITY_FILE: &str = "identity.toml";
const LOCK_FILE: &str = "lock";

/// Why a data folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// The disk says no.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was being done.
        what: &'static str,
        /// To what.
        path: PathBuf,
        /// What the disk said.
        source: std::io::Error,
    },
    /// Another process uses it.
    #[error("data folder {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// It belongs to another slot.
    #[error("data folder {} belongs to slot {found}, but this node was started with --slot {wanted}; give it its own folder", path.display())]
    OtherSlot {
        /// The folder.
        path: PathBuf,
        /// The slot it belongs to.
        found: u16,
        /// The slot configured.
        wanted: u16,
    },
    /// It has content but no identity.
    #[error("data folder {} is not empty but holds no {IDENTITY_FILE}; it is not a QuorumFS data folder, or it is damaged", .0.display())]
    NoIdentity(PathBuf),
    /// The identity cannot be read.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
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
    /// Whether the folder was another incarnation's before; such a node joins, it never makes a cluster.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    reborn: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cluster: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    members: Vec<MemberEntry>,
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
    /// Its name.
    pub cluster: ClusterId,
    /// The members it was made with, this node among them; none where it was taken in later. Changes are in the
    /// consensus, not here.
    pub founders: Vec<Member>,
}

/// A locked data folder and its identity.
#[derive(Debug)]
pub struct DataFolder {
    path: PathBuf,
    id: NodeId,
    reborn: bool,
    membership: Mutex<Option<Membership>>,
    _lock: nix::fcntl::Flock<File>,
}

impl DataFolder {
    /// Opens the folder, making it and its identity if it does not exist or is empty.
    pub fn open(path: &Path, slot: u16) -> Result<DataFolder, IdentityError> {
        let io = |what, at: &Path| {
            let at = at.to_path_buf();
            move |source| IdentityError::Io {
                what,
                path: at,
                source,
            }
        };
        std::fs::create_dir_all(path).map_err(io("make data folder", path))?;
        let lock_path = path.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&lock_path)
            .map_err(io("open", &lock_path))?;
        let lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock)
            .map_err(|_| IdentityError::InUse(path.to_path_buf()))?;

        let file_path = path.join(IDENTITY_FILE);
        let (id, reborn, membership) = match std::fs::read_to_string(&file_path) {
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
                let incarnation = rand::random_range(1..=u64::MAX);
                let id = NodeId { slot, incarnation };
                write(path, id, false, None).map_err(io("write identity in", path))?;
                (id, false, None)
            }
            Err(error) => return Err(io("read", &file_path)(error)),
        };
        if id.slot != slot {
            return Err(IdentityError::OtherSlot {
                path: path.to_path_buf(),
                found: id.slot,
                wanted: slot,
            });
        }
        Ok(DataFolder {
            path: path.to_path_buf(),
            id,
            reborn,
            membership: Mutex::new(membership),
            _lock: lock,
        })
    }

    /// Who this node is.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Where the folder is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it holds nothing: no earlier incarnation's content, and no cluster's.
    pub fn is_fresh(&self) -> bool {
        !self.reborn && self.membership.lock().is_none()
    }

    /// Gives the incarnation up, for what it had promised to remember is lost: sets `lost` (names in the folder) aside
    /// and writes a new identity that belongs to no cluster. Content stays. Nothing else may use the folder; open it
    /// anew afterwards.
    ///
    /// # Errors
    /// Where the disk says no; what was moved before is aside, and the node may try again.
    pub fn renounce(&self, lost: &[&str]) -> Result<(), IdentityError> {
        let io = |what, at: &Path| {
            let at = at.to_path_buf();
            move |source| IdentityError::Io {
                what,
                path: at,
                source,
            }
        };
        let aside = self.path.join(format!("damaged-{:016x}", self.id.incarnation));
        std::fs::create_dir_all(&aside).map_err(io("make", &aside))?;
        for name in lost {
            let from = self.path.join(name);
            match std::fs::rename(&from, aside.join(name)) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(io("set aside", &from)(error)),
            }
        }
        let incarnation = rand::random_range(1..=u64::MAX);
        let slot = self.id.slot;
        write(&self.path, NodeId { slot, incarnation }, true, None)
            .map_err(io("write identity in", &self.path))
    }

    /// The cluster it belongs to; `None`: it never held a vote or a log entry.
    pub fn membership(&self) -> Option<Membership> {
        self.membership.lock().clone()
    }

    /// Binds the folder to a cluster for ever, durably.
    pub fn bind(&self, membership: Membership) -> Result<(), IdentityError> {
        let mut held = self.membership.lock();
        write(&self.path, self.id, self.reborn, Some(&membership)).map_err(|source| IdentityError::Io {
            what: "write identity in",
            path: self.path.clone(),
            source,
        })?;
        *held = Some(membership);
        Ok(())
    }
}

fn temporary_name() -> String {
    format!("{IDENTITY_FILE}.new")
}

fn write(folder: &Path, id: NodeId, reborn: bool, membership: Option<&Membership>) -> std::io::Result<()> {
    let file = IdentityFile {
        version: FOLDER_VERSION,
        slot: id.slot,
        incarnation: format!("{:016x}", id.incarnation),
        reborn,
        cluster: membership.map(|m| m.cluster.to_string()),
        members: membership
            .map(|m| m.founders.iter().map(entry_of).collect())
            .unwrap_or_default(),
    };
    let text = toml::to_string(&file).map_err(std::io::Error::other)?;
    let temporary = folder.join(temporary_name());
    let mut out = File::create(&temporary)?;
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

fn parse(text: &str) -> Result<(NodeId, bool, Option<Membership>), String> {
    let file: IdentityFile = toml::from_str(text).map_err(|e| e.to_string())?;
    if file.version != FOLDER_VERSION {
        return Err(format!(
            "folder version {} is not known; this program knows {FOLDER_VERSION}",
            file.version
        ));
    }
    let number = |text: &str| u64::from_str_radix(text, 16).map_err(|e| format!("incarnation {text:?}: {e}"));
    let id = NodeId {
        slot: file.slot,
        incarnation: number(&file.incarnation)?,
    };
    let Some(cluster) = file.cluster else {
        return Ok((id, file.reborn, None));
    };
    let cluster =
        ClusterId::from_hex(&cluster).ok_or_else(|| format!("cluster {cluster:?} is not 32 hex digits"))?;
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
    Ok((id, file.reborn, Some(Membership { cluster, founders })))
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
        let reborn = DataFolder::open(dir.path(), 1).unwrap();
        assert_ne!(reborn.id(), first);
        assert_eq!(reborn.membership(), None);
        assert!(!reborn.is_fresh(), "it must not make a cluster");
        assert!(dir.path().join("content/file").exists());
        assert!(!dir.path().join("wal").exists());
        let aside = dir.path().join(format!("damaged-{:016x}", first.incarnation));
        assert_eq!(std::fs::read_to_string(aside.join("wal/file")).unwrap(), "wal");
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
