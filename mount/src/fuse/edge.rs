//! The state of a mount's edge, and how the work of a request is run and answered: exactly once.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use fuser::{Errno, INodeNo, ReplyEntry, ReplyWrite, ReplyXattr, Request};
use quorumfs_measure::Ending;
use quorumfs_proto::command::{NewInode, NewKind};
use quorumfs_proto::{FsError, InodeNumber};
use quorumfs_tasks::Tasks;

use super::answer::{View, answer_entry, answer_xattr};
use super::convert;
use super::inode_map::InodeMap;
use super::notices::Notices;
use super::payloads::WaitingPayloads;
use super::places::Place;
use crate::errno::errno;
use crate::statistics::{Statistics, Verb, attribute_value};
use quorumfs_fs::interrupt::{Caller, Callers, InterruptedBy, run_interrupted};
use quorumfs_fs::{Cluster, Filesystem, Handle, NewFile, OpenFlags, Opened};

/// A reply that can be an error. Dropped without an answer, it sends EIO.
pub trait Refuse: Send + 'static {
    /// Answers with an error.
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ident),*) => {$(
        impl Refuse for fuser::$reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        }
    )*};
}

refuse!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyOpen,
    ReplyStatfs,
    ReplyWrite,
    ReplyXattr
);

/// Longest time that the kernel may cache without asking, even under a longer lease.
const CACHE_MAX: Duration = Duration::from_secs(1);

/// The edge of one mount.
pub struct FuseEdge<C: Cluster> {
    filesystem: Arc<Filesystem<C>>,
    pub(super) view: View,
    runtime: tokio::runtime::Handle,
    statistics: Arc<Statistics>,
    callers: Arc<Callers>,
    pub(super) payloads: WaitingPayloads,
}

/// A request being served: its verb, the waiting thread, and its reply.
pub(super) type Call<Reply> = (Verb, u32, Reply);

impl<C: Cluster> FuseEdge<C> {
    /// Makes the edge of `filesystem`, whose root is the cluster's directory `root`. The kernel may keep names and
    /// attributes as long as the lease holds, and for at least `cache`. Background tasks run under `tasks`.
    pub fn new(
        filesystem: Arc<Filesystem<C>>,
        root: InodeNumber,
        cache: Duration,
        tasks: Arc<Tasks>,
        runtime: tokio::runtime::Handle,
    ) -> FuseEdge<C> {
        let _inside = runtime.enter();
        let lease_holder = Arc::clone(&filesystem);
        let kept = move || {
            let lease = lease_holder
                .cluster()
                .lease()
                .map_or(Duration::ZERO, |(left, _)| left);
            cache.max(lease.min(CACHE_MAX))
        };
        FuseEdge {
            filesystem,
            view: View {
                inodes: InodeMap::new(root),
                places: Arc::default(),
                cache: Arc::new(kept),
            },
            callers: Callers::start(&tasks),
            runtime: runtime.clone(),
            statistics: Arc::new(Statistics::new(tasks)),
            payloads: WaitingPayloads::new(),
        }
    }

    /// Connects the filesystem to the kernel: which unlinked inodes programs still use, and which pages are invalid.
    pub(super) fn attach_notices(&self, notices: Notices) {
        let (inodes, notices) = (self.view.inodes, Arc::new(notices));
        let kernel = Arc::clone(&notices);
        let places = Arc::clone(&self.view.places);
        let used = move |inode| {
            let plain = inodes.to_kernel(inode);
            for (parent, name) in places.take_left(plain) {
                kernel.forget_name(parent, &name);
            }
            let numbers = places.numbers(plain);
            numbers.into_iter().any(|number| kernel.may_know(number))
        };
        self.filesystem.set_in_use_check(Arc::new(used));
        self.filesystem.set_page_cache(notices);
    }

    /// Returns the counters of requests.
    pub fn statistics(&self) -> &Arc<Statistics> {
        &self.statistics
    }

    /// Answers a request for [`ATTRIBUTE`](crate::statistics::ATTRIBUTE).
    pub(super) fn answer_statistics(&self, room_bytes: u32, reply: ReplyXattr) {
        let filesystem = &self.filesystem;
        let report = self
            .statistics
            .report(filesystem.cache_statistics(), filesystem.dirty_bytes());
        answer_xattr(room_bytes)(reply, attribute_value(&report).into());
    }

    /// Returns the cluster's number of the kernel's `inode`.
    pub(super) fn cluster_inode(&self, inode: INodeNo) -> Result<InodeNumber, FsError> {
        self.view.inodes.to_cluster(inode)
    }

