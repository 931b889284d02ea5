//! A whole node in this process, whose background tasks are made to panic.

use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser as _;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::serve_with;
use crate::config::{Config, Settings};
use quorumfs_tasks::{TaskState, Tasks, Work};

const LIMIT: Duration = Duration::from_secs(30);

fn config(folder: &std::path::Path, grpc: &str, http: &str) -> Config {
    let arguments = [
        "quorumfs-node",
        "--slot",
        "1",
        "--members",
        grpc,
        "--http",
        http,
        "--ntp",
        "none",
        "--data",
    ];
    let arguments = arguments
        .into_iter()
        .map(std::ffi::OsString::from)
        .chain([folder.into()]);
    Settings::parse_from(arguments).resolve().unwrap()
}

/// Sends a request; returns the status and the body of the response.
async fn request(at: &str, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(at).await.unwrap();
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {at}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    let body = answer.split_once("\r\n\r\n").map(|(_, body)| body.to_string());
    (status.expect("a status line"), body.expect("a body"))
}

/// Returns a task's entry in `/status`.
async fn task(http: &str, name: &str) -> Option<Value> {
    let (_, body) = request(http, "GET", "/status", "").await;
    let status: Value = serde_json::from_str(&body).unwrap();
    let tasks = status["tasks"].as_array().unwrap();
    tasks.iter().find(|task| task["name"] == name).cloned()
}

async fn wait_for(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let began = Instant::now();
    while !holds().await {
        assert!(began.elapsed() < LIMIT, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Runs `work` of the task `name`, and panics once when `chosen` holds that name.
async fn run_until_chosen(chosen: Arc<watch::Sender<Option<&'static str>>>, name: &'static str, work: Work) {
    let mut names = chosen.subscribe();
    let panic = async {
        let is_chosen = names.wait_for(|chosen| *chosen == Some(name)).await.is_ok();
        assert!(
            !is_chosen || !chosen.send_if_modified(|chosen| chosen.take().is_some()),
            "as the test asks"
        );
    };
    tokio::select! {
        () = panic => {}
        () = work => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn p7_every_loop_that_panics_is_named_and_at_work_again() {
    let folder = tempfile::tempdir().unwrap();
    let grpc = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = http.local_addr().unwrap().to_string();
    let config = config(folder.path(), &grpc.local_addr().unwrap().to_string(), &address);
    let panics = Arc::new(watch::Sender::new(None));
    let chosen = panics.clone();
    let tasks = Arc::new(Tasks::wrapped(move |name, work| {
        Box::pin(run_until_chosen(chosen.clone(), name, work))
    }));
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let shutdown = async {
        let _ = stopped.await;
    };
    let node = tokio::spawn(serve_with(config, grpc, http, tasks.clone(), shutdown));
    wait_for("the node serves", async || {
        request(&address, "GET", "/readyz", "").await.0 == 200
    })
    .await;

    let running = tasks
        .report()
        .into_iter()
        .filter(|task| task.state == TaskState::Running);
    let names: Vec<&str> = running.map(|task| task.name).collect();
    assert!(names.len() >= 20, "{names:?}");
    for name in names {
        panics.send_replace(Some(name));
        wait_for(&format!("{name} is at work again"), async || {
            let Some(task) = task(&address, name).await else {
                return false;
            };
            // A task with an end may reach it before it is made to panic.
            task["state"] == "done"
                || task["failures"] == 1
                    && task["state"] == "running"
                    && task["last_error"]
                        .as_str()
                        .is_some_and(|error| error.contains("as the test asks"))
        })
        .await;
    }
    let (_, metrics) = request(&address, "GET", "/metrics?format=prometheus", "").await;
    assert!(
        metrics.contains("quorumfs_task_failures_total{task=\"scrub\"} 1"),
        "{metrics}"
    );

    // The work of the tasks is still done.
    assert_eq!(request(&address, "PUT", "/upload/file", "content").await.0, 201);
    assert_eq!(
        request(&address, "GET", "/download/file", "").await,
        (200, "content".to_string())
    );
    assert_eq!(request(&address, "DELETE", "/upload/file", "").await.0, 204);
    wait_for("the content is freed", async || {
        let (_, body) = request(&address, "GET", "/status", "").await;
        serde_json::from_str::<Value>(&body).unwrap()["chunks"]["held"] == 0
    })
    .await;
    stop.send(()).unwrap();
    node.await.unwrap().unwrap();
}
