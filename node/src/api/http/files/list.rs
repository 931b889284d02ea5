//! `GET /files`: decodes the question, walks the tree, encodes a page.

use std::fmt::Write as _;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, LINK};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use quorumfs_proto::{FileKind, FsError, InodeNumber};
use serde::Serialize;
use serde_json::json;
use utoipa::ToSchema;

use super::Service;
use super::access::{Access, verdict};
use super::conditional::etag;
use super::error::{ApiError, ErrorBody};
use super::path::{ListPrefix, display, encode_path, joined, percent_decoded};
use super::places::kind_name;
use super::times::rfc3339;
use super::walk::{Depth, Found, Step, Walk};
use crate::api::http::connections::Pace;

const LIMIT_DEFAULT: usize = 1000;
const LIMIT_MAX: usize = 10_000;

/// Where the next page begins: the last path seen, percent-encoded.
const NEXT_AFTER: HeaderName = HeaderName::from_static("x-next-after");

/// One entry of a listing.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FileEntry {
    /// Its path from the root, without a slash in front; what is not UTF-8 is replaced.
    path: String,
    /// `file`, `directory`, `symlink`, …
    kind: &'static str,
    /// Its length in bytes.
    size: u64,
    /// When its content last changed (RFC 3339).
    mtime: String,
    /// The twelve bits of its mode, in octal.
    mode: String,
    /// Its owner.
    uid: u32,
    /// Its group.
    gid: u32,
    /// How many names it has.
    links: u32,
    /// Its number.
    inode: u64,
    /// Of this version, for files.
    #[serde(skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
    /// Its path, percent-encoded, where it is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_encoded: Option<String>,
}

