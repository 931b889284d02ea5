//! Detects when the readers of a file have copied the pages of their answers.
//!
//! A thread that waits for a page is woken by the answer and copies its bytes when it gets a processor: on a busy
//! machine milliseconds later. No event reports that, but `/proc/TID` shows whether the thread has run since. Between
//! the page and its bytes it waits for nothing, so a thread that has run, or waits for something else, has copied them.
//!
//! This module must not know files and pages.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use quorumfs_fs::Reader;

/// Pause between two checks.
const POLL_INTERVAL: Duration = Duration::from_micros(200);

/// A reader that gets no processor for this long is no longer waited for.
const WAIT_MAX: Duration = Duration::from_millis(500);

/// Time to wait for threads that `/proc` does not show.
const UNSEEN_PAUSE: Duration = Duration::from_millis(5);

/// The state of a thread in `/proc`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    /// It runs, or waits for a processor. It has run for this many nanoseconds so far, if the kernel counts them.
    Runnable { ran_ns: Option<u64> },
    /// It waits for something else, or does not exist.
    NotRunnable,
}

/// Waits until each of `readers`, which were answered, has run since, or `WAIT_MAX` is over.
pub(super) fn wait_for_readers(readers: &[Reader]) {
    let begin = Instant::now();
    if readers.contains(&Reader(0)) {
        thread::sleep(UNSEEN_PAUSE);
    }
    let first_seen = readers.iter().map(|reader| (*reader, seen(*reader)));
    let mut waiting: Vec<_> = first_seen
        .filter(|(_, first)| *first != Seen::NotRunnable)
        .collect();
    while !waiting.is_empty() && begin.elapsed() < WAIT_MAX {
        thread::sleep(POLL_INTERVAL);
        waiting.retain(|(reader, first)| seen(*reader) == *first);
    }
}

fn seen(Reader(thread): Reader) -> Seen {
    // Reading these files takes no lock that a thread holds while it waits for this mount.
    let read = |file: &str| fs::read_to_string(format!("/proc/{thread}/{file}")).ok();
    let ran_ns = read("schedstat").and_then(|text| text.split(' ').next()?.parse().ok());
    match read("status").as_deref().and_then(state) {
        Some('R') => Seen::Runnable { ran_ns },
        _ => Seen::NotRunnable,
    }
}

/// Returns the letter of a thread's state in `/proc/TID/status` (proc_pid_status(5)).
fn state(status: &str) -> Option<char> {
    let line = status.lines().find_map(|line| line.strip_prefix("State:"))?;
    line.trim_start().chars().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_state_is_the_first_letter() {
        let status = "Name:\tState: R\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t7\n";
        assert_eq!(state(status), Some('S'));
        assert_eq!(state("Name:\tcat\n"), None);
    }

    #[test]
    fn a_thread_that_runs_sleeps_or_has_ended_is_not_waited_for() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let sleeping = thread::spawn(move || {
            // SAFETY: gettid touches no memory.
            sender.send(unsafe { libc::gettid() }).unwrap();
            let _ = ended.recv();
        });
        let asleep = Reader(receiver.recv().unwrap() as u32);
        while seen(asleep) != Seen::NotRunnable {
            thread::yield_now();
        }
        // SAFETY: as above.
        let own = Reader(unsafe { libc::gettid() } as u32);
        assert!(matches!(seen(own), Seen::Runnable { ran_ns: Some(_) }));
        let begin = Instant::now();
        wait_for_readers(&[own, asleep, Reader(u32::MAX)]);
        assert!(
            begin.elapsed() < WAIT_MAX,
            "this thread has slept and run meanwhile"
        );
        drop(end);
        sleeping.join().unwrap();
    }
}
