//! Paths in URLs: conversion from percent-encoded bytes to validated names, and back.
//!
//! A path is bytes, not UTF-8. Nothing is normalised: components that a browser would resolve (`..`, `//`) are
//! refused, so that a request never names another file than it seems to.

use axum::http::StatusCode;
use bytes::Bytes;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode, percent_encode};
use quorumfs_proto::limits::NAME_BYTES_MAX;
use quorumfs_proto::{FsError, Name};

use super::error::ApiError;

/// Most bytes of a whole path, decoded (PATH_MAX of Linux).
pub(super) const PATH_BYTES_MAX: usize = 4096;

/// Bytes that are percent-encoded in a component: all but the unreserved characters of RFC 3986, section 2.3.
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');
/// Like [`COMPONENT`], without the separator.
const PATH: &AsciiSet = &COMPONENT.remove(b'/');

/// Why a path is invalid.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum PathError {
    #[error("the path is empty")]
    Empty,
    #[error("the path has an empty component (a leading, doubled or trailing '/')")]
    EmptyComponent,
    #[error("the path has a component '{0}'; paths are not resolved")]
    Dots(&'static str),
    #[error("the path contains a NUL byte")]
    Nul,
    #[error("a component contains an encoded '/' (%2F)")]
    EncodedSlash,
    #[error("a component has {0} bytes; at most {NAME_BYTES_MAX} are allowed")]
    ComponentTooLong(usize),
    #[error("the path is longer than {PATH_BYTES_MAX} bytes")]
    TooLong,
    #[error("'%' is not followed by two hexadecimal digits; a literal '%' is written %25")]
    BadEscape,
}

impl From<PathError> for ApiError {
    fn from(error: PathError) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_path", error.to_string()).hint(
            "a path is names of 1 to 255 bytes with '/' between them, each percent-encoded, as in docs/a%20b.txt",
        )
    }
}

/// The path of a file, with at least one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FilePath {
    names: Vec<Name>,
}

impl FilePath {
    /// Parses the part of a URL after `/upload/` or `/download/`.
    pub(super) fn from_url(encoded: &str) -> Result<FilePath, PathError> {
        if encoded.is_empty() {
            return Err(PathError::Empty);
        }
        if encoded.len() > 3 * PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        let names = encoded
            .split('/')
            .map(|component| name(percent_decoded(component)?.into()))
            .collect::<Result<Vec<Name>, PathError>>()?;
        let path = FilePath { names };
        if path.to_bytes().len() > PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        Ok(path)
    }

    /// Returns all names, starting at the root.
    pub(super) fn names(&self) -> &[Name] {
        &self.names
    }

    /// Returns the names of the parent directory and the last name.
    pub(super) fn split(&self) -> (&[Name], &Name) {
        let (last, parents) = self.names.split_last().expect("a path has one name at least");
        (parents, last)
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        joined(&self.names)
    }

    /// Returns the path for a URL.
    pub(super) fn encoded(&self) -> String {
        encode_path(&self.to_bytes())
    }
}

/// Joins names with `/`.
pub(super) fn joined(names: &[Name]) -> Vec<u8> {
    let names: Vec<&[u8]> = names.iter().map(Name::as_bytes).collect();
    names.join(&b'/')
}

/// Percent-encodes a path, except its separators.
pub(super) fn encode_path(path: &[u8]) -> String {
    percent_encode(path, PATH).to_string()
}

/// Converts a path to text; bytes that are not UTF-8 are replaced.
pub(super) fn display(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// The prefix of a listing: all paths that begin with `directory` and `partial`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ListPrefix {
    /// The complete components.
    pub(super) directory: Vec<Name>,
    /// The beginning of the next component; may be empty.
    pub(super) partial: Bytes,
}

impl ListPrefix {
    /// Parses decoded bytes. One leading `/` is ignored.
    pub(super) fn from_bytes(prefix: &[u8]) -> Result<ListPrefix, PathError> {
        if prefix.len() > PATH_BYTES_MAX {
            return Err(PathError::TooLong);
        }
        let prefix = prefix.strip_prefix(b"/").unwrap_or(prefix);
        let mut components: Vec<&[u8]> = prefix.split(|&byte| byte == b'/').collect();
        let partial = components.pop().unwrap_or_default();
        if partial.contains(&0) {
            return Err(PathError::Nul);
        }
        let directory = components
            .into_iter()
            .map(|component| name(Bytes::copy_from_slice(component)))
            .collect::<Result<Vec<Name>, PathError>>()?;
        Ok(ListPrefix {
            directory,
            partial: Bytes::copy_from_slice(partial),
        })
    }
}

