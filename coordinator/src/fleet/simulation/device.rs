//! The device of a simulated shard: loads, allocates, joins, and computes steps through a KV memory.
//!
//! A collective is as mean as NCCL: it ends when all ranks have brought their part, or on abort; a
//! dead or frozen peer is waited for. Slots of the memory hold tokens by position, and what was written
//! in an epoch that is over is of no use. Invariant: a plan is checked before it is computed; one that no
//! shard could compute is a violation of the coordinator's.

use super::faults::Moment;
use super::oracle::{EMPTY, VOCAB_SIZE, chain, choose, share};
use super::shard::{Voice, say};
use super::world::{Group, MS, Parts, ProcId, State, World};
use std::collections::BTreeMap;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};
use topology::ids::{BlockId, Epoch, Rank, Step};
use topology::wire::{
    FromShard, Load, Loaded, PlanDigest, PlanRow, Ran, RowOutput, ScoredToken, StepPlan,
    StepTimings, digest_of_tokens,
};

/// How long ranks wait for each other when they join.
const JOIN_LIMIT: Duration = Duration::from_secs(30);

/// Collectives of a step: faults come between them too.
const COLLECTIVES: u8 = 2;

/// What the session asks of the device.
#[derive(Debug)]
pub(super) enum Command {
    Load(Load),
    Allocate(u32),
    MakeComm(Epoch),
    JoinComm {
        epoch: Epoch,
        id: Vec<u8>,
        abort: Arc<AtomicBool>,
    },
    Run(Box<StepPlan>),
    Leave(Epoch),
}

/// What was written to one place of the KV memory.
#[derive(Clone, Copy, Debug)]
struct Slot {
    epoch: Epoch,
    position: usize,
    token: u32,
}

#[derive(Debug)]
struct Joined {
    epoch: Epoch,
    next: Step,
    group: usize,
    abort: Arc<AtomicBool>,
    /// What the last step chose; `None` if it came to no end: those behind it are over too.
    chosen: Option<Vec<Option<u32>>>,
}

#[derive(Debug)]
pub(super) struct Device {
    world: Arc<World>,
    proc: ProcId,
    rank: Rank,
    voice: Voice,
    load: Option<Load>,
    slots: Vec<Option<Slot>>,
    joined: Option<Joined>,
}

/// Why there is no answer.
enum NoAnswer {
    /// The epoch is over; nothing is to be said.
    Over,
    /// The coordinator asked for what cannot be.
    Impossible(String),
}

type Answer = Result<FromShard, NoAnswer>;

fn impossible<T>(why: impl Into<String>) -> Result<T, NoAnswer> {
    Err(NoAnswer::Impossible(why.into()))
}

