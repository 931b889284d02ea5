//! The bytes of write requests that have been read from the kernel and wait for the filesystem.
//!
//! A request must be read before it is known to be a write, and then the kernel does not keep its bytes. A thread that
//! kept them while it waits would block all later requests, and the death of the program. So the first
//! [`WAITING_BYTES_MAX`] wait in memory, and further ones in an unnamed file on this machine's disk, until it is their
//! turn.
//!
//! Contract: memory for waiting bytes is bounded, whatever the number of writing programs, and no thread waits for
//! space. Programs that are blocked cannot send more, so the file is bounded by their number; [`FILE_BYTES_MAX`] bounds
//! it in any case. If there is no such file (no disk, no space) or it is full, bytes wait in memory after all: the
//! bound does not hold then, and the log says so once.
//!
//! Invariants: a slot of the file belongs to one [`Payload`] from its writing until that is dropped. The file is opened
//! before anything is mounted and is never on a FUSE filesystem, so this process never waits for its own mount.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use nix::sys::statfs::{FsType, fstatfs};
use parking_lot::Mutex;
use quorumfs_proto::FsError;
use quorumfs_proto::limits::CHUNK_BYTES_MAX;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most bytes of write requests that wait in memory: a MiB for each of as many programs as saturate any connection.
pub const WAITING_BYTES_MAX: usize = 32 << 20;
/// Most bytes in the file: more than programs blocked in writes of a MiB at once need on any known machine.
const FILE_BYTES_MAX: u64 = 8 << 30;
/// A write request has at most the bytes of one chunk.
const SLOT_BYTES: u64 = CHUNK_BYTES_MAX as u64;

/// Folders for the unnamed file; a file in memory is useless, and so is one that waits for another machine or this
/// process.
const FOLDERS: [&str; 3] = ["/var/tmp", "/var/cache", "/tmp"];
const TMPFS: FsType = FsType(0x0102_1994);
const RAMFS: FsType = FsType(0x8584_58f6_u32 as _);
const FUSE: FsType = FsType(0x6573_5546);
const NFS: FsType = FsType(0x6969);
const CIFS: FsType = FsType(0xff53_4d42_u32 as _);

/// The waiting payloads; see the module documentation. Clones share it.
#[derive(Clone, Debug)]
pub struct WaitingPayloads {
    memory: Arc<Semaphore>,
    file: Option<Arc<Slots>>,
    /// Whether it was logged that the bound does not hold.
    reported: Arc<AtomicBool>,
}

impl WaitingPayloads {
    /// Makes an empty set of payloads.
    pub fn new() -> WaitingPayloads {
        WaitingPayloads::bounded(
            WAITING_BYTES_MAX,
            FOLDERS.iter().find_map(|folder| open(Path::new(folder))),
        )
    }

    fn bounded(memory_bytes_max: usize, file: Option<File>) -> WaitingPayloads {
        WaitingPayloads {
            memory: Arc::new(Semaphore::new(memory_bytes_max)),
            file: file.map(|file| Arc::new(Slots::new(file))),
            reported: Arc::default(),
        }
    }

    /// Stores a request's bytes; never waits for other requests.
    pub fn take(&self, data: &[u8]) -> Payload {
        let bytes = data.len() as u32;
        let memory = Arc::clone(&self.memory);
        let storage = match Arc::clone(&self.memory).try_acquire_many_owned(bytes) {
            Ok(permit) => Storage::Memory(Bytes::copy_from_slice(data), Some(permit)),
            Err(_) => match self.store_in_file(data) {
                Ok(slot) => Storage::File(slot),
                Err(error) => {
                    if !self.reported.swap(true, Ordering::Relaxed) {
                        tracing::warn!(%error, "writes that wait for the cluster use more memory than the bound: there is no file on disk for them");
                    }
                    Storage::Memory(Bytes::copy_from_slice(data), None)
                }
            },
        };
        Payload {
            storage,
            bytes,
            memory,
        }
    }

    fn store_in_file(&self, data: &[u8]) -> io::Result<Slot> {
        let slots = self.file.as_ref().ok_or_else(|| {
            io::Error::other(format!(
                "no folder of {} is on a disk of this machine",
                FOLDERS.join(", ")
            ))
        })?;
        let slot = Slots::take(slots)?;
        slots.file.write_all_at(data, slot.offset())?;
        Ok(slot)
    }
}

/// The bytes of one write request.
#[derive(Debug)]
pub struct Payload {
    storage: Storage,
    bytes: u32,
    memory: Arc<Semaphore>,
}

#[derive(Debug)]
enum Storage {
    /// In memory, with its share of the bound; without one if there was no alternative.
    Memory(Bytes, Option<OwnedSemaphorePermit>),
    File(Slot),
}

impl Payload {
    /// Gives the bytes to `write` when there is space for them in memory, in order of arrival. They count as waiting
    /// until `write` is done.
    pub async fn pass_to<Writing, T>(self, write: impl FnOnce(Bytes) -> Writing) -> Result<T, FsError>
    where
        Writing: Future<Output = Result<T, FsError>>,
    {
        let (bytes, _permit) = self.bytes().await?;
        write(bytes).await
    }

