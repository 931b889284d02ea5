//! The complete REST interface with a cluster in the test process.

mod cluster;
mod downloads;
mod failures;
mod listings;
mod uploads;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use axum::http::{HeaderMap, HeaderName, Request, Response, StatusCode};
use bytes::Bytes;
use quorumfs_client::Client;
use quorumfs_proto::command::{IfExists, NewInode, NewKind, Operation, Privileges, Target};
use quorumfs_proto::{Command, Extent, InodeNumber, Name, OperationResult, SymlinkTarget};
use serde_json::{Value, json};
use tokio::sync::watch;
use tower::ServiceExt as _;

use super::{ClientHandle, Filesystem, RestState, filesystem_options, router};
use crate::api::http::connections::ClientTimeouts;
use cluster::{State, TestCluster};

/// A node's REST interface and the cluster behind it.
struct Rest {
    router: Router,
    cluster: TestCluster,
    client: Client,
    _handle: watch::Sender<ClientHandle>,
}

/// A response, read to its end.
#[derive(Debug)]
struct Reply {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    fn header(&self, name: &'static str) -> &str {
        let value = self.headers.get(HeaderName::from_static(name));
        value.map_or("", |value| value.to_str().unwrap())
    }

    /// Returns status and `code` of a failure, after a check of its format.
    fn failure(&self) -> (u16, String) {
        let body = self.json();
        assert!(!body["message"].as_str().unwrap().is_empty());
        assert!(body.get("hint").is_some());
        (self.status, body["code"].as_str().unwrap().to_string())
    }
}

impl Rest {
    async fn start() -> Rest {
        Rest::with_timeout(Duration::from_secs(10)).await
    }

    async fn with_timeout(request_timeout: Duration) -> Rest {
        Rest::with(request_timeout, ClientTimeouts::default()).await
    }

    async fn with(request_timeout: Duration, timeouts: ClientTimeouts) -> Rest {
        let cluster = TestCluster::start().await;
        let client = cluster.client().await;
        let (handle, receiver) = watch::channel(ready(&client));
        Rest {
            router: router(RestState {
                timeouts,
                client: receiver,
                admin: Router::new(),
                status: Arc::new(|| json!({ "writable": true, "node": 1 })),
                request_timeout,
            }),
            cluster,
            client,
            _handle: handle,
        }
    }

    fn state(&self) -> &State {
        &self.cluster.state
    }

    async fn send(&self, request: Request<Body>) -> Response<Body> {
        self.router.clone().oneshot(request).await.unwrap()
    }

    async fn ask(&self, method: &str, uri: &str, headers: &[(&str, &str)], body: impl Into<Body>) -> Reply {
        let mut request = Request::builder().method(method).uri(uri);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = self.send(request.body(body.into()).unwrap()).await;
        read(response).await
    }

    async fn get(&self, uri: &str) -> Reply {
        self.ask("GET", uri, &[], Body::empty()).await
    }

    async fn put(&self, path: &str, body: impl Into<Body>) -> Reply {
        let reply = self.ask("PUT", &format!("/upload/{path}"), &[], body).await;
        assert_eq!(reply.status, 201, "{reply:?}");
        reply
    }

    /// Changes the filesystem like a mount.
    async fn make(&self, parent: InodeNumber, name: &str, kind: NewKind) -> InodeNumber {
        let create = Operation::Create {
            parent: Target::Inode(parent),
            name: Name::new(name.as_bytes().to_vec()).unwrap(),
            inode: NewInode {
                kind,
                mode: 0o755,
                uid: 0,
                gid: 0,
            },
            existing: IfExists::Refuse,
        };
        let outcome = self.client.mutate(Command::single(create), &[]).await.unwrap();
        match outcome.results[0] {
            OperationResult::Entry { inode, .. } => inode,
            ref other => panic!("{other:?}"),
        }
    }

    async fn link_to(&self, name: &str, target: &str) -> InodeNumber {
        let target = SymlinkTarget::new(target.as_bytes().to_vec()).unwrap();
        self.make(InodeNumber::ROOT, name, NewKind::Symlink(target)).await
    }

    /// Writes to a file in place, like a mount.
    async fn write(&self, inode: u64, offset: u64, payload: &[u8]) {
        let chunk = self.client.new_chunk(Bytes::copy_from_slice(payload));
        let piece = Extent {
            file_offset: offset,
            length: payload.len() as u32,
            chunk: chunk.id(),
            chunk_offset: 0,
        };
        let command = Command {
            chunks: vec![chunk.inline()],
            operations: vec![Operation::Write {
                inode: Target::Inode(InodeNumber(inode)),
                extents: vec![piece],
                mtime: None,
                privileges: Privileges::Keep,
            }],
        };
        self.client.mutate(command, &[]).await.unwrap();
    }
}

/// Creates the filesystem of a node.
fn ready(client: &Client) -> ClientHandle {
    ClientHandle::Ready(Filesystem::new(
        client.clone(),
        filesystem_options(),
        &Arc::default(),
    ))
}

async fn read(response: Response<Body>) -> Reply {
    let (head, body) = response.into_parts();
    Reply {
        status: head.status.as_u16(),
        headers: head.headers,
        body: to_bytes(body, usize::MAX).await.unwrap(),
    }
}

/// Returns bytes whose period is unrelated to the length of a chunk.
fn bytes(length: usize) -> Vec<u8> {
    (0..length as u64)
        .map(|i| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32) as u8)
        .collect()
}

/// Returns a body in frames of `frame_bytes`, without a length.
fn streamed(bytes: &[u8], frame_bytes: usize) -> Body {
    let frames: Vec<Result<Bytes, std::io::Error>> = bytes
        .chunks(frame_bytes)
        .map(|frame| Ok(Bytes::copy_from_slice(frame)))
        .collect();
    Body::from_stream(futures::stream::iter(frames))
}

#[tokio::test(flavor = "multi_thread")]
async fn status_includes_the_client() {
    let rest = Rest::start().await;
    let reply = rest.get("/status").await;
    assert_eq!(reply.status, 200);
    assert_eq!(reply.json()["writable"], true);
    assert_eq!(reply.json()["client"]["connected"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_json() {
    let rest = Rest::start().await;
    assert_eq!(
        rest.get("/nowhere").await.failure(),
        (404, "no_such_endpoint".into())
    );
    let reply = rest.ask("PATCH", "/upload/a", &[], "x").await;
    assert_eq!(reply.failure(), (405, "method_not_allowed".into()));
    for method in ["GET", "HEAD", "POST", "PUT", "DELETE"] {
        assert!(reply.header("allow").contains(method), "{:?}", reply.headers);
    }
    let reply = rest.ask("DELETE", "/download/a", &[], "").await;
    assert_eq!(
        StatusCode::from_u16(reply.status).unwrap(),
        StatusCode::METHOD_NOT_ALLOWED
    );
    for uri in ["/upload", "/upload/", "/download/"] {
        assert_eq!(
            rest.get(uri).await.failure(),
            (400, "invalid_path".into()),
            "{uri}"
        );
    }
}
