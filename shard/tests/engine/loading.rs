//! What is loaded, what is refused, and what stays over an epoch's end.

use crate::support::{
    Cluster, Random, Request, Ways, fixtures, generate, load, open, rounds_on_tiles,
};
use kernels::backend::Element;
use kernels::cpu::CpuBackend;
use shard::comm::shm::ShmComm;
use shard::comm::{Abort, Comm, Seat};
use shard::engine::{Engine, Place, StepError};
use std::path::PathBuf;
use std::time::Duration;
use topology::ids::{BlockId, Epoch, Rank, Step};
use topology::model_files::ModelFiles;
use topology::model_shape::Dtype;
use topology::wire::{Load, PlanRow, Ran, Sampling, StepPlan};

pub(crate) type CpuEngine = Engine<CpuBackend, ShmComm>;

pub(crate) fn load_rank(files: &ModelFiles, load: &Load, rank: u32) -> anyhow::Result<CpuEngine> {
    let backend = CpuBackend::new(1, None)?;
    let place = Place {
        rank: Rank(rank),
        kv_element: Some(Element::F32),
        quantises_head: true,
        interface: None,
    };
    let (mut last, mut total) = (0, 0);
    let engine = Engine::load(backend, place, (files, load), &mut |done, all| {
        assert!(done >= last && done <= all, "{done} of {all} after {last}");
        (last, total) = (done, all);
    })?;
    assert_eq!(
        (last, total),
        (engine.loaded().weight_bytes, engine.loaded().weight_bytes)
    );
    Ok(engine)
}

fn refusal(files: &ModelFiles, load: &Load) -> String {
    format!(
        "{:#}",
        load_rank(files, load, 0).expect_err("this cannot be loaded")
    )
}

fn fixture(name: &str) -> PathBuf {
    fixtures()
        .into_iter()
        .find(|folder| folder.ends_with(name))
        .expect("the fixture")
}

#[test]
fn ranks_hold_their_share_and_no_more() {
    let (files, _) = open(&fixture("llama2"));
    let bytes = |world_size, rank| {
        let engine = load_rank(&files, &load(world_size, 16, "auto"), rank).expect("it loads");
        engine.loaded().weight_bytes
    };
    let whole = bytes(1, 0);
    for world_size in [2, 4, 8] {
        let parts: Vec<u64> = (0..world_size)
            .map(|rank| bytes(world_size, rank))
            .collect();
        // Norms are on every rank, everything else on one.
        let norms = 5 * 64 * 4;
        let sum: u64 = parts.iter().map(|part| part - norms).sum();
        assert_eq!(sum, whole - norms, "{parts:?}");
    }
}

#[test]
fn what_cannot_be_loaded_is_refused_in_a_sentence() {
    let folder = fixture("llama2");
    let (files, _) = open(&folder);
    let huge = Load {
        max_num_batched_tokens: u32::MAX,
        ..load(1, 0, "auto")
    };
    let said = refusal(&files, &huge);
    assert!(
        said.contains("no room for weights of 0.00 GiB and workspace of"),
        "{said}"
    );
    let said = refusal(&files, &load(1, 16, "int4"));
    assert!(
        said.contains("--dtype is int4; it must be auto, float32"),
        "{said}"
    );
    let said = refusal(&files, &load(3, 16, "auto"));
    assert!(said.contains("--tensor-parallel-size can be"), "{said}");

    let copy = tempfile::tempdir().expect("a temporary folder");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(folder.join(name), copy.path().join(name)).expect("a copy");
    }
    let weights = copy.path().join("model.safetensors");
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(weights)
        .expect("the copy");
    file.set_len(file.metadata().expect("its size").len() - 10)
        .expect("a shorter file");
    let said = refusal(
        &ModelFiles::directory(copy.path()).expect("a folder"),
        &load(1, 16, "auto"),
    );
    assert!(said.contains("model.safetensors"), "{said}");
}

