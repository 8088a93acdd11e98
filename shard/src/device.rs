//! The thread that owns device, communicator and model.
//!
//! Takes commands from a bounded channel, one at a time, and answers with the messages the
//! coordinator gets. It may block for as long as a collective does; whoever has to end that holds the
//! [`Abort`] that came with the communicator. No I/O but the model's files.
//!
//! While it waits for a step it listens: the next step is queued behind that one as soon as its plan is there, before
//! the first is answered. Any other command waits until the steps before it have ended.
//!
//! Invariant: every command is answered once and in order, except a plan or a communicator of an epoch that is
//! over, which changes nothing; after [`FromShard::Failed`] nothing more is answered.

use crate::comm::{Abort, Comm, CommError, Seat};
use crate::engine::{Engine, Place, StepError};
use anyhow::{Context, Result};
use kernels::backend::{Backend, DeviceError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use topology::ids::{Epoch, Step};
use topology::model_files::{BuiltInFile, ModelFiles};
use topology::wire::{FromShard, Load, StepPlan};

/// Commands that may wait: two steps in flight and whatever ends an epoch. More is a coordinator that
/// does not keep to the protocol.
const QUEUED_COMMANDS: usize = 16;
/// Answers that may wait for the link; beyond it the device waits. Progress is dropped instead.
const QUEUED_ANSWERS: usize = 64;
/// How long the ranks may take to find each other. The coordinator sends them off together, so this is
/// the time a busy machine may take to run all of them.
const JOIN_LIMIT: Duration = Duration::from_secs(30);

/// What the thread is told.
#[derive(Debug)]
pub(crate) enum Command {
    /// Read the weights.
    Load(Load),
    /// Take memory for KV blocks.
    Allocate(u32),
    /// Make the identity of a communicator.
    MakeComm(Epoch),
    /// Form a communicator; `abort` ends it.
    JoinComm {
        epoch: Epoch,
        id: Vec<u8>,
        abort: Abort,
    },
    /// Compute a step.
    Run(Box<StepPlan>),
    /// Drop the communicator, which was aborted before this was sent.
    Leave(Epoch),
    /// Say when everything before this was answered.
    Report(oneshot::Sender<()>),
}

/// The device as the operator would name it, and its memory.
#[derive(Clone, Debug)]
pub(crate) struct About {
    pub(crate) name: String,
    pub(crate) total_bytes: u64,
    pub(crate) free_bytes: u64,
}

/// The other threads' end of the device thread.
#[derive(Debug)]
pub(crate) struct Device {
    pub(crate) about: About,
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) answers: mpsc::Receiver<FromShard>,
    /// For answers that need no device.
    pub(crate) answer: mpsc::Sender<FromShard>,
    /// The last epoch that was left.
    pub(crate) left: watch::Receiver<Option<Epoch>>,
    pub(crate) open_comm: OpenComm,
}

/// Identity of a communicator that was announced and may not have been formed, so that a process that
/// ends can remove what belongs to it.
#[derive(Clone, Debug, Default)]
pub(crate) struct OpenComm(Arc<Mutex<Vec<u8>>>);

impl OpenComm {
    fn set(&self, id: Vec<u8>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = id;
    }

