//! Clients that neither read nor send, over real connections.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use axum::routing::{get, post};
use futures::stream;
use http_body_util::{BodyExt as _, Empty};

use super::*;

const TIMEOUTS: ClientTimeouts = ClientTimeouts {
    close_after: Duration::from_millis(600),
    preempt_after: Duration::from_millis(100),
};
/// What the test server serves.
const SMALL: &str = "/small";
const LARGE: &str = "/large";
const SLOW: &str = "/slow";
const LIMIT: Duration = Duration::from_secs(20);

/// Counts existing requests.
#[derive(Clone, Default)]
struct Counter(Arc<AtomicUsize>);

struct Counted(Counter);

impl Counter {
    fn one(&self) -> Counted {
        self.0.fetch_add(1, Ordering::SeqCst);
        Counted(self.clone())
    }

    fn now(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }

    async fn falls_to(&self, count: usize) {
        let start = Instant::now();
        while self.now() > count {
            assert!(start.elapsed() < LIMIT, "{} are still there", self.now());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::SeqCst);
    }
}

struct TestServer {
    address: SocketAddr,
    /// Bodies in progress.
    bodies: Counter,
}

/// Serves `/small`, the endless `/large`, and `/slow`, which takes longer than the time-out of clients.
async fn serve_with(limits: Limits) -> TestServer {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let bodies = Counter::default();
    let large = bodies.clone();
    let router = Router::new()
        .route(SMALL, get(|| async { "hello" }))
        .route(
            SLOW,
            post(|| async {
                tokio::time::sleep(TIMEOUTS.close_after * 3).await;
                "done"
            }),
        )
        .route(
            LARGE,
            get(move || {
                let held = large.one();
                let frames = stream::repeat_with(move || {
                    let _held = &held;
                    Ok::<_, std::io::Error>(Bytes::from_static(&[7; 64 << 10]))
                });
                async { Body::from_stream(frames) }
            }),
        );
    tokio::spawn(serve(listener, router, limits, std::future::pending()));
    TestServer { address, bodies }
}

fn limits(connections_max: usize) -> Limits {
    Limits {
        connections_max,
        per_client_max: connections_max,
        timeouts: TIMEOUTS,
    }
}

impl TestServer {
    fn connect(&self) -> std::net::TcpStream {
        let stream = std::net::TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    fn sends(&self, text: &str) -> std::net::TcpStream {
        let mut stream = self.connect();
        stream.write_all(text.as_bytes()).unwrap();
        stream
    }

    /// Reads the response until the server closes the connection.
    async fn all_that_comes(&self, text: &'static str) -> (String, Duration) {
        let mut stream = self.sends(text);
        let began = Instant::now();
        let reading = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        (reading.await.unwrap(), began.elapsed())
    }

    async fn small(&self) -> String {
        let asked = "GET /small HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        self.all_that_comes(asked).await.0
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_nothing_or_half_a_head_is_closed() {
    let server = serve_with(limits(100)).await;
    for said in [
        "",
        "GE",
        "GET /small HTTP/1.1\r\nhost",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ] {
        let (_, took) = server.all_that_comes(said).await;
        assert!(took < LIMIT, "{said:?}");
    }
    // A client with one request is answered, and its connection closed later.
    let (answer, took) = server
        .all_that_comes("GET /small HTTP/1.1\r\nhost: x\r\n\r\n")
        .await;
    assert!(answer.ends_with("hello"), "{answer}");
    assert!(took >= TIMEOUTS.close_after / 2, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_waits_for_the_node_is_not_closed() {
    let server = serve_with(limits(100)).await;
    let asked = "POST /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let (answer, _) = server.all_that_comes(asked).await;
    assert!(answer.ends_with("done"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_is_closed_and_a_slow_one_is_not() {
    let server = serve_with(limits(100)).await;
    let ask = "GET /large HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut slow = server.sends(ask);
    let stalled: Vec<_> = (0..5).map(|_| server.sends(ask)).collect();
    let read = tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; 128 << 10];
        let began = Instant::now();
        // Slow enough to fill the buffers of the server, fast enough to be noticed.
        while began.elapsed() < TIMEOUTS.close_after * 5 {
            slow.read_exact(&mut buffer).expect("a slow reader is served");
            std::thread::sleep(Duration::from_millis(60));
        }
        slow
    });
    let slow = read.await.unwrap();
    server.bodies.falls_to(1).await;
    drop(slow);
    server.bodies.falls_to(0).await;
    drop(stalled);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_connection_is_evicted_for_a_new_one() {
    let long = ClientTimeouts {
        close_after: Duration::from_secs(600),
        ..TIMEOUTS
    };
    let server = serve_with(Limits {
        timeouts: long,
        ..limits(8)
    })
    .await;
    let idle: Vec<_> = (0..20).map(|_| server.connect()).collect();
    let busy = server.sends("POST /slow HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
    tokio::time::sleep(Duration::from_millis(50)).await;
    for _ in 0..20 {
        assert!(server.small().await.ends_with("hello"));
    }
    let answer = tokio::task::spawn_blocking(move || {
        let (mut busy, mut text) = (busy, String::new());
        busy.read_to_string(&mut text).unwrap();
        text
    });
    assert!(answer.await.unwrap().ends_with("done"), "it was in use");
    drop(idle);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_at_its_limit_gets_a_503() {
    let server = serve_with(limits(3)).await;
    let slow = "POST /slow HTTP/1.1\r\nhost: x\r\n\r\n";
    let _busy: Vec<_> = (0..3).map(|_| server.sends(slow)).collect();
    tokio::time::sleep(TIMEOUTS.close_after / 2).await;
    let (answer, _) = server.all_that_comes("").await;
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
    assert!(
        head.ends_with(&format!("content-length: {}", body.len())),
        "{head}"
    );
    let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
    assert_eq!(body["code"], "unavailable");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unread_stream_times_out_and_others_of_its_connection_continue() {
    let server = serve_with(limits(100)).await;
    let stream = TcpStream::connect(server.address).await.unwrap();
    let handshake = hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut client, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let ask = |path: &str| {
        let uri = format!("http://{}{path}", server.address);
        Request::builder().uri(uri).body(Empty::<Bytes>::new()).unwrap()
    };
    let unread = client.send_request(ask("/large")).await.unwrap();
    assert_eq!(server.bodies.now(), 1);
    for _ in 0..30 {
        let answer = client.send_request(ask("/small")).await.unwrap();
        assert_eq!(
            answer.into_body().collect().await.unwrap().to_bytes(),
            "hello",
            "the connection lives on"
        );
        tokio::time::sleep(TIMEOUTS.close_after / 10).await;
    }
    server.bodies.falls_to(0).await;
    assert!(
        unread.into_body().collect().await.is_err(),
        "it was not answered whole"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_server_completes_its_requests() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let slow = || async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        "done"
    };
    let router = Router::new().route(SLOW, get(slow));
    let stop = tokio_util::sync::CancellationToken::new();
    let served = tokio::spawn(serve(
        listener,
        router,
        limits(10),
        stop.clone().cancelled_owned(),
    ));
    let server = TestServer {
        address,
        bodies: Counter::default(),
    };
    let idle = server.connect();
    let asked = server.all_that_comes("GET /slow HTTP/1.1\r\nhost: x\r\n\r\n");
    let stopping = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        stop.cancel();
    };
    let ((answer, _), ()) = tokio::join!(asked, stopping);
    assert!(answer.ends_with("done"), "{answer}");
    tokio::time::timeout(LIMIT, served).await.unwrap().unwrap();
    drop(idle);
}
