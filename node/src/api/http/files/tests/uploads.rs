//! Uploads and deletions.

use std::sync::atomic::Ordering;

use futures::StreamExt as _;
use quorumfs_proto::Sha256;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn files_of_all_sizes_are_returned_unchanged() {
    let rest = Rest::start().await;
    for size in [
        0,
        1,
        4096,
        32 << 10,
        (32 << 10) + 1,
        (1 << 20) - 1,
        1 << 20,
        (1 << 20) + 1,
        9_000_000,
    ] {
        let content = bytes(size);
        let path = format!("sizes/{size}.bin");
        let reply = rest.put(&path, streamed(&content, 100_000)).await;
        let body = reply.json();
        assert_eq!(body["path"], path.as_str());
        assert_eq!(body["size"], size);
        assert_eq!(reply.header("location"), format!("/download/{path}"));
        if size <= 1 << 20 {
            let expected: String = Sha256::of(&content)
                .0
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            assert_eq!(body["sha256"], expected.as_str());
        }
        let back = rest.get(&format!("/download/{path}")).await;
        assert_eq!(back.status, 200);
        assert!(back.body == content, "{size} bytes");
        assert_eq!(back.header("content-length"), size.to_string());
        assert_eq!(back.header("etag"), reply.header("etag"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_upload_is_one_command_with_its_directories() {
    let rest = Rest::start().await;
    let before = rest.state().mutations.load(Ordering::SeqCst);
    rest.put("a/b/c/d.txt", "hello").await;
    assert_eq!(rest.state().mutations.load(Ordering::SeqCst), before + 1);
    let reply = rest.get("/upload/a/b/c/d.txt").await;
    assert_eq!(reply.body, "hello");
    assert!(reply.header("content-type").starts_with("text/plain"));
}

#[tokio::test(flavor = "multi_thread")]
async fn very_deep_directories_are_created() {
    let rest = Rest::start().await;
    let path = vec!["d"; 1000].join("/");
    rest.put(&path, "deep").await;
    assert_eq!(rest.get(&format!("/download/{path}")).await.body, "deep");
    assert_eq!(rest.state().inodes(), 1001);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_are_bytes() {
    let rest = Rest::start().await;
    let reply = rest.put("%ff/caf%C3%A9%20%2B+", "x").await;
    assert_eq!(reply.json()["path_encoded"], "%FF/caf%C3%A9%20%2B%2B");
    assert_eq!(rest.get("/download/%FF/caf%c3%a9%20++").await.body, "x");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_replaces_a_file_and_keeps_its_permissions() {
    let rest = Rest::start().await;
    let script = rest.make(InodeNumber::ROOT, "run.sh", NewKind::File).await;
    rest.write(script.0, 0, b"old").await;
    let first = rest.get("/upload/run.sh").await;
    rest.put("run.sh", bytes(2_000_000)).await;
    let second = rest.get("/upload/run.sh").await;
    assert!(second.body == bytes(2_000_000));
    assert_ne!(first.header("etag"), second.header("etag"));
    let listed = rest.get("/files").await.json();
    assert_eq!(listed[0]["mode"], "0755");
    let state = rest.state();
    state
        .until("the old content is freed", |state| {
            state.inodes() == 2 && state.chunk_count() == 2
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_files_are_replaced_and_only_directories_traversed() {
    let rest = Rest::start().await;
    rest.put("dir/file", "x").await;
    rest.link_to("link", "/etc/passwd").await;
    rest.make(InodeNumber::ROOT, "fifo", NewKind::Fifo).await;
    for (path, code) in [
        ("dir", "is_a_directory"),
        ("dir/file/below", "not_a_directory"),
        ("link", "symbolic_link"),
        ("link/below/deep", "symbolic_link"),
        ("fifo", "not_a_file"),
    ] {
        let uri = format!("/upload/{path}");
        let reply = rest.ask("POST", &uri, &[], "new").await;
        assert_eq!(reply.failure(), (409, code.into()), "{path}");
        if code == "symbolic_link" {
            assert!(
                reply.json()["message"]
                    .as_str()
                    .unwrap()
                    .contains("'/etc/passwd'")
            );
        }
    }
    assert_eq!(rest.get("/upload/dir/file").await.body, "x");
}

#[tokio::test(flavor = "multi_thread")]
async fn if_none_match_stores_only_what_is_not_there() {
    let rest = Rest::start().await;
    let absent = [("if-none-match", "*")];
    assert_eq!(rest.ask("PUT", "/upload/a", &absent, "first").await.status, 201);
    assert_eq!(
        rest.ask("PUT", "/upload/a", &absent, "second").await.failure(),
        (412, "exists".into())
    );
    assert_eq!(rest.get("/upload/a").await.body, "first");
    // Several concurrent uploads: one succeeds.
    let attempts = (0..20).map(|n| {
        let (rest, absent) = (&rest, &absent);
        async move {
            rest.ask("PUT", "/upload/race", absent, vec![n; 2_000_000])
                .await
                .status
        }
    });
    let statuses = futures::future::join_all(attempts).await;
    assert_eq!(
        statuses.iter().filter(|&&status| status == 201).count(),
        1,
        "{statuses:?}"
    );
    assert_eq!(
        statuses.iter().filter(|&&status| status == 412).count(),
        19,
        "{statuses:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_to_one_path_at_once_leave_one_whole_file() {
    let rest = Rest::start().await;
    let attempts = (0..8u8).map(|n| {
        let rest = &rest;
        async move { rest.put("deep/er/race", vec![n; 1_500_000]).await.status }
    });
    futures::future::join_all(attempts).await;
    let body = rest.get("/upload/deep/er/race").await.body;
    assert_eq!(body.len(), 1_500_000);
    assert!(body.iter().all(|byte| *byte == body[0]), "a mix of two uploads");
    rest.state()
        .until("the losers are freed", |state| {
            state.inodes() == 4 && state.chunk_count() == 2
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incomplete_body_leaves_no_file() {
    let rest = Rest::start().await;
    let content = bytes(5_000_000);
    let frames: Vec<_> = content
        .chunks(100_000)
        .map(Bytes::copy_from_slice)
        .map(Ok)
        .collect();
    let broken = futures::stream::iter(frames).chain(futures::stream::once(async {
        Err(std::io::Error::other("the client went away"))
    }));
    let reply = rest
        .ask("POST", "/upload/new/dir/file", &[], Body::from_stream(broken))
        .await;
    assert_eq!(reply.failure(), (400, "incomplete_body".into()));
    let short = [("content-length", "5000001")];
    let reply = rest
        .ask(
            "POST",
            "/upload/new/dir/file",
            &short,
            streamed(&content, 100_000),
        )
        .await;
    assert_eq!(reply.failure(), (400, "length_mismatch".into()));
    assert_eq!(rest.get("/files?kind=all").await.json(), json!([]));
    rest.state()
        .until("nothing is left", |state| state.inodes() == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_upload_is_answered_as_the_first() {
    let rest = Rest::start().await;
    let key = [("idempotency-key", "8e03978e-40d5-43dd"), ("content-length", "5")];
    let first = rest.ask("POST", "/upload/a", &key, "hello").await;
    assert_eq!(first.status, 201);
    rest.put("a", "other").await;
    let again = rest.ask("POST", "/upload/a", &key, "hello").await;
    assert_eq!((again.status, again.json()), (201, first.json()));
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(
        rest.get("/upload/a").await.body,
        "other",
        "it was not uploaded again"
    );
    let reply = rest.ask("POST", "/upload/b", &key, "hello").await;
    assert_eq!(reply.failure(), (422, "idempotency_key_reused".into()));
    let bad = [("idempotency-key", "")];
    assert_eq!(
        rest.ask("POST", "/upload/b", &bad, "x").await.failure(),
        (400, "idempotency_key".into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn unsupported_uploads_are_refused() {
    let rest = Rest::start().await;
    for (header, failure) in [
        (
            ("content-type", "multipart/form-data; boundary=x"),
            (415, "multipart"),
        ),
        (("content-range", "bytes 0-1/10"), (400, "partial_upload")),
        (("if-match", "\"1-1\""), (501, "precondition_not_supported")),
        (("content-length", "many"), (400, "content_length")),
        (("content-length", "9223372036854775808"), (413, "too_large")),
    ] {
        let reply = rest.ask("POST", "/upload/a", &[header], "x").await;
        assert_eq!(reply.failure(), (failure.0, failure.1.into()), "{header:?}");
    }
    assert_eq!(rest.state().inodes(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn deleting_takes_files_links_and_empty_directories() {
    let rest = Rest::start().await;
    rest.put("d/file", bytes(3_000_000)).await;
    rest.link_to("link", "d/file").await;
    let delete = async |path: &str| rest.ask("DELETE", &format!("/upload/{path}"), &[], "").await;
    assert_eq!(delete("d").await.failure(), (409, "directory_not_empty".into()));
    assert_eq!(delete("link").await.status, 204);
    assert_eq!(delete("d/file").await.status, 204);
    assert_eq!(delete("d/file").await.failure(), (404, "not_found".into()));
    assert_eq!(delete("d").await.status, 204);
    assert_eq!(delete("d/file").await.failure(), (404, "not_found".into()));
    assert_eq!(rest.get("/files?kind=all").await.json(), json!([]));
    let state = rest.state();
    state
        .until("all is freed", |state| {
            state.inodes() == 1 && state.chunk_count() == 0
        })
        .await;
}
