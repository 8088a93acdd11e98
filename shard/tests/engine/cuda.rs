//! Groups of engines on the CUDA backend: against the references, and against the CPU backend.
//!
//! With the feature `cuda-emulation` the kernels run on the CPU; without it these tests need a GPU, and say so
//! where there is none. Ranks share the device and talk through the host, so that what is compared here is
//! the backend alone; NCCL has its own tests.
//!
//! Invariant: in f32 the promise is that of the CPU backend; in 16 bits, where every activation is rounded, what is
//! tested is that the distance to the reference is of the size of that rounding.

use crate::equivalences::{ALL, assert_same_bits, requests};
use crate::quantised;
use crate::reference::reference;
use crate::references::compare;
use crate::support::{
    Cluster, Group, Random, Request, Tested, Ways, fixtures, generate, load, open,
};
use kernels::backend::{Backend, DeviceError, Element};
use kernels::cuda::{CudaBackend, CudaTensor};
use shard::comm::shm::ShmComm;
use shard::comm::{Comm, CommError, CommTimings, Seat};
use std::net::IpAddr;
use topology::ids::{BlockId, Rank};
use topology::model_shape::Dtype;
use topology::partition::Partition;
use topology::wire::{Load, PlanRow, Sampling, ScoredToken};

/// What the project promises of f32.
const TOLERANCE: f32 = 1e-3;
/// Some roundings of 2^-9 (bf16) or 2^-12 (f16) in each of a few layers.
const ROUNDED: [(Dtype, f32); 2] = [(Dtype::Bfloat16, 0.05), (Dtype::Float16, 0.01)];

/// The same with quantised weights; and where these are floats of 8 bits, which many rows become as well: random weights
/// have nothing to spare. A layout that is misread is off by the size of the logits.
const QUANTISED: f32 = 0.05;
const QUANTISED_ROWS: f32 = 0.3;

impl Tested for CudaBackend {
    type Comm = HostComm;
    const KV_ELEMENT: Option<Element> = None;

    fn open() -> Self {
        Self::new(0).expect("GPU 0 can be opened")
    }
}

/// Collectives through the host.
pub(crate) struct HostComm {
    shm: ShmComm,
    world_size: u32,
    values: Vec<f32>,
}

fn failed(error: &DeviceError) -> CommError {
    CommError::Failed(error.to_string())
}

impl Comm<CudaBackend> for HostComm {
    fn new_id(
        world_size: u32,
        max_elements: usize,
        _: Option<IpAddr>,
    ) -> Result<Vec<u8>, CommError> {
        ShmComm::make_id(world_size, max_elements)
    }

    fn discard_id(id: &[u8]) {
        ShmComm::discard(id);
    }

    fn join(_: &CudaBackend, seat: &Seat<'_>) -> Result<Self, CommError> {
        Ok(Self {
            shm: ShmComm::join_group(seat)?,
            world_size: seat.world_size,
            values: Vec::new(),
        })
    }

    fn world_size(&self) -> u32 {
        self.world_size
    }

    fn begin_step(&mut self, digest: [u8; 16]) {
        self.shm.set_tag(digest);
    }

    fn is_recordable(&mut self) -> bool {
        // The way through the host cannot be recorded; alone there is none.
        self.world_size == 1
    }

    fn all_reduce_sum(
        &mut self,
        backend: &CudaBackend,
        x: &mut CudaTensor,
    ) -> Result<(), CommError> {
        if self.world_size == 1 {
            return Ok(());
        }
        backend
            .read(x, &mut self.values)
            .map_err(|error| failed(&error))?;
        self.shm.all_reduce(&mut self.values)?;
        backend
            .write(&self.values, x)
            .map_err(|error| failed(&error))
    }

