//! Speaks to nodes in the words of the wire, without the client crate: so that a test decides itself what is sent
//! twice, to whom, under which request id.

use std::time::Duration;

use bytes::Bytes;
use quorumfs_proto::call::{ClientRequest, ClientResponse, Mutation, Refusal};
use quorumfs_proto::chunk::block_crcs;
use quorumfs_proto::codec::{decode, encode};
use quorumfs_proto::command::{Command, Operation};
use quorumfs_proto::{
    Answer, ChunkBody, ChunkId, Lane, NewChunk, Query, RequestId, SessionId, SessionSecret, Sha256,
};
use quorumfs_wire as wire;
use quorumfs_wire::file_system_client::FileSystemClient;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// One call at one node; short enough to try another then.
const CALL_LIMIT: Duration = Duration::from_secs(5);
/// Until somebody decides.
const DECIDE_LIMIT: Duration = Duration::from_secs(30);

/// A session that its test steers.
#[derive(Debug)]
pub struct WireClient {
    runtime: Runtime,
    addresses: Vec<String>,
    session: SessionId,
    secret: SessionSecret,
}

impl WireClient {
    /// Opens a session at the cluster of these gRPC addresses (as in `--members`).
    pub fn connect(members: &str) -> WireClient {
        let client = WireClient {
            runtime: Runtime::new().expect("start a runtime"),
            addresses: members.split(',').map(str::to_string).collect(),
            session: SessionId(rand::random()),
            secret: SessionSecret(rand::random()),
        };
        let open = client.opening();
        let reply = client.decided(&open);
        assert!(
            matches!(reply, ClientResponse::Session(_)),
            "open a session: {reply:?}"
        );
        client
    }

    /// The call that opens the session.
    pub fn opening(&self) -> ClientRequest {
        ClientRequest::OpenSessionWithKey {
            session: self.session,
            description: "whole-cluster test".to_string(),
            secret: self.secret,
        }
    }

    /// The same client, as far as somebody knows it who knows the session's id alone.
    pub fn impostor(&self) -> WireClient {
        WireClient {
            runtime: Runtime::new().expect("start a runtime"),
            addresses: self.addresses.clone(),
            session: self.session,
            secret: SessionSecret(rand::random()),
        }
    }

    /// Asks whoever leads, until it is decided.
    #[track_caller]
    pub fn call(&self, call: &ClientRequest) -> ClientResponse {
        self.decided(call)
    }

    /// The session's id.
    pub fn session(&self) -> SessionId {
        self.session
    }

    /// A mutation of this session.
    pub fn mutation(&self, lane: u16, sequence: u64, command: Command) -> Mutation {
        Mutation {
            request: RequestId {
                session: self.session,
                lane: Lane(lane),
                sequence,
            },
            chunk_low_water: 0,
            command,
        }
    }

    /// A mutation of one operation.
    pub fn operation(&self, lane: u16, sequence: u64, operation: Operation) -> Mutation {
        self.mutation(lane, sequence, Command::single(operation))
    }

    /// Sends `mutation`, to whoever leads, until it is decided.
    #[track_caller]
    pub fn mutate(&self, mutation: &Mutation) -> ClientResponse {
        self.decided(&ClientRequest::Mutate(mutation.clone()))
    }

    /// Asks whoever leads.
    #[track_caller]
    pub fn query(&self, query: Query) -> Answer {
        match self.decided(&ClientRequest::Query(query)) {
            ClientResponse::Answer(Ok(answer)) => answer,
            other => panic!("a query was answered {other:?}"),
        }
    }

