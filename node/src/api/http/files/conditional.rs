//! Entity tags, and the preconditions of RFC 9110 section 13 on reads.
//!
//! The tag of a file is its inode and content version: equal versions mean equal bytes, so it is a strong one. A
//! file replaced by an upload is another inode, so an old tag never comes back.

use axum::http::header::{IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, RANGE};
use axum::http::{HeaderMap, HeaderName};
use quorumfs_proto::Attributes;

use super::range::{self, Selected};
use super::times;

/// The entity tag of a file's content.
pub(super) fn etag(attributes: &Attributes) -> String {
    format!("\"{:x}-{:x}\"", attributes.inode.0, attributes.content_version)
}

/// What a GET or HEAD is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Content, all or a part.
    Serve(Selected),
    /// 304.
    NotModified,
    /// 412.
    PreconditionFailed,
}

/// Evaluates the preconditions and the range, in the RFC's order.
pub(super) fn evaluate(headers: &HeaderMap, attributes: &Attributes) -> Verdict {
    let tag = etag(attributes);
    let modified = times::whole_seconds(attributes.mtime);
    let date = |name: HeaderName| text(headers, &name).and_then(times::parse_http_date);

    if headers.contains_key(IF_MATCH) {
        if !lists(headers, IF_MATCH, &tag, Comparison::Strong) {
            return Verdict::PreconditionFailed;
        }
    } else if date(IF_UNMODIFIED_SINCE).is_some_and(|limit| modified > limit) {
        return Verdict::PreconditionFailed;
    }
    if headers.contains_key(IF_NONE_MATCH) {
        if lists(headers, IF_NONE_MATCH, &tag, Comparison::Weak) {
            return Verdict::NotModified;
        }
    } else if date(IF_MODIFIED_SINCE).is_some_and(|limit| modified <= limit) {
        return Verdict::NotModified;
    }
    Verdict::Serve(match text(headers, &RANGE) {
        Some(wanted) if range_applies(headers, &tag) => range::select(wanted, attributes.size),
        _ => Selected::Whole,
    })
}

/// `If-Range`: the part only if the client's other part is of this very content, which the tag alone says for sure
/// (two changes can share a date); with a date the answer is the whole file.
fn range_applies(headers: &HeaderMap, tag: &str) -> bool {
    match headers.get(IF_RANGE) {
        None => true,
        Some(condition) => condition.as_bytes().trim_ascii() == tag.as_bytes(),
    }
}

/// Whether `If-None-Match: *` is asked: only if nothing is there.
pub(super) fn wants_absent(headers: &HeaderMap) -> bool {
    headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .any(|value| value.as_bytes().trim_ascii() == b"*")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Strong,
    Weak,
}

fn lists(headers: &HeaderMap, name: HeaderName, tag: &str, comparison: Comparison) -> bool {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|list| list.split(','))
        .map(str::trim)
        .any(|listed| {
            let opaque = match comparison {
                Comparison::Weak => listed.strip_prefix("W/").unwrap_or(listed),
                Comparison::Strong => listed,
            };
            listed == "*" || opaque == tag
        })
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use quorumfs_proto::{FileKind, InodeNumber, Timestamp};

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
}
