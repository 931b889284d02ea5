//! Ordinary shell commands, as a user would type them.

use std::process::{Command, Output, Stdio};

use crate::process::spawn;

/// A command that has not ended by then never will.
const LIMIT_SECONDS: &str = "900";

/// Runs `script` with `sh -e` and answers how it ended.
pub fn run(script: &str) -> Output {
    let mut command = Command::new("timeout");
    command
        .args(["-k", "5", LIMIT_SECONDS, "sh", "-ec", script])
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = spawn(command).expect("start a shell");
    child.wait_with_output().expect("wait for a shell")
}

/// Runs `script` with `sh -e`; panics unless it succeeds *and* says nothing on its error output. Answers its output.
#[track_caller]
pub fn shell(script: &str) -> String {
    let output = run(script);
    let errors = String::from_utf8_lossy(&output.stderr);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success() && errors.is_empty(),
        "{script}\n{}\nerrors: {errors}\noutput: {text}",
        output.status
    );
    text
}

/// Runs `script`; panics if it succeeds. Answers what it said on its error output.
#[track_caller]
pub fn shell_fails(script: &str) -> String {
    let output = run(script);
    assert!(!output.status.success(), "{script}: succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}