    fn all_gather(
        &mut self,
        backend: &CudaBackend,
        part: &CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<(), CommError> {
        backend
            .read(part, &mut self.values)
            .map_err(|error| failed(&error))?;
        let mut gathered = vec![0.0; out.rows() * out.width()];
        let (values, width) = (&self.values, part.width());
        self.shm.all_gather_rows(values, width, &mut gathered)?;
        backend
            .write(&gathered, out)
            .map_err(|error| failed(&error))
    }

    fn take_timings(&mut self) -> CommTimings {
        CommTimings::default()
    }
}

/// An error where there is no device to test.
fn probe() -> Result<(), DeviceError> {
    CudaBackend::new(0).map(drop)
}

#[test]
fn logits_and_greedy_tokens_are_the_references_in_f32() {
    if let Err(error) = probe() {
        return println!("not tested: {error}");
    }
    let mut cases = 0;
    for folder in fixtures() {
        let (files, shape) = open(&folder);
        let reference = reference(&folder);
        for world_size in [1, 2] {
            if Partition::new(&shape, Rank(0), world_size).is_err() {
                continue;
            }
            let case = format!("{} over {world_size} on CUDA", folder.display());
            let load = load(world_size, 64, "float32");
            let (worst, tokens) = compare::<CudaBackend>(&files, &load, &reference);
            println!("{case}: off by {worst:e}");
            assert!(worst < TOLERANCE, "{case}: off by {worst}");
            assert_eq!(tokens, reference.greedy, "{case}");
            cases += 1;
        }
    }
    assert!(cases >= 20, "only {cases} cases");
}

#[test]
fn narrow_activations_are_off_by_their_rounding() {
    if let Err(error) = probe() {
        return println!("not tested: {error}");
    }
    for folder in fixtures() {
        let (files, _) = open(&folder);
        let reference = reference(&folder);
        for (dtype, tolerance) in ROUNDED {
            let case = format!("{} in {} on CUDA", folder.display(), dtype.name());
            let load = load(1, 64, dtype.name());
            let (worst, tokens) = compare::<CudaBackend>(&files, &load, &reference);
            println!("{case}: off by {worst:e}");
            assert!(worst < tolerance, "{case}: off by {worst}");
            assert_eq!(tokens.len(), reference.greedy.len());
        }
    }
}

/// Checkpoints in every quantised layout. In f32 a weight is what its format says, to the last bits; in 16 bits activations
/// are rounded, and become codes of 8 bits where a weight has one scale for each output.
#[test]
fn quantised_layouts_are_read_as_their_formats_say() {
    if let Err(error) = probe() {
        return println!("not tested: {error}");
    }
    let mut cases = 0;
    for folder in quantised::fixtures() {
        let (files, shape) = open(&folder);
        let reference = reference(&folder);
        let narrow = if folder.display().to_string().contains("fp8") {
            QUANTISED_ROWS
        } else {
            QUANTISED
        };
        for (world_size, dtype) in [(1, Dtype::Bfloat16), (2, Dtype::Float16)] {
            if Partition::new(&shape, Rank(0), world_size).is_err() {
                continue;
            }
            for (dtype, tolerance) in [(Dtype::Float32, TOLERANCE), (dtype, narrow)] {
                let case = format!("{} over {world_size} in {}", folder.display(), dtype.name());
                let load = load(world_size, 64, dtype.name());
                let (worst, tokens) = compare::<CudaBackend>(&files, &load, &reference);
                println!("{case} on CUDA: off by {worst:e}");
                assert!(worst < tolerance, "{case}: off by {worst}");
                if dtype == Dtype::Float32 {
                    assert_eq!(tokens, reference.greedy, "{case}");
                }
                cases += 1;
            }
        }
    }
    assert!(cases >= 36, "only {cases} cases");
}

/// Decode steps of all sizes, recorded and replayed, against the same steps without; with a communicator that is
/// replaced in between.
#[test]
fn replayed_steps_give_what_queued_ones_do() {
    if let Err(error) = probe() {
        return println!("not tested: {error}");
    }
    let seed = Random::seed("replayed steps");
    println!("seed {seed}");
    for (name, dtype) in [
        ("llama31", "float32"),
        ("mistral", "float32"),
        ("qwen3", "bfloat16"),
        ("qwen2", "float16"),
    ] {
        let folders = fixtures();
        let folder = folders.iter().find(|f| f.ends_with(name)).expect(name);
        let (files, _) = open(folder);
        let prompt = reference(folder).prompt;
        let run = |enforce_eager: bool| {
            let random = &mut Random::new(seed);
            let load = Load {
                enforce_eager,
                ..load(1, 128, dtype)
            };
            let mut group = Group::<CudaBackend>::start(&files, &load);
            let mut found = Vec::new();
            for _ in 0..2 {
                let requests: Vec<_> = (0..7)
                    .map(|_| Request {
                        prompt: prompt[random.below(20)..][..=random.below(20)].to_vec(),
                        sampling: Sampling {
                            logprobs: Some(3),
                            ..Sampling::default()
                        },
                        new_tokens: 12,
                    })
                    .collect();
                found.push(generate(&mut group, &requests, ALL, random));
                let backend = group.backend();
                let recorded = (1..=16).filter(|rows| backend.is_recorded(*rows)).count();
                if cfg!(feature = "cuda-emulation") {
                    assert_eq!(recorded > 2, !enforce_eager, "{recorded} sizes");
                }
                group.reform();
                assert!((1..=16).all(|rows| !group.backend().is_recorded(rows)));
            }
            found
        };
        let (replayed, queued) = (run(false), run(true));
        if cfg!(feature = "cuda-emulation") {
            assert_eq!(replayed, queued, "{name} in {dtype}, bit for bit");
        }
        let tokens = |rounds: &[Vec<Vec<ScoredToken>>]| -> Vec<u32> {
            let all = rounds.iter().flatten().flatten();
            all.map(|answer| answer.token).collect()
        };
        // On a device products may come from other algorithms, which rounds near ties another way in 16 bits.
        if dtype == "float32" {
            assert_eq!(tokens(&replayed), tokens(&queued), "{name}");
        }
    }
}

/// Steps that are queued behind the one under way take its tokens on the device: their answers are those of steps that
/// wait for each other. Greedy and drawn, penalised, scored, in rows that come and go; recorded with one rank.
#[test]
fn steps_queued_behind_another_give_the_same_bits() {
    if let Err(error) = probe() {
        return println!("not tested: {error}");
    }
    let seed = Random::seed("overlapped steps");
    println!("seed {seed}");
    for (name, world_size, dtype) in [
        ("llama31", 1, "float32"),
        ("qwen3", 1, "bfloat16"),
        ("gemma2", 1, "float16"),
        ("mistral", 2, "float32"),
        ("gemma3", 2, "bfloat16"),
    ] {
        let folders = fixtures();
        let folder = folders.iter().find(|f| f.ends_with(name)).expect(name);
        let (files, shape) = open(folder);
        let mut group = Group::<CudaBackend>::start(&files, &load(world_size, 128, dtype));
        let wanted = requests(shape.vocab_size as usize, &mut Random::new(seed));
        let mut run = |overlapped| {
            let before = group.counts();
            let ways = Ways { overlapped, ..ALL };
            // The same steps of the same rows in either way.
            let answers = generate(&mut group, &wanted, ways, &mut Random::new(seed));
            let counts = group.counts();
            (answers, [0, 1].map(|at| counts[at] - before[at]))
        };
        let rounds = [false, true, true].map(&mut run);
        let [steps, overlapped] = rounds[0].1;
        assert!(steps > 9 && overlapped == 0, "{overlapped} of {steps}");
        for (answers, counts) in &rounds[1..] {
            assert_eq!(*counts, [steps, steps - 1], "all but the first");
            assert_same_bits(answers, &rounds[0].0, name);
        }
    }
}

/// A step whose logits come in pieces waits for the one before it, and the one behind it for that.
#[test]
fn a_step_in_pieces_is_queued_behind_none() {
    if let Err(error) = probe() {
        return println!("not tested: {error}");
    }
    let row = |sequence: u32, tokens: &[u32], position, last_from| PlanRow {
        tokens: tokens.to_vec(),
        position,
        blocks: (10 * sequence..10 * sequence + 9).map(BlockId).collect(),
        sampling: Some(Box::new(Sampling {
            logprobs: Some(4),
            presence_penalty: 0.5,
            ..Sampling::default()
        })),
        last_from,
        ..PlanRow::default()
    };
    let prompt: Vec<u32> = (3..24).collect();
    let scored = PlanRow {
        targets: prompt[1..].to_vec(),
        target_alternatives: 2,
        ..row(1, &prompt, 0, None)
    };
    let steps = [
        vec![row(0, &[9, 8, 7], 0, None)],
        vec![row(0, &[0], 3, Some(0)), scored],
        vec![row(1, &[0], 21, Some(1)), row(0, &[0], 4, Some(0))],
        vec![row(1, &[0], 22, Some(0)), row(0, &[0], 5, Some(1))],
    ];
    let folders = fixtures();
    let folder = folders.iter().find(|f| f.ends_with("llama3"));
    let (files, _) = open(folder.expect("llama3"));
    for world_size in [1, 2] {
        let mut load = load(world_size, 64, "float32");
        load.max_num_seqs = 2;
        let mut group = Group::<CudaBackend>::start(&files, &load);
        let expected = steps.clone().map(|rows| group.step(rows));
        let mut found = Vec::new();
        for (index, rows) in steps.iter().enumerate() {
            group.begin(rows.clone());
            if index > 0 {
                found.push(group.end());
            }
        }
        found.push(group.end());
        assert_eq!(found, expected, "over {world_size}");
        assert_eq!(group.counts(), [8, 1], "the last is queued behind another");
    }
}

/// An epoch that ends with two steps under way leaves nothing behind that the next one meets.
#[test]
fn an_epoch_can_end_with_two_steps_under_way() {
    if let Err(error) = probe() {
        return println!("not tested: {error}");
    }
    let seed = Random::seed("given up");
    println!("seed {seed}");
    let folders = fixtures();
    let folder = folders.iter().find(|f| f.ends_with("llama3"));
    let (files, shape) = open(folder.expect("llama3"));
    let mut group = Group::<CudaBackend>::start(&files, &load(1, 128, "float32"));
    let wanted = requests(shape.vocab_size as usize, &mut Random::new(seed));
    let run = |group: &mut Group<_>| generate(group, &wanted, ALL, &mut Random::new(seed));
    let undisturbed = run(&mut group);
    let row = |tokens: usize, position| PlanRow {
        tokens: vec![5; tokens],
        position,
        blocks: (0..3).map(BlockId).collect(),
        sampling: Some(Box::default()),
        ..PlanRow::default()
    };
    for steps in [1, 2] {
        group.begin(vec![row(7, 0)]);
        if steps == 2 {
            let last_from = Some(0);
            group.begin(vec![PlanRow {
                last_from,
                ..row(1, 7)
            }]);
        }
        group.reform();
        assert_same_bits(&run(&mut group), &undisturbed, "after the fault");
    }
}

/// Rows of many lengths in one step, prompts in pieces, blocks in any order: the index arrays and the attention of
/// a served batch, against the CPU backend's plain way.
#[test]
fn batched_chunked_and_scattered_work_gives_the_tokens_of_the_cpu() {
    if let Err(error) = probe() {
        return println!("not tested: {error}");
    }
    let seed = 51;
    println!("seed {seed}");
    let random = &mut Random::new(seed);
    for name in ["llama31", "mistral", "qwen3", "gemma2", "gemma3"] {
        let folders = fixtures();
        let folder = folders.iter().find(|f| f.ends_with(name)).expect(name);
        let (files, _) = open(folder);
        let reference = reference(folder);
        let requests: Vec<_> = (0..4)
            .map(|_| Request {
                prompt: reference.prompt[random.below(20)..][..=random.below(20)].to_vec(),
                sampling: Sampling::default(),
                new_tokens: 6,
            })
            .collect();
        let load = load(1, 128, "float32");
        let mut cuda = Group::<CudaBackend>::start(&files, &load);
        let found = generate(&mut cuda, &requests, ALL, random);
        let mut cpu = Cluster::start(&files, &load);
        let expected = generate(&mut cpu, &requests, Ways::default(), random);
        let tokens = |answers: &[Vec<ScoredToken>]| -> Vec<Vec<u32>> {
            let one = |answers: &Vec<ScoredToken>| answers.iter().map(|a| a.token).collect();
            answers.iter().map(one).collect()
        };
        assert_eq!(tokens(&found), tokens(&expected), "{name}");
    }
}
