//! The one encoding of domain types: a version byte, then postcard (<https://postcard.jamesmunns.com/wire-format>).
//!
//! Why not protobuf here too: these types are checked by their constructors when they are decoded, lie in the log
//! and in the tables as they travel, and never need to be read by a third party. The envelopes that carry them are
//! protobuf, so that streams, peers and future callers meet a described interface.
//!
//! A reader refuses versions it does not know; a new version is a new number here, with a conversion from the old.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The version written.
pub const VERSION: u8 = 1;

/// Why bytes are not a value.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Written by a version this one does not know.
    #[error("encoding version {found} is not known (this program knows {VERSION}); use a newer program")]
    UnknownVersion {
        /// The version found.
        found: u8,
    },
    /// Cut short, damaged or out of bounds.
    #[error("malformed {what}: {reason}")]
    Malformed {
        /// The type that was expected.
        what: &'static str,
        /// What the decoder says.
        reason: String,
    },
    /// Damaged on its way or on disk.
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

/// How many bytes `value` takes in [`encode`]d form, without the version.
pub fn encoded_bytes<T: Serialize>(value: &T) -> usize {
    let size = postcard::ser_flavors::Size::default();
    postcard::serialize_with_flavor(value, size).expect("counting bytes cannot fail")
}

/// Decodes what [`encode`] made. The bytes must be used up.
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

/// Encodes `value` with a CRC-32C behind it: the form in which values lie in tables and files.
pub fn encode_checked<T: Serialize>(value: &T) -> Bytes {
    let mut out = postcard::to_extend(value, vec![VERSION]).expect("encoding to memory");
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    Bytes::from(out)
}

/// Decodes what [`encode_checked`] made, after its checksum.
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
