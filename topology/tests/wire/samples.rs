//! One message of every kind with every field set, and random plans.
//!
//! The `match`es without a wildcard make a new kind of message a compile error here, so that none
//! goes without a sample.

use crate::random::Random;
use topology::ids::{BlockId, Epoch, Rank, Step};
use topology::wire::{
    FromShard, Held, Hello, Load, Loaded, LogitBias, ModelLocation, PlanRow, Ran, RowOutput,
    Sampling, ScoredToken, StepPlan, StepTimings, ToShard, TokenScore,
};

/// A message's name in the golden files.
pub(crate) fn command_kind(command: &ToShard) -> &'static str {
    match command {
        ToShard::Welcome { .. } => "welcome",
        ToShard::Load(load) => match load.model {
            ModelLocation::BuiltIn => "load_built_in",
            ModelLocation::Directory(_) => "load_directory",
        },
        ToShard::Allocate { .. } => "allocate",
        ToShard::MakeComm { .. } => "make_comm",
        ToShard::JoinComm { .. } => "join_comm",
        ToShard::Run(_) => "run",
        ToShard::Abort { .. } => "abort",
        ToShard::Stop => "stop",
    }
}

/// A message's name in the golden files.
pub(crate) fn reply_kind(reply: &FromShard) -> &'static str {
    match reply {
        FromShard::Hello(_) => "hello",
        FromShard::Held(_) => "held",
        FromShard::Progress { .. } => "progress",
        FromShard::Loaded(_) => "loaded",
        FromShard::Allocated { .. } => "allocated",
        FromShard::CommMade { .. } => "comm_made",
        FromShard::Joined { .. } => "joined",
        FromShard::Ran(_) => "ran",
        FromShard::Aborted { .. } => "aborted",
        FromShard::Failed { .. } => "failed",
    }
}

fn load(model: ModelLocation) -> Load {
    Load {
        model,
        tensor_parallel_size: 4,
        dtype: "bfloat16".to_owned(),
        quantization: "int8".to_owned(),
        kv_cache_dtype: "fp8".to_owned(),
        block_size: 16,
        max_model_len: 131_072,
        max_num_batched_tokens: 2048,
        max_num_seqs: 256,
        async_scheduling: true,
        enforce_eager: true,
    }
}

fn held() -> Held {
    Held {
        load: load(ModelLocation::BuiltIn),
        loaded: Loaded {
            weight_bytes: 1 << 30,
            workspace_bytes: 252,
            block_bytes: 1 << 15,
            recording_bytes: 0,
            free_bytes: 1 << 31,
            load_us: 1_234,
        },
        num_blocks: 16_384,
        kv_bytes: 1 << 29,
        epoch: Epoch(7),
    }
}

pub(crate) fn commands() -> Vec<ToShard> {
    let load = |model| ToShard::Load(load(model));
    vec![
        ToShard::Welcome {
            world_size: 4,
            generation: 2,
            pid: 4711,
        },
        load(ModelLocation::BuiltIn),
        load(ModelLocation::Directory("/models/llama".to_owned())),
        ToShard::Allocate { num_blocks: 70_000 },
        ToShard::MakeComm { epoch: Epoch(300) },
        ToShard::JoinComm {
            epoch: Epoch(1),
            comm_id: vec![0, 1, 254, 255],
        },
        ToShard::Run(Box::new(plan())),
        ToShard::Abort {
            epoch: Epoch(u32::MAX),
        },
        ToShard::Stop,
    ]
}