    /// Hands over the identity.
    pub(crate) fn take(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Starts the thread. `make` runs on it, because a backend may bind itself to its thread.
///
/// # Errors
/// What `make` said.
pub(crate) async fn start<B: Backend, C: Comm<B>>(
    make: impl FnOnce() -> Result<B, DeviceError> + Send + 'static,
    place: Place,
    built_in: &'static [BuiltInFile],
) -> Result<Device> {
    let (commands, inbox) = mpsc::channel(QUEUED_COMMANDS);
    let (answer, answers) = mpsc::channel(QUEUED_ANSWERS);
    let (left_sender, left) = watch::channel(None);
    let (ready, about) = oneshot::channel();
    let open_comm = OpenComm::default();
    let worker = Worker::<B, C> {
        place,
        built_in,
        answers: answer.clone(),
        left: left_sender,
        open_comm: open_comm.clone(),
        backend: None,
        engine: None,
    };
    let run = move || match make() {
        Ok(backend) => {
            let (total_bytes, free_bytes) = backend.memory();
            let about = About {
                name: backend.name(),
                total_bytes,
                free_bytes,
            };
            if ready.send(Ok(about)).is_ok() {
                worker.run(backend, inbox);
            }
        }
        // Nobody listens only if the process is on its way out.
        Err(error) => drop(ready.send(Err(error))),
    };
    thread::Builder::new()
        .name("device".to_owned())
        .spawn(run)
        .context("start the device thread")?;
    let about = about
        .await
        .context("start the device thread")?
        .context("open the device")?;
    Ok(Device {
        about,
        commands,
        answers,
        answer,
        left,
        open_comm,
    })
}

struct Worker<B: Backend, C> {
    place: Place,
    built_in: &'static [BuiltInFile],
    answers: mpsc::Sender<FromShard>,
    left: watch::Sender<Option<Epoch>>,
    open_comm: OpenComm,
    /// Until the model is loaded onto it.
    backend: Option<B>,
    engine: Option<Engine<B, C>>,
}

impl<B: Backend, C: Comm<B>> Worker<B, C> {
    fn run(mut self, backend: B, mut inbox: mpsc::Receiver<Command>) {
        self.backend = Some(backend);
        // A command that was taken out of the inbox and waits for steps to end.
        let mut held = None;
        loop {
            let answer = if self.is_computing() {
                self.go_on(&mut inbox, &mut held)
            } else {
                let Some(command) = held.take().or_else(|| inbox.blocking_recv()) else {
                    return;
                };
                self.handle(command)
            };
            let answer = match answer {
                Ok(Some(answer)) => answer,
                Ok(None) => continue,
                Err(error) => FromShard::Failed {
                    reason: format!("{error:#}"),
                },
            };
            let is_last = matches!(answer, FromShard::Failed { .. });
            if self.answers.blocking_send(answer).is_err() || is_last {
                return;
            }
        }
    }

    fn is_computing(&self) -> bool {
        self.engine.as_ref().is_some_and(Engine::is_under_way)
    }

    /// While a step is under way: begins the next one if its plan is there or comes, or else ends the oldest.
    fn go_on(
        &mut self,
        inbox: &mut mpsc::Receiver<Command>,
        held: &mut Option<Command>,
    ) -> Result<Option<FromShard>> {
        let engine = self.engine()?;
        if held.is_none() && engine.takes_another() {
            engine.wait(&mut || {
                *held = inbox.try_recv().ok();
                held.is_some()
            });
            if let Some(Command::Run(plan)) = held.take_if(|held| matches!(held, Command::Run(_))) {
                match self.begin(plan)? {
                    None => return Ok(None),
                    Some(plan) => *held = Some(Command::Run(plan)),
                }
            }
        }
        self.end()
    }

    /// The answer, if there is one. An error is the end of this shard.
    fn handle(&mut self, command: Command) -> Result<Option<FromShard>> {
        match command {
            Command::Load(load) => self.load(&load).map(Some),
            Command::Allocate(num_blocks) => {
                let kv_bytes = self
                    .engine()?
                    .allocate(num_blocks)
                    .context("allocate KV blocks")?;
                tracing::info!(num_blocks, kv_bytes, "KV blocks are allocated");
                Ok(Some(FromShard::Allocated { kv_bytes }))
            }
            Command::MakeComm(epoch) => {
                // What was made for an epoch that never began.
                C::discard_id(&self.open_comm.take());
                let interface = self.place.interface;
                let comm_id = self
                    .engine()?
                    .new_comm_id(interface)
                    .context("make a communicator")?;
                self.open_comm.set(comm_id.clone());
                Ok(Some(FromShard::CommMade { epoch, comm_id }))
            }
            Command::JoinComm { epoch, id, abort } => self.join(epoch, &id, &abort),
            Command::Run(plan) => self.begin(plan).map(|_| None),
            Command::Leave(epoch) => {
                if let Some(engine) = &mut self.engine {
                    engine.leave(epoch);
                }
                C::discard_id(&self.open_comm.take());
                self.left.send_replace(Some(epoch));
                Ok(Some(FromShard::Aborted { epoch }))
            }
            Command::Report(done) => {
                // Whoever asked may have given up.
                let _ = done.send(());
                Ok(None)
            }
        }
    }

    fn engine(&mut self) -> Result<&mut Engine<B, C>> {
        self.engine
            .as_mut()
            .context("a command needs a model, and none is loaded")
    }

    fn load(&mut self, load: &Load) -> Result<FromShard> {
        let backend = self.backend.take().context("a model is loaded already")?;
        let files = ModelFiles::open(&load.model, self.built_in)?;
        let answers = self.answers.clone();
        let mut progress = |bytes_done, bytes_total| {
            // The link is slower than the disk now and then; the next report will do.
            let _ = answers.try_send(FromShard::Progress {
                bytes_done,
                bytes_total,
            });
        };
        let engine = Engine::load(backend, self.place, (&files, load), &mut progress)
            .with_context(|| format!("load {files}"))?;
        let loaded = engine.loaded().clone();
        tracing::info!(
            weight_bytes = loaded.weight_bytes,
            workspace_bytes = loaded.workspace_bytes,
            load_us = loaded.load_us,
            // Bytes in a microsecond are megabytes in a second.
            megabytes_per_s = loaded.weight_bytes / loaded.load_us.max(1),
            "{files} is loaded"
        );
        self.engine = Some(engine);
        Ok(FromShard::Loaded(loaded))
    }

    fn join(&mut self, epoch: Epoch, id: &[u8], abort: &Abort) -> Result<Option<FromShard>> {
        let rank = self.place.rank.0;
        let interface = self.place.interface;
        let open_comm = self.open_comm.clone();
        let engine = self.engine()?;
        open_comm.set(id.to_vec());
        let seat = Seat {
            id,
            rank,
            world_size: engine.world_size(),
            interface,
            limit: JOIN_LIMIT,
            abort,
        };
        match C::join(engine.backend(), &seat) {
            Ok(comm) => {
                engine.enter(epoch, comm);
                drop(open_comm.take());
                tracing::info!(%epoch, "the communicator is formed");
                Ok(Some(FromShard::Joined { epoch }))
            }
            // Another rank's fault. The coordinator has a deadline too and will end the epoch; until then
            // weights and memory are worth keeping.
            Err(
                error @ (CommError::Aborted
                | CommError::Incomplete { .. }
                | CommError::Lost(_)
                | CommError::TimedOut { .. }),
            ) => {
                tracing::warn!(%epoch, "cannot join: {error}");
                Ok(None)
            }
            Err(error) => Err(error).context("join the communicator"),
        }
    }

    /// Begins a step, or gives its plan back where the one under way has to end first.
    fn begin(&mut self, plan: Box<StepPlan>) -> Result<Option<Box<StepPlan>>> {
        let (epoch, step) = (plan.epoch, plan.step);
        let begun = self.engine()?.begin(plan);
        begun.or_else(|error| given_up(error, (epoch, step)).map(|()| None))
    }

    /// Ends the oldest step.
    fn end(&mut self) -> Result<Option<FromShard>> {
        let engine = self.engine()?;
        let Some(oldest) = engine.oldest() else {
            return Ok(None);
        };
        match engine.end() {
            Ok(ran) => Ok(Some(FromShard::Ran(Box::new(ran)))),
            Err(error) => given_up(error, oldest).map(|()| None),
        }
    }
}

/// Lets a step go that has no result because its epoch is over. Any other error is the end of this shard.
fn given_up(error: StepError, (epoch, step): (Epoch, Step)) -> Result<()> {
    match error {
        StepError::Stale { .. }
        | StepError::Comm(CommError::Aborted)
        | StepError::Device(DeviceError::Interrupted { .. }) => {
            tracing::debug!(%epoch, %step, "no result: {error}");
            Ok(())
        }
        // The coordinator ends the epoch, at the latest when the step is late.
        StepError::Comm(CommError::Lost(_)) => {
            tracing::warn!(%epoch, %step, "no result: {error}");
            Ok(())
        }
        error => Err(error).with_context(|| format!("compute step {step} of epoch {epoch}")),
    }
}
