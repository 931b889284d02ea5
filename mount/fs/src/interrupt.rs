//! Interruption of requests whose caller receives a signal.
//!
//! The kernel cannot withdraw a request that has been read: its caller waits in state D, whatever signals it receives,
//! until the request is answered. (FUSE_INTERRUPT would report a signal, once per request and without its number; fuser
//! does not deliver it.) So the callers of requests that have waited for [`INTERRUPT_AFTER`] are checked periodically,
//! and a request whose caller is about to be terminated by a signal is answered with EINTR.
//!
//! As with NFS, only terminating signals count. Programs do not expect EINTR from files, so one that handles timers,
//! children or a profiler's signals is not disturbed. With one exception: a program that handles SIGINT, SIGQUIT or
//! SIGTERM (as `ls` does, to reset the terminal's colours) receives EINTR from a call that only queries.
//!
//! The work of an interrupted request runs to completion ([`run_interrupted`]), so that nothing is left half-done:
//! cached state stays true, and written bytes are committed. Where it only waits ([`interruptible`]), it ends with
//! [`FsError::TimedOut`]: the client voids a command that was sent, or waits for its result, before it sends a later
//! one.
//!
//! This module must not know FUSE or the meaning of requests.

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
use quorumfs_tasks::Tasks;

use caller::SignalState;

/// Age from which a request is checked. With a working quorum few requests reach it.
const INTERRUPT_AFTER: Duration = Duration::from_millis(300);

/// Age from which a handled termination request interrupts.
const INTERRUPT_HANDLED_AFTER: Duration = Duration::from_secs(1);

/// Interval between two checks.
const CHECK_PERIOD: Duration = Duration::from_millis(200);

/// Most callers per check, at about 20 µs each. The next check continues with the others.
const CHECKS_PER_PERIOD_MAX: usize = 512;

/// The signals that interrupt a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptedBy {
    /// Also handled requests to terminate: the request only queries.
    TerminationRequests,
    /// Only signals that terminate the program: the request changes something or transfers content.
    FatalSignals,
}

/// The caller of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The id of the thread; 0 if none waits, or it is not visible from here.
    pub thread: u32,
    /// The signals that interrupt it.
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
    /// By number, so the oldest first.
    waiting: BTreeMap<u64, Arc<WaitingRequest>>,
}

/// All unanswered requests, except those that never had to wait. The kernel bounds their number by the threads that
/// wait.
#[derive(Debug, Default)]
pub struct Callers {
    table: Mutex<Table>,
}

impl Callers {
    /// Makes a table and starts the task that checks it under `tasks`; it ends when the table is dropped. Must be called
    /// within a tokio runtime.
    pub fn start(tasks: &Arc<Tasks>) -> Arc<Callers> {
        let callers = Arc::new(Callers::default());
        tasks.supervise_until_done("interrupts", Arc::downgrade(&callers), watch);
        callers
    }

    /// Runs `work` for `caller`, which has waited since `since`. Returns `None` if the caller is interrupted: it must
    /// be answered now, and `work` be continued with [`run_interrupted`].
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
            // A future polled with the no-op waker is polled again at once.
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

    /// Checks callers after `number`, then those up to it, as many as one check allows. Returns the number of the last
    /// one checked.
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

/// The table entry of a request; removes it when dropped.
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
        // Not on a thread that serves requests: reading `/proc` may wait for one of them.
        let checked = tokio::task::spawn_blocking(move || callers.check(last)).await;
        last = checked.unwrap_or(last);
    }
}

thread_local! {
    /// Whether the work that this thread polls belongs to an interrupted request.
    static INTERRUPTED: Cell<bool> = const { Cell::new(false) };
}

/// Polls `work` with [`INTERRUPTED`] set to `interrupted`.
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

/// Runs `work`, whose caller was interrupted, to completion. Its [`interruptible`] parts end soon.
pub async fn run_interrupted<Work: Future>(mut work: Pin<&mut Work>) -> Work::Output {
    poll_fn(|context| poll_with(true, work.as_mut(), context)).await
}

/// Makes `work` interruptible: it may be dropped at any point. It ends with [`FsError::TimedOut`] when the caller is
/// interrupted, and does not start if that has happened before.
///
/// The result must be awaited by the task of the request itself. Inside a future that polls it only when woken, an
/// interruption does not wake it.
pub async fn interruptible<T>(work: impl Future<Output = Result<T, FsError>>) -> Result<T, FsError> {
    check_interrupted().await?;
    let mut work = pin!(work);
    poll_fn(|context| match work.as_mut().poll(context) {
        Poll::Pending if INTERRUPTED.get() => Poll::Ready(Err(FsError::TimedOut)),
        polled => polled,
    })
    .await
}

/// Returns at once.
///
/// # Errors
/// [`FsError::TimedOut`] if the caller was interrupted.
pub async fn check_interrupted() -> Result<(), FsError> {
    match INTERRUPTED.get() {
        true => Err(FsError::TimedOut),
        false => Ok(()),
    }
}

/// Runs `work` without interruption, because other callers need its result.
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

    /// A killed program that is not reaped: `/proc` shows it like one that is closing its files.
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
        assert_eq!(callers.table.lock().last_number, 0, "it did not wait");
        let mut work = pin!(receiver);
        let mut serving = pin!(callers.serve(own, Instant::now(), work.as_mut()));
        assert!(futures::poll!(serving.as_mut()).is_pending());
        assert_eq!(callers.table.lock().waiting.len(), 1);
        callers.check(0);
        assert!(
            futures::poll!(serving.as_mut()).is_pending(),
            "no caller is killed"
        );
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
                "the signal is not seen in /proc"
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
        assert!(committed.get(), "an uninterruptible part was interrupted");
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
