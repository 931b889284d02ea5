//! Programs that are killed while they wait for an answer.
//!
//! Once a request was read, the kernel can not take it back: its caller waits, in state D and whatever signals it gets,
//! until the request is answered. (FUSE_INTERRUPT would tell of a signal, once for each request and without saying
//! which; fuser does not pass it on.) So the callers of requests that have waited for [`INTERRUPT_AFTER`] are looked at: one
//! that a signal is about to end is answered EINTR.
//!
//! As with NFS only signals that end the program count. Programs do not expect EINTR from files, so one that handles
//! timers, children or a profiler's signals is not disturbed. One exception: a program that handles SIGINT, SIGQUIT or
//! SIGTERM (`ls` does, to reset the terminal's colours) gets EINTR where its call only asks and changes nothing.
//!
//! The work of an interrupted request is run to its end ([`run_interrupted`]), so that nothing is left half-done: what is
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

use caller::SignalState;

/// A request that is younger is not looked at: with a working quorum hardly any gets so old.
const INTERRUPT_AFTER: Duration = Duration::from_millis(300);

/// A caller that handles a request to end is not told before this.
const INTERRUPT_HANDLED_AFTER: Duration = Duration::from_secs(1);

/// Between two looks.
const CHECK_PERIOD: Duration = Duration::from_millis(200);

/// Callers that are looked at in one tick, at some 20 µs each. The others have their turn in the next.
const CHECKS_PER_PERIOD_MAX: usize = 512;

/// What becomes of the thread that waits for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptedBy {
    /// The request only asks: handled requests to end interrupt it too.
    TerminationRequests,
    /// It changes something, or moves content: only what ends the program interrupts it.
    FatalSignals,
}

/// Who waits for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The thread; 0 where nobody waits, or it cannot be seen from here.
    pub thread: u32,
    /// What may interrupt it.
    pub interrupted_by: InterruptedBy,
}

#[derive(Debug)]
struct WaitingRequest {
    caller: Caller,
    since: Instant,
    interrupted: AtomicBool,
    waker: AtomicWaker,
}

#[derive(Debug, Default)]
struct Table {
    last_number: u64,
    /// Oldest first.
    waiting: BTreeMap<u64, Arc<WaitingRequest>>,
}

/// All requests that are not answered yet, but for those that never had to wait. As many as programs wait for: the
/// kernel bounds them.
#[derive(Debug, Default)]
pub struct Callers {
    table: Mutex<Table>,
}

impl Callers {
    /// The table, and the task that looks after it; it ends with the table. Must be called within a tokio runtime.
    pub fn start() -> Arc<Callers> {
        let callers = Arc::new(Callers::default());
        tokio::spawn(watch(Arc::downgrade(&callers)));
        callers
    }

    /// Runs `work` for `caller`, who has waited since `since`. `None`: the caller is interrupted and must be answered
    /// now; `work` goes on with [`run_interrupted`].
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
            let entry = entry.get_or_insert_with(|| self.insert(caller, since));
            entry.waiting.waker.register(context.waker());
            match entry.waiting.interrupted.load(Ordering::Acquire) {
                true => Poll::Ready(None),
                false => Poll::Pending,
            }
        })
        .await
    }

    fn insert(&self, caller: Caller, since: Instant) -> Entry<'_> {
        let waiting = Arc::new(WaitingRequest {
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
    fn check(&self, number: u64) -> u64 {
        let due: Vec<(u64, Arc<WaitingRequest>)> = {
            let table = self.table.lock();
            let later = table.waiting.range(number + 1..);
            let earlier = table.waiting.range(..=number);
            later
                .chain(earlier)
                .filter(|(_, waiting)| waiting.since.elapsed() >= INTERRUPT_AFTER)
                .take(CHECKS_PER_PERIOD_MAX)
                .map(|(number, waiting)| (*number, Arc::clone(waiting)))
                .collect()
        };
        for (_, waiting) in &due {
            if waiting.should_interrupt() && !waiting.interrupted.swap(true, Ordering::AcqRel) {
                tracing::debug!(
                    thread = waiting.caller.thread,
                    "interrupted a request: a signal terminates its caller"
                );
                waiting.waker.wake();
            }
        }
        due.last().map_or(0, |(number, _)| *number)
    }
}

impl WaitingRequest {
    fn should_interrupt(&self) -> bool {
        match caller::signal_state(self.caller.thread) {
            SignalState::None => false,
            SignalState::TerminationRequested => {
                self.caller.interrupted_by == InterruptedBy::TerminationRequests
                    && self.since.elapsed() >= INTERRUPT_HANDLED_AFTER
            }
            SignalState::Fatal => true,
        }
    }
}

/// A request's place in the table.
struct Entry<'a> {
    callers: &'a Callers,
    number: u64,
    waiting: Arc<WaitingRequest>,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.callers.table.lock().waiting.remove(&self.number);
    }
}

