//! What is told apart: kinds of operations, where they come from, why calls are refused, what HTTP is asked for.
//!
//! Each is an enum with a fixed list, so that recording finds its counter by an index.

use quorumfs_proto::{CallReply, Operation, Query, Refusal};
use serde::Serialize;
use utoipa::ToSchema;

/// Begins the description of a session that carries REST requests; all others are mounts.
pub const REST_DESCRIPTION: &str = "REST of node";

/// Who wants an operation done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A mount.
    Mount,
    /// A node, for an HTTP client.
    Rest,
}

impl Origin {
    /// All of them, by index.
    pub const ALL: [Origin; 2] = [Origin::Mount, Origin::Rest];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Mount => "mount",
            Origin::Rest => "rest",
        }
    }

    /// From what a session says of itself.
    pub fn of_description(description: &str) -> Origin {
        match description.starts_with(REST_DESCRIPTION) {
            true => Origin::Rest,
            false => Origin::Mount,
        }
    }
}

/// What is done to files. One command may do several; each counts, and takes as long as the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum OperationKind {
    Create,
    CreateUnlinked,
    Mkdir,
    Symlink,
    Mknod,
    Link,
    Delete,
    Rmdir,
    Rename,
    SetAttributes,
    Write,
    Append,
    SetXattr,
    RemoveXattr,
    Release,
    Lookup,
    GetAttributes,
    List,
    ReadLink,
    GetXattr,
    ListXattrs,
    Extents,
    Space,
    Read,
    PutChunk,
    Session,
}

