//! Checkpoints in each published quantised layout, against what `transformers` says of the weights they stand for.
//!
//! The fixtures are made by `scripts/quantised_fixtures.py`, which packs them by code of its own. Says nothing of how much
//! a model loses by being quantised; the coordinator's tests do.

use crate::reference::reference;
use crate::references::compare;
use crate::support::{fixture_root, load, open};
use kernels::cpu::CpuBackend;
use std::path::PathBuf;
use topology::partition::world_sizes;

/// Relative to the row's largest logit. A backend that also rounds activations is further from the reference, which
/// does not; this is what would have to give way for it.
const TOLERANCE: f32 = 1e-4;

fn fixtures() -> Vec<PathBuf> {
    let root = fixture_root().join("quantised");
    let folders = std::fs::read_dir(root).expect("the fixtures are in the repository");
    let mut folders: Vec<_> = folders.map(|entry| entry.expect("readable").path()).collect();
    folders.sort();
    folders
}

#[test]
fn every_layout_is_read_as_its_format_says_at_every_size() {
    let mut tested = Vec::new();
    for folder in fixtures() {
        let (files, shape) = open(&folder);
        let reference = reference(&folder);
        for world_size in world_sizes(&shape) {
            let case = format!("{} over {world_size}", folder.display());
            let load = load(world_size, 64, "auto");
            let (worst, tokens) = compare::<CpuBackend>(&files, &load, &reference);
            println!("{case}: off by {worst:e}");
            assert!(worst < TOLERANCE, "{case}: off by {worst}");
            assert_eq!(tokens, reference.greedy, "{case}");
            tested.push(world_size);
        }
    }
    for size in [1, 2, 4, 8] {
        let count = tested.iter().filter(|tested| **tested == size).count();
        assert!(count >= 10, "{count} layouts over {size} ranks");
    }
}