    /// Returns the bytes with their share of the bound.
    ///
    /// # Errors
    /// [`FsError::Io`] if the disk cannot read them.
    async fn bytes(self) -> Result<(Bytes, Option<OwnedSemaphorePermit>), FsError> {
        let slot = match self.storage {
            Storage::Memory(bytes, permit) => return Ok((bytes, permit)),
            Storage::File(slot) => slot,
        };
        let permit = self.memory.acquire_many_owned(self.bytes).await.ok();
        let length = self.bytes as usize;
        let read = tokio::task::spawn_blocking(move || slot.read(length)).await;
        match read.map_err(io::Error::other).flatten() {
            Ok(bytes) => Ok((bytes, permit)),
            Err(error) => {
                tracing::error!(%error, bytes = length, "cannot read the bytes of a write back from the disk; the write fails");
                Err(FsError::Io)
            }
        }
    }
}

/// A file as an array of slots for one payload each.
#[derive(Debug)]
struct Slots {
    file: File,
    state: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    /// The free slots below `end`.
    free: Vec<u64>,
    end: u64,
}

impl Slots {
    fn new(file: File) -> Slots {
        Slots {
            file,
            state: Mutex::default(),
        }
    }

    fn take(slots: &Arc<Slots>) -> io::Result<Slot> {
        let mut used = slots.state.lock();
        let number = match used.free.pop() {
            Some(number) => number,
            None if used.end < FILE_BYTES_MAX / SLOT_BYTES => {
                used.end += 1;
                used.end - 1
            }
            None => {
                return Err(io::Error::other(format!(
                    "{FILE_BYTES_MAX} bytes wait on disk already"
                )));
            }
        };
        Ok(Slot {
            slots: Arc::clone(slots),
            number,
        })
    }

    fn give_back(&self, number: u64) {
        let mut used = self.state.lock();
        used.free.push(number);
        if used.free.len() as u64 == used.end {
            *used = Used::default();
            // Under the lock, so no write is in progress. If it fails, the file only keeps its size.
            let _ = self.file.set_len(0);
        }
    }
}

/// One slot of the file.
#[derive(Debug)]
struct Slot {
    slots: Arc<Slots>,
    number: u64,
}

impl Slot {
    fn offset(&self) -> u64 {
        self.number * SLOT_BYTES
    }

    fn read(&self, length: usize) -> io::Result<Bytes> {
        let mut bytes = vec![0; length];
        self.slots.file.read_exact_at(&mut bytes, self.offset())?;
        Ok(Bytes::from(bytes))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.slots.give_back(self.number);
    }
}

/// Opens an unnamed file in `folder`, if that is on a disk of this machine.
fn open(folder: &Path) -> Option<File> {
    let file = tempfile::tempfile_in(folder).ok()?;
    let kind = fstatfs(&file).ok()?.filesystem_type();
    (![TMPFS, RAMFS, FUSE, NFS, CIFS].contains(&kind)).then_some(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt as _;

    const MIB: usize = 1 << 20;

    fn payload(number: u8) -> Vec<u8> {
        vec![number; MIB]
    }

    #[tokio::test]
    async fn payloads_beyond_the_memory_limit_wait_on_disk_and_return_in_order() {
        let payloads = WaitingPayloads::bounded(2 * MIB, Some(tempfile::tempfile().unwrap()));
        let file = Arc::clone(payloads.file.as_ref().unwrap());
        let mut waiting: Vec<Payload> = (0..5).map(|number| payloads.take(&payload(number))).collect();
        assert_eq!(file.state.lock().end, 3, "two in memory");
        let last = waiting.split_off(2);
        let mut held = Vec::new();
        for (number, payload_taken) in waiting.into_iter().enumerate() {
            let (bytes, permit) = payload_taken.bytes().await.unwrap();
            assert_eq!(bytes, payload(number as u8));
            held.push(permit);
        }
        let mut later = Vec::new();
        for payload_taken in last {
            let mut reading = Box::pin(payload_taken.bytes());
            assert!(reading.as_mut().now_or_never().is_none(), "there is no room");
            later.push(reading);
        }
        for (number, reading) in later.into_iter().enumerate() {
            drop(held.remove(0));
            let (bytes, permit) = reading.await.unwrap();
            assert_eq!(bytes, payload(number as u8 + 2));
            held.push(permit);
        }
        assert_eq!(file.state.lock().end, 0, "nothing waits on disk");
        assert_eq!(file.file.metadata().unwrap().len(), 0);
    }

    #[tokio::test]
    async fn a_dropped_payload_frees_its_slot() {
        let payloads = WaitingPayloads::bounded(MIB, Some(tempfile::tempfile().unwrap()));
        let file = Arc::clone(payloads.file.as_ref().unwrap());
        let first = payloads.take(&payload(1));
        let second = payloads.take(&payload(2));
        let third = payloads.take(&payload(3));
        drop(second);
        assert_eq!(file.state.lock().free, [0]);
        let fourth = payloads.take(&payload(4));
        drop(first);
        let (bytes, _permit) = third.bytes().await.unwrap();
        assert_eq!(bytes, payload(3));
        drop(fourth);
        assert_eq!(file.state.lock().end, 0);
    }

    #[tokio::test]
    async fn without_a_disk_nothing_is_lost() {
        let payloads = WaitingPayloads::bounded(MIB, None);
        let both = [payloads.take(&payload(1)), payloads.take(&payload(2))];
        for (taken, number) in both.into_iter().zip(1..) {
            assert_eq!(taken.bytes().await.unwrap().0, payload(number));
        }
    }
}
