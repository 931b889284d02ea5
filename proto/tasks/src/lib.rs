//! The supervisor: every task that runs as long as its process is started here, under a name.
//!
//! A task that panics or returns is recorded with its reason and started again after a pause, which grows while it
//! keeps failing. A node shows the state of each task in `/status` and in its metrics, a mount sends what failed to the
//! cluster with its statistics, so that a task that has stopped is visible. A task keeps no state of its own that must
//! survive: such state is behind the `Arc` from which the task is made.
//!
//! This crate does not know what the tasks do. If continuing would break a promise, a task ends its process itself.

use std::collections::BTreeMap;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

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

/// The work of a task from one start to its end.
pub type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// What a start of the task with this name does instead of its work.
type Wrap = dyn Fn(&'static str, Work) -> Work + Send + Sync;

/// All supervised tasks of a process.
#[derive(Default)]
pub struct Tasks {
    reports: Mutex<BTreeMap<&'static str, TaskReport>>,
    wrap: Option<Box<Wrap>>,
}

impl fmt::Debug for Tasks {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Tasks")
            .field("reports", &self.reports)
            .finish_non_exhaustive()
    }
}

impl Tasks {
    /// Each start of a task does what `wrap` makes of its name and its work. A test makes tasks fail with it.
    pub fn wrapped(wrap: impl Fn(&'static str, Work) -> Work + Send + Sync + 'static) -> Tasks {
        Tasks {
            wrap: Some(Box::new(wrap)),
            ..Tasks::default()
        }
    }

    /// Runs `run` of `part`; restarts it whenever it ends.
    pub fn supervise<Part, Run>(
        self: &Arc<Self>,
        name: &'static str,
        part: Part,
        run: impl Fn(Part) -> Run + Send + 'static,
    ) -> JoinHandle<()>
    where
        Part: Clone + Send + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let make = move || run(part.clone());
        tokio::spawn(self.clone().run(name, Returns::Never, make))
    }

    /// Runs `run` of `part` until it returns; restarts it after a panic.
    pub fn supervise_until_done<Part, Run>(
        self: &Arc<Self>,
        name: &'static str,
        part: Part,
        run: impl Fn(Part) -> Run + Send + 'static,
    ) -> JoinHandle<()>
    where
        Part: Clone + Send + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let make = move || run(part.clone());
        tokio::spawn(self.clone().run(name, Returns::WhenDone, make))
    }

    /// Returns the reports about all tasks, by name.
    pub fn report(&self) -> Vec<TaskReport> {
        self.reports.lock().values().cloned().collect()
    }

    async fn run<Run: Future<Output = ()> + Send + 'static>(
        self: Arc<Self>,
        name: &'static str,
        returns: Returns,
        make: impl Fn() -> Run + Send + 'static,
    ) {
        let mut pause = PAUSE_MIN;
        loop {
            let began = Instant::now();
            self.begins(name);
            let work: Work = match &self.wrap {
                Some(wrap) => wrap(name, Box::pin(make())),
                None => Box::pin(make()),
            };
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

fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_millis()).unwrap_or(u64::MAX)
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
}
