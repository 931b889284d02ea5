//! `GET /files`: decodes the parameters, walks the tree, encodes a page.

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
use super::locate::kind_name;
use super::path::{ListPrefix, display, encode_path, joined, percent_decoded};
use super::times::rfc3339;
use super::walk::{Depth, Step, Walk, WalkEntry};
use crate::api::http::connections::ClientProgress;

const LIMIT_DEFAULT: usize = 1000;
const LIMIT_MAX: usize = 10_000;

/// Start of the next page: the last path seen, percent-encoded.
const NEXT_AFTER: HeaderName = HeaderName::from_static("x-next-after");

/// One entry of a listing.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FileEntry {
    /// Its path from the root, without a leading slash; bytes that are not UTF-8 are replaced.
    path: String,
    /// `file`, `directory`, `symlink`, `fifo`, `socket`, `character_device` or `block_device`.
    kind: &'static str,
    /// Its length in bytes.
    size: u64,
    /// Time of the last change of its content (RFC 3339).
    mtime: String,
    /// The twelve permission bits of its mode, in octal.
    mode: String,
    /// User id of its owner.
    uid: u32,
    /// Its group id.
    gid: u32,
    /// Number of its hard links.
    links: u32,
    /// Its inode number.
    inode: u64,
    /// Entity tag of its content; only for files.
    #[serde(skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
    /// Its path, percent-encoded; only if the path is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    path_encoded: Option<String>,
}

/// Lists files, sorted by their paths.
///
/// There is a next page if and only if the response has a `Link` header with `rel="next"`.
#[utoipa::path(
    get,
    path = "/files",
    tag = "files",
    params(
        ("prefix" = Option<String>, Query, description = "The beginning of the paths to list"),
        ("limit" = Option<u32>, Query, description = "Most entries of the page; 1,000 by default", minimum = 1, maximum = 10_000),
        ("after" = Option<String>, Query, description = "Only paths after this one"),
        ("recursive" = Option<bool>, Query, description = "Whether to list subdirectories; true by default"),
        ("kind" = Option<String>, Query, description = "`all`, or a list of `file,directory,symlink,…`"),
    ),
    responses(
        (status = 200, description = "A page of entries", body = Vec<FileEntry>, headers(
            ("Link" = Option<String>, description = "URL of the next page"),
            ("X-Next-After" = Option<String>, description = "Value of `after` for the next page"),
        )),
        (status = 400, description = "A parameter is invalid", body = ErrorBody),
        (status = 503, description = "No quorum answered in time", body = ErrorBody),
    )
)]
pub(super) async fn list(
    State(service): State<Arc<Service>>,
    request: Request,
) -> Result<Response, ApiError> {
    let parameters = ListParameters::from_query(request.uri().query().unwrap_or_default())?;
    let progress = ClientProgress::of(&request, service.timeouts);
    drop(request);
    let access = service.access().await?;
    let permit = service.permit(&service.lists, &progress).await?;
    let Some(directory) = find_directory(&access, &parameters.prefix).await? else {
        return Ok(Json(json!([])).into_response());
    };
    let mut path = joined(&parameters.prefix.directory);
    if !path.is_empty() {
        path.push(b'/');
    }
    let mut walk = Walk::new(
        &access,
        (directory, path),
        parameters.prefix.partial.to_vec(),
        parameters.after.clone(),
        parameters.depth,
        Instant::now() + service.request_timeout,
    );
    let mut page: Vec<FileEntry> = Vec::new();
    let mut last = Vec::new();
    let next = loop {
        match walk.next().await? {
            Step::End => break None,
            Step::Paused { at } => break Some(at),
            Step::Entry(found) if !parameters.includes(found.attributes.kind) => {}
            Step::Entry(_) if page.len() == parameters.limit => break Some(last),
            Step::Entry(found) => {
                page.push(file_entry(&found));
                last = found.path;
            }
        }
    };
    let mut headers = HeaderMap::new();
    if let Some(after) = next {
        let after = encode_path(&after);
        let link = format!("<{}>; rel=\"next\"", parameters.next_page(&after));
        let value = |text: String| {
            HeaderValue::try_from(text)
                .map_err(|_| ApiError::internal("cannot encode the link to the next page"))
        };
        headers.insert(LINK, value(link)?);
        headers.insert(NEXT_AFTER, value(after)?);
    }
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    // Encoding of ten thousand entries takes too long for a runtime thread.
    let encoding = tokio::task::spawn_blocking(move || serde_json::to_vec(&page));
    let encoded = encoding.await.map_err(|failed| failed.to_string());
    drop(permit);
    match encoded.and_then(|encoded| encoded.map_err(|failed| failed.to_string())) {
        Ok(page) => Ok((StatusCode::OK, headers, page).into_response()),
        Err(failed) => Err(ApiError::internal(format!("cannot encode a page: {failed}"))),
    }
}

