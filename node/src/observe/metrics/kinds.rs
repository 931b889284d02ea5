//! The classes by which events are counted: kinds of operations, their origins, reasons of refusals, HTTP endpoints.
//!
//! Each is an enum with a fixed list, so that its counter is found by an index.

use quorumfs_proto::{ClientResponse, Operation, Query, Refusal};
use serde::Serialize;
use utoipa::ToSchema;

/// Prefix of the description of a session that carries REST requests; all others are mounts.
pub const REST_DESCRIPTION: &str = "REST of node";

/// The origin of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// A mount of the filesystem.
    Mount,
    /// A node, for an HTTP client.
    Rest,
}

impl Origin {
    /// All origins, by index.
    pub const ALL: [Origin; 2] = [Origin::Mount, Origin::Rest];

    /// Returns the name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Origin::Mount => "mount",
            Origin::Rest => "rest",
        }
    }

    /// Derives the origin from a session's description.
    pub fn of_description(description: &str) -> Origin {
        match description.starts_with(REST_DESCRIPTION) {
            true => Origin::Rest,
            false => Origin::Mount,
        }
    }
}

/// Defines an enum whose values have a name for machines and a meaning for people, and the list of all values in the
/// order of their numbers.
macro_rules! kinds {
    ($(#[$about:meta])* $kind:ident { $($variant:ident $name:literal $meaning:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $kind {
            $(#[doc = $meaning] $variant,)*
        }

        impl $kind {
            /// All values, by index.
            pub const ALL: [$kind; [$($name),*].len()] = [$($kind::$variant),*];

            /// Returns the name in reports.
            pub fn name(self) -> &'static str {
                match self {
                    $($kind::$variant => $name,)*
                }
            }

            /// Returns the meaning, for people.
            pub fn meaning(self) -> &'static str {
                match self {
                    $($kind::$variant => $meaning,)*
                }
            }
        }
    };
}

kinds! {
    /// Operations on files. A command may have several; each counts, with the duration of the command.
    OperationKind {
        Create "create" "files created by name, or opened because they existed",
        CreateUnlinked "create_unlinked" "files created without a name (REST uploads in progress)",
        Mkdir "mkdir" "directories created",
        Symlink "symlink" "symbolic links created",
        Mknod "mknod" "named pipes, sockets and devices created",
        Link "link" "names added (REST uploads appear so)",
        Delete "delete" "names of files removed",
        Rmdir "rmdir" "directories removed",
        Rename "rename" "names moved",
        SetAttributes "setattr" "attributes or sizes changed",
        Write "write" "extents put into files; bytes: what they cover",
        Append "append" "extents added at the end of files",
        SetXattr "setxattr" "extended attributes set",
        RemoveXattr "removexattr" "extended attributes removed",
        Release "release" "unlinked files released",
        Lookup "lookup" "names and paths looked up",
        GetAttributes "getattr" "attributes asked for",
        List "list" "pages of directory listings",
        ReadLink "readlink" "symbolic links read",
        GetXattr "getxattr" "extended attributes read",
        ListXattrs "listxattr" "extended attributes listed",
        Extents "extents" "extents of files looked up (on open)",
        Space "statfs" "free space asked for",
        Read "read" "ranges of chunks read; bytes: what was sent",
        PutChunk "put_chunk" "chunks received; bytes: their payload, each once",
        Session "session" "sessions opened, kept alive, closed",
    }
}

kinds! {
    /// Reasons why a call was not decided; the client repeats it.
    RefusalKind {
        NotLeader "not_leader" "this node does not lead",
        Unavailable "unavailable" "no node can decide now",
        PutAgain "put_again" "chunks are not known to be on a quorum, and must be put again",
        UnknownSession "unknown_session" "the session is not known or has ended",
        StaleSequence "stale_sequence" "a later call of the lane was decided already",
        Invalid "invalid" "the call is out of bounds",
        NeverDecided "never_decided" "the session has ended without having decided the call",
    }
}

kinds! {
    /// The HTTP endpoints, by method and first part of the path.
    Endpoint {
        Upload "upload" "files stored",
        Download "download" "files read",
        Delete "delete" "files removed",
        List "list" "files listed",
        Status "status" "the node's status",
        Metrics "metrics" "metrics",
        Health "health" "health",
        Recovery "recovery" "recovery",
        Repair "repair" "repair",
        Other "other" "all other requests",
    }
}

impl OperationKind {
    /// Returns the kind of an operation of a command.
    pub fn of_operation(operation: &Operation) -> OperationKind {
        use quorumfs_proto::command::NewKind;
        match operation {
            Operation::Create { inode, .. } => match inode.kind {
                NewKind::File => OperationKind::Create,
                NewKind::Directory => OperationKind::Mkdir,
                NewKind::Symlink(_) => OperationKind::Symlink,
                NewKind::Fifo | NewKind::Socket | NewKind::CharacterDevice(_) | NewKind::BlockDevice(_) => {
                    OperationKind::Mknod
                }
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

    /// Returns the kind of a query.
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

impl RefusalKind {
    /// Returns the kind of a refusal; `None` for other replies.
    pub fn of_reply(reply: &ClientResponse) -> Option<RefusalKind> {
        let ClientResponse::Refused(refusal) = reply else {
            return None;
        };
        Some(match refusal {
            Refusal::NotLeader { .. } => RefusalKind::NotLeader,
            Refusal::Unavailable { .. } => RefusalKind::Unavailable,
            Refusal::PutAgain { .. } => RefusalKind::PutAgain,
            Refusal::UnknownSession => RefusalKind::UnknownSession,
            Refusal::StaleSequence => RefusalKind::StaleSequence,
            Refusal::Invalid { .. } => RefusalKind::Invalid,
            Refusal::NeverDecided => RefusalKind::NeverDecided,
        })
    }
}

impl Endpoint {
    /// Returns the endpoint of a request.
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
        assert_eq!(
            Endpoint::of_request("GET", "/metrics/tradeoffs"),
            Endpoint::Metrics
        );
        assert_eq!(Endpoint::of_request("GET", "/nothing"), Endpoint::Other);
        assert_eq!(
            Origin::of_description("REST of node 2 at 127.0.0.1:8082"),
            Origin::Rest
        );
        assert_eq!(Origin::of_description("mount on host:/mnt"), Origin::Mount);
    }
}
