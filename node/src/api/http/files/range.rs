//! The `Range` header (RFC 9110, section 14): the requested bytes of a file.
//!
//! One range is served as 206. Several ranges, other units and values that cannot be parsed are answered with the
//! whole file, as the RFC allows.
//!
//! No crate is used: `headers` 0.4 treats a suffix longer than the file as unsatisfiable and refuses `BYTES=`,
//! `http-range-header` also refuses leading zeros, and both refuse positions beyond 64 bits; RFC 9110 allows all of
//! these.

/// The selected bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Selected {
    /// The whole file: 200.
    Whole,
    /// The bytes from `start` to `end` (exclusive), never empty: 206.
    Part {
        /// Offset of the first byte.
        start: u64,
        /// Offset after the last byte.
        end: u64,
    },
    /// The range is outside the file: 416.
    Unsatisfiable,
}

/// Selects the bytes of a file of `size_bytes` that `header` requests.
pub(super) fn select(header: &str, size_bytes: u64) -> Selected {
    let Some((unit, ranges)) = header.split_once('=') else {
        return Selected::Whole;
    };
    if !unit.trim().eq_ignore_ascii_case("bytes") || ranges.contains(',') {
        return Selected::Whole;
    }
    let Some((first, last)) = ranges.trim().split_once('-') else {
        return Selected::Whole;
    };
    match (position(first), position(last)) {
        (Some(Position::At(start)), Some(last)) => {
            let end = match last {
                Position::At(last) if last < start => return Selected::Whole,
                Position::At(last) => last.saturating_add(1).min(size_bytes),
                Position::Open => size_bytes,
            };
            if start >= size_bytes {
                return Selected::Unsatisfiable;
            }
            Selected::Part { start, end }
        }
        (Some(Position::Open), Some(Position::At(0))) => Selected::Unsatisfiable,
        // A suffix of an empty file is the whole file, which a 206 cannot express.
        (Some(Position::Open), Some(Position::At(_))) if size_bytes == 0 => Selected::Whole,
        (Some(Position::Open), Some(Position::At(suffix))) => Selected::Part {
            start: size_bytes.saturating_sub(suffix),
            end: size_bytes,
        },
        _ => Selected::Whole,
    }
}

enum Position {
    At(u64),
    Open,
}

fn position(text: &str) -> Option<Position> {
    if text.is_empty() {
        return Some(Position::Open);
    }
    if !text.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    // A position that does not fit into a u64 is after the end of every file.
    Some(Position::At(text.parse().unwrap_or(u64::MAX)))
}

#[cfg(test)]
mod tests {
    use super::Selected::{Part, Unsatisfiable, Whole};
    use super::*;

    #[test]
    fn ranges_are_cut_to_the_file() {
        for (header, size, expected) in [
            ("bytes=0-0", 10, Part { start: 0, end: 1 }),
            ("bytes=2-5", 10, Part { start: 2, end: 6 }),
            ("BYTES=2-", 10, Part { start: 2, end: 10 }),
            ("bytes=9-99999999999999999999999", 10, Part { start: 9, end: 10 }),
            ("bytes=0-18446744073709551615", 10, Part { start: 0, end: 10 }),
            ("bytes=10-", 10, Unsatisfiable),
            ("bytes=0-", 0, Unsatisfiable),
            ("bytes=-3", 10, Part { start: 7, end: 10 }),
            ("bytes=-30", 10, Part { start: 0, end: 10 }),
            ("bytes=-0", 10, Unsatisfiable),
            ("bytes=-3", 0, Whole),
        ] {
            assert_eq!(select(header, size), expected, "{header} of {size}");
        }
    }

    #[test]
    fn what_is_not_one_range_of_bytes_is_ignored() {
        for header in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=5-2",
            "bytes=a-b",
            "bytes=+1-2",
            "bytes=0-1,4-5",
            "lines=0-1",
        ] {
            assert_eq!(select(header, 10), Whole, "{header}");
        }
    }
}
