//! Style that matters: the layers, the length of files, nothing left undone, every promise tested.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use quorumfs_tests::environment::workspace_folder;

/// The modules of `node`, top to bottom: one may use only what comes after it.
const NODE_LAYERS: &[&str] = &[
    "server",
    "api",
    "node",
    "leader",
    "integrity",
    "membership",
    "observe",
    "replication",
    "consensus",
    "config",
    "transport",
    "logging",
    "call_stream",
    "incoming",
    "private_files",
    "to_end",
    "pace",
    "wall_clock",
];

/// The modules of `mount`, top to bottom.
const MOUNT_LAYERS: &[&str] = &["serve", "fuse", "mountpoint"];

/// The modules of `mount` (and what lies below them) that may know fuser.
const KNOW_FUSER: &[&str] = &["fuse", "errno", "mountpoint", "serve", "main"];

/// Lines of a file above which it is two.
const FILE_LINES_MAX: usize = 600;

/// Each has tests whose names begin with it (`p1_…`).
const PROMISES: &[&str] = &["p1", "p2", "p3", "p4", "p5", "p6", "p7", "p8"];

/// Every source file below `folder` of the workspace, by its path from there.
fn sources(folder: &str) -> Vec<(PathBuf, String)> {
    fn collect(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).expect("list the sources") {
            let path = entry.expect("list the sources").path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                collect(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    let root = workspace_folder();
    let mut paths = Vec::new();
    collect(&root.join(folder), &mut paths);
    paths.sort();
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("read a source file");
        (
            path.strip_prefix(&root)
                .expect("below the workspace")
                .to_path_buf(),
            text,
        )
    };
    let found: Vec<_> = paths.into_iter().map(read).collect();
    assert!(!found.is_empty(), "no sources in {folder}");
    found
}

fn all_sources() -> Vec<(PathBuf, String)> {
    ["proto", "node", "mount", "tests"]
        .into_iter()
        .flat_map(sources)
        .collect()
}

/// The top-level module that a file of `crate_folder/src` belongs to.
fn module_of(path: &Path, crate_folder: &str) -> String {
    let below = path
        .strip_prefix(Path::new(crate_folder).join("src"))
        .expect("a file of the crate");
    let first = below.components().next().expect("a file has a name");
    let first = Path::new(first.as_os_str());
    first
        .file_stem()
        .expect("a file has a name")
        .to_string_lossy()
        .into_owned()
}

/// The top-level modules that `text` names as `crate::…`, comments left out; `use crate::{a, b::c}` too.
fn modules_used(text: &str) -> BTreeSet<String> {
    let code: String = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .map(|l| format!("{l}\n"))
        .collect();
    let mut used = BTreeSet::new();
    for (at, _) in code.match_indices("crate::") {
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let rest = &code[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => used.extend(first_word(rest)),
            Some(group) => {
                let mut depth = 0;
                let mut start = 0;
                for (i, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' if depth > 0 => depth -= 1,
                        ',' | '}' if depth == 0 => {
                            used.extend(first_word(group[start..i].trim_start()));
                            start = i + 1;
                            if c == '}' {
                                break;
                            }
                        }
                        _ => {}
                    }
                }
            }
        }
    }
    used
}

fn first_word(text: &str) -> Option<String> {
    let word: String = text
        .chars()
        .take_while(|c| c.is_alphanumeric() || *c == '_')
        .collect();
    // Modules are lower case; what is not is an item of the crate's root.
    word.starts_with(|c: char| c.is_lowercase()).then_some(word)
}

/// What points up in the layers.
fn wrong_uses(crate_folder: &str, layers: &[&str]) -> Vec<String> {
    let rank = |module: &str| layers.iter().position(|layer| *layer == module);
    let mut wrong = Vec::new();
    for (path, text) in sources(&format!("{crate_folder}/src")) {
        let own = module_of(&path, crate_folder);
        for used in modules_used(&text) {
            let upwards = matches!((rank(&own), rank(&used)), (Some(own), Some(used)) if used < own);
            if upwards {
                wrong.push(format!("{}: {own} uses {used}", path.display()));
            }
        }
    }
    wrong
}

