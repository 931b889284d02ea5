//! The write(2) call to which a WRITE request belongs.
//!
//! The kernel splits long writes without marking the parts. While a thread waits for the answer to the first part,
//! `/proc/TID/syscall` shows its system call with the arguments (proc_pid_syscall(5)).

use std::fs;

use quorumfs_fs::{WritePosition, may_be_first_part};

/// Adds to `position`, the position of a request of `bytes`, how many bytes are still to come, if that matters and can be
/// seen.
pub(super) async fn with_rest(mut position: WritePosition, thread: u32, bytes: usize) -> WritePosition {
    if let WritePosition::End { more_bytes, .. } = &mut position
        && may_be_first_part(bytes)
    {
        // Not on a thread of the runtime: reading that file may block.
        let whole = tokio::task::spawn_blocking(move || bytes_of_write(thread)).await;
        *more_bytes = whole
            .ok()
            .flatten()
            .and_then(|whole| whole.checked_sub(bytes as u64));
    }
    position
}

/// Returns the number of bytes that `thread`, which waits for an answer, writes with one call. `None` if that cannot be
/// seen, or the call is neither write(2) nor pwrite(2).
fn bytes_of_write(thread: u32) -> Option<u64> {
    parse(&fs::read_to_string(format!("/proc/{thread}/syscall")).ok()?)
}

/// Parses the number of the call in decimal, then its arguments in hexadecimal.
fn parse(shown: &str) -> Option<u64> {
    let mut fields = shown.split_ascii_whitespace();
    let number: i64 = fields.next()?.parse().ok()?;
    if number != libc::SYS_write && number != libc::SYS_pwrite64 {
        return None;
    }
    let count = fields.nth(2)?;
    u64::from_str_radix(count.strip_prefix("0x")?, 16).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_of_a_write_is_read() {
        let write = format!(
            "{} 0x3 0x7ffc0001 0x100000 0x0 0x0 0x0 0x7ffc 0x7f00\n",
            libc::SYS_write
        );
        assert_eq!(parse(&write), Some(1 << 20));
        assert_eq!(
            parse(&write.replacen(&libc::SYS_write.to_string(), "20", 1)),
            None
        );
        assert_eq!(parse("running\n"), None);
        assert_eq!(parse("-1 0x7ffc 0x7f00\n"), None);
    }

    #[test]
    fn a_thread_that_is_gone_writes_nothing() {
        assert_eq!(bytes_of_write(u32::MAX), None);
    }
}
