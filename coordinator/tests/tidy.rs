//! The house rules, as a test: what design reviews would otherwise have to repeat.
//!
//! Reads every source file of the workspace. A rule that is broken names the file and line, and
//! what to do instead.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest source file in lines.
const MAX_FILE_LINES: usize = 500;

/// Words that would tie the scheduler to a clock, to chance, to the world outside.
const IMPURE: &[&str] = &[
    "Instant",
    "SystemTime",
    "std::env",
    "tokio",
    "tracing::",
    "metrics::",
    "tokenizers",
    "rand::",
    "std::fs",
    "std::net",
];

/// Crates of the workspace and what they may depend on.
const ARROWS: &[(&str, &[&str])] = &[
    ("topology", &[]),
    ("kernels", &[]),
    ("shard", &["kernels", "topology"]),
    ("coordinator", &["bench", "shard", "topology"]),
    ("bench", &[]),
];

/// Where `unsafe` may stand (promise 13).
const UNSAFE_HOMES: &[&str] = &[
    "kernels/src/",
    "shard/src/weights",
    "shard/src/comm/shm",
    "shard/src/comm/nccl",
];

/// What may stand at the top level, dotfiles aside.
const TOP_LEVEL: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "LICENSE",
    "README.md",
    "bench",
    "coordinator",
    "kernels",
    "scripts",
    "shard",
    "target",
    "topology",
];

#[test]
fn files_open_with_their_purpose_and_stay_short() {
    let mut broken = Vec::new();
    let rust = rust_files();
    for (name, text) in &rust {
        if !text.starts_with("//!") {
            broken.push(format!(
                "{name}:1: open with `//!`: what the file is for, its invariant"
            ));
        }
    }
    let scripts = files("scripts", &["py", "sh"]);
    for (name, text) in &scripts {
        let mut lines = text.lines().filter(|line| !line.starts_with("#!"));
        let first = lines.next().unwrap_or_default();
        if !first.starts_with("\"\"\"") && !first.starts_with("# ") {
            broken.push(format!("{name}:1: open with what the script is for"));
        }
    }
    for (name, text) in rust.iter().chain(&scripts) {
        let lines = text.lines().count();
        if lines > MAX_FILE_LINES {
            broken.push(format!(
                "{name}: {lines} lines; cut it along the data ({MAX_FILE_LINES})"
            ));
        }
    }
    assert_none(&broken);
}

#[test]
fn nothing_is_left_unfinished() {
    let markers = [
        ["to", "do!("],
        ["unimple", "mented!("],
        ["FIX", "ME"],
        ["#[igno", "re"],
    ];
    let markers: Vec<String> = markers.iter().map(|m| m.concat()).collect();
    assert_none(&lines_where(&rust_files(), |line| {
        let marker = markers.iter().find(|m| line.contains(m.as_str()))?;
        Some(format!("finish or remove `{marker}`"))
    }));
}

#[test]
fn the_scheduler_is_a_value() {
    let scheduler = files("coordinator/src/scheduler", &["rs"]);
    assert!(scheduler.len() >= 4, "the scheduler's files were not found");
    assert_none(&lines_where(&scheduler, |line| {
        let word = IMPURE.iter().find(|word| code(line).contains(**word))?;
        Some(format!("`{word}`: hand it in as an argument"))
    }));
    assert_none(&lines_where(&scheduler, |line| {
        let iterates = ["HashMap", "HashSet"]
            .iter()
            .find(|word| code(line).contains(**word))?;
        Some(format!(
            "`{iterates}`: its order differs from run to run; use BTreeMap or indices"
        ))
    }));
}

#[test]
fn arrows_between_crates_point_one_way() {
    let names: BTreeSet<&str> = ARROWS.iter().map(|(name, _)| *name).collect();
    let mut broken = Vec::new();
    for (name, allowed) in ARROWS {
        let manifest = fs::read_to_string(root().join(name).join("Cargo.toml"))
            .expect("every crate has a manifest");
        for line in manifest.lines() {
            let dependency = line.split(['.', ' ', '=']).next().unwrap_or_default();
            if names.contains(dependency) && !allowed.contains(&dependency) {
                broken.push(format!("{name}/Cargo.toml: must not know `{dependency}`"));
            }
        }
    }
    assert_none(&broken);
    let mut coordinator = files("coordinator/src", &["rs"]);
    coordinator.retain(|(name, _)| name != "coordinator/src/main.rs");
    assert_none(&lines_where(&coordinator, |line| {
        let code = code(line);
        let names = |path: &str| {
            code.match_indices(path).any(|(at, _)| {
                !code[..at].ends_with(|b: char| b.is_alphanumeric() || b == '_' || b == ':')
            })
        };
        let path = ["shard::", "bench::", "kernels::"]
            .into_iter()
            .find(|path| names(path))?;
        Some(format!("only main.rs names `{path}`"))
    }));
}

