//! Directories and trees are listed whole, in pages, while they change.

use std::collections::BTreeSet;
use std::sync::Arc;

use quorumfs_proto::command::*;
use quorumfs_proto::query::EntryDetail;
use quorumfs_proto::*;

use super::super::tables::{DirentKey, DirentRecord, Dirents, Rows as _, Table};
use super::support::*;

const ROOT: InodeNumber = InodeNumber::ROOT;

#[test]
fn entries_of_one_cookie_come_in_one_answer() {
    let mut node = Node::with_sessions(1);
    let file = node.entry(create(ROOT, "f", NewKind::File));
    let mut view = node.view();
    let real = DirentKey::new(ROOT, &name("f"));
    let (before, cookie, after) = (real.cookie - 1, real.cookie, real.cookie + 1);
    let placed = [("a", before), ("x", cookie), ("y", cookie), ("b", after)];
    for (text, cookie) in placed {
        let key = DirentKey {
            directory: ROOT,
            cookie,
            name: name(text),
        };
        let entry = DirentRecord {
            inode: file,
            kind: FileKind::File,
        };
        let value = Arc::from(&codec::encode_checked(&entry)[..]);
        Arc::make_mut(&mut view.layers.active).set(Table::Dirents, Dirents::key(&key), Some(value));
    }
    let page = |after| {
        let page = view.read_directory(ROOT, after, 0, EntryDetail::Name).unwrap();
        let names: Vec<String> = page.entries.iter().map(|entry| entry.name.to_string()).collect();
        (names.concat(), page.end)
    };
    assert_eq!(page(0), ("a".into(), false));
    assert_eq!(page(before), ("fxy".into(), false));
    assert_eq!(page(cookie), ("b".into(), true));
    assert_eq!(page(after), (String::new(), true));
    assert_eq!(page(u64::MAX), (String::new(), true));
}

#[test]
fn a_large_directory_lists_completely_while_it_changes() {
    let mut node = Node::with_sessions(1);
    let names = |prefix: &str, node: &mut Node| {
        let made: Vec<String> = (0..1000).map(|n| format!("{prefix}{n}")).collect();
        for some in made.chunks(250) {
            let operations = some
                .iter()
                .map(|text| create(ROOT, text, NewKind::File))
                .collect();
            let command = Command {
                chunks: Vec::new(),
                operations,
            };
            node.call(1, command).0.unwrap();
        }
        made
    };
    let stay = names("stay", &mut node);
    let go = names("go", &mut node);
    node.store.freeze();
    node.store.flush().unwrap();
    let mut seen = Vec::new();
    let mut after = 0;
    let mut round = 0;
    loop {
        let page = node
            .view()
            .read_directory(ROOT, after, 4000, EntryDetail::Name)
            .unwrap();
        seen.extend(page.entries.iter().map(|entry| entry.name.to_string()));
        if page.end {
            break;
        }
        after = page.entries.last().unwrap().cookie;
        node.operate(unlink(ROOT, &go[round], Held::NotOpen)).unwrap();
        node.operate(create(ROOT, &format!("new{round}"), NewKind::File))
            .unwrap();
        round += 1;
    }
    assert!(round > 10, "several pages");
    let unique: BTreeSet<&String> = seen.iter().collect();
    assert_eq!(unique.len(), seen.len(), "none twice");
    assert!(stay.iter().all(|text| unique.contains(text)), "none missed");
}

#[test]
fn a_tree_lists_sorted_by_path_in_pages_of_any_size() {
    let mut node = Node::with_sessions(1);
    // '!' and '.' sort before '/', '0' after it.
    let directories = ["a", "a!", "a0", "b", "b/c", "b/empty", "z", "z/y", "z/y/x"];
    let files = [
        "a/0", "a/z", "a.txt", "a!/1", "a0/f", "a00", "b/c/1", "b/c/2", "b/c!", "b/c0", "b0", "z/y/x/f", "~",
    ];
    let split = |path: &str| match path.rsplit_once('/') {
        Some((parent, last)) => (parent.split('/').map(name).collect(), last.to_string()),
        None => (Vec::new(), path.to_string()),
    };
    for (path, kind) in directories
        .iter()
        .map(|path| (path, NewKind::Directory))
        .chain(files.iter().map(|path| (path, NewKind::File)))
    {
        let (parent, last): (Vec<Name>, String) = split(path);
        let parent = node.view().resolve(ROOT, &parent).unwrap().inode;
        node.operate(create(parent, &last, kind)).unwrap();
    }
    let link = NewKind::Symlink(SymlinkTarget::new(&b"b"[..]).unwrap());
    node.operate(create(ROOT, "link", link)).unwrap();
    let mut sorted = files.map(str::to_string);
    sorted.sort();
    let view = node.view();
    let page = |after: &str, max| -> Vec<String> {
        let page = view.list_tree(ROOT, after.as_bytes(), max).unwrap();
        page.into_iter()
            .map(|file| String::from_utf8(file.0).unwrap())
            .collect()
    };
    for max in 1..=files.len() + 1 {
        let mut listed: Vec<String> = Vec::new();
        loop {
            let after = listed.last().cloned().unwrap_or_default();
            let more = page(&after, max);
            let last = more.len() < max;
            listed.extend(more);
            if last {
                break;
            }
        }
        assert_eq!(listed, sorted, "pages of {max}");
    }
    // A page may begin after anything, not only after a file that is there.
    for after in ["a/", "a0", "b/c", "b/c/", "b/c/1x", "b/d", "zz", "a!"] {
        let expected: Vec<&String> = sorted.iter().filter(|path| path.as_str() > after).collect();
        assert_eq!(
            page(after, 100).iter().collect::<Vec<_>>(),
            expected,
            "after {after}"
        );
    }
}
