//! Random operations of two mounts on one cluster, against a model that is a map of byte vectors.
//!
//! While a file is open on one mount, the other does not touch its content; after its close either may open it and must
//! see every byte (close-to-open). Names are changed by both mounts at any time.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;
use quorumfs_proto::command::{AttributeChanges, Privileges, RenameMode};
use quorumfs_proto::{FsError, InodeNumber};

use super::support::write_position;
use crate::handles::Scope;
use crate::{Filesystem, FsOptions, Handle, OpenFlags, Order, Reader};
use quorumfs_memory::{Connection, MemoryCluster};

const ROOT: InodeNumber = InodeNumber::ROOT;

#[derive(Clone, Debug)]
enum Step {
    Open {
        mount: usize,
        name: u8,
        flags: i32,
    },
    Write {
        handle: usize,
        offset: u64,
        length: usize,
    },
    Read {
        handle: usize,
        offset: u64,
        length: u32,
    },
    Sync {
        handle: usize,
    },
    Background {
        handle: usize,
        everything: bool,
    },
    Close {
        handle: usize,
    },
    Truncate {
        mount: usize,
        name: u8,
        size: u64,
    },
    Rename {
        mount: usize,
        from: u8,
        to: u8,
        mode: RenameMode,
    },
    Link {
        mount: usize,
        from: u8,
        to: u8,
    },
    Unlink {
        mount: usize,
        name: u8,
    },
    Stat {
        mount: usize,
        name: u8,
    },
    Reclaim,
    Pause,
}

fn step() -> impl Strategy<Value = Step> {
    let mount = 0usize..2;
    let name = 0u8..4;
    let handle = 0usize..6;
    let offset = prop_oneof![
        Just(0u64),
        0u64..20_000,
        (1u64 << 20) - 5000..(1 << 20) + 5000,
        0u64..3_000_000
    ];
    let length = prop_oneof![4 => 1usize..6000, 2 => 1usize..300_000, 1 => 1_000_000usize..2_200_000];
    let flags = prop_oneof![
        5 => Just(libc::O_CREAT),
        2 => Just(libc::O_CREAT | libc::O_TRUNC),
        2 => Just(libc::O_CREAT | libc::O_APPEND),
        1 => Just(libc::O_CREAT | libc::O_EXCL),
        1 => Just(0),
        1 => Just(libc::O_TRUNC),
    ];
    let mode = prop_oneof![
        3 => Just(RenameMode::Replace),
        1 => Just(RenameMode::NoReplace),
        1 => Just(RenameMode::Exchange),
    ];
    prop_oneof![
        4 => (mount.clone(), name.clone(), flags).prop_map(|(mount, name, flags)| Step::Open { mount, name, flags }),
        8 => (handle.clone(), offset.clone(), length).prop_map(|(handle, offset, length)| Step::Write { handle, offset, length }),
        6 => (handle.clone(), offset.clone(), 1u32..400_000).prop_map(|(handle, offset, length)| Step::Read { handle, offset, length }),
        2 => handle.clone().prop_map(|handle| Step::Sync { handle }),
        2 => (handle.clone(), any::<bool>()).prop_map(|(handle, everything)| Step::Background { handle, everything }),
        3 => handle.prop_map(|handle| Step::Close { handle }),
        2 => (mount.clone(), name.clone(), offset).prop_map(|(mount, name, size)| Step::Truncate { mount, name, size }),
        2 => (mount.clone(), name.clone(), name.clone(), mode)
            .prop_map(|(mount, from, to, mode)| Step::Rename { mount, from, to, mode }),
        1 => (mount.clone(), name.clone(), name.clone()).prop_map(|(mount, from, to)| Step::Link { mount, from, to }),
        2 => (mount.clone(), name.clone()).prop_map(|(mount, name)| Step::Unlink { mount, name }),
        2 => (mount, name).prop_map(|(mount, name)| Step::Stat { mount, name }),
        1 => Just(Step::Reclaim),
        2 => Just(Step::Pause),
    ]
}

struct OpenHere {
    mount: usize,
    handle: Handle,
    file: usize,
    append: bool,
}

struct World {
    cluster: Arc<MemoryCluster>,
    mounts: [Arc<Filesystem<Connection>>; 2],
    names: BTreeMap<u8, usize>,
    files: Vec<Vec<u8>>,
    open: Vec<OpenHere>,
    steps: usize,
}

fn name_bytes(name: u8) -> Vec<u8> {
    format!("name {name}").into_bytes()
}

fn model_read(bytes: &[u8], offset: u64, length: u32) -> &[u8] {
    let from = (offset as usize).min(bytes.len());
    let to = (offset as usize + length as usize).min(bytes.len());
    &bytes[from..to]
}

