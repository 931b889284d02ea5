//! Downloads: parts, preconditions, and files that change while they are read.

use http_body_util::BodyExt as _;
use quorumfs_fs::readahead::READAHEAD_CHUNKS_MAX;

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn parts_are_exactly_what_was_asked_for() {
    let rest = Rest::start().await;
    let content = bytes(3_500_000);
    rest.put("f.html", content.clone()).await;
    for (range, start, end) in [
        ("bytes=0-0", 0, 1),
        ("bytes=1048570-1048580", 1_048_570, 1_048_581),
        ("bytes=4095-", 4095, 3_500_000),
        ("bytes=-10", 3_499_990, 3_500_000),
    ] {
        let reply = rest.ask("GET", "/download/f.html", &[("range", range)], "").await;
        assert_eq!(reply.status, 206, "{range}");
        assert!(reply.body == content[start..end], "{range}");
        assert_eq!(
            reply.header("content-range"),
            format!("bytes {start}-{}/3500000", end - 1)
        );
        assert_eq!(reply.header("content-length"), (end - start).to_string());
    }
    let reply = rest
        .ask("GET", "/download/f.html", &[("range", "bytes=3500000-")], "")
        .await;
    assert_eq!(reply.failure(), (416, "range_not_satisfiable".into()));
    assert_eq!(reply.header("content-range"), "bytes */3500000");
    let reply = rest
        .ask("GET", "/download/f.html", &[("range", "bytes=0-1,5-6")], "")
        .await;
    assert_eq!((reply.status, reply.body.len()), (200, 3_500_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn head_describes_without_content() {
    let rest = Rest::start().await;
    rest.put("page.html", bytes(100_000)).await;
    for uri in ["/download/page.html", "/upload/page.html"] {
        let reply = rest.ask("HEAD", uri, &[], "").await;
        assert_eq!((reply.status, reply.body.len()), (200, 0));
        assert_eq!(reply.header("content-length"), "100000");
        assert_eq!(reply.header("accept-ranges"), "bytes");
        assert_eq!(reply.header("content-type"), "text/html");
        assert_eq!(reply.header("x-content-type-options"), "nosniff");
        assert!(reply.header("last-modified").ends_with(" GMT"));
        // Ranges are defined for GET only (RFC 9110, section 14.2).
        for range in ["bytes=0-9", "bytes=100000-"] {
            let reply = rest.ask("HEAD", uri, &[("range", range)], "").await;
            assert_eq!(
                (
                    reply.status,
                    reply.header("content-length"),
                    reply.header("content-range")
                ),
                (200, "100000", ""),
                "{uri} {range}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_known_tag_saves_the_transfer() {
    let rest = Rest::start().await;
    let tag = rest.put("f", "v1").await.header("etag").to_string();
    let known = [("if-none-match", tag.as_str())];
    let reply = rest.ask("GET", "/download/f", &known, "").await;
    assert_eq!(
        (reply.status, reply.body.len(), reply.header("etag")),
        (304, 0, tag.as_str())
    );
    let inode = rest.get("/files").await.json()[0]["inode"].as_u64().unwrap();
    rest.write(inode, 0, b"v2").await;
    let reply = rest.ask("GET", "/download/f", &known, "").await;
    assert_eq!((reply.status, reply.body.as_ref()), (200, &b"v2"[..]));
    let reply = rest.ask("GET", "/download/f", &[("if-match", &tag)], "").await;
    assert_eq!(reply.failure(), (412, "precondition_failed".into()));
    let part = [("range", "bytes=0-0"), ("if-range", tag.as_str())];
    assert_eq!(rest.ask("GET", "/download/f", &part, "").await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn holes_are_zeros() {
    let rest = Rest::start().await;
    let file = rest.make(InodeNumber::ROOT, "sparse", NewKind::File).await;
    rest.write(file.0, 3_000_000, b"middle").await;
    rest.write(file.0, 5_000_000, b"end").await;
    let mut expected = vec![0; 5_000_003];
    expected[3_000_000..3_000_006].copy_from_slice(b"middle");
    expected[5_000_000..].copy_from_slice(b"end");
    assert!(rest.get("/download/sparse").await.body == expected);
    let part = [("range", "bytes=2999999-3000006")];
    let reply = rest.ask("GET", "/download/sparse", &part, "").await;
    assert_eq!(reply.body.as_ref(), b"\0middle\0");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_kinds_than_files_are_refused() {
    let rest = Rest::start().await;
    rest.put("d/f", "x").await;
    rest.link_to("link", "d/f").await;
    for (path, status, code) in [
        ("d", 409, "is_a_directory"),
        ("link", 409, "symbolic_link"),
        ("link/x", 409, "symbolic_link"),
        ("d/f/x", 404, "not_found"),
        ("d/g", 404, "not_found"),
        ("e/g", 404, "not_found"),
    ] {
        let reply = rest.get(&format!("/download/{path}")).await;
        assert_eq!(reply.failure(), (status, code.into()), "{path}");
    }
    let message = rest.get("/download/e/g").await.json()["message"].clone();
    assert!(
        message
            .as_str()
            .unwrap()
            .contains("the directory 'e' does not exist"),
        "{message}"
    );
}

/// Starts a download of a file of 20 MB and allows only the first chunk and those of the read-ahead to be fetched, which
/// may arrive in any order.
async fn begun(rest: &Rest) -> (Body, Vec<u8>) {
    let content = bytes(20_000_000);
    rest.put("big", content.clone()).await;
    let gets = &rest.state().gets;
    gets.forget_permits(gets.available_permits());
    gets.add_permits(1 + READAHEAD_CHUNKS_MAX as usize);
    let request = Request::get("/download/big").body(Body::empty()).unwrap();
    let mut body = rest.send(request).await.into_body();
    let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
    assert!(first == content[..first.len()]);
    (body, content[first.len()..].to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_continues_when_the_file_is_replaced_and_deleted() {
    let rest = Rest::start().await;
    let (body, expected) = begun(&rest).await;
    rest.put("big", "other").await;
    assert_eq!(rest.ask("DELETE", "/upload/big", &[], "").await.status, 204);
    // Longer than a keep-alive interval: the node must report that the file is open.
    tokio::time::sleep(Duration::from_millis(6_000)).await;
    rest.state().gets.add_permits(1000);
    let rest_of_it = to_bytes(body, usize::MAX).await.unwrap();
    assert!(rest_of_it == expected);
    rest.state()
        .until("it is freed then", |state| {
            state.inodes() == 1 && state.chunk_count() == 0
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_download_of_an_overwritten_file_is_aborted_and_never_mixed() {
    let rest = Rest::start().await;
    let (body, _) = begun(&rest).await;
    let inode = rest.get("/files").await.json()[0]["inode"].as_u64().unwrap();
    // Removes whole chunks of the old version.
    for chunk in 0..19 * 32 {
        rest.write(inode, chunk * (32 << 10), &[0xAA; 32 << 10]).await;
    }
    rest.state().gets.add_permits(1000);
    let error = to_bytes(body, usize::MAX).await.unwrap_err();
    let mut source: Option<&dyn std::error::Error> = Some(&error);
    let mut messages = Vec::new();
    while let Some(error) = source {
        messages.push(error.to_string());
        source = error.source();
    }
    assert!(
        messages
            .iter()
            .any(|message| message.contains("changed during the download")),
        "{messages:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_disconnects_leaves_no_open_file() {
    let rest = Rest::start().await;
    let (body, _) = begun(&rest).await;
    drop(body);
    assert_eq!(rest.ask("DELETE", "/upload/big", &[], "").await.status, 204);
    rest.state()
        .until("it is freed", |state| {
            state.inodes() == 1 && state.chunk_count() == 0
        })
        .await;
}