/// Decodes `%xx`; an invalid escape is an error.
pub(super) fn percent_decoded(text: &str) -> Result<Vec<u8>, PathError> {
    let bytes = text.as_bytes();
    let escaped = |at: usize| {
        let digits = bytes.get(at + 1..at + 3);
        digits.is_some_and(|digits| digits.iter().all(u8::is_ascii_hexdigit))
    };
    if (0..bytes.len()).any(|at| bytes[at] == b'%' && !escaped(at)) {
        return Err(PathError::BadEscape);
    }
    Ok(percent_decode(bytes).collect())
}

fn name(bytes: Bytes) -> Result<Name, PathError> {
    Name::new(bytes.clone()).map_err(|error| match (error, bytes.as_ref()) {
        (FsError::NameTooLong, long) => PathError::ComponentTooLong(long.len()),
        (_, b"") => PathError::EmptyComponent,
        (_, b".") => PathError::Dots("."),
        (_, b"..") => PathError::Dots(".."),
        (_, other) if other.contains(&0) => PathError::Nul,
        _ => PathError::EncodedSlash,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_cannot_be_a_path_is_refused_with_its_reason() {
        for (bad, reason) in [
            ("", PathError::Empty),
            ("a//b", PathError::EmptyComponent),
            ("a/", PathError::EmptyComponent),
            ("/a", PathError::EmptyComponent),
            ("../x", PathError::Dots("..")),
            ("a/%2e%2E/x", PathError::Dots("..")),
            ("a/./x", PathError::Dots(".")),
            ("a%00b", PathError::Nul),
            ("a%2fb", PathError::EncodedSlash),
            ("100%", PathError::BadEscape),
            ("%zz", PathError::BadEscape),
        ] {
            assert_eq!(FilePath::from_url(bad), Err(reason), "{bad}");
        }
        assert_eq!(
            FilePath::from_url(&"x".repeat(256)),
            Err(PathError::ComponentTooLong(256))
        );
        assert!(FilePath::from_url(&"%41".repeat(255)).is_ok());
        let deep = vec!["abcdefg"; 512].join("/");
        assert_eq!(deep.len(), 4095);
        assert!(FilePath::from_url(&deep).is_ok());
        assert_eq!(FilePath::from_url(&format!("{deep}/x")), Err(PathError::TooLong));
    }

    #[test]
    fn names_are_bytes_and_plus_is_plus() {
        let path = FilePath::from_url("d%C3%A9/%ff+a%20b...").unwrap();
        assert_eq!(path.to_bytes(), b"d\xc3\xa9/\xff+a b...");
        assert_eq!(path.encoded(), "d%C3%A9/%FF%2Ba%20b...");
        let (parents, own) = path.split();
        assert_eq!((parents.len(), own.as_bytes()), (1, &b"\xff+a b..."[..]));
    }

    #[test]
    fn a_prefix_is_whole_components_and_the_beginning_of_one() {
        let prefix = ListPrefix::from_bytes(b"/a/b/re").unwrap();
        assert_eq!(joined(&prefix.directory), b"a/b");
        assert_eq!(prefix.partial.as_ref(), b"re");
        let root = ListPrefix::from_bytes(b"").unwrap();
        assert!(root.directory.is_empty() && root.partial.is_empty());
        assert_eq!(ListPrefix::from_bytes(b"a/../b"), Err(PathError::Dots("..")));
        assert_eq!(ListPrefix::from_bytes(b"a//"), Err(PathError::EmptyComponent));
        assert_eq!(ListPrefix::from_bytes(b"a\0"), Err(PathError::Nul));
    }

    proptest! {
        #[test]
        fn encoding_is_undone_by_decoding(names in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..20), 1..5)) {
            let valid = names.iter().all(|n| Name::new(n.clone()).is_ok());
            prop_assume!(valid);
            let bytes = names.join(&b'/');
            let path = FilePath::from_url(&encode_path(&bytes)).unwrap();
            prop_assert_eq!(path.to_bytes(), bytes);
        }
    }
}
