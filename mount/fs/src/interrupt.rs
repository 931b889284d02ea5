//! Programs that are killed while they wait for an answer.
//!
//! Once a request was read, the kernel can not take it back: its caller waits, in state D and whatever signals it gets,
//! until the request is answered. (FUSE_INTERRUPT would tell of a signal, once for each request and without saying
//! which; fuser does not pass it on.) So the callers of requests that have waited for [`PATIENCE`] are looked at: one
//! that a signal is about to end is answered EINTR.
//!
//! As with NFS only signals that end the program count. Programs do not expect EINTR from files, so one that handles
//! timers, children or a profiler's signals is not disturbed. One exception: a program that handles SIGINT, SIGQUIT or
//! SIGTERM (`ls` does, to reset the terminal's colours) gets EINTR where its call only asks and changes nothing.
//!
//! The work of an interrupted request is run to its end ([`in_vain`]), so that nothing is left half-done: what is
//! known of files stays true, and what was written is committed. Where it only waits ([`interruptible`]), it ends as
//! [`FsError::TimedOut`]: a change that was sent is voided by the client, or its verdict awaited, before any later
//! change is sent.
//!
//! Knows nothing of FUSE and of what requests do.

mod caller;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use futures::task::AtomicWaker;
use parking_lot::Mutex;
use quorumfs_proto::FsError;

use caller::Wish;

/// A request that is younger is not looked at: with a working quorum hardly any gets so old.
const PATIENCE: Duration = Duration::from_millis(300);

/// A caller that handles a request to end is not told before this.
const PATIENCE_HANDLED: Duration = Duration::from_secs(1);

/// Between two looks.
const TICK: Duration = Duration::from_millis(200);

/// Callers that are looked at in one tick, at some 20 µs each. The others have their turn in the next.
const LOOKS_PER_TICK_MAX: usize = 512;

/// What becomes of the thread that waits for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// The request only asks: handled requests to end interrupt it too.
    Asking,
    /// It changes something, or moves content: only what ends the program interrupts it.
    Acting,
}

/// Who waits for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The thread; 0 where nobody waits, or it cannot be seen from here.
    pub thread: u32,
    /// What may interrupt it.
    pub tolerance: Tolerance,
}

#[derive(Debug)]
struct Waiting {
    caller: Caller,
    since: Instant,
    interrupted: AtomicBool,
    waker: AtomicWaker,
}

#[derive(Debug, Default)]
struct Table {
    last_number: u64,
    /// Oldest first.
    waiting: BTreeMap<u64, Arc<Waiting>>,
}

/// All requests that are not answered yet, but for those that never had to wait. As many as programs wait for: the
/// kernel bounds them.
#[derive(Debug, Default)]
pub struct Callers {
    table: Mutex<Table>,
}

impl Callers {
    /// The table, and the task that looks after it; it ends with the table. Must be called within a tokio runtime.
    pub fn watched() -> Arc<Callers> {
        let callers = Arc::new(Callers::default());
        tokio::spawn(watch(Arc::downgrade(&callers)));
        callers
    }

    /// Runs `work` for `caller`, who has waited since `since`. `None`: the caller is interrupted and must be answered
    /// now; `work` goes on with [`in_vain`].
    pub async fn serve<Work: Future>(
        &self,
        caller: Caller,
        since: Instant,
        mut work: Pin<&mut Work>,
    ) -> Option<Work::Output> {
        let mut entry: Option<Entry> = None;
        poll_fn(|context| {
            if let Poll::Ready(done) = work.as_mut().poll(context) {
                return Poll::Ready(Some(done));
            }
            // Polled so, it is polled again at once by whoever waits for it.
            if caller.thread == 0 || context.waker().will_wake(Waker::noop()) {
                return Poll::Pending;
            }
            let entry = entry.get_or_insert_with(|| self.enter(caller, since));
            entry.waiting.waker.register(context.waker());
            match entry.waiting.interrupted.load(Ordering::Acquire) {
                true => Poll::Ready(None),
                false => Poll::Pending,
            }
        })
        .await
    }

    fn enter(&self, caller: Caller, since: Instant) -> Entry<'_> {
        let waiting = Arc::new(Waiting {
            caller,
            since,
            interrupted: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        });
        let mut table = self.table.lock();
        table.last_number += 1;
        let number = table.last_number;
        table.waiting.insert(number, Arc::clone(&waiting));
        Entry {
            callers: self,
            number,
            waiting,
        }
    }

    /// Looks at the callers that come after `number` and at those before them, as many as one tick allows. Answers the
    /// last that was looked at.
    fn look(&self, number: u64) -> u64 {
        let due: Vec<(u64, Arc<Waiting>)> = {
            let table = self.table.lock();
            let later = table.waiting.range(number + 1..);
            let earlier = table.waiting.range(..=number);
            later
                .chain(earlier)
                .filter(|(_, waiting)| waiting.since.elapsed() >= PATIENCE)
                .take(LOOKS_PER_TICK_MAX)
                .map(|(number, waiting)| (*number, Arc::clone(waiting)))
                .collect()
        };
        for (_, waiting) in &due {
            if waiting.is_to_end() && !waiting.interrupted.swap(true, Ordering::AcqRel) {
                tracing::debug!(
                    thread = waiting.caller.thread,
                    "the caller of a request was killed"
                );
                waiting.waker.wake();
            }
        }
        due.last().map_or(0, |(number, _)| *number)
    }
}

impl Waiting {
    fn is_to_end(&self) -> bool {
        match caller::wish(self.caller.thread) {
            Wish::Wait => false,
            Wish::HandleRequest => {
                self.caller.tolerance == Tolerance::Asking && self.since.elapsed() >= PATIENCE_HANDLED
            }
            Wish::Die => true,
        }
    }
}

