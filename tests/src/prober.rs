//! Measures how long calls wait: the pause that a user would notice.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two calls: short against the pauses that matter, long enough not to be a load.
const INTERVAL: Duration = Duration::from_millis(10);

/// Calls `mkdir` and `rmdir` in a directory, over and over, until told to stop.
#[derive(Debug)]
pub struct Prober {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Pauses>,
}

/// What was measured.
#[derive(Clone, Debug)]
pub struct Pauses {
    /// Calls made.
    pub calls: usize,
    /// The longest ones: (since the start, how long), longest first, at most ten.
    pub longest: Vec<(Duration, Duration)>,
    /// What failed.
    pub errors: Vec<String>,
}

impl Prober {
    /// Starts with the directory `place`, which must not exist.
    pub fn start(place: &Path) -> Prober {
        let over = Arc::new(AtomicBool::new(false));
        let (stop, place) = (Arc::clone(&over), place.to_path_buf());
        let thread = std::thread::spawn(move || {
            let start = Instant::now();
            let mut pauses = Pauses {
                calls: 0,
                longest: Vec::new(),
                errors: Vec::new(),
            };
            while !stop.load(Ordering::Relaxed) {
                for call in [std::fs::create_dir::<&Path>, std::fs::remove_dir::<&Path>] {
                    let begin = Instant::now();
                    if let Err(error) = call(&place) {
                        pauses
                            .errors
                            .push(format!("after {:?}: {error}", start.elapsed()));
                    }
                    pauses.calls += 1;
                    pauses
                        .longest
                        .push((begin.duration_since(start), begin.elapsed()));
                }
                pauses.longest.sort_by_key(|(_, took)| std::cmp::Reverse(*took));
                pauses.longest.truncate(10);
                std::thread::sleep(INTERVAL);
            }
            pauses
        });
        Prober { over, thread }
    }

    /// Stops and answers what was measured.
    pub fn stop(self) -> Pauses {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().expect("the prober does not panic")
    }
}

impl Pauses {
    /// The longest call.
    pub fn longest(&self) -> Duration {
        self.longest.first().map_or(Duration::ZERO, |(_, took)| *took)
    }

    /// Prints what was measured; panics where a call failed or took longer than `limit`.
    #[track_caller]
    pub fn assert_within(&self, limit: Duration) {
        eprintln!(
            "measured: {} calls, longest pauses (at, took): {:.2?}",
            self.calls, self.longest
        );
        assert!(self.errors.is_empty(), "calls failed: {:?}", self.errors);
        assert!(self.calls > 0, "nothing was measured");
        assert!(
            self.longest() <= limit,
            "a pause of {:?} (at most {limit:?})",
            self.longest()
        );
    }
}