impl Device {
    pub(super) fn new(world: &Arc<World>, proc: ProcId, voice: Voice) -> Self {
        let rank = world.lock().procs[proc].source.rank;
        Self {
            world: Arc::clone(world),
            proc,
            rank,
            voice,
            load: None,
            slots: Vec::new(),
            joined: None,
        }
    }

    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Command>) {
        while let Some(command) = inbox.recv().await {
            self.world.awake(self.proc).await;
            let answer = self.handle(command).await;
            self.world.awake(self.proc).await;
            match answer {
                Ok(answer) => say(&self.world, self.proc, &self.voice, answer),
                Err(NoAnswer::Over) => {}
                Err(NoAnswer::Impossible(reason)) => {
                    let (rank, world) = (self.rank, &self.world);
                    world.violation(format_args!("rank {rank} cannot do this: {reason}"));
                    let failed = FromShard::Failed { reason };
                    say(world, self.proc, &self.voice, failed);
                    sleep(5 * MS).await;
                    world.die(self.proc, "exit status: 1");
                    pending::<()>().await;
                }
            }
        }
    }

    async fn handle(&mut self, command: Command) -> Answer {
        match command {
            Command::Load(load) => self.load(load).await,
            Command::Allocate(num_blocks) => self.allocate(num_blocks).await,
            Command::MakeComm(epoch) => {
                self.world.at(self.proc, Moment::MakeComm).await;
                if self.slots.is_empty() {
                    return impossible("a communicator before memory");
                }
                let comm_id = self.world.lock().new_group(epoch);
                Ok(FromShard::CommMade { epoch, comm_id })
            }
            Command::JoinComm { epoch, id, abort } => self.join(epoch, &id, abort).await,
            Command::Run(plan) => self.step(&plan).await,
            Command::Leave(epoch) => {
                self.world.at(self.proc, Moment::Leave).await;
                self.joined.take_if(|joined| joined.epoch <= epoch);
                let mut state = self.world.lock();
                let proc = &mut state.procs[self.proc];
                proc.joined = self.joined.as_ref().map(|joined| joined.epoch);
                proc.left = Some(epoch);
                Ok(FromShard::Aborted { epoch })
            }
        }
    }

    async fn load(&mut self, load: Load) -> Answer {
        if self.load.is_some() {
            return impossible("a model is loaded already");
        }
        for done in 0..3 {
            let progress = FromShard::Progress {
                bytes_done: done,
                bytes_total: 3,
            };
            say(&self.world, self.proc, &self.voice, progress);
            sleep(self.world.some_ms(1, 100)).await;
            self.world.at(self.proc, Moment::Load).await;
        }
        self.load = Some(load);
        Ok(FromShard::Loaded(Loaded {
            weight_bytes: 3,
            workspace_bytes: 1,
            block_bytes: 1,
            recording_bytes: 0,
            free_bytes: 1,
            load_us: 1,
        }))
    }

    async fn allocate(&mut self, num_blocks: u32) -> Answer {
        self.world.at(self.proc, Moment::Allocate).await;
        sleep(self.world.some_ms(0, 20)).await;
        let Some(load) = &self.load else {
            return impossible("KV blocks before a model");
        };
        self.slots = vec![None; (num_blocks * load.block_size) as usize];
        let kv_bytes = u64::from(num_blocks);
        Ok(FromShard::Allocated { kv_bytes })
    }

    async fn join(&mut self, epoch: Epoch, id: &[u8], abort: Arc<AtomicBool>) -> Answer {
        self.world.at(self.proc, Moment::Join).await;
        let Some(load) = self.load.as_ref().filter(|_| !self.slots.is_empty()) else {
            return impossible("a communicator before memory");
        };
        if let Some(joined) = &self.joined {
            let old = joined.epoch;
            return impossible(format!("epoch {epoch} begins before {old} was left"));
        }
        let world_size = load.tensor_parallel_size as usize;
        let seat = self
            .world
            .lock()
            .take_seat(epoch, id, (self.rank, self.proc));
        let group = seat.map_err(NoAnswer::Impossible)?;
        self.world.tell();
        let all_here =
            |state: &mut State| (state.groups[group].seats.len() == world_size).then_some(());
        let deadline = Instant::now() + JOIN_LIMIT;
        let came = self.world.until(&abort, deadline, all_here).await;
        self.world.awake(self.proc).await;
        // Another rank's fault; the coordinator has a deadline too.
        came.ok_or(NoAnswer::Over)?;
        self.joined = Some(Joined {
            epoch,
            next: Step(0),
            group,
            abort,
            chosen: Some(Vec::new()),
        });
        self.world.lock().procs[self.proc].joined = Some(epoch);
        Ok(FromShard::Joined { epoch })
    }

    async fn step(&mut self, plan: &StepPlan) -> Answer {
        self.world.at(self.proc, Moment::Step).await;
        let (epoch, step) = (plan.epoch, plan.step);
        let current = |joined: &&mut Joined| joined.epoch == epoch && joined.chosen.is_some();
        let Some(joined) = self.joined.as_mut().filter(current) else {
            return Err(NoAnswer::Over);
        };
        if joined.next != step {
            return impossible(format!("step {step} came, {} was due", joined.next));
        }
        joined.next = step.next();
        let before = joined.chosen.take().unwrap_or_default();
        let (group, abort) = (joined.group, Arc::clone(&joined.abort));
        self.check(plan)?;
        let digest = plan.digest();
        let plan = &known(plan, &before)?;
        let tokens = plan.num_tokens();
        sleep(MS + MS * u32::try_from(tokens / 16).unwrap_or(0)).await;
        let prefixes: Vec<u64> = plan.rows.iter().map(|row| self.read(epoch, row)).collect();
        let rows = plan.rows.iter().zip(prefixes);
        let shares: Vec<u64> = rows.map(|(row, p)| self.write(epoch, row, p)).collect();
        let mut sums = Vec::new();
        for number in 0..COLLECTIVES {
            self.world.at(self.proc, Moment::Collective).await;
            let place = (group, (step, number));
            let part = (digest, shares.clone());
            sums = self.reduce(place, part, &abort).await?;
        }
        let lies = self.world.at(self.proc, Moment::Answer).await;
        self.world.lock().compute(plan, self.rank, digest);
        let rows = plan.rows.iter().zip(sums);
        let outputs: Vec<RowOutput> = rows.map(|(row, sum)| sample(row, sum)).collect();
        let tokens = outputs.iter().map(|row| row.sampled.as_ref());
        let chosen: Vec<_> = tokens.map(|sampled| sampled.map(|s| s.token)).collect();
        let mut ran = Ran {
            epoch,
            step,
            digest,
            outputs: Vec::new(),
            chosen: Some(digest_of_tokens(chosen.iter().copied().flatten())),
            timings: StepTimings::default(),
        };
        if let Some(joined) = &mut self.joined {
            joined.chosen = Some(chosen);
        }
        if self.rank == Rank(0) {
            ran.outputs = outputs;
        }
        if lies {
            self.world.lock().lie(&mut ran);
        }
        Ok(FromShard::Ran(Box::new(ran)))
    }

    /// Every part's sum, once all ranks have brought theirs.
    async fn reduce(
        &self,
        (group, place): (usize, (Step, u8)),
        part: (PlanDigest, Vec<u64>),
        abort: &AtomicBool,
    ) -> Result<Vec<u64>, NoAnswer> {
        let digest = part.0;
        let load = self.load.as_ref().expect("it has joined");
        let world_size = load.tensor_parallel_size as usize;
        {
            let mut state = self.world.lock();
            let brought = &mut state.groups[group].brought;
            brought.retain(|(step, _), _| step.next() >= place.0);
            brought.entry(place).or_default().insert(self.rank, part);
        }
        self.world.tell();
        let for_ever = Instant::now() + Duration::from_secs(100_000_000);
        let all = |state: &mut State| {
            let brought = state.groups[group].brought.get(&place)?;
            (brought.len() == world_size).then(|| brought.clone())
        };
        let all = self.world.until(abort, for_ever, all).await;
        self.world.awake(self.proc).await;
        let parts = all.ok_or(NoAnswer::Over)?;
        if parts.values().any(|(other, _)| *other != digest) {
            return impossible("ranks hold different plans");
        }
        Ok(sum(&parts))
    }

    /// What could not be computed, whatever the memory holds.
    fn check(&self, plan: &StepPlan) -> Result<(), NoAnswer> {
        let load = self.load.as_ref().expect("it has joined");
        let block_size = load.block_size as usize;
        let mut holders: BTreeMap<BlockId, u32> = BTreeMap::new();
        let tokens = plan.num_tokens();
        if plan.rows.is_empty()
            || plan.rows.len() > load.max_num_seqs as usize
            || tokens > load.max_num_batched_tokens as usize
        {
            return impossible(format!("{} rows of {tokens} tokens", plan.rows.len()));
        }
        for row in &plan.rows {
            let end = row.position as usize + row.tokens.len();
            let known = |block: &BlockId| block.index() * block_size < self.slots.len();
            if row.tokens.is_empty()
                || row.blocks.len() != end.div_ceil(block_size)
                || !row.blocks.iter().all(known)
            {
                return impossible(format!("{row:?}"));
            }
            for block in &row.blocks {
                *holders.entry(*block).or_default() += 1;
            }
        }
        for row in &plan.rows {
            let written = &row.blocks[row.position as usize / block_size..];
            if written.iter().any(|block| holders[block] > 1) {
                return impossible(format!("a block is written and shared: {row:?}"));
            }
        }
        Ok(())
    }

    /// The prefix before a row, as the memory has it.
    fn read(&self, epoch: Epoch, row: &PlanRow) -> u64 {
        (0..row.position as usize).fold(EMPTY, |prefix, position| {
            let slot = self.slots[self.place(row, position)];
            let sound = slot.filter(|s| s.epoch == epoch && s.position == position);
            // What is not there, or not what it should be, reads as something no prompt contains.
            chain(prefix, sound.map_or(VOCAB_SIZE + 7, |slot| slot.token))
        })
    }

    /// Puts a row into the memory and gives this rank's share of the token after it.
    fn write(&mut self, epoch: Epoch, row: &PlanRow, mut prefix: u64) -> u64 {
        for (position, token) in (row.position as usize..).zip(&row.tokens) {
            let place = self.place(row, position);
            let token = *token;
            self.slots[place] = Some(Slot {
                epoch,
                position,
                token,
            });
            prefix = chain(prefix, token);
        }
        share(prefix, self.rank.0)
    }

    fn place(&self, row: &PlanRow, position: usize) -> usize {
        let load = self.load.as_ref().expect("it has joined");
        let block_size = load.block_size as usize;
        row.blocks[position / block_size].index() * block_size + position % block_size
    }
}