/// List files, sorted by their paths.
///
/// There is a next page if, and only if, there is a `Link` header with `rel="next"`.
#[utoipa::path(
    get,
    path = "/files",
    tag = "files",
    params(
        ("prefix" = Option<String>, Query, description = "Any beginning of a path"),
        ("limit" = Option<u32>, Query, description = "1 to 10,000; 1,000 unless said", minimum = 1, maximum = 10_000),
        ("after" = Option<String>, Query, description = "Only paths after this one"),
        ("recursive" = Option<bool>, Query, description = "Whether directories are gone into; they are unless said"),
        ("kind" = Option<String>, Query, description = "`all`, or some of `file,directory,symlink,…`"),
    ),
    responses(
        (status = 200, description = "A page", body = Vec<FileEntry>, headers(
            ("Link" = Option<String>, description = "The next page"),
            ("X-Next-After" = Option<String>, description = "Its `after`"),
        )),
        (status = 400, description = "A parameter that cannot be", body = ErrorBody),
        (status = 503, description = "No quorum in time", body = ErrorBody),
    )
)]
pub(super) async fn list(
    State(service): State<Arc<Service>>,
    request: Request,
) -> Result<Response, ApiError> {
    let question = Question::from_query(request.uri().query().unwrap_or_default())?;
    let pace = Pace::of(&request, service.patience);
    drop(request);
    let access = service.access().await?;
    let turn = service.turn(&service.lists, &pace).await?;
    let Some(directory) = find_directory(&access, &question.prefix).await? else {
        return Ok(Json(json!([])).into_response());
    };
    let mut path = joined(&question.prefix.directory);
    if !path.is_empty() {
        path.push(b'/');
    }
    let mut walk = Walk::new(
        &access,
        (directory, path),
        question.prefix.partial.to_vec(),
        question.after.clone(),
        question.depth,
        Instant::now() + service.request_timeout,
    );
    let mut page: Vec<FileEntry> = Vec::new();
    let mut last = Vec::new();
    let next = loop {
        match walk.next().await? {
            Step::End => break None,
            Step::Paused { at } => break Some(at),
            Step::Entry(found) if !question.wants(found.attributes.kind) => {}
            Step::Entry(_) if page.len() == question.limit => break Some(last),
            Step::Entry(found) => {
                page.push(described(&found));
                last = found.path;
            }
        }
    };
    let mut headers = HeaderMap::new();
    if let Some(after) = next {
        let after = encode_path(&after);
        let link = format!("<{}>; rel=\"next\"", question.next_page(&after));
        let value = |text: String| HeaderValue::try_from(text).map_err(|_| ApiError::internal("next page"));
        headers.insert(LINK, value(link)?);
        headers.insert(NEXT_AFTER, value(after)?);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // Ten thousand entries take longer to encode than other requests should wait for.
    let encoding = tokio::task::spawn_blocking(move || serde_json::to_vec(&page));
    let encoded = encoding.await.map_err(|failed| failed.to_string());
    drop(turn);
    match encoded.and_then(|encoded| encoded.map_err(|failed| failed.to_string())) {
        Ok(page) => Ok((StatusCode::OK, headers, page).into_response()),
        Err(failed) => Err(ApiError::internal(format!("encode a page: {failed}"))),
    }
}

/// The directory that the whole components of a prefix name; nothing can begin with them if there is none.
async fn find_directory(access: &Access, prefix: &ListPrefix) -> Result<Option<InodeNumber>, ApiError> {
    match verdict(access.resolve(&prefix.directory).await)? {
        Ok(found) if found.kind == FileKind::Directory => Ok(Some(found.inode)),
        Ok(_) | Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

fn described(found: &Found) -> FileEntry {
    let attributes = &found.attributes;
    FileEntry {
        path: display(&found.path).to_string(),
        kind: kind_name(attributes.kind),
        size: attributes.size,
        mtime: rfc3339(attributes.mtime),
        mode: format!("{:04o}", attributes.mode),
        uid: attributes.uid,
        gid: attributes.gid,
        links: attributes.links,
        inode: attributes.inode.0,
        etag: (attributes.kind == FileKind::File).then(|| etag(attributes)),
        path_encoded: std::str::from_utf8(&found.path)
            .is_err()
            .then(|| encode_path(&found.path)),
    }
}

/// What is to be listed.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Question {
    prefix: ListPrefix,
    /// As it was given, for the link to the next page.
    prefix_bytes: Vec<u8>,
    after: Vec<u8>,
    limit: usize,
    depth: Depth,
    /// As they were given; `None`: the default.
    kinds: Option<Vec<Kind>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    All,
    One(FileKind),
}

const KINDS: [FileKind; 7] = [
    FileKind::File,
    FileKind::Directory,
    FileKind::Symlink,
    FileKind::Fifo,
    FileKind::Socket,
    FileKind::CharacterDevice,
    FileKind::BlockDevice,
];

impl Kind {
    fn named(name: &str) -> Option<Kind> {
        match name {
            "all" => Some(Kind::All),
            name => KINDS
                .into_iter()
                .find(|&kind| kind_name(kind) == name)
                .map(Kind::One),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::All => "all",
            Kind::One(kind) => kind_name(kind),
        }
    }
}

impl Question {
    fn from_query(query: &str) -> Result<Question, ApiError> {
        let mut question = Question {
            prefix: ListPrefix::from_bytes(b"")?,
            prefix_bytes: Vec::new(),
            after: Vec::new(),
            limit: LIMIT_DEFAULT,
            depth: Depth::Tree,
            kinds: None,
        };
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            // Forms write a space as '+'.
            let value = percent_decoded(&value.replace('+', "%20"))?;
            let text = String::from_utf8_lossy(&value);
            match name {
                "prefix" => {
                    question.prefix = ListPrefix::from_bytes(&value)?;
                    question.prefix_bytes = value;
                }
                "after" => question.after = value.strip_prefix(b"/").unwrap_or(&value).to_vec(),
                "limit" => match text.parse() {
                    Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => question.limit = limit,
                    _ => return Err(invalid(format!("limit must be 1 to {LIMIT_MAX}, not '{text}'"))),
                },
                "recursive" => match text.as_ref() {
                    "true" | "1" | "" => question.depth = Depth::Tree,
                    "false" | "0" => question.depth = Depth::Level,
                    _ => return Err(invalid(format!("recursive must be true or false, not '{text}'"))),
                },
                "kind" => {
                    let kinds: Option<Vec<Kind>> = text.split(',').map(Kind::named).collect();
                    let unknown = || invalid(format!("kind '{text}' is not known"));
                    question.kinds = Some(kinds.ok_or_else(unknown)?);
                }
                _ => return Err(invalid(format!("there is no parameter '{name}'"))),
            }
        }
        Ok(question)
    }

    fn wants(&self, kind: FileKind) -> bool {
        match &self.kinds {
            Some(kinds) => kinds
                .iter()
                .any(|&wanted| wanted == Kind::All || wanted == Kind::One(kind)),
            None => match self.depth {
                Depth::Tree => matches!(kind, FileKind::File | FileKind::Symlink),
                // Who looks at one directory wants to see where it goes on.
                Depth::Level => true,
            },
        }
    }

    fn next_page(&self, after_encoded: &str) -> String {
        let mut url = format!("/files?after={after_encoded}&limit={}", self.limit);
        if !self.prefix_bytes.is_empty() {
            let prefix = percent_encode(&self.prefix_bytes, NON_ALPHANUMERIC);
            write!(url, "&prefix={prefix}").expect("writing to a string");
        }
        if self.depth == Depth::Level {
            url.push_str("&recursive=false");
        }
        if let Some(kinds) = &self.kinds {
            let names: Vec<&str> = kinds.iter().map(|kind| kind.name()).collect();
            write!(url, "&kind={}", names.join(",")).expect("writing to a string");
        }
        url
    }
}

fn invalid(message: String) -> ApiError {
    let kinds: Vec<&str> = KINDS.into_iter().map(kind_name).collect();
    ApiError::bad_request("invalid_parameter", message).hint(format!(
        "prefix=PATH, after=PATH, limit=1..{LIMIT_MAX}, recursive=true|false, kind=all or some of {}",
        kinds.join(",")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_asks_the_same_question() {
        let query = "prefix=d%C3%A9+s/%ff&limit=7&recursive=false&kind=file,directory&after=x";
        let question = Question::from_query(query).unwrap();
        assert_eq!(question.prefix_bytes, b"d\xc3\xa9 s/\xff");
        let url = question.next_page("d%C3%A9%20s/%FFz");
        let next = Question::from_query(url.strip_prefix("/files?").unwrap()).unwrap();
        assert_eq!(next.after, b"d\xc3\xa9 s/\xffz");
        assert_eq!(
            Question {
                after: question.after.clone(),
                ..next
            },
            question
        );
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for query in [
            "limit=0",
            "limit=10001",
            "limit=x",
            "recursive=maybe",
            "kind=files",
            "kind=",
            "prefx=a",
            "prefix=%g",
            "prefix=a/../b",
            "prefix=a%00",
        ] {
            let error = Question::from_query(query).unwrap_err();
            assert_eq!(error.status.as_u16(), 400, "{query}");
        }
    }

    #[test]
    fn a_tree_lists_files_and_links_a_level_everything() {
        let tree = Question::from_query("").unwrap();
        assert!(
            tree.wants(FileKind::File) && tree.wants(FileKind::Symlink) && !tree.wants(FileKind::Directory)
        );
        let level = Question::from_query("recursive=false").unwrap();
        assert!(level.wants(FileKind::Directory));
        let asked = Question::from_query("kind=directory").unwrap();
        assert!(asked.wants(FileKind::Directory) && !asked.wants(FileKind::File));
    }
}