impl World {
    fn new() -> World {
        let cluster = MemoryCluster::new();
        let options = FsOptions {
            dirty_bytes_max: 6 << 20,
            cache_bytes: 8 << 20,
            dirty_age_ms: 20,
            lookup_grace_ms: 0,
            ..FsOptions::default()
        };
        let mounts =
            [1, 2].map(|session| Filesystem::new(cluster.connect(session), options.clone(), &Arc::default()));
        World {
            cluster,
            mounts,
            names: BTreeMap::new(),
            files: Vec::new(),
            open: Vec::new(),
            steps: 0,
        }
    }

    /// Returns the mount that may access the content of `file` now.
    fn mount_for(&self, file: usize, wanted: usize) -> usize {
        self.open
            .iter()
            .find(|open| open.file == file)
            .map_or(wanted, |open| open.mount)
    }

    fn data(&self, length: usize) -> Vec<u8> {
        (0..length)
            .map(|at| (at * 7 + self.steps * 13 + at / 251) as u8 | 1)
            .collect()
    }

    async fn step(&mut self, step: &Step) {
        self.steps += 1;
        match step.clone() {
            Step::Open { mount, name, flags } => self.open(mount, name, flags).await,
            Step::Write {
                handle,
                offset,
                length,
            } => {
                let data = self.data(length);
                let Some(open) = self.open.get(handle) else { return };
                let fs = &self.mounts[open.mount];
                let written = fs
                    .write(
                        open.handle,
                        write_position(fs, open.handle, offset),
                        Bytes::from(data.clone()),
                        Privileges::Keep,
                        Order::default(),
                    )
                    .await;
                assert_eq!(written, Ok(length as u32));
                let bytes = &mut self.files[open.file];
                let offset = if open.append { bytes.len() } else { offset as usize };
                if bytes.len() < offset + length {
                    bytes.resize(offset + length, 0);
                }
                bytes[offset..offset + length].copy_from_slice(&data);
            }
            Step::Read {
                handle,
                offset,
                length,
            } => {
                let Some(open) = self.open.get(handle) else { return };
                let read = self.mounts[open.mount]
                    .read(open.handle, offset, length, Order::default(), Reader::default())
                    .await
                    .unwrap();
                let expected = model_read(&self.files[open.file], offset, length);
                assert_eq!(read.len(), expected.len(), "length of a read at {offset}");
                assert!(read == expected, "bytes of a read at {offset}");
            }
            Step::Sync { handle } => {
                let Some(open) = self.open.get(handle) else { return };
                assert_eq!(self.mounts[open.mount].fsync(open.handle).await, Ok(()));
            }
            Step::Background { handle, everything } => {
                let Some(open) = self.open.get(handle) else { return };
                let fs = &self.mounts[open.mount];
                let scope = if everything {
                    Scope::Everything
                } else {
                    Scope::Sealed
                };
                fs.commit_in_background(&fs.open.get(open.handle).unwrap().node, scope);
            }
            Step::Close { handle } => {
                if handle < self.open.len() {
                    let open = self.open.remove(handle);
                    self.close(open).await;
                }
            }
            Step::Truncate { mount, name, size } => {
                let Some(file) = self.names.get(&name).copied() else {
                    return;
                };
                let fs = &self.mounts[self.mount_for(file, mount)];
                let inode = fs.lookup(ROOT, &name_bytes(name)).await.unwrap().inode;
                let changes = AttributeChanges {
                    size: Some(size),
                    ..AttributeChanges::default()
                };
                assert_eq!(fs.set_attributes(inode, None, changes).await.unwrap().size, size);
                self.files[file].resize(size as usize, 0);
            }
            Step::Rename {
                mount,
                from,
                to,
                mode,
            } => self.rename(mount, from, to, mode).await,
            Step::Link { mount, from, to } => {
                let Some(file) = self.names.get(&from).copied() else {
                    return;
                };
                let fs = &self.mounts[mount];
                let inode = fs.lookup(ROOT, &name_bytes(from)).await.unwrap().inode;
                let linked = fs.link(inode, ROOT, &name_bytes(to)).await;
                match self.names.entry(to) {
                    Entry::Occupied(_) => assert_eq!(linked, Err(FsError::Exists)),
                    Entry::Vacant(free) => {
                        assert_eq!(linked.unwrap().inode, inode);
                        free.insert(file);
                    }
                }
            }
            Step::Unlink { mount, name } => {
                let unlinked = self.mounts[mount].unlink(ROOT, &name_bytes(name)).await;
                let expected = self.names.remove(&name).map(|_| ()).ok_or(FsError::NotFound);
                assert_eq!(unlinked, expected);
            }
            Step::Stat { mount, name } => {
                let Some(file) = self.names.get(&name).copied() else {
                    let missing = self.mounts[mount].lookup(ROOT, &name_bytes(name)).await;
                    assert_eq!(missing, Err(FsError::NotFound));
                    return;
                };
                let fs = &self.mounts[self.mount_for(file, mount)];
                let attributes = fs.lookup(ROOT, &name_bytes(name)).await.unwrap();
                assert_eq!(attributes.size, self.files[file].len() as u64);
            }
            Step::Reclaim => self.cluster.reclaim(),
            Step::Pause => tokio::time::sleep(std::time::Duration::from_millis(1)).await,
        }
    }