/// A narrower type than the checkpoint's moves answers a little, a wider one not at all.
#[test]
fn dtype_rounds_the_weights() {
    let logprob = |name, dtype| {
        let (files, _) = open(&fixture(name));
        let request = Request {
            prompt: (20..50).collect(),
            sampling: Sampling {
                logprobs: Some(1),
                ..Sampling::default()
            },
            new_tokens: 1,
        };
        let mut cluster = Cluster::start(&files, &load(2, 64, dtype));
        let answers = generate(
            &mut cluster,
            &[request],
            Ways::default(),
            &mut Random::new(0),
        );
        answers[0][0]
            .score
            .clone()
            .expect("it was asked for")
            .logprob
    };
    for (name, stored) in [("llama31", "bfloat16"), ("llama-uneven", "float32")] {
        let auto = logprob(name, "auto");
        assert_eq!(auto.to_bits(), logprob(name, stored).to_bits());
        let exact = logprob(name, "float32");
        if stored == "bfloat16" && rounds_on_tiles(Dtype::Bfloat16) {
            assert!((auto - exact).abs() < 0.5, "{name}: {auto} and {exact}");
        } else {
            assert_eq!(auto.to_bits(), exact.to_bits());
        }
    }
    let moved = (logprob("llama-uneven", "auto") - logprob("llama-uneven", "bfloat16")).abs();
    assert!((1e-5..0.5).contains(&moved), "moved by {moved}");
}

#[test]
fn an_epoch_can_end_and_weights_and_blocks_stay() {
    let (files, _) = open(&fixture("qwen3"));
    let mut engine = load_rank(&files, &load(1, 64, "auto"), 0).expect("it loads");
    let first = plan(7, 0, 0, (30..42).collect());
    assert!(stale(&engine.step(&first)), "there is no communicator yet");

    enter(&mut engine, 7);
    assert!(matches!(engine.step(&first), Err(StepError::NoBlocks)));
    engine.allocate(16).expect("the blocks fit");
    let prefill = engine.step(&first).expect("a valid plan");
    let again = engine.step(&first);
    assert!(
        matches!(
            again,
            Err(StepError::Order {
                expected: Step(1),
                ..
            })
        ),
        "{again:?}"
    );
    let next = engine
        .step(&plan(7, 1, 12, vec![99]))
        .expect("a valid plan");

    engine.leave(Epoch(6));
    assert!(
        !stale(&engine.step(&plan(7, 2, 13, vec![98]))),
        "an older epoch ends nothing"
    );
    engine.leave(Epoch(7));
    assert!(stale(&engine.step(&plan(7, 3, 14, vec![97]))));
    enter(&mut engine, 8);
    assert!(stale(&engine.step(&plan(7, 3, 14, vec![97]))));
    // The keys and values of the prompt are where they were.
    let resumed = engine
        .step(&plan(8, 0, 12, vec![99]))
        .expect("a valid plan");
    assert_eq!(resumed.outputs, next.outputs);
    let recomputed = engine
        .step(&plan(8, 1, 0, (30..42).collect()))
        .expect("a valid plan");
    assert_eq!(recomputed.outputs, prefill.outputs);
}

#[test]
fn nothing_follows_a_step_that_came_to_no_end() {
    let (files, _) = open(&fixture("qwen3"));
    let mut engine = load_rank(&files, &load(1, 64, "auto"), 0).expect("it loads");
    engine.allocate(16).expect("the blocks fit");
    enter(&mut engine, 3);
    let prefill = engine.step(&plan(3, 0, 0, (30..42).collect()));
    assert!(prefill.is_ok());
    let mut beyond = plan(3, 1, 12, vec![0]);
    beyond.rows[0].last_from = Some(1);
    assert!(matches!(engine.step(&beyond), Err(StepError::Plan(_))));
    assert!(stale(&engine.step(&plan(3, 1, 12, vec![99]))));
}

fn stale(result: &Result<Ran, StepError>) -> bool {
    matches!(result, Err(StepError::Stale { .. }))
}

fn plan(epoch: u32, step: u64, position: u32, tokens: Vec<u32>) -> StepPlan {
    StepPlan {
        epoch: Epoch(epoch),
        step: Step(step),
        rows: vec![PlanRow {
            tokens,
            position,
            blocks: (3..9).map(BlockId).collect(),
            sampling: Some(Box::new(Sampling {
                logprobs: Some(3),
                ..Sampling::default()
            })),
            ..PlanRow::default()
        }],
    }
}

fn enter(engine: &mut CpuEngine, epoch: u32) {
    let (abort, limit) = (&Abort::default(), Duration::from_secs(1));
    let seat = Seat {
        id: &[],
        rank: 0,
        world_size: 1,
        interface: None,
        limit,
        abort,
    };
    let comm = ShmComm::join(engine.backend(), &seat).expect("a group of one");
    engine.enter(Epoch(epoch), comm);
}
