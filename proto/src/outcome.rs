//! What a command did.

use serde::{Deserialize, Serialize};

use crate::attributes::Attributes;
use crate::ids::InodeNumber;

/// The result of a whole command. It carries the new attributes of every inode it touched, so that no round trip
/// follows to learn them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// One for each operation, in order.
    pub results: Vec<OperationResult>,
    /// Attributes after the command of every inode it touched (parents too) and that still exists, each once.
    pub touched: Vec<Attributes>,
    /// The log index at which it took effect.
    pub index: u64,
}

impl Outcome {
    /// The attributes after the command of `inode`, if it was touched.
    pub fn attributes_of(&self, inode: InodeNumber) -> Option<&Attributes> {
        self.touched.iter().find(|attributes| attributes.inode == inode)
    }
}

/// The result of one operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OperationResult {
    /// Nothing to tell.
    Done,
    /// The inode it was about; its attributes are among those touched.
    Entry {
        /// Which.
        inode: InodeNumber,
        /// Whether this operation made it.
        created: bool,
    },
    /// A name is gone.
    Removed {
        /// What it named.
        inode: InodeNumber,
        /// Whether that was its last name.
        last: bool,
    },
    /// A name has moved.
    Renamed {
        /// What moved.
        inode: InodeNumber,
        /// What had the new name before: replaced, or exchanged.
        other: Option<InodeNumber>,
    },
    /// Content was added at this offset.
    Appended {
        /// Where the first byte went.
        offset: u64,
    },
}
