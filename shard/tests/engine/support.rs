//! Drives the engines of a whole group in one process, one thread per rank, over shared memory.
//!
//! Stands in for the coordinator as far as plans go: it keeps sequences, hands out blocks and builds
//! plans in the ways the tests compare. What is computed is the product's code.
//!
//! Invariant: every step it takes all ranks take, with the same digest.

use kernels::backend::{Backend, Element};
use kernels::cpu::CpuBackend;
use shard::comm::shm::ShmComm;
use shard::comm::{Abort, Comm, Seat};
use shard::engine::{Engine, Place};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use topology::ids::{BlockId, Epoch, Rank, Step};
use topology::model_files::ModelFiles;
use topology::model_shape::{Dtype, ModelShape};
use topology::wire::{
    Load, ModelLocation, PlanRow, Ran, RowOutput, Sampling, ScoredToken, StepPlan,
};

pub(crate) use crate::testing::Random;

/// Tokens per KV block in these tests: small, so that sequences have many.
pub(crate) const BLOCK_SIZE: u32 = 4;
pub(crate) const NUM_BLOCKS: u32 = 160;

/// Where the fixtures are; `CLUSTER_TEST_FIXTURES` says so where the sources are not.
pub(crate) fn fixture_root() -> PathBuf {
    let elsewhere = std::env::var_os("CLUSTER_TEST_FIXTURES").map(PathBuf::from);
    elsewhere.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"))
}

