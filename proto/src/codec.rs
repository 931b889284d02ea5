//! The one encoding of domain types: a version byte, then postcard (<https://postcard.jamesmunns.com/wire-format>).
//!
//! Why these types are not protobuf: their constructors check them when they are decoded, the log and the tables store
//! them in the form in which they travel, and no third party reads them. The envelopes that carry them are protobuf, so
//! that streams, peers and future callers have a described interface.
//!
//! A reader refuses versions that it does not know. A new encoding gets a new version number here and a conversion from
//! the old one.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version that this program writes.
pub const VERSION: u8 = 1;

/// Why bytes could not be decoded.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes were written by a version that this program does not know.
    #[error("encoding version {found} is not known (this program knows {VERSION}); use a newer program")]
    UnknownVersion {
        /// The version in the bytes.
        found: u8,
    },
    /// The bytes are cut short, damaged or out of bounds.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// The type that was expected.
        what: &'static str,
        /// The decoder's message.
        reason: String,
    },
    /// The bytes were damaged in transit or on disk.
    #[error("checksum of {what} does not match")]
    Checksum {
        /// The type that was expected.
        what: &'static str,
    },
}

/// Encodes `value`.
pub fn encode<T: Serialize>(value: &T) -> Bytes {
    let out = vec![VERSION];
    // Writing to a Vec cannot fail, and no domain type has a sequence of unknown length.
    let out = postcard::to_extend(value, out).expect("encoding to memory");
    Bytes::from(out)
}

/// Returns the number of bytes of `value` in [`encode`]d form, without the version byte.
pub fn encoded_bytes<T: Serialize>(value: &T) -> usize {
    let size = postcard::ser_flavors::Size::default();
    postcard::serialize_with_flavor(value, size).expect("counting bytes cannot fail")
}

/// Decodes bytes made by [`encode`].
///
/// # Errors
/// [`DecodeError`] if the version is not known, the bytes are malformed, or bytes are left over.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    let what = std::any::type_name::<T>();
    let malformed = |reason: &str| DecodeError::Malformed {
        what,
        reason: reason.to_string(),
    };
    match bytes.split_first() {
        None => Err(malformed("empty")),
        Some((&VERSION, rest)) => match postcard::take_from_bytes::<T>(rest) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err(malformed("trailing bytes")),
            Err(error) => Err(malformed(&error.to_string())),
        },
        Some((&found, _)) => Err(DecodeError::UnknownVersion { found }),
    }
}

/// Encodes `value` and appends a CRC-32C: the form of values in tables and files.
pub fn encode_checked<T: Serialize>(value: &T) -> Bytes {
    let mut out = postcard::to_extend(value, vec![VERSION]).expect("encoding to memory");
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    Bytes::from(out)
}

/// Checks the CRC-32C of bytes made by [`encode_checked`] and decodes them.
///
/// # Errors
/// [`DecodeError`], as [`decode`], and if the checksum does not match.
pub fn decode_checked<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DecodeError> {
    match bytes.split_last_chunk::<4>() {
        Some((body, crc)) if crc32c::crc32c(body) == u32::from_le_bytes(*crc) => decode(body),
        _ => Err(DecodeError::Checksum {
            what: std::any::type_name::<T>(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded_and_damage_is_seen() {
        let value = (7u64, String::from("seven"));
        assert_eq!(decode::<(u64, String)>(&encode(&value)), Ok(value.clone()));
        let checked = encode_checked(&value);
        assert_eq!(decode_checked::<(u64, String)>(&checked), Ok(value.clone()));
        for at in 0..checked.len() {
            let mut damaged = checked.to_vec();
            damaged[at] ^= 1;
            assert!(decode_checked::<(u64, String)>(&damaged).is_err(), "byte {at}");
        }
        let mut future = encode(&value).to_vec();
        future[0] = 9;
        assert_eq!(
            decode::<(u64, String)>(&future),
            Err(DecodeError::UnknownVersion { found: 9 })
        );
    }
}
