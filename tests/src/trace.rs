//! Watches, with strace, when processes flush to disk.
//!
//! strace writes one file for each thread (`-ff`), so that no call is split between two lines:
//! `1700000000.123456 fdatasync(7</path>) = 0 <0.000140>`.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::Sandbox;
use crate::environment::wait_for;
use crate::process::spawn;

/// The calls that bring data to stable storage.
const FLUSHES: &str = "trace=fsync,fdatasync,sync_file_range,syncfs,msync";

/// A running strace of one process.
#[derive(Debug)]
pub struct Trace {
    strace: Child,
    prefix: PathBuf,
}

/// One successful flush.
#[derive(Clone, Debug, PartialEq)]
pub struct Flush {
    /// When it was done, since 1970.
    pub done: Duration,
    /// The file.
    pub file: String,
}

/// This moment, on the clock of [`Flush::done`].
pub fn now() -> Duration {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("later than 1970")
}

impl Trace {
    /// Watches the process `id` and its threads, present and future.
    pub fn attach(sandbox: &Sandbox, name: &str, id: i32) -> Trace {
        let prefix = sandbox.make_folder(format!("trace-{name}")).join("thread");
        let mut command = Command::new("strace");
        command
            .args([
                "-ff",
                "-y",
                "-ttt",
                "-T",
                "-e",
                FLUSHES,
                "-e",
                "signal=none",
                "-p",
                &id.to_string(),
                "-o",
            ])
            .arg(&prefix)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let strace = spawn(command).expect("start strace");
        let tracer = format!("TracerPid:\t{}", strace.id());
        wait_for("strace watches every thread", Duration::from_secs(20), || {
            let threads = std::fs::read_dir(format!("/proc/{id}/task")).expect("the process runs");
            threads.flatten().all(|thread| {
                std::fs::read_to_string(thread.path().join("status"))
                    .is_ok_and(|status| status.contains(&tracer))
            })
        });
        Trace { strace, prefix }
    }

    /// Stops watching; answers every successful flush, in the order in which they were done.
    pub fn stop(mut self) -> Vec<Flush> {
        kill(Pid::from_raw(self.strace.id() as i32), Signal::SIGTERM).expect("end strace");
        self.strace.wait().expect("wait for strace");
        let folder = self.prefix.parent().expect("the prefix lies in a folder");
        let mut flushes: Vec<Flush> = std::fs::read_dir(folder)
            .expect("read the folder of traces")
            .flatten()
            .flat_map(|entry| parse_file(&entry.path()))
            .collect();
        flushes.sort_by_key(|flush| flush.done);
        flushes
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // After `stop` it has ended already.
        let _ = self.strace.kill();
        let _ = self.strace.wait();
    }
}

fn parse_file(path: &Path) -> Vec<Flush> {
    let text = std::fs::read(path).unwrap_or_default();
    String::from_utf8_lossy(&text)
        .lines()
        .filter_map(parse_line)
        .collect()
}

fn parse_line(line: &str) -> Option<Flush> {
    let (entered, rest) = line.split_once(' ')?;
    let (call, result) = rest.rsplit_once(" = ")?;
    let took = result.strip_prefix("0 <")?.strip_suffix('>')?;
    let seconds: f64 = took.parse().ok()?;
    let (whole, fraction) = entered.split_once('.')?;
    let entered = Duration::from_secs(whole.parse().ok()?) + Duration::from_micros(fraction.parse().ok()?);
    let file = call
        .split_once('<')
        .and_then(|(_, file)| file.split_once('>'))
        .map_or("", |(file, _)| file);
    Some(Flush {
        done: entered + Duration::from_secs_f64(seconds),
        file: file.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_strace_are_understood() {
        assert_eq!(
            parse_line("1700000000.000100 fdatasync(7</data/wal/1.log>) = 0 <0.000200>"),
            Some(Flush {
                done: Duration::from_micros(1_700_000_000_000_300),
                file: "/data/wal/1.log".into()
            })
        );
        assert_eq!(
            parse_line("1700000000.000100 fsync(7</x>) = -1 EIO (Input/output error) <0.1>"),
            None
        );
        assert_eq!(parse_line("1700000000.000100 +++ exited with 0 +++"), None);
    }

    #[test]
    fn a_flush_of_a_traced_process_is_seen() {
        let sandbox = Sandbox::light("trace");
        let file = sandbox.path("file");
        let mut writer = Command::new("sh");
        writer
            .args([
                "-c",
                "while :; do echo x >>\"$0\"; sync -d \"$0\"; sleep 0.05; done",
            ])
            .arg(&file);
        let mut writer = spawn(writer).unwrap();
        // sh forks for each `sync`: strace follows.
        let trace = Trace::attach(&sandbox, "writer", writer.id() as i32);
        let before = now();
        std::thread::sleep(Duration::from_millis(500));
        let after = now();
        let flushes = trace.stop();
        writer.kill().unwrap();
        writer.wait().unwrap();
        let seen = flushes
            .iter()
            .filter(|f| before <= f.done && f.done <= after && f.file.ends_with("/file"))
            .count();
        assert!(seen >= 2, "{flushes:?}");
    }
}
