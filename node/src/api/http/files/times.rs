//! Timestamps in HTTP headers and JSON.
//!
//! Programs can set any time. A time that HTTP cannot express is omitted; JSON contains any year.
//!
//! The calendar is implemented here because the time of a file is any 64-bit number of seconds, and `jiff` ends a day
//! before the year 10000. `httpdate`, a dependency of every HTTP server, formats HTTP dates.

use std::time::SystemTime;

use quorumfs_proto::Timestamp;

/// The first second that an HTTP date cannot express: the year 10000.
const HTTP_DATE_END_S: i64 = 253_402_300_800;

/// Formats a time for `Last-Modified`, in whole seconds; `None` before 1970 and after the year 9999.
pub(super) fn http_date(time: Timestamp) -> Option<String> {
    let whole = whole_seconds(time);
    (0..HTTP_DATE_END_S)
        .contains(&whole.seconds)
        .then(|| httpdate::fmt_http_date(SystemTime::from(whole)))
}

/// Removes the fraction of a second, which HTTP dates do not have.
pub(super) fn whole_seconds(time: Timestamp) -> Timestamp {
    Timestamp {
        seconds: time.seconds,
        nanoseconds: 0,
    }
}

/// Formats a time according to RFC 3339, in UTC with nanoseconds, such as `2026-11-05T12:34:56.000000789Z`.
pub(super) fn rfc3339(time: Timestamp) -> String {
    let (days, second_of_day) = (time.seconds.div_euclid(86_400), time.seconds.rem_euclid(86_400));
    let (year, month, day) = civil_from_days(i128::from(days));
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:09}Z",
        second_of_day / 3600,
        second_of_day / 60 % 60,
        second_of_day % 60,
        time.nanoseconds
    )
}

/// Returns the date (year, month, day) `days` after 1970-01-01 in the proleptic Gregorian calendar: Howard Hinnant's
/// `civil_from_days` (<https://howardhinnant.github.io/date_algorithms.html>). Years start in March here, so that the
/// leap day is last.
fn civil_from_days(days: i128) -> (i128, i128, i128) {
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let day_of_era = days.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year_of_era + era * 400 + i128::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: i64, nanoseconds: u32) -> Timestamp {
        Timestamp { seconds, nanoseconds }
    }

    #[test]
    fn json_times_are_rfc_3339() {
        // Expected values from `date -u -d @N +%FT%TZ`.
        assert_eq!(rfc3339(at(0, 0)), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(rfc3339(at(951_827_696, 7)), "2000-02-29T12:34:56.000000007Z");
        assert_eq!(rfc3339(at(1_783_253_696, 0)), "2026-07-05T12:14:56.000000000Z");
        assert_eq!(rfc3339(at(-1, 999_999_999)), "1969-12-31T23:59:59.999999999Z");
        assert_eq!(rfc3339(at(253_402_300_799, 0)), "9999-12-31T23:59:59.000000000Z");
        rfc3339(at(i64::MAX, 0));
        rfc3339(at(i64::MIN, 0));
    }

    #[test]
    fn http_dates_never_panic() {
        assert_eq!(
            http_date(at(784_111_777, 5)).as_deref(),
            Some("Sun, 06 Nov 1994 08:49:37 GMT")
        );
        for beyond in [i64::MIN, -1, HTTP_DATE_END_S, i64::MAX] {
            assert_eq!(http_date(at(beyond, 0)), None);
        }
        assert!(http_date(at(HTTP_DATE_END_S - 1, 0)).is_some());
    }
}
