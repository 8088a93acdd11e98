//! A coordinator as far as these checks need one: starts shard processes, loads a fixture, forms the
//! communicator, runs greedy steps of one sequence.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::timeout;
use topology::ids::{BlockId, Epoch, Rank, Step};
use topology::launch::local::{self, Process};
use topology::launch::{Hold, Launch, environment};
use topology::link::{Certificate, LinkReceiver, LinkSender, Listener};
use topology::placement::Device;
use topology::wire::{
    FromShard, Load, ModelLocation, PlanRow, Ran, RowOutput, Sampling, ScoredToken, StepPlan,
    ToShard,
};

/// What the checks' two ranks compute on: a core each, or both on the GPU whose number is in
/// `CLUSTER_TEST_GPU`, over NCCL.
pub(crate) fn device() -> Device {
    match std::env::var_os("CLUSTER_TEST_GPU") {
        Some(index) => Device::Gpu {
            index: (index.to_str().and_then(|index| index.parse().ok()))
                .expect("CLUSTER_TEST_GPU is the number of a GPU"),
            ranks: 2,
        },
        None => Device::Cpu {
            threads: 1,
            cores: Vec::new(),
        },
    }
}

/// Whether bits may differ between ways of computing the same.
pub(crate) fn is_gpu() -> bool {
    matches!(device(), Device::Gpu { .. })
}

/// Where the fixtures are; `CLUSTER_TEST_FIXTURES` says so where the sources are not.
pub(crate) fn fixture_root() -> PathBuf {
    let elsewhere = std::env::var_os("CLUSTER_TEST_FIXTURES").map(PathBuf::from);
    elsewhere.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"))
}

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const BLOCK_SIZE: usize = 4;

/// One shard process and its link.
pub(crate) struct Shard {
    pub(crate) process: Process,
    pub(crate) sender: LinkSender<ToShard>,
    pub(crate) receiver: LinkReceiver<FromShard>,
    pub(crate) certificate: Certificate,
}

impl Shard {
    pub(crate) async fn start(listener: &mut Listener, rank: u32) -> Self {
        Self::start_with(listener, rank, None).await
    }

    pub(crate) async fn start_with(
        listener: &mut Listener,
        rank: u32,
        hold: Option<&Hold>,
    ) -> Self {
        let (certificate, mut process) = Self::launch(listener, rank, (device(), hold)).await;
        let mut lines = process.lines.take().expect("nobody took them");
        tokio::spawn(async move {
            while let Some(line) = lines.recv().await {
                // At its level it is of no use to a reader.
                if line.contains(REPLAYED) {
                    REPLAYED_SIZES.fetch_add(1, Ordering::Release);
                } else {
                    eprint(&line);
                }
            }
        });
        let admitted = listener.accept(PATIENCE).await.expect("the shard connects");
        assert_eq!(admitted.hello.rank, Rank(rank));
        assert_eq!(Some(admitted.hello.pid), process.pid());
        let is_cpu = admitted.hello.device.contains("cpu");
        assert!(is_cpu != is_gpu() && admitted.hello.free_bytes > 0);
        let (mut sender, receiver) = (admitted.sender, admitted.receiver);
        sender
            .send(&ToShard::Welcome {
                world_size: 2,
                generation: 0,
                pid: std::process::id(),
            })
            .await
            .expect("the shard listens");
        Self {
            process,
            sender,
            receiver,
            certificate,
        }
    }

    /// Only the process; it connects on its own.
    pub(crate) async fn spawn(listener: &Listener, rank: u32, device: Device) -> Process {
        Self::launch(listener, rank, (device, None)).await.1
    }

    async fn launch(
        listener: &Listener,
        rank: u32,
        (device, hold): (Device, Option<&Hold>),
    ) -> (Certificate, Process) {
        let program = std::env::current_exe().expect("this program has a path");
        let started = local::start_for(
            &environment::of(&device, None),
            program.as_os_str(),
            ["shard"],
        )
        .await
        .expect("it announces itself");
        let certificate = started.said.certificate.clone();
        listener.expect(Rank(rank), certificate.clone());
        let launch = Launch {
            coordinator: listener.local_addr().expect("it listens"),
            certificate: listener.certificate().clone(),
            rank: Rank(rank),
            device,
            cpu_isa: "auto".to_owned(),
            interface: None,
            hold: hold.cloned(),
        };
        let process = started.launch(&launch).await.expect("it takes the line");
        (certificate, process)
    }

