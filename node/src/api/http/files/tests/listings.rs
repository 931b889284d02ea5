//! Listings of files.

use super::*;

fn paths(listing: &Value) -> Vec<String> {
    let entries = listing.as_array().unwrap().iter();
    entries
        .map(|entry| entry["path"].as_str().unwrap().to_string())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_tree_is_an_empty_array() {
    let rest = Rest::start().await;
    let reply = rest.get("/files").await;
    assert_eq!((reply.status, reply.body.as_ref()), (200, &b"[]"[..]));
    assert_eq!(rest.get("/files?prefix=no/such/").await.json(), json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tree_is_listed_in_the_order_of_its_paths() {
    let rest = Rest::start().await;
    for path in ["a/x", "a.txt", "a0", "b/c/d", "b/c!", "%ff"] {
        rest.put(path, "12345").await;
    }
    rest.link_to("link", "a/x").await;
    let listing = rest.get("/files").await.json();
    let expected = ["a.txt", "a/x", "a0", "b/c!", "b/c/d", "link", "\u{fffd}"];
    assert_eq!(paths(&listing), expected);
    assert_eq!(listing[6]["path_encoded"], "%FF");
    assert_eq!(listing[5]["kind"], "symlink");
    let file = &listing[1];
    assert_eq!(
        (&file["size"], &file["kind"], &file["mode"]),
        (&json!(5), &json!("file"), &json!("0644"))
    );
    assert!(file["inode"].is_u64() && file["etag"].is_string());
    assert!(file["mtime"].as_str().unwrap().starts_with("20"), "{file}");

    let level = rest.get("/files?recursive=false&prefix=b/").await.json();
    assert_eq!(paths(&level), ["b/c", "b/c!"]);
    assert_eq!(level[0]["kind"], "directory");
    assert_eq!(
        paths(&rest.get("/files?prefix=a").await.json()),
        ["a.txt", "a/x", "a0"]
    );
    assert_eq!(
        paths(&rest.get("/files?kind=directory").await.json()),
        ["a", "b", "b/c"]
    );
    assert_eq!(paths(&rest.get("/files?prefix=link/").await.json()), [""; 0]);
    assert_eq!(
        rest.get("/files?limit=none").await.failure(),
        (400, "invalid_parameter".into())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pages_follow_their_links() {
    let rest = Rest::start().await;
    let mut expected = Vec::new();
    for n in 0..25 {
        let path = format!("p/{}/{n}", n % 4);
        rest.put(&path, "").await;
        expected.push(path);
    }
    expected.sort();
    let mut listed = Vec::new();
    let mut next = Some("/files?limit=4&prefix=p/".to_string());
    let mut pages = 0;
    while let Some(uri) = next {
        let reply = rest.get(&uri).await;
        pages += 1;
        listed.extend(paths(&reply.json()));
        let link = reply.header("link");
        next = link
            .strip_prefix('<')
            .and_then(|link| link.strip_suffix(">; rel=\"next\""))
            .map(str::to_string);
        assert_eq!(
            reply.header("x-next-after"),
            if next.is_some() {
                listed.last().unwrap()
            } else {
                ""
            }
        );
    }
    assert_eq!(listed, expected);
    assert_eq!(pages, 7, "no empty page at the end");
}
