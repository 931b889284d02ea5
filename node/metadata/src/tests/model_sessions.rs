//! The time of the model, and the inodes that its sessions hold.

use quorumfs_proto::{InodeNumber, SessionId, Timestamp};

use super::model::Model;

impl Model {
    pub fn tick(&mut self, stamp: Timestamp) {
        self.now = stamp.max(self.now.plus_nanoseconds(1));
    }

    pub fn end_session(&mut self, session: SessionId) {
        self.living.remove(&session);
        for inode in self.inodes.values_mut() {
            inode.held_by.remove(&session);
            inode.awaited.remove(&session);
        }
    }

    /// The session states whether it holds an inode about which it is asked.
    pub fn answer(&mut self, session: SessionId, inode: InodeNumber, holds: bool) {
        let inode = self.inodes.get_mut(&inode).unwrap();
        assert!(inode.awaited.remove(&session), "it was not to be asked");
        if holds {
            inode.held_by.insert(session);
        }
    }

    pub fn forget_doomed(&mut self) {
        self.inodes.retain(|_, inode| !inode.is_doomed());
    }
}