    pub(crate) async fn say(&mut self, message: ToShard) {
        self.sender.send(&message).await.expect("the shard listens");
    }

    pub(crate) async fn hear(&mut self) -> FromShard {
        let heard = timeout(PATIENCE, self.receiver.recv())
            .await
            .expect("in time");
        heard.expect("the shard speaks")
    }

    /// Loads a fixture and allocates its blocks.
    pub(crate) async fn prepare(&mut self, fixture: &str) {
        self.prepare_as(&load(fixture)).await;
    }

    /// Loads a model and allocates its blocks.
    async fn prepare_as(&mut self, load: &Load) {
        self.say(ToShard::Load(load.clone())).await;
        let mut progress = Vec::new();
        let loaded = loop {
            match self.hear().await {
                FromShard::Progress {
                    bytes_done,
                    bytes_total,
                } => {
                    progress.push((bytes_done, bytes_total));
                }
                FromShard::Loaded(loaded) => break loaded,
                other => panic!("not loaded but {other:?}"),
            }
        };
        let (done, total) = progress.last().copied().expect("progress is reported");
        assert!(done == total && total == loaded.weight_bytes && progress.is_sorted());
        self.say(ToShard::Allocate { num_blocks: 32 }).await;
        let allocated = self.hear().await;
        let kv_bytes = 32 * loaded.block_bytes;
        assert_eq!(allocated, FromShard::Allocated { kv_bytes });
    }

    pub(crate) async fn exit_code(&mut self) -> Option<i32> {
        let ended = timeout(PATIENCE, self.process.wait())
            .await
            .expect("in time");
        ended.expect("a status").code()
    }
}

/// What a shard says at the level `debug` when it has recorded a size of decode step.
const REPLAYED: &str = "are replayed from now on";

static REPLAYED_SIZES: AtomicUsize = AtomicUsize::new(0);

/// Sizes that this program's shards have recorded so far, counted on every rank.
pub(crate) fn replayed_sizes() -> usize {
    REPLAYED_SIZES.load(Ordering::Acquire)
}

/// A line among the results.
#[expect(clippy::print_stdout, reason = "a test harness reports here")]
pub(crate) fn say(line: &str) {
    println!("{line}");
}

#[expect(
    clippy::print_stderr,
    reason = "what the shards say helps when a check fails"
)]
fn eprint(line: &str) {
    eprintln!("shard: {line}");
}

pub(crate) fn load(fixture: &str) -> Load {
    let folder = fixture_root().join(fixture);
    Load {
        model: ModelLocation::Directory(folder.display().to_string()),
        tensor_parallel_size: 2,
        // GPUs and matrix tiles round activations to the weights' type; nothing is to be rounded here.
        dtype: "float32".to_owned(),
        quantization: "auto".to_owned(),
        kv_cache_dtype: "auto".to_owned(),
        block_size: 4,
        max_model_len: 100,
        max_num_batched_tokens: 64,
        max_num_seqs: 4,
        async_scheduling: true,
        enforce_eager: false,
    }
}

/// Two shards.
pub(crate) struct Group {
    pub(crate) listener: Listener,
    pub(crate) ranks: [Shard; 2],
    pub(crate) epoch: Epoch,
    pub(crate) next: Step,
}

impl Group {
    pub(crate) async fn start(fixture: &str) -> Self {
        Self::start_with(fixture, None).await
    }

    pub(crate) async fn start_with(fixture: &str, hold: Option<&Hold>) -> Self {
        Self::start_as(&load(fixture), hold).await
    }

    pub(crate) async fn start_as(load: &Load, hold: Option<&Hold>) -> Self {
        let address = std::net::Ipv4Addr::LOCALHOST.into();
        let mut listener = Listener::bind(address).expect("a port on loopback");
        let mut ranks = [
            Shard::start_with(&mut listener, 0, hold).await,
            Shard::start_with(&mut listener, 1, hold).await,
        ];
        for rank in &mut ranks {
            rank.prepare_as(load).await;
        }
        Self::of(listener, ranks, Epoch(0))
    }

    /// Of shards that have loaded and are in no epoch after `epoch`.
    pub(crate) fn of(listener: Listener, ranks: [Shard; 2], epoch: Epoch) -> Self {
        let next = Step(0);
        Self {
            listener,
            ranks,
            epoch,
            next,
        }
    }

