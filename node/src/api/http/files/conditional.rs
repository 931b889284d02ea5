//! Entity tags, and the preconditions of RFC 9110, section 13, for reads.
//!
//! The tag of a file consists of its inode and content version: equal versions have equal bytes, so it is a strong
//! tag. A file that replaces another has a new inode, so a tag is never reused. The `headers` crate parses and
//! compares tags. A condition that it cannot parse is ignored, except `If-Range`, which then selects the whole file.

use std::time::SystemTime;

use axum::http::HeaderMap;
use axum::http::header::{IF_NONE_MATCH, RANGE};
use headers::{ETag, HeaderMapExt as _, IfMatch, IfModifiedSince, IfNoneMatch, IfRange, IfUnmodifiedSince};
use quorumfs_proto::{Attributes, Timestamp};

use super::range::{self, Selected};
use super::times;

/// Returns the entity tag of the content of a file.
pub(super) fn etag(attributes: &Attributes) -> String {
    format!("\"{:x}-{:x}\"", attributes.inode.0, attributes.content_version)
}

/// The result of the preconditions of a GET or HEAD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Serve the content or a part of it.
    Serve(Selected),
    /// 304.
    NotModified,
    /// 412.
    PreconditionFailed,
}

/// Evaluates the preconditions and the range in the order of RFC 9110, section 13.2.2.
pub(super) fn evaluate(headers: &HeaderMap, attributes: &Attributes) -> Verdict {
    let tag: ETag = etag(attributes)
        .parse()
        .expect("hexadecimal digits and a dash between quotes are an entity tag");
    // Compared as `Timestamp`, because the time of a file may be outside the range of HTTP dates.
    let modified_after = |limit: SystemTime| times::whole_seconds(attributes.mtime) > Timestamp::from(limit);
    let is_as_demanded = match headers.typed_get::<IfMatch>() {
        Some(listed) => listed.precondition_passes(&tag),
        None => !date::<IfUnmodifiedSince>(headers).is_some_and(modified_after),
    };
    if !is_as_demanded {
        return Verdict::PreconditionFailed;
    }
    let is_new = match headers.typed_get::<IfNoneMatch>() {
        Some(listed) => listed.precondition_passes(&tag),
        None => date::<IfModifiedSince>(headers).is_none_or(modified_after),
    };
    if !is_new {
        return Verdict::NotModified;
    }
    let wanted = headers.get(RANGE).and_then(|value| value.to_str().ok());
    Verdict::Serve(match wanted {
        Some(wanted) if range_applies(headers, &tag) => range::select(wanted, attributes.size),
        _ => Selected::Whole,
    })
}

fn date<Condition: headers::Header + Into<SystemTime>>(headers: &HeaderMap) -> Option<SystemTime> {
    headers.typed_get::<Condition>().map(Into::into)
}

/// Whether the range applies under `If-Range`. Only an equal tag proves that the client has parts of the same content,
/// because two changes can have the same date; with a date, the whole file is served.
fn range_applies(headers: &HeaderMap, tag: &ETag) -> bool {
    match headers.typed_try_get::<IfRange>() {
        Ok(None) => true,
        Ok(Some(condition)) => !condition.is_modified(Some(tag), None),
        Err(_) => false,
    }
}

