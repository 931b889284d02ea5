//! The effect of a waiting thread's signals, read from `/proc`.
//!
//! Reading `/proc/TID/status` does not take the lock of the thread's address space, which a thread that faults on a
//! page of this mount, or a fork of its process, holds while it waits for this process. Reading `/proc/TID/stat` does,
//! so it is read only for threads that have no address space any more, as when they exit.

use std::fs;

/// A set of signals as in `/proc`: signal N is bit N - 1.
type SignalSet = u64;

/// Signals whose default action does not terminate the program: they are ignored, stop it or continue it.
const NON_TERMINATING: SignalSet = set(&[
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
    libc::SIGSTOP,
    libc::SIGTSTP,
    libc::SIGTTIN,
    libc::SIGTTOU,
]);

/// Signals with which a person or a service manager requests termination. A handler for one of them should run soon.
/// Other signals have other uses (timers, children, profilers, reloads).
const TERMINATION_REQUESTS: SignalSet = set(&[libc::SIGINT, libc::SIGQUIT, libc::SIGTERM]);

/// PF_EXITING of linux/sched.h.
const EXITING: u64 = 0x4;

const fn set(signals: &[i32]) -> SignalSet {
    let mut set = 0;
    let mut at = 0;
    while at < signals.len() {
        set |= 1 << (signals[at] - 1);
        at += 1;
    }
    set
}

/// The effect of a thread's pending signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SignalState {
    /// It continues to wait.
    None,
    /// A termination request is pending, and the program handles it when the call returns.
    TerminationRequested,
    /// A pending signal terminates it, or it is being killed.
    Fatal,
}

/// Returns the effect of the pending signals of `thread`; `None` if it does not exist or cannot be read.
pub(super) fn signal_state(thread: u32) -> SignalState {
    let read = |file: &str| fs::read_to_string(format!("/proc/{thread}/{file}")).ok();
    let Some(status) = read("status") else {
        return SignalState::None;
    };
    let Some(state) = parse_status(&status) else {
        return SignalState::None;
    };
    match state {
        SignalState::None
            if !has_address_space(&status) && read("stat").is_some_and(|stat| is_being_killed(&stat)) =>
        {
            SignalState::Fatal
        }
        state => state,
    }
}

/// Whether `/proc/TID/status` shows an address space. An exiting thread drops it before its files.
fn has_address_space(status: &str) -> bool {
    status.lines().any(|line| line.starts_with("VmSize:"))
}

/// Returns what `/proc/TID/status` says about signals; `None` if fields are missing.
fn parse_status(status: &str) -> Option<SignalState> {
    let value = |name: &str| {
        let mut lines = status.lines();
        lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
    };
    let signals = |name| SignalSet::from_str_radix(value(name)?, 16).ok();
    let pending = signals("SigPnd")? | signals("ShdPnd")?;
    if pending & set(&[libc::SIGKILL]) != 0 {
        return Some(SignalState::Fatal);
    }
    // The debugger decides what a signal does.
    if value("TracerPid")? != "0" {
        return Some(SignalState::None);
    }
    let delivered = pending & !signals("SigBlk")? & !signals("SigIgn")?;
    let handled = signals("SigCgt")?;
    Some(if delivered & !handled & !NON_TERMINATING != 0 {
        SignalState::Fatal
    } else if delivered & handled & TERMINATION_REQUESTS != 0 {
        SignalState::TerminationRequested
    } else {
        SignalState::None
    })
}