    /// Runs `work` and gives its result to `answer`, or its error to the kernel.
    pub(super) fn serve<Reply, Work, Running, Value>(
        &self,
        call: Call<Reply>,
        work: Work,
        answer: impl FnOnce(Reply, Value) + Send + 'static,
    ) where
        Reply: Refuse,
        Work: FnOnce(Arc<Filesystem<C>>) -> Running,
        Running: Future<Output = Result<Value, FsError>> + Send + 'static,
        Value: Send + 'static,
    {
        self.run(call, |_| 0, work, answer, |_, _| ());
    }

    /// Like [`FuseEdge::serve`], for requests that move content: `moved` returns the number of bytes.
    pub(super) fn serve_moving<Reply, Work, Running, Value>(
        &self,
        call: Call<Reply>,
        moved: fn(&Value) -> u64,
        work: Work,
        answer: impl FnOnce(Reply, Value) + Send + 'static,
    ) where
        Reply: Refuse,
        Work: FnOnce(Arc<Filesystem<C>>) -> Running,
        Running: Future<Output = Result<Value, FsError>> + Send + 'static,
        Value: Send + 'static,
    {
        self.run(call, moved, work, answer, |_, _| ());
    }

    /// Like [`FuseEdge::serve`], for requests that open something: if the caller was interrupted, `close` closes it
    /// again, because the kernel does not know it then.
    pub(super) fn serve_opening<Reply, Work, Running, Value>(
        &self,
        call: Call<Reply>,
        work: Work,
        answer: impl FnOnce(Reply, Value) + Send + 'static,
        close: fn(Arc<Filesystem<C>>, Value),
    ) where
        Reply: Refuse,
        Work: FnOnce(Arc<Filesystem<C>>) -> Running,
        Running: Future<Output = Result<Value, FsError>> + Send + 'static,
        Value: Send + 'static,
    {
        self.run(call, |_| 0, work, answer, close);
    }

    fn run<Reply, Work, Running, Value>(
        &self,
        (verb, thread, reply): Call<Reply>,
        moved: fn(&Value) -> u64,
        work: Work,
        answer: impl FnOnce(Reply, Value) + Send + 'static,
        close: fn(Arc<Filesystem<C>>, Value),
    ) where
        Reply: Refuse,
        Work: FnOnce(Arc<Filesystem<C>>) -> Running,
        Running: Future<Output = Result<Value, FsError>> + Send + 'static,
        Value: Send + 'static,
    {
        let began = Instant::now();
        let running = work(Arc::clone(&self.filesystem));
        let (filesystem, callers) = (Arc::clone(&self.filesystem), Arc::clone(&self.callers));
        let statistics = Arc::clone(&self.statistics);
        let caller = Caller {
            thread,
            interrupted_by: interrupted_by(verb),
        };
        run(&self.runtime, async move {
            let mut running = std::pin::pin!(running);
            let done = callers.serve(caller, began, running.as_mut()).await;
            let ending = done.as_ref().map_or(Ending::Failed, Ending::of);
            let bytes = done.as_ref().and_then(|done| done.as_ref().ok()).map_or(0, moved);
            statistics.record(verb, ending, bytes, began.elapsed());
            match done {
                Some(Ok(value)) => answer(reply, value),
                Some(Err(error)) => reply.refuse(errno(error)),
                None => {
                    reply.refuse(Errno::EINTR);
                    // The caller is gone; a failure is reported like any other.
                    if let Ok(value) = run_interrupted(running).await {
                        close(filesystem, value);
                    }
                }
            }
        });
    }

    /// Like [`FuseEdge::serve`], for a write of `data`, which first waits for space in memory.
    pub(super) fn serve_write<Work, Writing>(
        &self,
        (thread, reply): (u32, ReplyWrite),
        data: &[u8],
        work: Work,
    ) where
        Work: FnOnce(Arc<Filesystem<C>>, Bytes) -> Writing + Send + 'static,
        Writing: Future<Output = Result<u32, FsError>> + Send + 'static,
    {
        let payload = self.payloads.take(data);
        self.serve_moving(
            (Verb::Write, thread, reply),
            |written: &u32| u64::from(*written),
            move |fs| payload.pass_to(move |data| work(fs, data)),
            |reply, written: u32| reply.written(written),
        );
    }

    /// Serves mknod, mkdir and symlink.
    pub(super) fn make(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        kind: Result<NewKind, FsError>,
        mode: u32,
        (verb, reply): (Verb, ReplyEntry),
    ) {
        let name = name_bytes(name);
        let place = Place::In(parent, name.clone());
        let parent = self.cluster_inode(parent);
        let (uid, gid) = (request.uid(), request.gid());
        self.serve(
            (verb, request.pid(), reply),
            move |fs| async move {
                let inode = NewInode {
                    kind: kind?,
                    mode: convert::permissions(mode),
                    uid,
                    gid,
                };
                fs.make_node(parent?, &name, inode).await
            },
            answer_entry(self.view.clone(), place),
        );
    }
}

