//! No type on the wire contains itself, so that no frame can exhaust the stack of its decoder.
//!
//! Read from the source: the definitions in `wire` and `ids`, and the names that each one mentions.

use std::collections::{BTreeMap, BTreeSet};

const SOURCES: [&str; 3] = [
    include_str!("../../src/wire/mod.rs"),
    include_str!("../../src/wire/plan.rs"),
    include_str!("../../src/ids.rs"),
];

/// For each type of the source, the words in its definition.
fn definitions<'a>(sources: &[&'a str]) -> BTreeMap<&'a str, BTreeSet<&'a str>> {
    let mut found = BTreeMap::new();
    for source in sources {
        let code = source
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        let mut open: Option<&str> = None;
        for line in code {
            let mut words = line
                .split(|c: char| !c.is_alphanumeric() && c != '_')
                .filter(|w| !w.is_empty());
            if let Some(rest) = line
                .strip_prefix("pub struct ")
                .or(line.strip_prefix("pub enum "))
            {
                let name = rest
                    .split(|c: char| !c.is_alphanumeric())
                    .next()
                    .unwrap_or_default();
                found.insert(name, BTreeSet::new());
                open = Some(name);
                words.nth(2);
            }
            if let Some(name) = open {
                found.entry(name).or_default().extend(words);
            }
            // A definition ends at a closing brace in the first column, or on its own line.
            if line.starts_with('}') || line.ends_with(");") {
                open = None;
            }
        }
    }
    found
}

/// A type that reaches itself, if there is one.
fn recursive<'a>(definitions: &BTreeMap<&'a str, BTreeSet<&'a str>>) -> Option<&'a str> {
    definitions.keys().copied().find(|start| {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&str> = definitions[start].iter().copied().collect();
        while let Some(name) = next.pop() {
            if let Some(inner) = definitions.get(name).filter(|_| reached.insert(name)) {
                next.extend(inner);
            }
        }
        reached.contains(start)
    })
}

#[test]
fn no_type_on_the_wire_is_recursive() {
    let definitions = definitions(&SOURCES);
    for known in [
        "ToShard",
        "FromShard",
        "StepPlan",
        "PlanRow",
        "Sampling",
        "TokenScore",
        "Loaded",
    ] {
        assert!(
            definitions.contains_key(known),
            "{known} was not found: {:?}",
            definitions.keys()
        );
    }
    assert!(definitions["StepPlan"].contains("PlanRow"));
    assert!(definitions["ToShard"].contains("Load"));
    assert_eq!(recursive(&definitions), None);
}

#[test]
fn a_recursive_type_would_be_found() {
    let direct = "pub struct A {\n    next: Option<Box<A>>,\n}\npub struct B(u32);\n";
    assert_eq!(recursive(&definitions(&[direct])), Some("A"));
    let indirect = "pub enum A {\n    One(Vec<B>),\n}\npub struct B {\n    /// A\n    x: Box<C>,\n}\npub struct C {\n    a: A,\n}\n";
    assert!(recursive(&definitions(&[indirect])).is_some());
    let fine = "pub struct A {\n    /// Not an A.\n    b: B,\n    b2: B,\n}\npub struct B(u32);\n";
    assert_eq!(recursive(&definitions(&[fine])), None);
}