/// Whether the request has `If-None-Match: *`, which stores a file only if the path does not exist. A repeated `*`
/// counts too; the typed header would parse it as two invalid tags.
pub(super) fn wants_absent(headers: &HeaderMap) -> bool {
    headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .any(|value| value.as_bytes().trim_ascii() == b"*")
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::{HeaderName, HeaderValue};
    use quorumfs_proto::{FileKind, InodeNumber};

    fn file() -> Attributes {
        let time = Timestamp {
            seconds: 784_111_777,
            nanoseconds: 5,
        };
        Attributes {
            inode: InodeNumber(0x1f),
            kind: FileKind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            links: 1,
            size: 100,
            allocated_bytes: 100,
            rdev: 0,
            atime: time,
            mtime: time,
            ctime: time,
            birth_time: time,
            content_version: 10,
            xattr_count: 0,
            has_capability: false,
            parent: InodeNumber::ROOT,
        }
    }

    fn verdict(headers: &[(&'static str, &str)]) -> Verdict {
        let headers = headers
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_static(name),
                    HeaderValue::from_str(value).unwrap(),
                )
            })
            .collect();
        evaluate(&headers, &file())
    }

    const WHOLE: Verdict = Verdict::Serve(Selected::Whole);
    const PART: Verdict = Verdict::Serve(Selected::Part { start: 0, end: 5 });

    #[test]
    fn tags_decide() {
        assert_eq!(etag(&file()), "\"1f-a\"");
        assert_eq!(verdict(&[]), WHOLE);
        assert_eq!(
            verdict(&[("if-none-match", "\"0-0\", W/\"1f-a\"")]),
            Verdict::NotModified
        );
        assert_eq!(verdict(&[("if-none-match", "*")]), Verdict::NotModified);
        assert_eq!(verdict(&[("if-none-match", "\"0-0\"")]), WHOLE);
        assert_eq!(verdict(&[("if-match", "\"1f-a\"")]), WHOLE);
        assert_eq!(
            verdict(&[("if-match", "W/\"1f-a\"")]),
            Verdict::PreconditionFailed
        );
        assert_eq!(verdict(&[("if-match", "\"1f-9\"")]), Verdict::PreconditionFailed);
    }

    #[test]
    fn dates_decide_where_there_is_no_tag() {
        let same = "Sun, 06 Nov 1994 08:49:37 GMT";
        let before = "Sun, 06 Nov 1994 08:49:36 GMT";
        assert_eq!(verdict(&[("if-modified-since", same)]), Verdict::NotModified);
        assert_eq!(verdict(&[("if-modified-since", before)]), WHOLE);
        assert_eq!(
            verdict(&[("if-modified-since", same), ("if-none-match", "\"x\"")]),
            WHOLE
        );
        assert_eq!(
            verdict(&[("if-unmodified-since", before)]),
            Verdict::PreconditionFailed
        );
        assert_eq!(verdict(&[("if-unmodified-since", same)]), WHOLE);
    }

    #[test]
    fn if_range_guards_the_part() {
        assert_eq!(verdict(&[("range", "bytes=0-4")]), PART);
        assert_eq!(verdict(&[("range", "bytes=0-4"), ("if-range", "\"1f-a\"")]), PART);
        assert_eq!(
            verdict(&[("range", "bytes=0-4"), ("if-range", "\"1f-9\"")]),
            WHOLE
        );
        assert_eq!(
            verdict(&[
                ("range", "bytes=0-4"),
                ("if-range", "Sun, 06 Nov 1994 08:49:37 GMT")
            ]),
            WHOLE
        );
    }

    #[test]
    fn lists_may_be_long_broken_or_spread_over_lines() {
        let many = vec!["\"0-0\""; 1000].join(", ");
        assert_eq!(verdict(&[("if-none-match", &many)]), WHOLE);
        let with_ours = format!("{many}, \"1f-a\"");
        assert_eq!(verdict(&[("if-none-match", &with_ours)]), Verdict::NotModified);
        assert_eq!(verdict(&[("if-match", &with_ours)]), WHOLE);
        let lines = HeaderMap::from_iter([
            (IF_NONE_MATCH, HeaderValue::from_static("\"0-0\"")),
            (IF_NONE_MATCH, HeaderValue::from_static("\"1f-a\"")),
        ]);
        assert_eq!(evaluate(&lines, &file()), Verdict::NotModified);
        for broken in [
            "",
            "\"",
            "W/",
            "W/\"",
            "1f-a",
            "\"1f-a",
            "\"a b\"",
            "\"a\tb\"",
            ",,,",
            "w/\"1f-a\"",
        ] {
            assert_eq!(verdict(&[("if-none-match", broken)]), WHOLE, "{broken:?}");
            assert_eq!(
                verdict(&[("if-match", broken)]),
                Verdict::PreconditionFailed,
                "{broken:?}"
            );
            let part = [("range", "bytes=0-4"), ("if-range", broken)];
            assert_eq!(verdict(&part), WHOLE, "{broken:?}");
            assert_eq!(verdict(&[("if-modified-since", broken)]), WHOLE, "{broken:?}");
        }
    }

    #[test]
    fn times_that_no_http_date_can_name_are_compared() {
        let mut file = file();
        let since = "Sun, 06 Nov 1994 08:49:37 GMT";
        let headers = HeaderMap::from_iter([(
            HeaderName::from_static("if-modified-since"),
            HeaderValue::from_static(since),
        )]);
        file.mtime.seconds = i64::MIN;
        assert_eq!(evaluate(&headers, &file), Verdict::NotModified);
        file.mtime.seconds = i64::MAX;
        assert_eq!(evaluate(&headers, &file), WHOLE);
    }

    #[test]
    fn an_upload_that_must_not_replace_is_recognised() {
        let headers = |values: &[&'static str]| -> HeaderMap {
            let values = values.iter().map(|value| HeaderValue::from_static(value));
            values.map(|value| (IF_NONE_MATCH, value)).collect()
        };
        assert!(wants_absent(&headers(&["*"])));
        assert!(wants_absent(&headers(&["*", "*"])));
        assert!(!wants_absent(&headers(&["\"1f-a\""])));
        assert!(!wants_absent(&headers(&[])));
    }
}
