//! Requests without a quorum, space or client, and raw requests on a socket.

use std::time::Instant;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::cluster::REASON;
use super::*;
use crate::api::http::connections::{self, ClientTimeouts, Limits};

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_everything_is_503_in_time_and_works_again_after() {
    let rest = Rest::with_timeout(Duration::from_millis(400)).await;
    rest.put("f", bytes(2_000_000)).await;
    State::set(&rest.state().leaderless, true);
    for (method, uri) in [
        ("PUT", "/upload/g"),
        ("GET", "/download/f"),
        ("HEAD", "/download/f"),
        ("DELETE", "/upload/f"),
        ("GET", "/files"),
    ] {
        let began = Instant::now();
        let reply = rest.ask(method, uri, &[], "body").await;
        assert_eq!(reply.status, 503, "{method} {uri}");
        assert_eq!(reply.header("retry-after"), "2");
        assert!(
            began.elapsed() < Duration::from_secs(2),
            "{method} took {:?}",
            began.elapsed()
        );
        if method != "HEAD" {
            assert!(
                reply.json()["message"].as_str().unwrap().contains("quorum"),
                "{reply:?}"
            );
        }
    }
    assert_eq!(rest.get("/status").await.status, 200);
    State::set(&rest.state().leaderless, false);
    tokio::time::sleep(Duration::from_millis(600)).await;
    rest.put("g", "again").await;
    assert!(rest.get("/download/f").await.body == bytes(2_000_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_outlasts_a_change_of_leader() {
    let rest = Rest::start().await;
    let content = bytes(6_000_000);
    let (frames, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(1);
    let body = Body::from_stream(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let feeding = async {
        for frame in content.chunks(500_000) {
            tokio::time::sleep(Duration::from_millis(50)).await;
            frames.send(Ok(Bytes::copy_from_slice(frame))).await.unwrap();
        }
        drop(frames);
    };
    let failing = async {
        rest.state()
            .until("it is under way", |state| state.chunk_count() == 2)
            .await;
        State::set(&rest.state().leaderless, true);
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        State::set(&rest.state().leaderless, false);
    };
    let (reply, (), ()) = tokio::join!(rest.put("f", body), feeding, failing);
    assert_eq!(reply.json()["size"], 6_000_000);
    assert!(rest.get("/download/f").await.body == content);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_cluster_is_507_and_still_deletes() {
    let rest = Rest::start().await;
    rest.put("f", "x").await;
    State::set(&rest.state().full, true);
    for size in [10, 500_000, 9_000_000] {
        let reply = rest.ask("PUT", "/upload/g", &[], bytes(size)).await;
        assert_eq!(reply.failure(), (507, "no_space".into()), "{size}");
    }
    assert_eq!(rest.ask("DELETE", "/upload/f", &[], "").await.status, 204);
    State::set(&rest.state().full, false);
    rest.put("g", bytes(9_000_000)).await;
    let state = rest.state();
    state
        .until("what failed left nothing", |state| state.inodes() == 2)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_client_the_reason_is_reported() {
    let (sender, client) = watch::channel(ClientHandle::Connecting {
        reason: REASON.to_string(),
    });
    let router = router(RestState {
        timeouts: ClientTimeouts::default(),
        client,
        admin: Router::new(),
        status: Arc::new(|| json!({ "writable": false, "reason": REASON })),
        request_timeout: Duration::from_millis(100),
    });
    let ask = async |uri: &str| {
        let request = Request::get(uri).body(Body::empty()).unwrap();
        read(router.clone().oneshot(request).await.unwrap()).await
    };
    let reply = ask("/files").await;
    assert_eq!(
        (reply.status, reply.json()["message"].as_str()),
        (503, Some(REASON))
    );
    let status = ask("/status").await;
    assert_eq!((status.status, &status.json()["writable"]), (200, &json!(false)));
    assert_eq!(status.json()["client"]["connected"], false);
    assert_eq!(
        ask("/download/..").await.status,
        400,
        "what is wrong anyway need not wait"
    );

    let cluster = TestCluster::start().await;
    sender.send_replace(ready(&cluster.client().await));
    assert_eq!(ask("/files").await.json(), json!([]));
}

/// Serves `rest` on a socket.
async fn served(rest: &Rest) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = rest.router.clone();
    let never = std::future::pending();
    tokio::spawn(connections::serve(listener, router, Limits::default(), never));
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_are_refused_as_they_come_from_the_wire() {
    let rest = Rest::start().await;
    let address = served(&rest).await;
    let long_name = format!("/upload/{}", "x".repeat(256));
    let long_path = format!("/upload/{}", "x/".repeat(2050));
    for target in [
        "/upload/../x",
        "/upload/a/../../x",
        "/upload/a/%2e%2e/x",
        "/upload/a%00b",
        "/upload/a%2Fb",
        "/upload//etc/passwd",
        "/upload/a/",
        "/upload/%",
        "/download/./x",
        &long_name,
        &long_path,
    ] {
        for method in ["GET", "PUT"] {
            if method == "PUT" && target.starts_with("/download") {
                continue;
            }
            let mut stream = TcpStream::connect(address).await.unwrap();
            let request = format!(
                "{method} {target} HTTP/1.1\r\nHost: n\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.starts_with("HTTP/1.1 400 "), "{method} {target}: {answer}");
            assert!(answer.contains("\"code\":\"invalid_path\""), "{answer}");
        }
    }
    assert_eq!(rest.state().inodes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_during_an_upload_leaves_no_file() {
    let rest = Rest::start().await;
    let address = served(&rest).await;
    for framing in ["Content-Length: 9000000", "Transfer-Encoding: chunked"] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("PUT /upload/d/f HTTP/1.1\r\nHost: n\r\n{framing}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        if framing.starts_with("Transfer") {
            stream.write_all(b"895440\r\n").await.unwrap();
        }
        stream.write_all(&bytes(4_000_000)).await.unwrap();
        rest.state()
            .until("the upload is under way", |state| state.inodes() == 2)
            .await;
        drop(stream);
        rest.state()
            .until("nothing is left", |state| state.inodes() == 1)
            .await;
    }
    assert_eq!(rest.get("/files?kind=all").await.json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_upload_times_out_and_leaves_no_file() {
    let short = ClientTimeouts {
        close_after: Duration::from_secs(3),
        preempt_after: Duration::from_millis(100),
    };
    let rest = Rest::with(Duration::from_secs(10), short).await;
    let address = served(&rest).await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = "PUT /upload/d/f HTTP/1.1\r\nHost: n\r\nContent-Length: 9000000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&bytes(4_000_000)).await.unwrap();
    rest.state()
        .until("the upload is under way", |state| state.inodes() == 2)
        .await;
    rest.state()
        .until("nothing is left", |state| state.inodes() == 1)
        .await;
    let mut answer = String::new();
    // The connection may be reset, because more bytes were to come.
    let _ = stream.read_to_string(&mut answer).await;
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn stalled_downloads_are_preempted_and_small_files_need_no_permit() {
    let short = ClientTimeouts {
        close_after: Duration::from_secs(600),
        preempt_after: Duration::from_millis(100),
    };
    let rest = Rest::with(Duration::from_secs(10), short).await;
    let address = served(&rest).await;
    rest.put("large", bytes(12 << 20)).await;
    rest.put("small", "hello").await;
    let mut stalled = Vec::new();
    for _ in 0..super::super::DOWNLOADS_MAX + 2 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = "GET /download/large HTTP/1.1\r\nHost: n\r\n\r\n";
        stream.write_all(request.as_bytes()).await.unwrap();
        stalled.push(stream);
    }
    let ask = async |path: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    };
    assert!(ask("/download/small").await.ends_with(b"hello"));
    assert!(ask("/download/large").await.ends_with(&bytes(12 << 20)));
}