/// The plan with the tokens that it leaves to the step before, which chose these.
fn known(plan: &StepPlan, before: &[Option<u32>]) -> Result<StepPlan, NoAnswer> {
    let mut plan = plan.clone();
    for row in &mut plan.rows {
        let Some(from) = row.last_from else {
            continue;
        };
        let token = before.get(from as usize).copied().flatten();
        match (token, row.tokens.last_mut()) {
            (Some(token), Some(last)) => *last = token,
            _ => return impossible(format!("no token in row {from} of the step before")),
        }
    }
    Ok(plan)
}

fn sum(parts: &Parts) -> Vec<u64> {
    let rows = parts.values().map(|(_, shares)| shares.len()).max();
    let row = |row: usize| {
        let shares = parts.values().filter_map(|(_, shares)| shares.get(row));
        shares.fold(0, |sum: u64, share| sum.wrapping_add(*share))
    };
    (0..rows.unwrap_or(0)).map(row).collect()
}

fn sample(row: &PlanRow, sum: u64) -> RowOutput {
    let sampled = row.sampling.as_ref().map(|sampling| ScoredToken {
        token: choose(sum, sampling.seed, sampling.position),
        score: None,
    });
    RowOutput {
        sampled,
        targets: Vec::new(),
    }
}

impl State {
    /// The identity of a communicator that no one has joined yet.
    fn new_group(&mut self, epoch: Epoch) -> Vec<u8> {
        let id = self.groups.len();
        self.groups.push(Group {
            epoch,
            seats: BTreeMap::new(),
            brought: BTreeMap::new(),
        });
        id.to_le_bytes().to_vec()
    }

