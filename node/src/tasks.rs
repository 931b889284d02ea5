//! The supervisor: every task that runs as long as the node is started here, under a name.
//!
//! A task that panics or returns is recorded with its reason and started again after a pause, which grows while it
//! keeps failing. `/status` and the metrics show the state of each task, so that a healing task that has stopped is
//! visible. A task keeps no state of its own that must survive: such state is behind the `Arc` from which the task is
//! made.
//!
//! This module does not know what the tasks do. If continuing would break a promise, a task reports that itself
//! ([`crate::consensus::Consensus::fatal`]), and the node ends.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

use crate::wall_clock::unix_ms;

/// Pause between the first failure and the restart; doubled with each further failure.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Longest pause before a restart.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A task that ran this long before it failed restarts after the shortest pause.
const STEADY_AFTER: Duration = Duration::from_secs(60);

tokio::task_local! {
    /// The name of the supervised task that is being polled.
    static NAME: &'static str;
}

/// The state of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum TaskState {
    /// It is running.
    Running,
    /// It failed, and restarts after a pause.
    Waiting,
    /// It had an end, and has reached it.
    Done,
}

/// The report about a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct TaskReport {
    /// Name of the task.
    pub name: &'static str,
    /// State of the task.
    pub state: TaskState,
    /// Time of its last start, in milliseconds since 1970.
    pub started_unix_ms: u64,
    /// Number of failures.
    pub failures: u64,
    /// The reason of the last failure.
    pub last_error: Option<String>,
}

/// Whether a task may return.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Returns {
    /// Returning is a failure.
    Never,
    /// Returning means that its work is done.
    WhenDone,
}

/// All supervised tasks of a node.
#[derive(Debug, Default)]
pub struct Tasks {
    reports: Mutex<BTreeMap<&'static str, TaskReport>>,
    /// Tests make tasks panic with it.
    #[cfg(test)]
    panics: tokio::sync::watch::Sender<Option<&'static str>>,
}

impl Tasks {
    /// Runs `run` of `part`; restarts it whenever it ends.
    pub fn supervise<Part, Work>(
        self: &Arc<Self>,
        name: &'static str,
        part: Part,
        run: impl Fn(Part) -> Work + Send + 'static,
    ) -> JoinHandle<()>
    where
        Part: Clone + Send + 'static,
        Work: Future<Output = ()> + Send + 'static,
    {
        let make = move || run(part.clone());
        tokio::spawn(self.clone().run(name, Returns::Never, make))
    }

    /// Runs `run` of `part` until it returns; restarts it after a panic.
    pub fn supervise_until_done<Part, Work>(
        self: &Arc<Self>,
        name: &'static str,
        part: Part,
        run: impl Fn(Part) -> Work + Send + 'static,
    ) -> JoinHandle<()>
    where
        Part: Clone + Send + 'static,
        Work: Future<Output = ()> + Send + 'static,
    {
        let make = move || run(part.clone());
        tokio::spawn(self.clone().run(name, Returns::WhenDone, make))
    }

    /// Returns the reports about all tasks, by name.
    pub fn report(&self) -> Vec<TaskReport> {
        self.reports.lock().values().cloned().collect()
    }

    async fn run<Work: Future<Output = ()> + Send + 'static>(
        self: Arc<Self>,
        name: &'static str,
        returns: Returns,
        make: impl Fn() -> Work + Send + 'static,
    ) {
        let mut pause = PAUSE_MIN;
        loop {
            let began = Instant::now();
            self.begins(name);
            #[cfg(test)]
            let work = self.clone().until_panic(name, make());
            #[cfg(not(test))]
            let work = make();
            // The inner task ends with this one, which the caller may abort.
            let ended = AbortOnDropHandle::new(tokio::spawn(NAME.scope(name, work))).await;
            let reason = match ended {
                Ok(()) if returns == Returns::WhenDone => {
                    self.change(name, |report| report.state = TaskState::Done);
                    return;
                }
                Ok(()) => {
                    error!(
                        task = name,
                        "a task that has no end has ended; it is started again"
                    );
                    "it ended".to_string()
                }
                // The panic hook has logged the panic with the task's name.
                Err(panicked) => panicked.to_string(),
            };
            if began.elapsed() >= STEADY_AFTER {
                pause = PAUSE_MIN;
            }
            self.change(name, |report| {
                report.state = TaskState::Waiting;
                report.failures += 1;
                report.last_error = Some(reason);
            });
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn begins(&self, name: &'static str) {
        let started_unix_ms = unix_ms();
        let mut reports = self.reports.lock();
        let report = reports.entry(name).or_insert_with(|| TaskReport {
            name,
            state: TaskState::Running,
            started_unix_ms,
            failures: 0,
            last_error: None,
        });
        report.state = TaskState::Running;
        report.started_unix_ms = started_unix_ms;
    }

    fn change(&self, name: &'static str, change: impl FnOnce(&mut TaskReport)) {
        if let Some(report) = self.reports.lock().get_mut(name) {
            change(report);
        }
    }
}

#[cfg(test)]
impl Tasks {
    /// Makes the task with this name panic at its next wait.
    pub fn make_panic(&self, name: &'static str) {
        self.panics.send_replace(Some(name));
    }

    async fn until_panic(self: Arc<Self>, name: &'static str, work: impl Future<Output = ()>) {
        let mut panics = self.panics.subscribe();
        let chosen = async {
            let chosen = panics.wait_for(|chosen| *chosen == Some(name)).await.is_ok();
            assert!(
                !chosen || !self.panics.send_if_modified(|chosen| chosen.take().is_some()),
                "as the test asks"
            );
        };
        tokio::select! {
            () = chosen => {}
            () = work => {}
        }
    }
}

/// Work that is run to its end: by whoever waits for it, and in a task of its own from when this is dropped.
pub struct ToEnd<T: 'static> {
    work: Option<BoxFuture<'static, T>>,
    when_dropped: fn(BoxFuture<'static, T>) -> BoxFuture<'static, T>,
}

impl<T> ToEnd<T> {
    /// `work`, which goes on unchanged when this is dropped.
    pub fn new(work: impl Future<Output = T> + Send + 'static) -> ToEnd<T> {
        ToEnd::with(work, |work| work)
    }

    /// `work`, which goes on as `when_dropped` makes of it.
    pub fn with(
        work: impl Future<Output = T> + Send + 'static,
        when_dropped: fn(BoxFuture<'static, T>) -> BoxFuture<'static, T>,
    ) -> ToEnd<T> {
        ToEnd {
            work: Some(Box::pin(work)),
            when_dropped,
        }
    }
}

impl<T> Future for ToEnd<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let work = self.work.as_mut().expect("it is not polled after its end");
        let polled = work.as_mut().poll(context);
        if polled.is_ready() {
            self.work = None;
        }
        polled
    }
}