    async fn open(&mut self, mount: usize, name: u8, flags: i32) {
        let known = self.names.get(&name).copied();
        let mount = known.map_or(mount, |file| self.mount_for(file, mount));
        let fs = Arc::clone(&self.mounts[mount]);
        let open_flags = OpenFlags::from(flags | libc::O_RDWR);
        let created = match flags & libc::O_CREAT {
            0 => Err(FsError::Stale),
            _ => fs.create(ROOT, &name_bytes(name), 0o644, 0, 0, open_flags).await,
        };
        let handle = if let Ok((_, opened)) = created {
            opened.handle
        } else if created == Err(FsError::Exists) {
            assert!(known.is_some() && open_flags.exclusive);
            return;
        } else {
            // Without O_CREAT, or after a failed creation, the kernel opens the existing file.
            assert_eq!(created, Err(FsError::Stale));
            match fs.lookup(ROOT, &name_bytes(name)).await {
                Ok(found) => fs.open(found.inode, open_flags).await.unwrap().handle,
                Err(error) => {
                    assert_eq!((error, known), (FsError::NotFound, None));
                    return;
                }
            }
        };
        assert!(known.is_none() || !(open_flags.exclusive && flags & libc::O_CREAT != 0));
        let file = known.unwrap_or_else(|| {
            self.files.push(Vec::new());
            self.files.len() - 1
        });
        self.names.insert(name, file);
        if open_flags.truncate {
            self.files[file].clear();
        }
        self.open.push(OpenHere {
            mount,
            handle,
            file,
            append: open_flags.append,
        });
    }

    async fn rename(&mut self, mount: usize, from: u8, to: u8, mode: RenameMode) {
        let renamed = self.mounts[mount]
            .rename(ROOT, &name_bytes(from), ROOT, &name_bytes(to), mode)
            .await
            .map(|_| ());
        let (source, target) = (self.names.get(&from).copied(), self.names.get(&to).copied());
        match (source, target, mode) {
            (None, ..) | (_, None, RenameMode::Exchange) => assert_eq!(renamed, Err(FsError::NotFound)),
            (Some(_), Some(_), RenameMode::NoReplace) => assert_eq!(renamed, Err(FsError::Exists)),
            (Some(source), Some(target), _) if source == target => assert_eq!(renamed, Ok(())),
            (Some(source), Some(target), RenameMode::Exchange) => {
                assert_eq!(renamed, Ok(()));
                self.names.insert(from, target);
                self.names.insert(to, source);
            }
            (Some(source), ..) => {
                assert_eq!(renamed, Ok(()));
                self.names.remove(&from);
                self.names.insert(to, source);
            }
        }
    }

    async fn close(&self, open: OpenHere) {
        let fs = &self.mounts[open.mount];
        assert_eq!(fs.flush(open.handle).await, Ok(()));
        assert_eq!(fs.release(open.handle).await, Ok(()));
    }

    /// Closes everything and checks that both mounts see everything and no inode is left over.
    async fn finish(mut self) {
        for open in std::mem::take(&mut self.open) {
            self.close(open).await;
        }
        for fs in &self.mounts {
            for (name, file) in &self.names {
                let found = fs.lookup(ROOT, &name_bytes(*name)).await.unwrap();
                let opened = fs
                    .open(found.inode, OpenFlags::from(libc::O_RDONLY))
                    .await
                    .unwrap();
                let read = fs
                    .read(opened.handle, 0, 8 << 20, Order::default(), Reader::default())
                    .await
                    .unwrap();
                assert!(read == self.files[*file], "{name} is the same everywhere");
                fs.release(opened.handle).await.unwrap();
            }
            let root = fs.open_directory(ROOT).await.unwrap();
            let listed = fs
                .read_directory(root, 0, quorumfs_proto::query::EntryDetail::Name, 1 << 20)
                .await
                .unwrap();
            assert_eq!(listed.len(), self.names.len() + 2);
            fs.flush_all().await.unwrap();
            assert_eq!(fs.dirty.bytes(), 0);
            assert!(fs.open.is_empty());
        }
        self.cluster.reclaim();
        let files: std::collections::BTreeSet<usize> = self.names.values().copied().collect();
        assert_eq!(
            self.cluster.inode_count(),
            files.len() + 1,
            "unlinked files are removed"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn random_operations_of_two_mounts_match_the_model(steps in prop::collection::vec(step(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let run = async {
            let mut world = World::new();
            for step in &steps {
                world.step(step).await;
            }
            world.finish().await;
        };
        let done = runtime.block_on(async { tokio::time::timeout(std::time::Duration::from_secs(60), run).await });
        prop_assert!(done.is_ok(), "a task never ends");
    }
}
