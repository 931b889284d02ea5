//! What imports what: no two files of a crate depend on each other, not even by way of others.
//!
//! Between crates Cargo sees to that; inside one nothing does. Each file is a room; a path in its code (`use` or in
//! place) that leads into another file of the crate is an arrow. A module's file that hands on what its children define
//! (`pub use`), or only declares them, does not depend on them, and what is inside a module may use what its file defines.
//! Tests are left out. The graph is written to `target/imports.dot` (Graphviz: `dot -Tsvg target/imports.dot`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use petgraph::algo::tarjan_scc;
use petgraph::dot::{Config, Dot};
use petgraph::graphmap::DiGraphMap;
use quorumfs_tests::environment::{target_folder, workspace_folder};
use syn::visit::{self, Visit};

/// Every crate with more than a file or two.
const CRATES: &[&str] = &[
    "proto",
    "node",
    "node/metadata",
    "node/content",
    "mount",
    "mount/fs",
    "mount/client",
];

/// A module: the names that lead to it from the crate's root.
type ModulePath = Vec<String>;

/// The files of one crate, by their modules.
fn modules_of(crate_folder: &Path) -> BTreeMap<ModulePath, PathBuf> {
    fn collect(folder: &Path, module: &ModulePath, found: &mut BTreeMap<ModulePath, PathBuf>) {
        for entry in fs::read_dir(folder).expect("list the sources").flatten() {
            let path = entry.path();
            let stem = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let mut inner = module.clone();
            if path.is_dir() {
                if stem != "tests" {
                    inner.push(stem);
                    collect(&path, &inner, found);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                match stem.as_str() {
                    "lib" | "mod" => {}
                    // A program is a crate of its own, above the library.
                    "main" | "tests" => continue,
                    _ => inner.push(stem),
                }
                found.insert(inner, path);
            }
        }
    }
    let mut found = BTreeMap::new();
    collect(&crate_folder.join("src"), &ModulePath::new(), &mut found);
    found
}

/// Collects the modules that the paths of one file lead into.
struct Arrows<'a> {
    modules: &'a BTreeMap<ModulePath, PathBuf>,
    /// Of the file.
    own: ModulePath,
    found: Vec<ModulePath>,
}

impl Arrows<'_> {
    /// The module of the file that `path` leads into, if that is one of this crate.
    fn add(&mut self, path: &[String]) {
        let mut at: ModulePath = match path.first().map(String::as_str) {
            Some("crate") => ModulePath::new(),
            Some("self") => self.own.clone(),
            Some("super") => self.own[..self.own.len().saturating_sub(1)].to_vec(),
            // The name of a child, or of another crate.
            Some(first) => {
                let child = [&self.own[..], &[first.to_string()]].concat();
                if !self.modules.contains_key(&child) {
                    return;
                }
                child
            }
            None => return,
        };
        for name in &path[1..] {
            if name == "super" {
                at.pop();
                continue;
            }
            at.push(name.clone());
            if !self.modules.contains_key(&at) {
                at.pop();
                break;
            }
        }
        if !self.own.starts_with(&at) && self.modules.contains_key(&at) {
            self.found.push(at);
        }
    }

    fn add_tree(&mut self, before: &[String], tree: &syn::UseTree) {
        match tree {
            syn::UseTree::Path(path) => {
                let longer = [before, &[path.ident.to_string()]].concat();
                self.add_tree(&longer, &path.tree);
            }
            syn::UseTree::Group(group) => group.items.iter().for_each(|item| self.add_tree(before, item)),
            syn::UseTree::Name(name) => self.add(&[before, &[name.ident.to_string()]].concat()),
            syn::UseTree::Rename(rename) => self.add(&[before, &[rename.ident.to_string()]].concat()),
            syn::UseTree::Glob(_) => self.add(before),
        }
    }
}

fn is_for_tests(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        let is_cfg = attribute.path().is_ident("cfg");
        attribute.path().is_ident("test")
            || is_cfg
                && attribute
                    .parse_args::<syn::Ident>()
                    .is_ok_and(|what| what == "test")
    })
}

impl<'ast> Visit<'ast> for Arrows<'_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        if !is_for_tests(&module.attrs) {
            visit::visit_item_mod(self, module);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        // What is handed on is not used here.
        if matches!(item.vis, syn::Visibility::Inherited) && !is_for_tests(&item.attrs) {
            self.add_tree(&[], &item.tree);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.segments.len() > 1 {
            let names: Vec<String> = path
                .segments
                .iter()
                .map(|segment| segment.ident.to_string())
                .collect();
            self.add(&names);
        }
        visit::visit_path(self, path);
    }
}

#[test]
fn no_import_runs_in_a_circle() {
    let root = workspace_folder();
    let mut graph: DiGraphMap<&str, ()> = DiGraphMap::new();
    let crates: Vec<_> = CRATES
        .iter()
        .map(|folder| modules_of(&root.join(folder)))
        .collect();
    let relative = |path: &'_ PathBuf| {
        path.strip_prefix(&root)
            .expect("below the root")
            .to_string_lossy()
            .into_owned()
    };
    let names: Vec<BTreeMap<ModulePath, String>> = crates
        .iter()
        .map(|modules| {
            modules
                .iter()
                .map(|(module, path)| (module.clone(), relative(path)))
                .collect()
        })
        .collect();
    for (modules, names) in crates.iter().zip(&names) {
        for (module, path) in modules {
            let text = fs::read_to_string(path).expect("read a source file");
            let file = syn::parse_file(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let mut arrows = Arrows {
                modules,
                own: module.clone(),
                found: Vec::new(),
            };
            arrows.visit_file(&file);
            graph.add_node(&names[module]);
            for target in arrows.found {
                graph.add_edge(&names[module], &names[&target], ());
            }
        }
    }
    let drawn = format!("{:?}", Dot::with_config(&graph, &[Config::EdgeNoLabel]));
    fs::write(target_folder().join("imports.dot"), drawn).expect("write the graph");
    assert!(
        graph.edge_count() > 500,
        "only {} imports were seen",
        graph.edge_count()
    );
    let circles: Vec<Vec<&str>> = tarjan_scc(&graph)
        .into_iter()
        .filter(|circle| circle.len() > 1)
        .collect();
    let edges_in = |circle: &[&str]| -> Vec<String> {
        let inside = graph
            .all_edges()
            .filter(|(from, to, ())| circle.contains(from) && circle.contains(to));
        inside.map(|(from, to, ())| format!("{from} -> {to}")).collect()
    };
    let told: Vec<Vec<String>> = circles.iter().map(|circle| edges_in(circle)).collect();
    assert!(circles.is_empty(), "files that depend on each other: {told:#?}");
}