impl<T> Drop for ToEnd<T> {
    fn drop(&mut self) {
        // Without a runtime the process is about to end.
        if let (Some(work), Ok(runtime)) = (self.work.take(), tokio::runtime::Handle::try_current()) {
            let rest = (self.when_dropped)(work);
            runtime.spawn(async move { drop(rest.await) });
        }
    }
}

/// From now on a panic is one line of the log, with the name of the task or else of the thread. Called once, when there is
/// a log.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let task = NAME.try_with(|name| (*name).to_string());
        let thread = std::thread::current();
        let task = task.unwrap_or_else(|_| thread.name().unwrap_or("a thread").to_string());
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let backtrace = std::backtrace::Backtrace::capture();
        let reason = panic.payload_as_str().unwrap_or("it does not say why");
        match backtrace.status() {
            std::backtrace::BacktraceStatus::Captured => {
                error!(task, place, reason, %backtrace, "a task panicked")
            }
            _ => error!(task, place, reason, "a task panicked"),
        }
    }));
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    async fn wait_for(tasks: &Tasks, what: impl Fn(&TaskReport) -> bool) -> TaskReport {
        loop {
            if let Some(report) = tasks.report().into_iter().find(&what) {
                return report;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn a_loop_that_fails_is_named_and_starts_again() {
        let tasks = Arc::new(Tasks::default());
        let runs = Arc::new(AtomicU64::new(0));
        tasks.supervise("fragile", runs.clone(), |runs| {
            let run = runs.fetch_add(1, Ordering::Relaxed);
            async move {
                match run {
                    0 => panic!("the first time"),
                    1 => {}
                    _ => std::future::pending().await,
                }
            }
        });
        let panicked = wait_for(&tasks, |report| report.failures == 1).await;
        assert_eq!(panicked.state, TaskState::Waiting);
        assert!(
            panicked
                .last_error
                .is_some_and(|error| error.contains("panicked") && error.contains("the first time"))
        );
        let returned = wait_for(&tasks, |report| report.failures == 2).await;
        assert_eq!(returned.last_error.as_deref(), Some("it ended"));
        let again = wait_for(&tasks, |report| {
            report.state == TaskState::Running && report.failures == 2
        })
        .await;
        assert_eq!(again.name, "fragile");
        assert_eq!(runs.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn who_goes_on_failing_waits_longer_each_time() {
        let tasks = Arc::new(Tasks::default());
        tasks.supervise("broken", (), |()| async { panic!("again") });
        let began = Instant::now();
        wait_for(&tasks, |report| report.failures == 4).await;
        let elapsed = began.elapsed();
        // 0.1 + 0.2 + 0.4 s; delays of the timer are added.
        assert!(elapsed >= Duration::from_millis(700), "{elapsed:?}");
    }

    #[tokio::test]
    async fn what_has_an_end_is_done_with_it_and_no_failure() {
        let tasks = Arc::new(Tasks::default());
        tasks
            .supervise_until_done("short", (), |()| async {})
            .await
            .unwrap();
        let report = &tasks.report()[0];
        assert_eq!((report.state, report.failures), (TaskState::Done, 0));
    }

    #[tokio::test]
    async fn work_that_is_dropped_half_way_comes_to_its_end() {
        let (step, mut steps) = tokio::sync::mpsc::unbounded_channel();
        let go = Arc::new(tokio::sync::Notify::new());
        let waits = go.clone();
        let mut work = ToEnd::new(async move {
            step.send("begun").unwrap();
            waits.notified().await;
            step.send("ended").unwrap();
        });
        assert!(futures::poll!(&mut work).is_pending());
        assert_eq!(steps.recv().await, Some("begun"));
        drop(work);
        go.notify_one();
        assert_eq!(steps.recv().await, Some("ended"));
        assert_eq!(ToEnd::new(async { 7 }).await, 7);
    }
}