/// Returns what may interrupt the callers of `verb`.
fn interrupted_by(verb: Verb) -> InterruptedBy {
    match verb {
        Verb::Lookup
        | Verb::GetAttributes
        | Verb::ReadLink
        | Verb::Open
        | Verb::OpenDirectory
        | Verb::ReadDirectory
        | Verb::Space
        | Verb::GetXattr
        | Verb::ListXattrs => InterruptedBy::TerminationRequests,
        Verb::SetAttributes
        | Verb::Mknod
        | Verb::Mkdir
        | Verb::Symlink
        | Verb::Unlink
        | Verb::Rmdir
        | Verb::Rename
        | Verb::Link
        | Verb::Create
        | Verb::Read
        | Verb::Write
        | Verb::Flush
        | Verb::Fsync
        | Verb::Release
        | Verb::ReleaseDirectory
        | Verb::FsyncDirectory
        | Verb::SetXattr
        | Verb::RemoveXattr => InterruptedBy::FatalSignals,
    }
}

/// Returns the options with which `caller_uid` opens a file.
pub(super) fn opening(flags: i32, caller_uid: u32) -> OpenFlags {
    OpenFlags {
        privileges: convert::privileges_of(caller_uid),
        ..OpenFlags::from(flags)
    }
}

/// Returns the file that `request` creates with this mode.
pub(super) fn new_file(mode: u32, request: &Request) -> NewFile {
    NewFile {
        mode: convert::permissions(mode),
        uid: request.uid(),
        gid: request.gid(),
    }
}

/// Closes a file that the kernel does not know to be open.
pub(super) fn close<C: Cluster>(filesystem: Arc<Filesystem<C>>, opened: Opened) {
    tokio::spawn(async move {
        // It was opened a moment ago, so the handle exists.
        let _ = filesystem.release(opened.handle).await;
    });
}

/// Closes a directory that the kernel does not know to be open.
pub(super) fn close_directory<C: Cluster>(filesystem: Arc<Filesystem<C>>, handle: Handle) {
    let _ = filesystem.release_directory(handle);
}

/// Copies a name, so that it outlives its request.
pub(super) fn name_bytes(name: &OsStr) -> Bytes {
    Bytes::copy_from_slice(name.as_bytes())
}

/// Polls `work` once on this thread; if it must wait, it continues on `runtime`. A panic ends only `work`.
fn run(runtime: &tokio::runtime::Handle, work: impl Future<Output = ()> + Send + 'static) {
    let mut work = Box::pin(work);
    let _inside = runtime.enter();
    // This context wakes nothing: `spawn` polls once more, and finds what became ready in between.
    let mut context = Context::from_waker(Waker::noop());
    // After a panic the future is dropped without another poll, so its broken state is not used.
    match std::panic::catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(&mut context))) {
        Ok(Poll::Pending) => drop(runtime.spawn(work)),
        Ok(Poll::Ready(())) => {}
        // The panic hook has logged the panic, and the dropped reply sends EIO.
        Err(_panic) => drop(std::panic::catch_unwind(AssertUnwindSafe(|| drop(work)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    #[test]
    fn ready_work_runs_at_once_and_waiting_work_later() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        let here = std::thread::current().id();
        let counter = Arc::clone(&done);
        run(runtime.handle(), async move {
            assert_eq!(std::thread::current().id(), here);
            counter.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(done.load(Ordering::SeqCst), 1);

        let (sender, receiver) = tokio::sync::oneshot::channel();
        let (finished, finish) = std::sync::mpsc::channel();
        run(runtime.handle(), async move {
            let value: u32 = receiver.await.unwrap();
            tokio::time::sleep(Duration::from_millis(1)).await;
            finished.send((value, std::thread::current().id())).unwrap();
        });
        sender.send(7).unwrap();
        let (value, thread) = finish.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(value, 7);
        assert_ne!(thread, here);
    }

    #[test]
    fn a_panic_drops_the_reply_and_spares_the_thread() {
        struct Reply(Arc<AtomicUsize>);
        impl Drop for Reply {
            fn drop(&mut self) {
                self.0.fetch_add(1, Ordering::SeqCst);
            }
        }
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dropped = Arc::new(AtomicUsize::new(0));
        let reply = Reply(Arc::clone(&dropped));
        run(runtime.handle(), async move {
            let _reply = reply;
            panic!("on purpose, at once");
        });
        assert_eq!(dropped.load(Ordering::SeqCst), 1);
        let reply = Reply(Arc::clone(&dropped));
        run(runtime.handle(), async move {
            let _reply = reply;
            tokio::task::yield_now().await;
            panic!("on purpose, later");
        });
        let start = std::time::Instant::now();
        while dropped.load(Ordering::SeqCst) < 2 {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "the reply was never dropped"
            );
            std::thread::yield_now();
        }
    }
}