/// The folders of `tests/fixtures`, at least eight, in order.
pub(crate) fn fixtures() -> Vec<PathBuf> {
    let root = fixture_root();
    let entries = std::fs::read_dir(&root).expect("the fixtures are in the repository");
    let mut folders: Vec<_> = entries
        .map(|entry| entry.expect("a readable folder").path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    folders.sort();
    assert!(
        folders.len() >= 8,
        "only {} fixtures in {}",
        folders.len(),
        root.display()
    );
    folders
}

/// The files and the shape of a fixture.
pub(crate) fn open(folder: &std::path::Path) -> (ModelFiles, ModelShape) {
    let files = ModelFiles::directory(folder).expect("a fixture is a directory");
    let config = files
        .read_json("config.json")
        .expect("a fixture has a config.json");
    let shape = ModelShape::from_config(&config).expect("a fixture's config.json is supported");
    (files, shape)
}

/// What to load a model with.
pub(crate) fn load(world_size: u32, max_tokens: u32, dtype: &str) -> Load {
    Load {
        model: ModelLocation::BuiltIn,
        tensor_parallel_size: world_size,
        dtype: dtype.to_owned(),
        quantization: "auto".to_owned(),
        kv_cache_dtype: "auto".to_owned(),
        block_size: BLOCK_SIZE,
        max_model_len: 128,
        max_num_batched_tokens: max_tokens,
        max_num_seqs: 16,
        async_scheduling: true,
        enforce_eager: false,
    }
}

/// A backend to test, and what its ranks talk through.
pub(crate) trait Tested: Backend + Sized {
    type Comm: Comm<Self>;
    /// What keys and values are stored as; `None`: as the weights.
    const KV_ELEMENT: Option<Element>;

    /// A backend for one rank, on the thread that will use it.
    fn open() -> Self;
}

impl Tested for CpuBackend {
    type Comm = ShmComm;
    const KV_ELEMENT: Option<Element> = Some(Element::F32);

    fn open() -> Self {
        Self::new(1, None).expect("one thread can be had")
    }
}

/// What a few layers make of rounding to bfloat16 what is multiplied with weights of it, relative to the largest logit.
pub(crate) const ON_TILES: f32 = 0.05;

/// Whether the CPU backend does so here: matrix tiles take nothing else.
pub(crate) fn rounds_on_tiles(stored: Dtype) -> bool {
    stored == Dtype::Bfloat16 && CpuBackend::open().name().contains("AMX")
}

/// A group of engines over one model.
pub(crate) struct Group<B: Tested> {
    members: Vec<Member<B>>,
    next: Step,
}

/// One rank, and what it answered to steps that had to end before another could begin.
struct Member<B: Tested> {
    engine: Engine<B, B::Comm>,
    answered: VecDeque<Ran>,
    /// Steps that it began while another was under way.
    overlapped: usize,
}

/// A group on the CPU backend.
pub(crate) type Cluster = Group<CpuBackend>;

impl<B: Tested> Group<B> {
    /// Loads every rank and forms their communicator.
    pub(crate) fn start(files: &ModelFiles, load: &Load) -> Self {
        let world_size = load.tensor_parallel_size;
        let id = B::Comm::new_id(world_size, 1 << 16, None).expect("shared memory can be had");
        let abort = Abort::default();
        let (id, abort) = (&id, &abort);
        let members = thread::scope(|scope| {
            let ranks = (0..world_size).map(|rank| {
                scope.spawn(move || {
                    let place = Place {
                        rank: Rank(rank),
                        kv_element: B::KV_ELEMENT,
                        quantises_head: B::KV_ELEMENT.is_some(),
                        interface: None,
                    };
                    let mut engine = Engine::load(B::open(), place, (files, load), &mut |_, _| ())
                        .expect("the fixture loads");
                    engine.allocate(NUM_BLOCKS).expect("the blocks fit");
                    let limit = Duration::from_secs(60);
                    let seat = Seat {
                        id,
                        rank,
                        world_size,
                        interface: None,
                        limit,
                        abort,
                    };
                    let comm = B::Comm::join(engine.backend(), &seat).expect("all ranks join");
                    engine.enter(Epoch(1), comm);
                    Member {
                        engine,
                        answered: VecDeque::new(),
                        overlapped: 0,
                    }
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks
                .into_iter()
                .map(|rank| rank.join().expect("no rank panics"))
                .collect()
        });
        Self {
            members,
            next: Step(0),
        }
    }

    /// Bytes of weights on rank 0.
    pub(crate) fn weight_bytes(&self) -> u64 {
        self.members[0].engine.loaded().weight_bytes
    }

    /// The backend of rank 0.
    #[cfg(feature = "cuda")]
    pub(crate) fn backend(&self) -> &B {
        self.members[0].engine.backend()
    }

    /// Steps that were begun, and how many of them every rank began while another was under way.
    #[cfg(feature = "cuda")]
    pub(crate) fn counts(&self) -> [usize; 2] {
        let overlapped = self.members.iter().map(|member| member.overlapped);
        let steps = usize::try_from(self.next.0).expect("few");
        [steps, overlapped.min().expect("there is a rank")]
    }

    /// Replaces the communicator of a group of one, as after a fault, whatever is under way.
    #[cfg(feature = "cuda")]
    pub(crate) fn reform(&mut self) {
        let [
            Member {
                engine, answered, ..
            },
        ] = &mut self.members[..]
        else {
            panic!("a group of one");
        };
        answered.clear();
        let id = B::Comm::new_id(1, 1 << 16, None).expect("shared memory can be had");
        let seat = Seat {
            id: &id,
            rank: 0,
            world_size: 1,
            interface: None,
            limit: Duration::from_secs(60),
            abort: &Abort::default(),
        };
        engine.leave(Epoch(1));
        let comm = B::Comm::join(engine.backend(), &seat).expect("it is alone");
        engine.enter(Epoch(1), comm);
        self.next = Step(0);
    }

    /// Runs one plan on all ranks.
    pub(crate) fn step(&mut self, rows: Vec<PlanRow>) -> Vec<RowOutput> {
        self.begin(rows);
        self.end()
    }

    /// Has all ranks begin a step, each behind the one under way if it can.
    pub(crate) fn begin(&mut self, rows: Vec<PlanRow>) {
        let plan = &StepPlan {
            epoch: Epoch(1),
            step: self.next,
            rows,
        };
        self.next = self.next.next();
        self.each(|member| member.begin(plan));
    }

    /// What the oldest step gave that has no answer yet.
    pub(crate) fn end(&mut self) -> Vec<RowOutput> {
        let mut answers = self.each(Member::end);
        for answer in &answers[1..] {
            assert_eq!(answer.digest, answers[0].digest);
            assert!(answer.outputs.is_empty(), "rank 0 alone reports");
            assert!(answer.chosen.is_some() && answer.chosen == answers[0].chosen);
        }
        answers.swap_remove(0).outputs
    }

    /// Calls `act` on a thread for each rank: they meet in collectives.
    fn each<T: Send>(&mut self, act: impl Fn(&mut Member<B>) -> T + Sync) -> Vec<T> {
        let act = &act;
        thread::scope(|scope| {
            let members = self.members.iter_mut();
            let ranks: Vec<_> = members.map(|m| scope.spawn(move || act(m))).collect();
            let join = |rank: thread::ScopedJoinHandle<'_, T>| rank.join().expect("no rank panics");
            ranks.into_iter().map(join).collect()
        })
    }
}

impl<B: Tested> Member<B> {
    fn begin(&mut self, plan: &StepPlan) {
        let engine = &mut self.engine;
        let begin = |engine: &mut Engine<B, B::Comm>| {
            let begun = engine.begin(Box::new(plan.clone()));
            begun.expect("the plan is valid").is_none()
        };
        if engine.is_under_way() && !engine.takes_another() {
            self.answered.push_back(engine.end().expect("it ends"));
        }
        let behind = engine.is_under_way();
        if begin(engine) {
            self.overlapped += usize::from(behind);
        } else {
            self.answered.push_back(engine.end().expect("it ends"));
            assert!(begin(engine), "nothing is before it");
        }
    }

    fn end(&mut self) -> Ran {
        let answered = self.answered.pop_front();
        answered.unwrap_or_else(|| self.engine.end().expect("it ends"))
    }
}

/// A request: its prompt and how tokens are chosen.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) prompt: Vec<u32>,
    pub(crate) sampling: Sampling,
    pub(crate) new_tokens: usize,
}

/// How the driver cuts and places work. The defaults are the plain way.
#[derive(Clone, Copy, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is on or off by itself")]
pub(crate) struct Ways {
    /// Sequences share steps, a random number of them in each.
    pub(crate) batched: bool,
    /// Prompts are computed in random pieces.
    pub(crate) chunked: bool,
    /// Blocks are taken in random order.
    pub(crate) scattered: bool,
    /// A token that the last step chose is left to it.
    pub(crate) ahead: bool,
    /// A step begins before the one before it has ended; its tokens are left to that.
    pub(crate) overlapped: bool,
}

struct Sequence {
    tokens: Vec<u32>,
    computed: usize,
    blocks: Vec<BlockId>,
    answers: Vec<ScoredToken>,
    /// Its row in the last step, if that chooses a token.
    chosen_in: Option<u32>,
}

/// The sequences of a step's rows, and where the tokens go that it chooses.
type Places = Vec<(usize, Option<usize>)>;

/// Generates for all requests, and gives what each got.
pub(crate) fn generate<B: Tested>(
    cluster: &mut Group<B>,
    requests: &[Request],
    ways: Ways,
    random: &mut Random,
) -> Vec<Vec<ScoredToken>> {
    let mut free: Vec<u32> = (0..NUM_BLOCKS).rev().collect();
    let mut sequences: Vec<_> = requests
        .iter()
        .map(|request| Sequence {
            tokens: request.prompt.clone(),
            computed: 0,
            blocks: Vec::new(),
            answers: Vec::new(),
            chosen_in: None,
        })
        .collect();
    let mut under_way: VecDeque<Places> = VecDeque::new();
    loop {
        let chosen = choose(&sequences, requests, ways, random);
        if chosen.is_empty() && under_way.is_empty() {
            return sequences
                .into_iter()
                .map(|sequence| sequence.answers)
                .collect();
        }
        let stay = usize::from(ways.overlapped && !chosen.is_empty());
        if !chosen.is_empty() {
            let mut rows = Vec::new();
            for i in &chosen {
                let (sequence, request) = (&mut sequences[*i], &requests[*i]);
                rows.push(sequence.next_row(request, ways, &mut free, random));
            }
            under_way.push_back(expect_tokens(&mut sequences, &chosen, &rows));
            cluster.begin(rows);
        }
        if under_way.len() > stay {
            let places = under_way.pop_front().expect("one is under way");
            for ((i, place), output) in places.into_iter().zip(cluster.end()) {
                assert_eq!(place.is_some(), output.sampled.is_some());
                if let (Some(place), Some(token)) = (place, output.sampled) {
                    sequences[i].tokens[place] = token.token;
                    sequences[i].answers.push(token);
                }
            }
        }
    }
}

/// Sequences of the next step, of those that have tokens to come.
fn choose(
    sequences: &[Sequence],
    requests: &[Request],
    ways: Ways,
    random: &mut Random,
) -> Vec<usize> {
    let open = |i: &usize| {
        let wanted = requests[*i].prompt.len() + requests[*i].new_tokens;
        sequences[*i].tokens.len() < wanted
    };
    let mut chosen: Vec<usize> = (0..requests.len()).filter(open).collect();
    if chosen.is_empty() {
        return chosen;
    }
    if ways.batched {
        // Any non-empty subset, in any order.
        for i in (1..chosen.len()).rev() {
            chosen.swap(i, random.below(i + 1));
        }
        chosen.truncate(1 + random.below(chosen.len()));
    } else {
        chosen.truncate(1);
    }
    chosen
}

/// Makes room for the tokens that a step with these rows will choose.
fn expect_tokens(sequences: &mut [Sequence], chosen: &[usize], rows: &[PlanRow]) -> Places {
    for sequence in &mut *sequences {
        sequence.chosen_in = None;
    }
    let places = chosen.iter().zip(rows).zip(0..).map(|((i, row), index)| {
        let sequence = &mut sequences[*i];
        row.sampling.as_ref()?;
        sequence.chosen_in = Some(index);
        // Nobody looks at it before it is known.
        sequence.tokens.push(0);
        Some(sequence.tokens.len() - 1)
    });
    let places: Vec<_> = places.collect();
    chosen.iter().copied().zip(places).collect()
}

impl Sequence {
    fn next_row(
        &mut self,
        request: &Request,
        ways: Ways,
        free: &mut Vec<u32>,
        random: &mut Random,
    ) -> PlanRow {
        let left = self.tokens.len() - self.computed;
        let count = if ways.chunked {
            1 + random.below(left)
        } else {
            left
        };
        let end = self.computed + count;
        while self.blocks.len() * (BLOCK_SIZE as usize) < end {
            let at = if ways.scattered {
                random.below(free.len())
            } else {
                free.len() - 1
            };
            self.blocks.push(BlockId(free.swap_remove(at)));
        }
        let sampling = (end == self.tokens.len()).then(|| {
            let position = u32::try_from(end).expect("short sequences");
            Box::new(Sampling {
                position,
                generated: if request.sampling.penalises_generated() {
                    self.tokens[request.prompt.len()..].to_vec()
                } else {
                    Vec::new()
                },
                ..request.sampling.clone()
            })
        });
        let mut row = PlanRow {
            tokens: self.tokens[self.computed..end].to_vec(),
            position: u32::try_from(self.computed).expect("short sequences"),
            blocks: self.blocks.clone(),
            sampling,
            ..PlanRow::default()
        };
        if let (true, Some(last)) = (
            (ways.ahead || ways.overlapped) && end == self.tokens.len(),
            row.tokens.last_mut(),
        ) && self.chosen_in.is_some()
        {
            *last = 0;
            row.last_from = self.chosen_in;
            if let Some(sampling) = &mut row.sampling {
                sampling.generated.pop();
            }
        }
        self.computed = end;
        row
    }
}
