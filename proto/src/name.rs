//! Names that programs choose: bytes, not UTF-8, each valid by construction.

use std::fmt;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::error::FsError;
use crate::limits::{NAME_BYTES_MAX, SYMLINK_BYTES_MAX, XATTR_NAME_BYTES_MAX};

/// The name of a directory entry: 1 to 255 bytes without `/` and NUL, neither `.` nor `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Bytes", into = "Bytes")]
pub struct Name(Bytes);

impl Name {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// [`FsError::NameTooLong`] above 255 bytes, [`FsError::InvalidArgument`] for everything else that cannot be a
    /// name.
    pub fn new(bytes: impl Into<Bytes>) -> Result<Name, FsError> {
        let bytes = bytes.into();
        if bytes.len() > NAME_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        if bytes.is_empty()
            || bytes.as_ref() == b"."
            || bytes.as_ref() == b".."
            || bytes.iter().any(|&b| b == b'/' || b == 0)
        {
            return Err(FsError::InvalidArgument);
        }
        Ok(Name(bytes))
    }

    /// Returns the bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<Bytes> for Name {
    type Error = FsError;
    fn try_from(bytes: Bytes) -> Result<Name, FsError> {
        Name::new(bytes)
    }
}

impl From<Name> for Bytes {
    fn from(name: Name) -> Bytes {
        name.0
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", String::from_utf8_lossy(&self.0))
    }
}

/// The target of a symbolic link: 1 to 4095 bytes without NUL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Bytes", into = "Bytes")]
pub struct SymlinkTarget(Bytes);

impl SymlinkTarget {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// [`FsError::NameTooLong`] above 4095 bytes, [`FsError::InvalidArgument`] with a NUL, [`FsError::NotFound`] when
    /// empty (as symlink(2)).
    pub fn new(bytes: impl Into<Bytes>) -> Result<SymlinkTarget, FsError> {
        let bytes = bytes.into();
        if bytes.is_empty() {
            return Err(FsError::NotFound);
        }
        if bytes.len() > SYMLINK_BYTES_MAX {
            return Err(FsError::NameTooLong);
        }
        if bytes.contains(&0) {
            return Err(FsError::InvalidArgument);
        }
        Ok(SymlinkTarget(bytes))
    }

    /// Returns the bytes of the target.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<Bytes> for SymlinkTarget {
    type Error = FsError;
    fn try_from(bytes: Bytes) -> Result<SymlinkTarget, FsError> {
        SymlinkTarget::new(bytes)
    }
}

impl From<SymlinkTarget> for Bytes {
    fn from(target: SymlinkTarget) -> Bytes {
        target.0
    }
}

/// The name of an extended attribute with its namespace (`user.…`): 1 to 255 bytes without NUL.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Bytes", into = "Bytes")]
pub struct XattrName(Bytes);

/// The namespaces of extended attributes (xattr(7)) that are stored.
const XATTR_NAMESPACES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

impl XattrName {
    /// Checks `bytes`.
    ///
    /// # Errors
    /// [`FsError::Range`] when empty or above 255 bytes (as setxattr(2)).
    pub fn new(bytes: impl Into<Bytes>) -> Result<XattrName, FsError> {
        let bytes = bytes.into();
        if bytes.is_empty() || bytes.len() > XATTR_NAME_BYTES_MAX {
            return Err(FsError::Range);
        }
        if bytes.contains(&0) {
            return Err(FsError::InvalidArgument);
        }
        Ok(XattrName(bytes))
    }

    /// Returns the bytes of the name.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Checks that programs may use the name, as Linux' own filesystems do.
    ///
    /// # Errors
    /// [`FsError::NotSupported`] outside of the namespaces `user`, `trusted` and `security` (`system` has ACLs, which
    /// QuorumFS does not enforce), [`FsError::InvalidArgument`] if nothing follows the namespace.
    pub fn require_known_namespace(&self) -> Result<(), FsError> {
        let rest = XATTR_NAMESPACES
            .iter()
            .find_map(|namespace| self.0.strip_prefix(*namespace));
        match rest {
            None => Err(FsError::NotSupported),
            Some([]) => Err(FsError::InvalidArgument),
            Some(_) => Ok(()),
        }
    }
}

impl TryFrom<Bytes> for XattrName {
    type Error = FsError;
    fn try_from(bytes: Bytes) -> Result<XattrName, FsError> {
        XattrName::new(bytes)
    }
}

impl From<XattrName> for Bytes {
    fn from(name: XattrName) -> Bytes {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_cannot_be_are_refused() {
        for bad in [&b""[..], b".", b"..", b"a/b", b"a\0b"] {
            assert_eq!(
                Name::new(bad),
                Err(FsError::InvalidArgument),
                "{}",
                bad.escape_ascii()
            );
        }
        assert_eq!(Name::new(vec![b'x'; 256]), Err(FsError::NameTooLong));
        assert!(Name::new(vec![b'x'; 255]).is_ok());
        assert!(Name::new(&b"\xff\xfe"[..]).is_ok(), "names are bytes");
    }

    #[test]
    fn decoding_checks_like_the_constructor() {
        let slash = postcard::to_stdvec(&Bytes::from_static(b"a/b")).unwrap();
        assert!(postcard::from_bytes::<Name>(&slash).is_err());
    }
}
