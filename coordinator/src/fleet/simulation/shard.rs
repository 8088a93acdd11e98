//! A simulated shard: a session that never waits for its device, and a device that does one thing at a
//! time.
//!
//! Both keep to the wire's protocol as the real shard does: an abort overtakes, an epoch that is over
//! never comes back, who cannot leave a collective ends its process. A message that the real shard
//! would not survive, though it did nothing wrong itself, is a violation of the coordinator's.

use super::device::{Command, Device};
use super::faults::Moment;
use super::world::{ProcId, World};
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use topology::ids::Epoch;
use topology::wire::{FromShard, ToShard};

/// How long a device may take to leave its collective after an abort.
const LEAVE_LIMIT: Duration = Duration::from_secs(2);

/// Commands that may wait for the device.
const QUEUED_COMMANDS: usize = 16;

/// Where a shard puts what it says.
pub(super) type Voice = mpsc::UnboundedSender<(Instant, FromShard)>;

/// The part of a shard that reads its link.
#[derive(Debug)]
pub(super) struct Session {
    world: Arc<World>,
    proc: ProcId,
    voice: Voice,
    commands: mpsc::Sender<Command>,
    welcome: bool,
    /// The epoch that the device is in or on its way into, and what gets it out.
    group: Option<(Epoch, Arc<AtomicBool>)>,
    /// Epochs up to this one are over.
    ended: Option<Epoch>,
    /// An epoch that the device has to leave, and until when.
    leaving: Option<(Epoch, Instant)>,
}

impl Session {
    /// Starts session and device; what comes through `messages` is what the link brings.
    pub(super) fn spawn(
        world: &Arc<World>,
        proc: ProcId,
        voice: Voice,
        messages: mpsc::UnboundedReceiver<ToShard>,
    ) {
        let (commands, inbox) = mpsc::channel(QUEUED_COMMANDS);
        let device = Device::new(world, proc, voice.clone());
        world.spawn(proc, device.run(inbox));
        let session = Self {
            world: Arc::clone(world),
            proc,
            voice,
            commands,
            welcome: false,
            group: None,
            ended: None,
            leaving: None,
        };
        world.spawn(proc, session.run(messages));
    }

    async fn run(mut self, mut messages: mpsc::UnboundedReceiver<ToShard>) {
        loop {
            let far_away = Instant::now() + Duration::from_secs(3600);
            let deadline = self.leaving.map_or(far_away, |(_, until)| until);
            let message = tokio::select! {
                biased;
                // Without a link there is nothing to read; whoever cut it ends the process.
                Some(message) = messages.recv() => Some(message),
                () = sleep_until(deadline) => None,
            };
            self.world.awake(self.proc).await;
            self.forget_what_was_left();
            match message {
                Some(ToShard::Stop) => return self.end("exit status: 0").await,
                Some(message) => {
                    if let Err(why) = self.handle(message).await {
                        self.world
                            .violation(format_args!("process {}: {why}", self.proc));
                        return self.end("exit status: 1").await;
                    }
                }
                None if self
                    .leaving
                    .is_some_and(|(_, until)| until <= Instant::now()) =>
                {
                    return self.end("exit status: 1 (stuck)").await;
                }
                None => {}
            }
        }
    }

    async fn end(&self, how: &str) {
        self.world.die(self.proc, how);
        pending::<()>().await;
    }

    fn forget_what_was_left(&mut self) {
        let left = self.world.lock().procs[self.proc].left;
        self.leaving.take_if(|(leaving, _)| left >= Some(*leaving));
    }

    async fn handle(&mut self, message: ToShard) -> Result<(), &'static str> {
        match message {
            ToShard::Welcome { .. } if self.welcome => Err("Welcome came twice"),
            ToShard::Welcome { .. } => {
                self.welcome = true;
                Ok(())
            }
            _ if !self.welcome && !matches!(message, ToShard::Abort { .. }) => {
                Err("something came before Welcome")
            }
            ToShard::Load(load) => self.command(Command::Load(load)),
            ToShard::Allocate { num_blocks } => self.command(Command::Allocate(num_blocks)),
            // An abort may overtake what was sent before it.
            ToShard::MakeComm { epoch } | ToShard::JoinComm { epoch, .. }
                if self.is_over(epoch) =>
            {
                Ok(())
            }
            ToShard::Run(plan) if self.is_over(plan.epoch) => Ok(()),
            ToShard::MakeComm { epoch } => self.command(Command::MakeComm(epoch)),
            ToShard::JoinComm { epoch, comm_id: id } => {
                let abort = Arc::new(AtomicBool::new(false));
                self.group = Some((epoch, Arc::clone(&abort)));
                self.command(Command::JoinComm { epoch, id, abort })
            }
            ToShard::Run(plan) => self.command(Command::Run(plan)),
            ToShard::Abort { epoch } => {
                self.world.at(self.proc, Moment::Abort).await;
                self.abort(epoch)
            }
            ToShard::Stop => Ok(()),
        }
    }

    fn is_over(&self, epoch: Epoch) -> bool {
        self.ended.is_some_and(|ended| epoch <= ended)
    }

    fn abort(&mut self, epoch: Epoch) -> Result<(), &'static str> {
        self.ended = self.ended.max(Some(epoch));
        match self.group.take_if(|(current, _)| *current <= epoch) {
            Some((_, abort)) => {
                abort.store(true, Ordering::Relaxed);
                self.world.tell();
                self.leaving = Some((epoch, Instant::now() + LEAVE_LIMIT));
                self.command(Command::Leave(epoch))
            }
            // The answer to the first serves both.
            None if self.leaving.is_some_and(|(leaving, _)| epoch <= leaving) => Ok(()),
            None => {
                say(
                    &self.world,
                    self.proc,
                    &self.voice,
                    FromShard::Aborted { epoch },
                );
                Ok(())
            }
        }
    }

    fn command(&self, command: Command) -> Result<(), &'static str> {
        let sent = self.commands.try_send(command);
        sent.map_err(|_| "more commands came than may wait")
    }
}

/// Hands a message to the link.
pub(super) fn say(world: &World, proc: ProcId, voice: &Voice, message: FromShard) {
    let mut state = world.lock();
    let state = &mut *state;
    let delay = state.plan.delay(&mut state.rng);
    let name = name_of(&message);
    let source = state.procs[proc].source;
    state.note(format_args!("{source:?} says {name}"));
    // The other end goes only with the whole run.
    let _ = voice.send((Instant::now() + delay, message));
}

/// A message without its content, for the log.
fn name_of(message: &FromShard) -> String {
    match message {
        FromShard::Ran(ran) => format!("Ran {}/{}", ran.epoch, ran.step),
        FromShard::CommMade { epoch, .. } => format!("CommMade {epoch}"),
        FromShard::Loaded(_) => "Loaded".to_owned(),
        other => format!("{other:?}"),
    }
}