#[test]
fn unsafe_has_one_address() {
    let mut rust = rust_files();
    rust.retain(|(name, _)| {
        !name.contains("/tests/") && !UNSAFE_HOMES.iter().any(|home| name.starts_with(home))
    });
    assert_none(&lines_where(&rust, |line| {
        let found = ["unsafe {", "unsafe fn", "unsafe impl"]
            .iter()
            .find(|u| code(line).contains(**u))?;
        Some(format!("`{found}` outside {}", UNSAFE_HOMES.join(", ")))
    }));
}

#[test]
fn every_cuda_file_has_its_twin() {
    let mut broken = Vec::new();
    for (name, _) in files("kernels/src", &["cu"]) {
        let twin = root().join(&name).with_extension("rs");
        // `x_part.cu` is a piece of `x.cu` that is compiled beside it.
        let stem = twin.file_stem().and_then(|stem| stem.to_str());
        let whole = stem.and_then(|stem| stem.rsplit_once('_'));
        let whole = whole.map(|(whole, _)| twin.with_file_name(format!("{whole}.rs")));
        if !twin.exists() && !whole.is_some_and(|whole| whole.exists()) {
            broken.push(format!("{name}: no twin {}", twin.display()));
        }
    }
    assert_none(&broken);
}

/// A type that contains itself would let a hostile frame exhaust the stack while it is decoded.
#[test]
fn wire_types_do_not_recurse() {
    let mut bodies: Vec<(String, String)> = Vec::new();
    for (_, text) in files("topology/src/wire", &["rs"]) {
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            let declared = line
                .strip_prefix("pub struct ")
                .or_else(|| line.strip_prefix("pub enum "))
                .and_then(|rest| rest.split([' ', '<', '(', '{']).next());
            if let Some(declared) = declared {
                let body = lines.by_ref().take_while(|l| *l != "}").map(code);
                let body = body.collect::<Vec<_>>().join("\n");
                bodies.push((declared.to_owned(), body));
            }
        }
    }
    assert!(
        bodies.len() >= 10,
        "the wire's types were not found: {bodies:?}"
    );
    let held_by = |holder: &str| -> Vec<&str> {
        let body = bodies
            .iter()
            .find(|(name, _)| name == holder)
            .map_or("", |(_, body)| body);
        let words: BTreeSet<&str> = body
            .split(|c: char| !c.is_alphanumeric() && c != '_')
            .collect();
        bodies
            .iter()
            .map(|(name, _)| name.as_str())
            .filter(|name| words.contains(name))
            .collect()
    };
    for (name, _) in &bodies {
        let mut seen = BTreeSet::new();
        let mut open = held_by(name);
        while let Some(next) = open.pop() {
            assert!(
                next != name,
                "`{name}` contains itself: no recursive type on the wire"
            );
            if seen.insert(next) {
                open.extend(held_by(next));
            }
        }
    }
}

#[test]
fn the_top_level_is_fixed() {
    let mut broken = Vec::new();
    for entry in fs::read_dir(root()).expect("the root is readable") {
        let name = entry.expect("the entry is readable").file_name();
        let name = name.to_string_lossy();
        if !name.starts_with('.') && !TOP_LEVEL.contains(&&*name) {
            broken.push(format!(
                "{name}: the top level holds only {}",
                TOP_LEVEL.join(" ")
            ));
        }
    }
    assert_none(&broken);
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate is in the workspace")
        .into()
}

/// Name (from the root) and text of the files under `dir` with one of the extensions, sorted.
fn files(dir: &str, extensions: &[&str]) -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("the directory is readable") {
            let path = entry.expect("the entry is readable").path();
            if path.is_dir() && !path.ends_with("target") {
                walk(&path, found);
            } else if path.is_file() {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root().join(dir), &mut found);
    found.sort();
    found.retain(|p| {
        p.extension()
            .is_some_and(|e| extensions.iter().any(|x| e == *x))
    });
    let named = |path: PathBuf| {
        let text = fs::read_to_string(&path).expect("a source file is UTF-8");
        let name = path
            .strip_prefix(root())
            .expect("inside the root")
            .display()
            .to_string();
        (name, text)
    };
    found.into_iter().map(named).collect()
}

fn rust_files() -> Vec<(String, String)> {
    ARROWS
        .iter()
        .flat_map(|(name, _)| files(name, &["rs"]))
        .collect()
}

/// `file:line: complaint` for each line that `judge` complains about.
fn lines_where(files: &[(String, String)], judge: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let mut broken = Vec::new();
    for (name, text) in files {
        for (number, line) in text.lines().enumerate() {
            if let Some(complaint) = judge(line) {
                broken.push(format!("{name}:{}: {complaint}", number + 1));
            }
        }
    }
    broken
}

/// A line without its comment; good enough for the words looked for here.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

fn assert_none(broken: &[String]) {
    assert!(
        broken.is_empty(),
        "{} house rules broken:\n{}",
        broken.len(),
        broken.join("\n")
    );
}