/// Whether `/proc/TID/stat` shows a thread that exits because of a signal and is closing its files. (A program that
/// exits by itself waits until its files are written, as close(2) does.)
fn is_being_killed(stat: &str) -> bool {
    // The name, in parentheses, may contain anything. Field 3 follows it.
    let Some((_, fields)) = stat.rsplit_once(") ") else {
        return false;
    };
    let field = |number: usize| fields.split_whitespace().nth(number - 3)?.parse::<u64>().ok();
    // As in waitpid(2): the low seven bits are the signal.
    let is_signalled = |exit_code: u64| exit_code & 0x7f != 0;
    field(9).is_some_and(|flags| flags & EXITING != 0) && field(52).is_some_and(is_signalled)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(tracer: u32, sets: [SignalSet; 5]) -> Option<SignalState> {
        let [pending, shared, blocked, ignored, handled] = sets;
        parse_status(&format!(
            "Name:\tSigPnd: 1\nState:\tD (disk sleep)\nTracerPid:\t{tracer}\nSigQ:\t1/31\nSigPnd:\t{pending:016x}\n\
             ShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{handled:016x}\n"
        ))
    }

    #[test]
    fn only_signals_that_terminate_the_program_interrupt_its_call() {
        const NONE: SignalSet = 0;
        let int = set(&[libc::SIGINT]);
        let kill = set(&[libc::SIGKILL]);
        assert_eq!(status(0, [NONE; 5]), Some(SignalState::None));
        assert_eq!(
            status(0, [kill, NONE, NONE, NONE, NONE]),
            Some(SignalState::Fatal)
        );
        assert_eq!(
            status(7, [NONE, kill, NONE, NONE, NONE]),
            Some(SignalState::Fatal),
            "traced"
        );
        assert_eq!(status(0, [NONE, int, NONE, NONE, NONE]), Some(SignalState::Fatal));
        assert_eq!(
            status(7, [NONE, int, NONE, NONE, NONE]),
            Some(SignalState::None),
            "traced"
        );
        assert_eq!(
            status(0, [NONE, int, int, NONE, NONE]),
            Some(SignalState::None),
            "blocked"
        );
        assert_eq!(
            status(0, [NONE, int, NONE, int, NONE]),
            Some(SignalState::None),
            "ignored"
        );
        assert_eq!(
            status(0, [int, NONE, NONE, NONE, int]),
            Some(SignalState::TerminationRequested)
        );
        for signal in 1..=64 {
            let signals = set(&[signal]);
            let requests = [libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];
            let handled = status(0, [signals, NONE, NONE, NONE, signals]);
            let expected = match signal {
                libc::SIGKILL => SignalState::Fatal,
                signal if requests.contains(&signal) => SignalState::TerminationRequested,
                _ => SignalState::None,
            };
            assert_eq!(handled, Some(expected), "handled {signal}");
        }
        for signal in [libc::SIGALRM, libc::SIGPROF, libc::SIGUSR1, 64] {
            let default = status(0, [set(&[signal]), NONE, NONE, NONE, NONE]);
            assert_eq!(default, Some(SignalState::Fatal), "default {signal}");
        }
        for signal in [libc::SIGCHLD, libc::SIGURG, libc::SIGTSTP, libc::SIGWINCH] {
            let default = status(0, [set(&[signal]), NONE, NONE, NONE, NONE]);
            assert_eq!(default, Some(SignalState::None), "default {signal}");
        }
        assert_eq!(parse_status("Name:\tkthread\n"), None);
    }

    #[test]
    fn a_killed_program_is_distinguished_from_one_that_exits() {
        let stat = |flags: u64, exit_code: u64| {
            let middle = ["0"; 42].join(" ");
            format!("7 (a) b) D 1 7 7 0 -1 {flags} {middle} {exit_code}\n")
        };
        assert!(is_being_killed(&stat(0x4, 9)));
        assert!(is_being_killed(&stat(0x40_0444, 0x80 | 3)), "with a core");
        assert!(!is_being_killed(&stat(0x4, 1 << 8)), "exit(1)");
        assert!(!is_being_killed(&stat(0x400, 9)), "not exiting");
        assert!(!is_being_killed("7 (a"));
    }

    #[test]
    fn this_thread_has_no_pending_signals() {
        // SAFETY: gettid touches no memory.
        let own = unsafe { libc::gettid() };
        assert_eq!(signal_state(own as u32), SignalState::None);
        assert_eq!(
            signal_state(u32::MAX),
            SignalState::None,
            "there is no such thread"
        );
    }
}