    fn take_seat(
        &mut self,
        epoch: Epoch,
        id: &[u8],
        (rank, proc): (Rank, ProcId),
    ) -> Result<usize, String> {
        let id = id.try_into().map(usize::from_le_bytes);
        let id = id.map_err(|_| "an unknown communicator".to_owned())?;
        let group = self.groups.get_mut(id).ok_or("an unknown communicator")?;
        if group.epoch != epoch {
            return Err(format!("epoch {}'s communicator for {epoch}", group.epoch));
        }
        match group.seats.insert(rank, proc) {
            Some(other) if other != proc => Err(format!("rank {rank} sits twice in {epoch}")),
            _ => Ok(id),
        }
    }

    /// A rank has computed a plan; it does so once, and epochs only go up.
    fn compute(&mut self, plan: &StepPlan, rank: Rank, digest: PlanDigest) {
        let (epoch, step) = (plan.epoch, plan.step);
        let mut later = self.computed.range((epoch.next(), Step(0))..);
        if let Some(((later, _), _)) = later.find(|(_, ranks)| ranks.contains_key(&rank)) {
            let what = format!("rank {rank} computes in {epoch} after {later}");
            self.violation(format_args!("{what}"));
        }
        let ranks = self.computed.entry((epoch, step)).or_default();
        if ranks.insert(rank, digest).is_some() {
            self.violation(format_args!("rank {rank} computes {epoch}/{step} twice"));
        }
    }

    /// Spoils an answer in a way that can be told.
    fn lie(&mut self, ran: &mut Ran) {
        self.lied = true;
        let place = (ran.epoch, ran.step);
        let sampled = ran.outputs.iter_mut().find_map(|row| row.sampled.as_mut());
        match (self.rng.u32(0..5), sampled) {
            (0, Some(sampled)) => sampled.token = VOCAB_SIZE + self.rng.u32(0..9),
            (1, Some(_)) => drop(ran.outputs.pop()),
            (4, Some(_)) => {
                self.lies.insert(place);
                ran.chosen = Some([1; 16]);
            }
            // These the fleet itself has to see; those above, the scheduler.
            (2, _) => {
                self.lies.insert(place);
                ran.step = ran.step.next();
            }
            _ => {
                self.lies.insert(place);
                ran.digest[self.rng.usize(0..16)] ^= 1;
            }
        }
        self.note(format_args!("a lie about {}/{}", place.0, place.1));
    }
}
