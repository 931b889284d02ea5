//! The result of a command.

use serde::{Deserialize, Serialize};

use crate::attributes::Attributes;
use crate::ids::InodeNumber;

/// The result of a whole command. It has the new attributes of every inode that the command changed, so that the client
/// needs no further round trip for them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// One result for each operation, in order.
    pub results: Vec<OperationResult>,
    /// The attributes after the command of every inode that it changed (parents too) and that still exists, each once.
    pub touched: Vec<Attributes>,
    /// The log index at which the command took effect.
    pub index: u64,
}

impl Outcome {
    /// Returns the attributes of `inode` after the command, if the command changed it.
    pub fn attributes_of(&self, inode: InodeNumber) -> Option<&Attributes> {
        self.touched.iter().find(|attributes| attributes.inode == inode)
    }
}

/// The result of one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperationResult {
    /// Success without details.
    Done,
    /// The inode of the operation; its attributes are in [`Outcome::touched`].
    Entry {
        /// Number of the inode.
        inode: InodeNumber,
        /// Whether this operation created it.
        created: bool,
    },
    /// A name was removed.
    Removed {
        /// The inode that had the name.
        inode: InodeNumber,
        /// Whether that was its last name.
        last: bool,
    },
    /// A name was moved.
    Renamed {
        /// The inode that was moved.
        inode: InodeNumber,
        /// The inode that had the new name before: it was replaced or exchanged.
        other: Option<InodeNumber>,
    },
    /// Content was added at the end of a file.
    Appended {
        /// Offset of the first byte added.
        offset: u64,
    },
}