async fn watch(callers: Weak<Callers>) {
    let mut ticks = tokio::time::interval(CHECK_PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = 0;
    loop {
        ticks.tick().await;
        let Some(callers) = callers.upgrade() else {
            return;
        };
        // Not on a thread that serves requests: what is looked at may wait for one of them.
        let checked = tokio::task::spawn_blocking(move || callers.check(last)).await;
        last = checked.unwrap_or(last);
    }
}

thread_local! {
    /// Whether what is being polled on this thread is work in vain.
    static INTERRUPTED: Cell<bool> = const { Cell::new(false) };
}

/// Polls `work` with [`INTERRUPTED`] set to `run_interrupted`.
fn poll_with<Work: Future>(
    interrupted: bool,
    work: Pin<&mut Work>,
    context: &mut Context<'_>,
) -> Poll<Work::Output> {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            INTERRUPTED.set(self.0);
        }
    }
    let _restore = Restore(INTERRUPTED.replace(interrupted));
    work.poll(context)
}

/// Runs `work`, whose caller was interrupted, to its end: what is [`interruptible`] in it ends soon, the rest is done.
pub async fn run_interrupted<Work: Future>(mut work: Pin<&mut Work>) -> Work::Output {
    poll_fn(|context| poll_with(true, work.as_mut(), context)).await
}

/// `work`, which may be given up at any point. It ends as [`FsError::TimedOut`] when the caller is interrupted, and is
/// not begun if it was interrupted before.
///
/// It must be awaited by the request's own task: it is not woken where another future polls it only when it is woken.
pub async fn interruptible<T>(work: impl Future<Output = Result<T, FsError>>) -> Result<T, FsError> {
    check_interrupted().await?;
    let mut work = pin!(work);
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Pending if INTERRUPTED.get() => Poll::Ready(Err(FsError::TimedOut)),
        polled => polled,
    })
    .await
}

/// Ready at once: [`FsError::TimedOut`] if the caller was interrupted.
pub async fn check_interrupted() -> Result<(), FsError> {
    match INTERRUPTED.get() {
        true => Err(FsError::TimedOut),
        false => Ok(()),
    }
}

/// `work`, in which nothing is interruptible: what it does concerns others than the caller.
pub async fn uninterruptible<Work: Future>(work: Work) -> Work::Output {
    let mut work = pin!(work);
    poll_fn(|context| poll_with(false, work.as_mut(), context)).await
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn caller(thread: u32, interrupted_by: InterruptedBy) -> Caller {
        Caller {
            thread,
            interrupted_by,
        }
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
    async fn a_waiting_request_is_in_the_table_until_it_is_answered() {
        let callers = Callers::default();
        let own = caller(std::process::id(), InterruptedBy::TerminationRequests);
        let (sender, receiver) = tokio::sync::oneshot::channel::<()>();
        let mut ready = pin!(async { 7 });
        assert_eq!(callers.serve(own, Instant::now(), ready.as_mut()).await, Some(7));
        assert_eq!(callers.table.lock().last_number, 0, "it never waited");
        let mut work = pin!(receiver);
        let mut serving = pin!(callers.serve(own, Instant::now(), work.as_mut()));
        assert!(futures::poll!(serving.as_mut()).is_pending());
        assert_eq!(callers.table.lock().waiting.len(), 1);
        callers.check(0);
        assert!(futures::poll!(serving.as_mut()).is_pending(), "nobody is killed");
        sender.send(()).unwrap();
        assert_eq!(serving.await, Some(Ok(())));
        assert!(callers.table.lock().waiting.is_empty());
    }

    #[tokio::test]
    async fn an_interrupted_request_is_answered_at_once_and_its_work_ends() {
        let callers = Callers::default();
        let killed = Killed::new();
        let thread = killed.0.id();
        let begin = Instant::now();
        while caller::signal_state(thread) != SignalState::Fatal {
            assert!(
                begin.elapsed() < Duration::from_secs(10),
                "it is not seen to be killed"
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let begin = Instant::now().checked_sub(INTERRUPT_AFTER).unwrap();
        let committed = Cell::new(false);
        let mut work = pin!(async {
            uninterruptible(async {
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
            let mut serving =
                pin!(callers.serve(caller(thread, InterruptedBy::FatalSignals), begin, work.as_mut()));
            assert!(futures::poll!(serving.as_mut()).is_pending());
            callers.check(0);
            assert_eq!(serving.await, None);
        }
        assert_eq!(run_interrupted(work).await, Err(FsError::TimedOut));
        assert!(committed.get(), "what concerns others was given up");
        assert!(!INTERRUPTED.get());
    }

    #[tokio::test]
    async fn every_caller_is_checked_in_turn() {
        let callers = Callers::default();
        let long_ago = Instant::now().checked_sub(INTERRUPT_AFTER).unwrap();
        let own = caller(std::process::id(), InterruptedBy::TerminationRequests);
        let entries: Vec<Entry<'_>> = (0..CHECKS_PER_PERIOD_MAX + 5)
            .map(|_| callers.insert(own, long_ago))
            .collect();
        let first = callers.check(0);
        assert_eq!(first, CHECKS_PER_PERIOD_MAX as u64);
        let second = callers.check(first);
        assert_eq!(second, first - 5, "the last five, and from the front again");
        drop(entries);
        assert_eq!(callers.check(second), 0);
    }
}