impl OperationKind {
    /// All of them, by index.
    pub const ALL: [OperationKind; 26] = [
        OperationKind::Create,
        OperationKind::CreateUnlinked,
        OperationKind::Mkdir,
        OperationKind::Symlink,
        OperationKind::Mknod,
        OperationKind::Link,
        OperationKind::Delete,
        OperationKind::Rmdir,
        OperationKind::Rename,
        OperationKind::SetAttributes,
        OperationKind::Write,
        OperationKind::Append,
        OperationKind::SetXattr,
        OperationKind::RemoveXattr,
        OperationKind::Release,
        OperationKind::Lookup,
        OperationKind::GetAttributes,
        OperationKind::List,
        OperationKind::ReadLink,
        OperationKind::GetXattr,
        OperationKind::ListXattrs,
        OperationKind::Extents,
        OperationKind::Space,
        OperationKind::Read,
        OperationKind::PutChunk,
        OperationKind::Session,
    ];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            OperationKind::Create => "create",
            OperationKind::CreateUnlinked => "create_unlinked",
            OperationKind::Mkdir => "mkdir",
            OperationKind::Symlink => "symlink",
            OperationKind::Mknod => "mknod",
            OperationKind::Link => "link",
            OperationKind::Delete => "delete",
            OperationKind::Rmdir => "rmdir",
            OperationKind::Rename => "rename",
            OperationKind::SetAttributes => "setattr",
            OperationKind::Write => "write",
            OperationKind::Append => "append",
            OperationKind::SetXattr => "setxattr",
            OperationKind::RemoveXattr => "removexattr",
            OperationKind::Release => "release",
            OperationKind::Lookup => "lookup",
            OperationKind::GetAttributes => "getattr",
            OperationKind::List => "list",
            OperationKind::ReadLink => "readlink",
            OperationKind::GetXattr => "getxattr",
            OperationKind::ListXattrs => "listxattr",
            OperationKind::Extents => "extents",
            OperationKind::Space => "statfs",
            OperationKind::Read => "read",
            OperationKind::PutChunk => "put_chunk",
            OperationKind::Session => "session",
        }
    }

    /// What it does, for people.
    pub fn meaning(self) -> &'static str {
        match self {
            OperationKind::Create => "files made by name, or opened because they were there",
            OperationKind::CreateUnlinked => "files made without a name (REST uploads under way)",
            OperationKind::Mkdir => "directories made",
            OperationKind::Symlink => "symbolic links made",
            OperationKind::Mknod => "pipes, sockets' names and devices made",
            OperationKind::Link => "names added (REST uploads appear so)",
            OperationKind::Delete => "names of files removed",
            OperationKind::Rmdir => "directories removed",
            OperationKind::Rename => "names moved",
            OperationKind::SetAttributes => "attributes or sizes changed",
            OperationKind::Write => "extents put into files; bytes: what they cover",
            OperationKind::Append => "extents added at the end of files",
            OperationKind::SetXattr => "extended attributes set",
            OperationKind::RemoveXattr => "extended attributes removed",
            OperationKind::Release => "unlinked files let go of",
            OperationKind::Lookup => "names and paths looked up",
            OperationKind::GetAttributes => "attributes asked for",
            OperationKind::List => "pieces of directory listings",
            OperationKind::ReadLink => "symbolic links read",
            OperationKind::GetXattr => "extended attributes read",
            OperationKind::ListXattrs => "extended attributes listed",
            OperationKind::Extents => "files opened: where their bytes are",
            OperationKind::Space => "free space asked for",
            OperationKind::Read => "ranges of chunks read; bytes: what was sent",
            OperationKind::PutChunk => "chunks brought; bytes: their payload, each once",
            OperationKind::Session => "sessions opened, kept alive, closed",
        }
    }

    /// What an operation of a command is.
    pub fn of_operation(operation: &Operation) -> OperationKind {
        use quorumfs_proto::command::NewKind;
        match operation {
            Operation::Create { inode, .. } => match inode.kind {
                NewKind::File => OperationKind::Create,
                NewKind::Directory => OperationKind::Mkdir,
                NewKind::Symlink(_) => OperationKind::Symlink,
                NewKind::Fifo
                | NewKind::Socket
                | NewKind::CharacterDevice(_)
                | NewKind::BlockDevice(_) => OperationKind::Mknod,
            },
            Operation::CreateUnlinked { .. } => OperationKind::CreateUnlinked,
            Operation::Link { .. } => OperationKind::Link,
            Operation::Unlink { .. } => OperationKind::Delete,
            Operation::RemoveDirectory { .. } => OperationKind::Rmdir,
            Operation::Rename { .. } => OperationKind::Rename,
            Operation::SetAttributes { .. } => OperationKind::SetAttributes,
            Operation::Write { .. } => OperationKind::Write,
            Operation::Append { .. } => OperationKind::Append,
            Operation::SetXattr { .. } => OperationKind::SetXattr,
            Operation::RemoveXattr { .. } => OperationKind::RemoveXattr,
            Operation::ReleaseUnlinked { .. } => OperationKind::Release,
        }
    }

    /// What a query is.
    pub fn of_query(query: &Query) -> OperationKind {
        match query {
            Query::Lookup { .. } | Query::Resolve { .. } => OperationKind::Lookup,
            Query::Attributes { .. } => OperationKind::GetAttributes,
            Query::ReadDirectory { .. } => OperationKind::List,
            Query::ReadLink { .. } => OperationKind::ReadLink,
            Query::GetXattr { .. } => OperationKind::GetXattr,
            Query::ListXattrs { .. } => OperationKind::ListXattrs,
            Query::Extents { .. } => OperationKind::Extents,
            Query::Space => OperationKind::Space,
        }
    }
}

/// Why nothing was decided; the client comes again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    NotLeader,
    Unavailable,
    PutAgain,
    UnknownSession,
    StaleSequence,
    Invalid,
}