/// Returns the directory of the complete components of a prefix; `None` if it does not exist, so no path has the
/// prefix.
async fn find_directory(access: &Access, prefix: &ListPrefix) -> Result<Option<InodeNumber>, ApiError> {
    match verdict(access.resolve(&prefix.directory).await)? {
        Ok(found) if found.kind == FileKind::Directory => Ok(Some(found.inode)),
        Ok(_) | Err(FsError::NotFound | FsError::NotDirectory | FsError::Stale) => Ok(None),
        Err(other) => Err(other.into()),
    }
}

fn file_entry(found: &WalkEntry) -> FileEntry {
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

/// The parameters of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ListParameters {
    prefix: ListPrefix,
    /// The prefix as given, for the link to the next page.
    prefix_bytes: Vec<u8>,
    after: Vec<u8>,
    limit: usize,
    depth: Depth,
    /// The kinds as given; `None` means the default.
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

impl ListParameters {
    fn from_query(query: &str) -> Result<ListParameters, ApiError> {
        let mut parameters = ListParameters {
            prefix: ListPrefix::from_bytes(b"")?,
            prefix_bytes: Vec::new(),
            after: Vec::new(),
            limit: LIMIT_DEFAULT,
            depth: Depth::Tree,
            kinds: None,
        };
        for parameter in query.split('&').filter(|parameter| !parameter.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            // HTML forms encode a space as '+'.
            let value = percent_decoded(&value.replace('+', "%20"))?;
            let text = String::from_utf8_lossy(&value);
            match name {
                "prefix" => {
                    parameters.prefix = ListPrefix::from_bytes(&value)?;
                    parameters.prefix_bytes = value;
                }
                "after" => parameters.after = value.strip_prefix(b"/").unwrap_or(&value).to_vec(),
                "limit" => match text.parse() {
                    Ok(limit) if (1..=LIMIT_MAX).contains(&limit) => parameters.limit = limit,
                    _ => return Err(invalid(format!("limit must be 1 to {LIMIT_MAX}, not '{text}'"))),
                },
                "recursive" => match text.as_ref() {
                    "true" | "1" | "" => parameters.depth = Depth::Tree,
                    "false" | "0" => parameters.depth = Depth::Level,
                    _ => return Err(invalid(format!("recursive must be true or false, not '{text}'"))),
                },
                "kind" => {
                    let kinds: Option<Vec<Kind>> = text.split(',').map(Kind::named).collect();
                    let unknown = || invalid(format!("kind '{text}' is unknown"));
                    parameters.kinds = Some(kinds.ok_or_else(unknown)?);
                }
                _ => return Err(invalid(format!("unknown parameter '{name}'"))),
            }
        }
        Ok(parameters)
    }

    fn includes(&self, kind: FileKind) -> bool {
        match &self.kinds {
            Some(kinds) => kinds
                .iter()
                .any(|&wanted| wanted == Kind::All || wanted == Kind::One(kind)),
            None => match self.depth {
                Depth::Tree => matches!(kind, FileKind::File | FileKind::Symlink),
                // A listing of one directory includes its subdirectories.
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
        let parameters = ListParameters::from_query(query).unwrap();
        assert_eq!(parameters.prefix_bytes, b"d\xc3\xa9 s/\xff");
        let url = parameters.next_page("d%C3%A9%20s/%FFz");
        let next = ListParameters::from_query(url.strip_prefix("/files?").unwrap()).unwrap();
        assert_eq!(next.after, b"d\xc3\xa9 s/\xffz");
        assert_eq!(
            ListParameters {
                after: parameters.after.clone(),
                ..next
            },
            parameters
        );
    }

    #[test]
    fn unknown_parameters_are_refused() {
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
            let error = ListParameters::from_query(query).unwrap_err();
            assert_eq!(error.status.as_u16(), 400, "{query}");
        }
    }

    #[test]
    fn a_recursive_listing_has_files_and_links_and_a_flat_one_everything() {
        let tree = ListParameters::from_query("").unwrap();
        assert!(
            tree.includes(FileKind::File)
                && tree.includes(FileKind::Symlink)
                && !tree.includes(FileKind::Directory)
        );
        let level = ListParameters::from_query("recursive=false").unwrap();
        assert!(level.includes(FileKind::Directory));
        let asked = ListParameters::from_query("kind=directory").unwrap();
        assert!(asked.includes(FileKind::Directory) && !asked.includes(FileKind::File));
    }
}