#[test]
fn imports_point_down_the_layers() {
    let mut wrong = wrong_uses("node", NODE_LAYERS);
    wrong.extend(wrong_uses("mount", MOUNT_LAYERS));
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_module_of_the_node_has_its_layer() {
    let known: BTreeSet<&str> = NODE_LAYERS.iter().copied().chain(["lib", "main"]).collect();
    let modules: BTreeSet<String> = sources("node/src")
        .iter()
        .map(|(path, _)| module_of(path, "node"))
        .collect();
    let unknown: Vec<&String> = modules
        .iter()
        .filter(|module| !known.contains(module.as_str()))
        .collect();
    assert!(
        unknown.is_empty(),
        "give these a place in NODE_LAYERS: {unknown:?}"
    );
}

#[test]
fn only_the_edge_of_the_mount_knows_fuser() {
    let uses = |text: &str| {
        text.lines()
            .any(|line| !line.trim_start().starts_with("//") && line.contains("fuser::"))
    };
    let wrong: Vec<PathBuf> = sources("mount/src")
        .into_iter()
        .filter(|(path, text)| uses(text) && !KNOW_FUSER.contains(&module_of(path, "mount").as_str()))
        .map(|(path, _)| path)
        .collect();
    assert!(wrong.is_empty(), "these know fuser: {wrong:?}");
    let wrong: Vec<PathBuf> = ["mount/client", "mount/fs", "node", "proto"]
        .into_iter()
        .flat_map(sources)
        .filter(|(_, text)| uses(text))
        .map(|(path, _)| path)
        .collect();
    assert!(wrong.is_empty(), "these know fuser: {wrong:?}");
}

#[test]
fn files_stay_short() {
    let mut wrong = Vec::new();
    for (path, text) in all_sources() {
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            wrong.push(format!("{}: {lines} lines", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn nothing_is_left_undone() {
    // In two parts, so that this file does not name them itself.
    let marks = [
        ("to", "do!("),
        ("unimpl", "emented!("),
        ("FIX", "ME"),
        ("XX", "X:"),
        ("for", " now"),
        // Nothing refers to a document that is not in the repository.
        ("(des", "ign"),
        ("(Ru", "le "),
    ];
    let marks = marks.map(|(a, b)| format!("{a}{b}"));
    let mut wrong = Vec::new();
    for (path, text) in all_sources() {
        for (number, line) in text.lines().enumerate() {
            if let Some(mark) = marks.iter().find(|mark| line.contains(mark.as_str())) {
                wrong.push(format!("{}:{}: {mark}", path.display(), number + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_file_says_what_it_owes() {
    let silent = |text: &str| !text.trim_start().starts_with("//!");
    let wrong: Vec<PathBuf> = all_sources()
        .into_iter()
        .filter(|(path, text)| silent(text) && path.file_name().is_some_and(|name| name != "build.rs"))
        .map(|(path, _)| path)
        .collect();
    assert!(wrong.is_empty(), "no `//!` at the top of {wrong:#?}");
}

#[test]
fn every_promise_is_tested() {
    let mut named: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, text) in sources("tests/tests") {
        let lines: Vec<&str> = text.lines().collect();
        for pair in lines.windows(2).filter(|pair| pair[0] == "#[test]") {
            for promise in PROMISES {
                if pair[1].starts_with(&format!("fn {promise}_")) {
                    *named.entry(promise).or_default() += 1;
                }
            }
        }
    }
    let missing: Vec<&&str> = PROMISES
        .iter()
        .filter(|promise| !named.contains_key(**promise))
        .collect();
    assert!(missing.is_empty(), "no test names {missing:?}");
}

#[test]
fn the_layer_check_sees_what_it_should() {
    let text = "use crate::consensus::View;\n// crate::comment\nuse crate::{replication::{store, x}, Item, read};\nlet a = crate::write::put();";
    let used: Vec<String> = modules_used(text).into_iter().collect();
    assert_eq!(used, ["consensus", "read", "replication", "write"]);
}