impl RefusalKind {
    /// All of them, by index.
    pub const ALL: [RefusalKind; 6] = [
        RefusalKind::NotLeader,
        RefusalKind::Unavailable,
        RefusalKind::PutAgain,
        RefusalKind::UnknownSession,
        RefusalKind::StaleSequence,
        RefusalKind::Invalid,
    ];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            RefusalKind::NotLeader => "not_leader",
            RefusalKind::Unavailable => "unavailable",
            RefusalKind::PutAgain => "put_again",
            RefusalKind::UnknownSession => "unknown_session",
            RefusalKind::StaleSequence => "stale_sequence",
            RefusalKind::Invalid => "invalid",
        }
    }

    /// Of a reply that is one.
    pub fn of_reply(reply: &CallReply) -> Option<RefusalKind> {
        let CallReply::Refused(refusal) = reply else {
            return None;
        };
        Some(match refusal {
            Refusal::NotLeader { .. } => RefusalKind::NotLeader,
            Refusal::Unavailable { .. } => RefusalKind::Unavailable,
            Refusal::PutAgain { .. } => RefusalKind::PutAgain,
            Refusal::UnknownSession => RefusalKind::UnknownSession,
            Refusal::StaleSequence => RefusalKind::StaleSequence,
            Refusal::Invalid { .. } => RefusalKind::Invalid,
        })
    }
}

/// What an HTTP request is about: the method and the first part of its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Upload,
    Download,
    Delete,
    List,
    Status,
    Metrics,
    Health,
    Recovery,
    Repair,
    Other,
}

impl Endpoint {
    /// All of them, by index.
    pub const ALL: [Endpoint; 10] = [
        Endpoint::Upload,
        Endpoint::Download,
        Endpoint::Delete,
        Endpoint::List,
        Endpoint::Status,
        Endpoint::Metrics,
        Endpoint::Health,
        Endpoint::Recovery,
        Endpoint::Repair,
        Endpoint::Other,
    ];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Endpoint::Upload => "upload",
            Endpoint::Download => "download",
            Endpoint::Delete => "delete",
            Endpoint::List => "list",
            Endpoint::Status => "status",
            Endpoint::Metrics => "metrics",
            Endpoint::Health => "health",
            Endpoint::Recovery => "recovery",
            Endpoint::Repair => "repair",
            Endpoint::Other => "other",
        }
    }

    /// Of a request.
    pub fn of_request(method: &str, path: &str) -> Endpoint {
        let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
        match (first, method) {
            ("upload", "POST" | "PUT") => Endpoint::Upload,
            ("upload", "DELETE") => Endpoint::Delete,
            ("upload" | "download", "GET" | "HEAD") => Endpoint::Download,
            ("files", _) => Endpoint::List,
            ("status", _) => Endpoint::Status,
            ("metrics", _) => Endpoint::Metrics,
            ("health" | "healthz" | "readyz", _) => Endpoint::Health,
            ("recovery", _) => Endpoint::Recovery,
            ("repair", _) => Endpoint::Repair,
            _ => Endpoint::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn each_list_is_in_the_order_of_its_enum_and_names_are_unique() {
        for (index, kind) in OperationKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
        }
        for (index, kind) in RefusalKind::ALL.into_iter().enumerate() {
            assert_eq!(kind as usize, index);
        }
        for (index, endpoint) in Endpoint::ALL.into_iter().enumerate() {
            assert_eq!(endpoint as usize, index);
        }
        for (index, origin) in Origin::ALL.into_iter().enumerate() {
            assert_eq!(origin as usize, index);
        }
        let names: BTreeSet<&str> = OperationKind::ALL.iter().map(|kind| kind.name()).collect();
        assert_eq!(names.len(), OperationKind::ALL.len());
    }

    #[test]
    fn requests_and_sessions_are_told_apart() {
        assert_eq!(Endpoint::of_request("PUT", "/upload/a/b"), Endpoint::Upload);
        assert_eq!(Endpoint::of_request("HEAD", "/upload/a"), Endpoint::Download);
        assert_eq!(Endpoint::of_request("DELETE", "/upload/a"), Endpoint::Delete);
        assert_eq!(Endpoint::of_request("GET", "/metrics/tradeoffs"), Endpoint::Metrics);
        assert_eq!(Endpoint::of_request("GET", "/nothing"), Endpoint::Other);
        assert_eq!(
            Origin::of_description("REST of node 2 at 127.0.0.1:8082"),
            Origin::Rest
        );
        assert_eq!(Origin::of_description("mount on host:/mnt"), Origin::Mount);
    }
}
