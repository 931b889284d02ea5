//! What the kernel above takes for granted: that an answer is as new as it claims, and that what it left to us is done.

use quorumfs_proto::InodeNumber;
use quorumfs_proto::query::EntryDetail;

use super::reference::Reference;
use super::support::{close, create, mount, write};

const ROOT: InodeNumber = InodeNumber::ROOT;

#[tokio::test]
async fn attributes_of_a_listing_are_as_new_as_the_request() {
    let reference = Reference::new();
    let (fs, other) = (mount(&reference, 1), mount(&reference, 2));
    let mut handles = Vec::new();
    for at in 0..400 {
        handles.push(create(&fs, &format!("{at:03}")).await.1);
    }
    let directory = fs.open_directory(ROOT).await.unwrap();
    let detail = EntryDetail::Attributes;
    let first = fs.read_directory(directory, 0, detail, 8 << 10).await.unwrap();
    let told: Vec<&[u8]> = first.iter().map(|item| item.name.as_ref()).collect();
    let (mut removed, mut grown) = (0, 0);
    for (at, handle) in handles.iter().enumerate() {
        let name = format!("{at:03}");
        if told.contains(&name.as_bytes()) {
            continue;
        }
        if at % 2 == 0 {
            // By whom makes no difference.
            let by = [&fs, &other][at / 2 % 2];
            by.unlink(ROOT, name.as_bytes()).await.unwrap();
            removed += 1;
        } else {
            write(&fs, *handle, 0, b"grown").await;
            close(&fs, *handle).await;
            grown += 1;
        }
    }
    assert!(removed > 50 && grown > 50, "{removed} and {grown}");
    let mut rest = Vec::new();
    let mut offset = first.last().unwrap().cookie;
    loop {
        let page = fs
            .read_directory(directory, offset, detail, 8 << 10)
            .await
            .unwrap();
        let Some(last) = page.last() else { break };
        offset = last.cookie;
        rest.extend(page);
    }
    assert_eq!(rest.len(), grown);
    for item in rest {
        assert_eq!(item.attributes.unwrap().size, 5, "{:?}", item.name);
    }
}