pub(crate) fn replies() -> Vec<FromShard> {
    let score = TokenScore {
        logprob: -0.5,
        rank: 3,
        top: vec![(7, -0.1), (u32::MAX, -12.25)],
    };
    vec![
        FromShard::Hello(Hello {
            rank: Rank(3),
            pid: 4242,
            device: "CPU cores 0,1".to_owned(),
            free_bytes: 1 << 34,
            total_bytes: u64::MAX,
        }),
        FromShard::Progress {
            bytes_done: 5,
            bytes_total: 1 << 40,
        },
        FromShard::Loaded(Loaded {
            weight_bytes: 1,
            workspace_bytes: 251,
            block_bytes: 1 << 16,
            recording_bytes: 1 << 28,
            free_bytes: 1 << 32,
            load_us: 123_456,
        }),
        FromShard::Allocated { kv_bytes: 1 << 33 },
        FromShard::Held(Box::new(held())),
        FromShard::CommMade {
            epoch: Epoch(1),
            comm_id: (0..128).collect(),
        },
        FromShard::Joined { epoch: Epoch(2) },
        FromShard::Ran(Box::new(Ran {
            epoch: Epoch(2),
            step: Step(1 << 40),
            digest: [7; 16],
            outputs: vec![
                RowOutput::default(),
                RowOutput {
                    sampled: Some(ScoredToken {
                        token: 9,
                        score: Some(score.clone()),
                    }),
                    targets: vec![score],
                },
            ],
            chosen: Some([8; 16]),
            timings: StepTimings {
                step_us: 1000,
                idle_us: 30,
                collective_us: 300,
                wait_us: 20,
                sample_us: 4,
                outside_us: 90,
            },
        })),
        FromShard::Aborted { epoch: Epoch(2) },
        FromShard::Failed {
            reason: "no memory for 3 GiB of weights".to_owned(),
        },
    ]
}

fn plan() -> StepPlan {
    let sampling = Sampling {
        temperature: 0.7,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.05,
        presence_penalty: 0.25,
        frequency_penalty: -0.5,
        repetition_penalty: 1.1,
        seed: u64::MAX - 1,
        position: 1000,
        logit_bias: vec![LogitBias {
            token: 5,
            bias: -100.0,
        }],
        banned: vec![2],
        allowed: vec![1, 300],
        prompt: vec![10, 20],
        generated: vec![30],
        logprobs: Some(20),
    };
    let prefill = PlanRow {
        tokens: vec![1, 250, 251, 70_000],
        position: 16,
        blocks: vec![BlockId(0), BlockId(65_536)],
        sampling: None,
        targets: vec![250, 251, 70_000, 3],
        target_alternatives: 5,
        last_from: None,
    };
    let decode = PlanRow {
        tokens: vec![42],
        position: 999,
        blocks: (0..63).map(BlockId).collect(),
        sampling: Some(Box::new(sampling)),
        last_from: Some(300),
        ..PlanRow::default()
    };
    StepPlan {
        epoch: Epoch(2),
        step: Step(300),
        rows: vec![prefill, decode],
    }
}

/// A plan of up to a few hundred rows, with everything on or off at random.
pub(crate) fn random_plan(random: &mut Random) -> StepPlan {
    let tokens = |random: &mut Random| -> Vec<u32> {
        let length = random.below(4) * random.below(20);
        (0..length).map(|_| number(random)).collect()
    };
    let row = |random: &mut Random| PlanRow {
        tokens: tokens(random),
        position: number(random),
        blocks: tokens(random).into_iter().map(BlockId).collect(),
        sampling: (random.below(2) == 0).then(|| {
            Box::new(Sampling {
                temperature: f32::from_bits(number(random) & 0x3FFF_FFFF),
                seed: random.next(),
                banned: tokens(random),
                generated: tokens(random),
                logprobs: (random.below(2) == 0).then(|| number(random)),
                ..Sampling::default()
            })
        }),
        targets: tokens(random),
        target_alternatives: number(random),
        last_from: (random.below(2) == 0).then(|| number(random)),
    };
    let rows = random.below(20) * random.below(20);
    StepPlan {
        epoch: Epoch(number(random)),
        step: Step(random.next() >> random.below(64)),
        rows: (0..rows).map(|_| row(random)).collect(),
    }
}

/// Of any size: small numbers take fewer bytes.
fn number(random: &mut Random) -> u32 {
    let bits = random.below(33);
    u32::try_from(random.next() & ((1 << bits) - 1)).expect("at most 32 bits")
}