    /// Puts a chunk of this session and names it nowhere.
    #[track_caller]
    pub fn put_chunk(&self, counter: u64, payload: &[u8]) -> NewChunk {
        let id = ChunkId {
            session: self.session,
            counter,
        };
        let sha256 = Sha256::of(payload);
        let request = wire::PutChunkRequest {
            call_id: 1,
            chunk: Some(id.into()),
            sha256: Bytes::copy_from_slice(&sha256.0),
            payload: Bytes::copy_from_slice(payload),
            block_crcs: block_crcs(payload),
        };
        let put = |address: &str| {
            let exchange = async {
                let mut client = FileSystemClient::connect(format!("http://{address}"))
                    .await
                    .map_err(|e| e.to_string())?;
                let (sender, requests) = mpsc::channel(1);
                sender.send(request.clone()).await.map_err(|e| e.to_string())?;
                let answers = client.put_chunks(ReceiverStream::new(requests)).await;
                let answer = answers
                    .map_err(|e| e.to_string())?
                    .into_inner()
                    .message()
                    .await
                    .map_err(|e| e.to_string())?;
                let answer = answer.ok_or("the stream ended")?;
                match answer.status() {
                    wire::ChunkStatus::Ok => Ok(()),
                    status => Err(format!("{status:?} {}", answer.detail)),
                }
            };
            let limited = async { tokio::time::timeout(CALL_LIMIT, exchange).await };
            self.runtime
                .block_on(limited)
                .unwrap_or_else(|_| Err(format!("no answer within {CALL_LIMIT:?}")))
        };
        let refusals: Vec<String> = self
            .addresses
            .iter()
            .map_while(|address| put(address).err())
            .collect();
        assert!(
            refusals.len() < self.addresses.len(),
            "nobody took a chunk: {refusals:?}"
        );
        NewChunk {
            id,
            length: payload.len() as u32,
            sha256,
            body: ChunkBody::Stored,
        }
    }

    /// Ends the session: what it put and did not name, nobody names any more.
    #[track_caller]
    pub fn close(&self) {
        let session = self.session;
        let reply = self.decided(&ClientRequest::CloseSession { session });
        assert!(
            matches!(reply, ClientResponse::Session(_)),
            "close a session: {reply:?}"
        );
    }

    /// Sends `call` to one node, once; an error where no answer came back.
    pub fn send_once(&self, address: &str, call: &ClientRequest) -> Result<ClientResponse, String> {
        let exchange = async {
            let mut client = FileSystemClient::connect(format!("http://{address}"))
                .await
                .map_err(|e| e.to_string())?;
            // The sender is kept until the answer is here: an ended request stream may end the answers too.
            let (sender, requests) = mpsc::channel(1);
            let request = wire::CallRequest {
                call_id: 1,
                call: encode(call),
                hello: Some(wire::SessionHello {
                    session: self.session.0,
                    secret: Bytes::copy_from_slice(&self.secret.0),
                }),
                ..Default::default()
            };
            sender.send(request).await.map_err(|e| e.to_string())?;
            let answers = client.calls(ReceiverStream::new(requests)).await;
            let answer = answers
                .map_err(|e| e.to_string())?
                .into_inner()
                .message()
                .await
                .map_err(|e| e.to_string())?;
            decode(&answer.ok_or("the stream ended")?.reply).map_err(|e| e.to_string())
        };
        let limited = async { tokio::time::timeout(CALL_LIMIT, exchange).await };
        self.runtime
            .block_on(limited)
            .unwrap_or_else(|_| Err(format!("{address}: no answer within {CALL_LIMIT:?}")))
    }

    #[track_caller]
    fn decided(&self, call: &ClientRequest) -> ClientResponse {
        let start = std::time::Instant::now();
        let mut last = String::new();
        while start.elapsed() < DECIDE_LIMIT {
            for address in &self.addresses {
                match self.send_once(address, call) {
                    Ok(ClientResponse::Refused(
                        refusal @ (Refusal::NotLeader { .. } | Refusal::Unavailable { .. }),
                    )) => {
                        last = format!("{address}: {refusal:?}");
                    }
                    Ok(reply) => return reply,
                    Err(error) => last = format!("{address}: {error}"),
                }
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("nobody decided within {DECIDE_LIMIT:?}; last: {last}");
    }
}
