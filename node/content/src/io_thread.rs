//! The thread that writes and flushes for its callers. One flush serves all puts that arrived during the previous one.
//!
//! Puts are admitted by bytes ([`PUT_QUEUE_BYTES_MAX`]) before they enter the queue, so it is bounded.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread::JoinHandle;

use mea::oneshot;
use mea::semaphore::{OwnedSemaphorePermit, Semaphore};

use super::error::ContentError;
use super::writer::SegmentWriter;
use quorumfs_proto::Chunk;

/// Most bytes of chunks in the queue: about a second of work for a slow disk, and more than one flush can use.
const PUT_QUEUE_BYTES_MAX: usize = 64 << 20;
/// Most bytes written before a flush, so that the first of many puts does not wait for all of them.
const FLUSH_BYTES_MAX: usize = 16 << 20;

enum Job {
    Put {
        chunk: Chunk,
        // Returned when the put is answered.
        admission: OwnedSemaphorePermit,
        done: oneshot::Sender<Result<(), ContentError>>,
    },
    Flush {
        done: Option<oneshot::Sender<Result<(), ContentError>>>,
    },
}

/// The thread and its queue.
#[derive(Debug)]
pub struct IoThread {
    // `None` only while the value is being dropped.
    queue: Option<mpsc::Sender<Job>>,
    admission: Arc<Semaphore>,
    thread: Option<JoinHandle<()>>,
    puts: Arc<AtomicU64>,
}

impl IoThread {
    /// Starts the thread.
    pub fn start(writer: Arc<SegmentWriter>) -> std::io::Result<IoThread> {
        let (queue, jobs) = mpsc::channel();
        let puts = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&puts);
        let thread = std::thread::Builder::new()
            .name("content-io".to_string())
            .spawn(move || run(&writer, &jobs, &counter))?;
        Ok(IoThread {
            queue: Some(queue),
            admission: Arc::new(Semaphore::new(PUT_QUEUE_BYTES_MAX)),
            thread: Some(thread),
            puts,
        })
    }

    /// Writes `chunk`. It is durable when the call returns.
    pub async fn put(&self, chunk: Chunk) -> Result<(), ContentError> {
        let admission = Arc::clone(&self.admission)
            .acquire_owned(chunk.payload().len())
            .await;
        let (done, answer) = oneshot::channel();
        self.send(Job::Put {
            chunk,
            admission,
            done,
        })?;
        answer.await.map_err(|_| stopped())?
    }

    /// Flushes, and blocks until the flush has ended.
    pub fn flush(&self) -> Result<(), ContentError> {
        let (done, answer) = oneshot::channel();
        self.send(Job::Flush { done: Some(done) })?;
        futures::executor::block_on(answer.into_future()).map_err(|_| stopped())?
    }

    /// Requests a flush without waiting for it.
    pub fn flush_soon(&self) -> Result<(), ContentError> {
        self.send(Job::Flush { done: None })
    }

    /// Returns the number of acknowledged puts.
    pub fn puts(&self) -> u64 {
        self.puts.load(Ordering::Relaxed)
    }

    fn send(&self, job: Job) -> Result<(), ContentError> {
        self.queue
            .as_ref()
            .and_then(|queue| queue.send(job).ok())
            .ok_or_else(stopped)
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(thread) = self.thread.take() {
            // The thread ends when the queue closes; the panic hook has reported a panic in it.
            let _ = thread.join();
        }
    }
}

fn stopped() -> ContentError {
    ContentError::Fatal {
        reason: "its I/O thread has ended".into(),
    }
}

fn run(writer: &SegmentWriter, jobs: &mpsc::Receiver<Job>, puts: &AtomicU64) {
    while let Ok(first) = jobs.recv() {
        let mut put_waiters = Vec::new();
        let mut flush_waiters = Vec::new();
        let mut written_bytes = 0;
        let mut next = Some(first);
        while let Some(job) = next.take() {
            match job {
                Job::Put {
                    chunk,
                    admission,
                    done,
                } => {
                    written_bytes += chunk.payload().len();
                    match writer.append(&chunk) {
                        Ok(_) => put_waiters.push((done, admission)),
                        // Here and below: a caller that has stopped waiting does not receive the result.
                        Err(error) => drop(done.send(Err(error))),
                    }
                }
                Job::Flush { done } => flush_waiters.extend(done),
            }
            if written_bytes < FLUSH_BYTES_MAX {
                next = jobs.try_recv().ok();
            }
        }
        let flushed = if writer.is_flushed(writer.changes()) {
            writer.fault.check()
        } else {
            writer.flush()
        };
        if flushed.is_ok() {
            puts.fetch_add(put_waiters.len() as u64, Ordering::Relaxed);
        }
        let waiters = put_waiters
            .into_iter()
            .map(|(done, _admission)| done)
            .chain(flush_waiters);
        for done in waiters {
            let _ = done.send(flushed.clone().map_err(ContentError::from));
        }
    }
}
