//! Starts simulated shards, and carries what is said in both directions.
//!
//! The seam of [`crate::fleet::host`], with links that delay, hold back and lose, in order within a
//! stream and in any order between streams. Invariant: a process ends with the value that stands for it;
//! what it sent before may still arrive, under its own source.

use super::super::fault::{Cause, Fault, Phase};
use super::super::host::{Host, Launched, Shard};
use super::super::inbox::{Heard, Outlet, Source};
use super::super::start::StartEvent;
use super::faults::Moment;
use super::shard::Session;
use super::world::{FROM_SHARD, ProcId, TO_SHARD, World};
use futures_util::future::try_join_all;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};
use topology::link::Frame;
use topology::wire::{FromShard, Hello, ToShard, decode};

/// Longest time from a process's start to its `Hello`.
const ADMIT_LIMIT: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct SimHost {
    pub(super) world: Arc<World>,
}

/// A shard as the fleet holds it.
#[derive(Debug)]
pub(super) struct SimShard {
    world: Arc<World>,
    proc: ProcId,
    main: mpsc::UnboundedSender<(Instant, ToShard)>,
    urgent: mpsc::UnboundedSender<(Instant, ToShard)>,
}

impl Host for SimHost {
    type Shard = SimShard;

    async fn launch(
        &mut self,
        sources: &[Source],
        outlet: &Outlet,
        tell: &mut (dyn FnMut(StartEvent) + Send),
    ) -> Result<Launched<SimShard>, Fault> {
        let start = |source: &Source| SimShard::start(&self.world, *source, outlet);
        // Dropped with a fault, which ends all of them.
        let shards: Vec<SimShard> = sources.iter().map(start).collect();
        for (source, shard) in sources.iter().zip(&shards) {
            let (rank, pid) = (source.rank, pid(shard.proc));
            tell(StartEvent::Launched { rank, pid });
        }
        let admitted = sources
            .iter()
            .zip(&shards)
            .map(|(source, it)| it.admit(*source));
        let hellos = try_join_all(admitted).await?;
        Ok(Launched {
            shards: hellos.into_iter().zip(shards).collect(),
            phases: Vec::new(),
        })
    }
}

fn pid(proc: ProcId) -> u32 {
    u32::try_from(proc + 100).expect("a run starts few processes")
}

impl SimShard {
    fn start(world: &Arc<World>, source: Source, outlet: &Outlet) -> Self {
        let proc = world.start(source, outlet.clone());
        let (main, from_main) = mpsc::unbounded_channel();
        let (urgent, from_urgent) = mpsc::unbounded_channel();
        let (voice, said) = mpsc::unbounded_channel();
        let (to_session, messages) = mpsc::unbounded_channel();
        for stream in [from_main, from_urgent] {
            let carried = carry_in(Arc::clone(world), proc, stream, to_session.clone());
            world.spawn(proc, carried);
        }
        // What was said travels on when its sender is gone.
        tokio::spawn(carry_out(Arc::clone(world), proc, said));
        let booting = Arc::clone(world);
        world.spawn(proc, async move {
            sleep(booting.some_ms(5, 300)).await;
            if booting.lock().plan.no_launch {
                booting.strike(proc, super::faults::Ill::Kill);
            }
            booting.at(proc, Moment::Launch).await;
            booting.lock().procs[proc].admitted = true;
            Session::spawn(&booting, proc, voice, messages);
            booting.tell();
        });
        Self {
            world: Arc::clone(world),
            proc,
            main,
            urgent,
        }
    }

    async fn admit(&self, source: Source) -> Result<Hello, Fault> {
        let (rank, limit) = (source.rank, ADMIT_LIMIT);
        let no_abort = AtomicBool::new(false);
        let deadline = Instant::now() + limit;
        let state = self.world.until(&no_abort, deadline, |state| {
            let it = &state.procs[self.proc];
            (it.admitted || !it.alive).then_some(it.alive)
        });
        match state.await {
            Some(true) => Ok(Hello {
                rank,
                pid: pid(self.proc),
                device: "simulated".to_owned(),
                free_bytes: 1,
                total_bytes: 1,
            }),
            Some(false) => Err(Fault::of(rank, Cause::Exited("while it started".into()))),
            None => {
                let phase = Phase::Admit;
                Err(Fault::of(rank, Cause::Deadline { phase, limit }))
            }
        }
    }

    fn push(
        &self,
        stream: &mpsc::UnboundedSender<(Instant, ToShard)>,
        message: ToShard,
    ) -> Result<(), Cause> {
        let mut state = self.world.lock();
        let state = &mut *state;
        if state.procs[self.proc].link_lost {
            return Err(Cause::LinkLost("it was lost before".into()));
        }
        let name = name_of(&message);
        let source = state.procs[self.proc].source;
        state.note(format_args!("{source:?} is sent {name}"));
        let at = Instant::now() + state.plan.delay(&mut state.rng);
        // A process that is gone does not read; that is heard of otherwise.
        let _ = stream.send((at, message));
        Ok(())
    }
}

impl Shard for SimShard {
    async fn send(&mut self, frame: &Frame<ToShard>) -> Result<(), Cause> {
        let message = decode(frame.body()).expect("it was encoded by this process");
        self.push(&self.main, message)
    }

    async fn send_urgent(&mut self, message: &ToShard) -> Result<(), Cause> {
        self.push(&self.urgent, message.clone())
    }

    async fn end(self, limit: Duration) {
        let no_abort = AtomicBool::new(false);
        let deadline = Instant::now() + limit;
        let gone = |state: &mut super::world::State| (!state.procs[self.proc].alive).then_some(());
        if self.world.until(&no_abort, deadline, gone).await.is_none() {
            self.world
                .die(self.proc, "signal: 9 (SIGKILL) by the fleet");
            sleep(self.world.some_ms(1, 20)).await;
        }
    }
}

impl Drop for SimShard {
    fn drop(&mut self) {
        self.world.kill(self.proc);
    }
}

/// One stream of the link to the shard.
async fn carry_in(
    world: Arc<World>,
    proc: ProcId,
    mut stream: mpsc::UnboundedReceiver<(Instant, ToShard)>,
    session: mpsc::UnboundedSender<ToShard>,
) {
    while let Some((at, message)) = stream.recv().await {
        sleep_until(at).await;
        if !world.passable(proc, TO_SHARD).await {
            return;
        }
        if session.send(message).is_err() {
            return;
        }
    }
}

/// The link from the shard. What is on its way when the link is lost comes very late.
async fn carry_out(
    world: Arc<World>,
    proc: ProcId,
    mut said: mpsc::UnboundedReceiver<(Instant, FromShard)>,
) {
    while let Some((at, message)) = said.recv().await {
        sleep_until(at).await;
        if !world.passable(proc, FROM_SHARD).await {
            sleep(world.some_ms(0, 5000)).await;
        }
        world.report(proc, Heard::Message(message)).await;
    }
}

/// A message without its content, for the log.
fn name_of(message: &ToShard) -> String {
    match message {
        ToShard::Run(plan) => format!("Run {}/{}", plan.epoch, plan.step),
        ToShard::Load(_) => "Load".to_owned(),
        ToShard::JoinComm { epoch, .. } => format!("JoinComm {epoch}"),
        other => format!("{other:?}"),
    }
}