/// A request's place in the table.
struct Entry<'a> {
    callers: &'a Callers,
    number: u64,
    waiting: Arc<Waiting>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.callers.table.lock().waiting.remove(&self.number);
    }
}

async fn watch(callers: Weak<Callers>) {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = 0;
    loop {
        ticks.tick().await;
        let Some(callers) = callers.upgrade() else {
            return;
        };
        // Not on a thread that serves requests: what is looked at may wait for one of them.
        let looked = tokio::task::spawn_blocking(move || callers.look(last)).await;
        last = looked.unwrap_or(last);
    }
}

thread_local! {
    /// Whether what is being polled on this thread is work in vain.
    static IN_VAIN: Cell<bool> = const { Cell::new(false) };
}

/// Polls `work` with [`IN_VAIN`] set to `in_vain`.
fn poll_as<Work: Future>(
    in_vain: bool,
    work: Pin<&mut Work>,
    context: &mut Context<'_>,
) -> Poll<Work::Output> {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IN_VAIN.set(self.0);
        }
    }
    let _restore = Restore(IN_VAIN.replace(in_vain));
    work.poll(context)
}

/// Runs `work`, whose caller was interrupted, to its end: what is [`interruptible`] in it ends soon, the rest is done.
pub async fn in_vain<Work: Future>(mut work: Pin<&mut Work>) -> Work::Output {
    poll_fn(|context| poll_as(true, work.as_mut(), context)).await
}

/// `work`, which may be given up at any point. It ends as [`FsError::TimedOut`] when the caller is interrupted, and is
/// not begun if it was interrupted before.
///
/// It must be awaited by the request's own task: it is not woken where another future polls it only when it is woken.
pub async fn interruptible<T>(work: impl Future<Output = Result<T, FsError>>) -> Result<T, FsError> {
    still_wanted().await?;
    let mut work = pin!(work);
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Pending if IN_VAIN.get() => Poll::Ready(Err(FsError::TimedOut)),
        polled => polled,
    })
    .await
}

/// Ready at once: [`FsError::TimedOut`] if the caller was interrupted.
pub async fn still_wanted() -> Result<(), FsError> {
    match IN_VAIN.get() {
        true => Err(FsError::TimedOut),
        false => Ok(()),
    }
}

/// `work`, in which nothing is interruptible: what it does concerns others than the caller.
pub async fn uninterrupted<Work: Future>(work: Work) -> Work::Output {
    let mut work = pin!(work);
    poll_fn(|context| poll_as(false, work.as_mut(), context)).await
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn caller(thread: u32, tolerance: Tolerance) -> Caller {
        Caller { thread, tolerance }
    }

    /// A program that was killed and that nobody has waited for: `/proc` shows it as it shows one that closes its files.
    struct Killed(Child);

    impl Killed {
        fn new() -> Killed {
            let mut child = Command::new("sleep")
                .arg("60")
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            child.kill().unwrap();
            Killed(child)
        }
    }

    impl Drop for Killed {
        fn drop(&mut self) {
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn what_waits_is_listed_until_it_is_answered() {
        let callers = Callers::default();
        let own = caller(std::process::id(), Tolerance::Asking);
        let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
        let mut ready = pin!(async { 7 });
        assert_eq!(callers.serve(own, Instant::now(), ready.as_mut()).await, Some(7));
        assert_eq!(callers.table.lock().last_number, 0, "it never waited");
        let mut work = pin!(receiver);
        let mut serving = pin!(callers.serve(own, Instant::now(), work.as_mut()));
        assert!(futures::poll!(serving.as_mut()).is_pending());
        assert_eq!(callers.table.lock().waiting.len(), 1);
        callers.look(0);
        assert!(futures::poll!(serving.as_mut()).is_pending(), "nobody is killed");
        sender.send(()).unwrap();
        assert_eq!(serving.await, Some(Ok(())));
        assert!(callers.table.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn an_interrupted_request_is_told_at_once_and_its_work_ends() {
        let callers = Callers::default();
        let killed = Killed::new();
        let thread = killed.0.id();
        let begin = Instant::now();
        while caller::wish(thread) != Wish::Die {
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "it is not seen to be killed"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let begin = Instant::now().checked_sub(PATIENCE).unwrap();
        let committed = Cell::new(false);
        let mut work = pin!(async {
            uninterrupted(async {
                let slept = interruptible(async {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    Ok(())
                });
                committed.set(slept.await.is_ok());
            })
            .await;
            interruptible(std::future::pending::<Result<(), FsError>>()).await
        });
        {
            let mut serving = pin!(callers.serve(caller(thread, Tolerance::Acting), begin, work.as_mut()));
            assert!(futures::poll!(serving.as_mut()).is_pending());
            callers.look(0);
            assert_eq!(serving.await, None);
        }
        assert_eq!(in_vain(work).await, Err(FsError::TimedOut));
        assert!(committed.get(), "what concerns others was given up");
        assert!(!IN_VAIN.get());
    }

    #[tokio::test]
    async fn every_caller_has_its_turn() {
        let callers = Callers::default();
        let long_ago = Instant::now().checked_sub(PATIENCE).unwrap();
        let own = caller(std::process::id(), Tolerance::Asking);
        let entries: Vec<Entry<'_>> = (0..LOOKS_PER_TICK_MAX + 5)
            .map(|_| callers.enter(own, long_ago))
            .collect();
        let first = callers.look(0);
        assert_eq!(first, LOOKS_PER_TICK_MAX as u64);
        let second = callers.look(first);
        assert_eq!(second, first - 5, "the last five, and from the front again");
        drop(entries);
        assert_eq!(callers.look(second), 0);
    }
}