    /// Enters the next epoch. Returns the communicator's identity.
    pub(crate) async fn form(&mut self) -> Vec<u8> {
        self.epoch = self.epoch.next();
        self.next = Step(0);
        let epoch = self.epoch;
        let comm_id = self.make_comm().await;
        for rank in &mut self.ranks {
            rank.say(ToShard::JoinComm {
                epoch,
                comm_id: comm_id.clone(),
            })
            .await;
        }
        for rank in &mut self.ranks {
            assert_eq!(rank.hear().await, FromShard::Joined { epoch });
        }
        comm_id
    }

    pub(crate) async fn make_comm(&mut self) -> Vec<u8> {
        self.ranks[0]
            .say(ToShard::MakeComm { epoch: self.epoch })
            .await;
        match self.ranks[0].hear().await {
            FromShard::CommMade { epoch, comm_id } if epoch == self.epoch => comm_id,
            other => panic!("no communicator but {other:?}"),
        }
    }

    /// The plan that computes `tokens[computed..]` and samples.
    pub(crate) fn plan(&mut self, tokens: &[u32], computed: usize) -> StepPlan {
        let blocks = u32::try_from(tokens.len().div_ceil(BLOCK_SIZE)).expect("few");
        let position = |at: usize| u32::try_from(at).expect("short");
        let sampling = Sampling {
            position: position(tokens.len()),
            temperature: 0.8,
            seed: 5,
            logprobs: Some(2),
            ..Sampling::default()
        };
        let row = PlanRow {
            tokens: tokens[computed..].to_vec(),
            position: position(computed),
            blocks: (0..blocks).map(BlockId).collect(),
            sampling: Some(Box::new(sampling)),
            ..PlanRow::default()
        };
        let step = self.next;
        self.next = step.next();
        StepPlan {
            epoch: self.epoch,
            step,
            rows: vec![row],
        }
    }

    /// One step on both ranks; the token of its one row.
    pub(crate) async fn step(&mut self, plan: StepPlan) -> ScoredToken {
        let output = self.run(plan).await;
        output.sampled.expect("a sample was asked for")
    }

    /// One step on both ranks; the answer to its one row.
    pub(crate) async fn run(&mut self, plan: StepPlan) -> RowOutput {
        for rank in &mut self.ranks {
            rank.say(ToShard::Run(Box::new(plan.clone()))).await;
        }
        let mut answers: Vec<Ran> = Vec::new();
        for rank in &mut self.ranks {
            match rank.hear().await {
                FromShard::Ran(ran) => answers.push(*ran),
                other => panic!("no result but {other:?}"),
            }
        }
        let digest = plan.digest();
        assert!(
            answers
                .iter()
                .all(|ran| ran.digest == digest && ran.step == plan.step)
        );
        assert!(
            answers
                .iter()
                .all(|ran| ran.timings.step_us >= ran.timings.collective_us)
        );
        assert!(answers[1].outputs.is_empty());
        answers[0].outputs.swap_remove(0)
    }

    /// Appends `count` tokens to `tokens`, of which `computed` are in the blocks.
    pub(crate) async fn generate(
        &mut self,
        tokens: &mut Vec<u32>,
        count: usize,
    ) -> Vec<ScoredToken> {
        let mut answers = Vec::new();
        let mut computed = 0;
        for _ in 0..count {
            let plan = self.plan(tokens, computed);
            computed = tokens.len();
            let answer = self.step(plan).await;
            tokens.push(answer.token);
            answers.push(answer);
        }
        answers
    }

    /// The likeliest tokens after `tokens`, which they are appended to.
    pub(crate) async fn generate_greedy(
        &mut self,
        tokens: &mut Vec<u32>,
        count: usize,
    ) -> Vec<u32> {
        let mut answers = Vec::new();
        let mut computed = 0;
        for _ in 0..count {
            let mut plan = self.plan(tokens, computed);
            if let Some(sampling) = &mut plan.rows[0].sampling {
                sampling.temperature = 0.0;
            }
            computed = tokens.len();
            let token = self.step(plan).await.token;
            tokens.push(token);
            answers.push(token);
        }
        answers
    }

    pub(crate) async fn stop(mut self) {
        for rank in &mut self.ranks {
            rank.say(ToShard::Stop).await;
        }
        for rank in &mut self.ranks {
            assert_eq!(rank.exit_code().await, Some(0));
        }
    }
}
