//! The fixtures over two real processes and their real communicator, against the references.
//!
//! What the engine's tests say of the arithmetic, this says of the whole path: link, session, device thread
//! and, on a GPU, NCCL. Invariant: fixtures that two ranks cannot share are left out, and they are few.

use crate::group::{BLOCK_SIZE, Group, fixture_root, is_gpu, say};
use crate::life::run;
use crate::reference::reference;
use std::sync::Mutex;
use std::thread;
use topology::ids::Rank;
use topology::model_files::ModelFiles;
use topology::model_shape::ModelShape;
use topology::partition::Partition;
use topology::wire::StepPlan;

/// On the CPU every fixture is computed in-process by the engine's tests; a few are enough here.
const ON_CPU: [&str; 3] = ["gemma2", "llama3", "qwen3"];
/// Groups at the same time, at most: they take turns on the GPU.
const AT_ONCE: usize = 4;
/// What the project promises of f32.
const TOLERANCE: f32 = 1e-3;

fn shape(fixture: &str) -> ModelShape {
    let files = ModelFiles::directory(fixture_root().join(fixture)).expect("a directory");
    let config = files.read_json("config.json").expect("a config.json");
    ModelShape::from_config(&config).expect("a supported model")
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(fixture_root()).expect("the fixtures are there");
    let names = entries
        .flatten()
        .filter(|entry| entry.path().join("config.json").is_file());
    let mut names: Vec<_> = names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| is_gpu() || ON_CPU.contains(&name.as_str()))
        .collect();
    names.sort();
    names
}

pub(crate) fn two_processes_give_the_references_logits() {
    let mut names = names();
    names.retain(|fixture| Partition::new(&shape(fixture), Rank(0), 2).is_ok());
    let tested = names.len();
    // Most of a fixture's time is two processes' start, which on a machine with a GPU has cores to spare.
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let names = Mutex::new(names);
    let next = || names.lock().expect("no check failed").pop();
    thread::scope(|scope| {
        for _ in 0..(cores / 4).clamp(1, AT_ONCE) {
            scope.spawn(|| {
                while let Some(fixture) = next() {
                    run(one_fixture(&fixture));
                }
            });
        }
    });
    assert!(
        tested >= if is_gpu() { 8 } else { 3 },
        "{tested} were tested"
    );
}

async fn one_fixture(fixture: &str) {
    let reference = reference(&fixture_root().join(fixture));
    let mut group = Group::start(fixture).await;
    group.form().await;
    let block_size = u32::try_from(BLOCK_SIZE).expect("small");
    let plan = StepPlan {
        epoch: group.epoch,
        step: group.next,
        rows: vec![reference.row(block_size)],
    };
    group.next = plan.step.next();
    let output = group.run(plan).await;
    let worst = reference.worst(&reference.log_probabilities(output));
    say(&format!("{fixture} over 2 processes: off by {worst:e}"));
    assert!(worst < TOLERANCE, "{fixture}: off by {worst}");
    let mut tokens = reference.prompt.clone();
    let answers = group
        .generate_greedy(&mut tokens, reference.greedy.len())
        .await;
    assert_eq!(answers, reference.greedy, "{fixture}");
    group.stop().await;
}
