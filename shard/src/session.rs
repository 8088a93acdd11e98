//! The shard's end of the link: turns the coordinator's messages into commands for the device thread
//! and carries the answers back.
//!
//! Never waits for the device: an [`Abort`](ToShard::Abort) takes effect while a collective is under
//! way. Decides nothing about what is computed.
//!
//! Invariants: an epoch that was aborted never comes back, whatever arrives late or out of order; a
//! device that does not leave its collective within [`LEAVE_LIMIT`] ends the process; so does the loss
//! of the coordinator.

use crate::comm::Abort;
use crate::device::{Command, Device};
use anyhow::{Context, Result, bail};
use std::pin::{Pin, pin};
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use topology::ids::Epoch;
use topology::link::{Connected, LinkReceiver, LinkSender};
use topology::wire::{FromShard, ToShard};

/// How long a device may take to leave its collective after an abort.
pub(crate) const LEAVE_LIMIT: Duration = Duration::from_secs(2);
/// How long the last message may take to reach the coordinator.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// How a session ended, where it was not lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The coordinator said so.
    Stopped,
    /// The device did not leave its collective; nothing but the end of the process gets it out.
    Stuck,
}

/// Serves the coordinator until it says stop.
///
/// `orphaned` ends when the process that started this one is gone.
///
/// # Errors
/// The link or the coordinator was lost, the protocol was broken, or the device failed (which the
/// coordinator has been told).
pub(crate) async fn serve(
    link: Connected,
    device: Device,
    orphaned: impl Future<Output = ()>,
) -> Result<End> {
    let Connected {
        sender, receiver, ..
    } = link;
    let writer = tokio::spawn(write_answers(sender, device.answers));
    let session = Session {
        commands: device.commands,
        answer: device.answer,
        group: None,
        ended: None,
        leaving: None,
    };
    session
        .run(receiver, writer, (device.left, pin!(orphaned)))
        .await
}

/// Carries answers to the coordinator. Ends after a [`FromShard::Failed`], which it returns.
async fn write_answers(
    mut sender: LinkSender<FromShard>,
    mut answers: mpsc::Receiver<FromShard>,
) -> Result<String> {
    while let Some(answer) = answers.recv().await {
        sender
            .send(&answer)
            .await
            .context("send to the coordinator")?;
        if let FromShard::Failed { reason } = answer {
            // The sentence matters more than whether it arrives: it is logged here too.
            let _ = sender.finish(FAREWELL_LIMIT).await;
            return Ok(reason);
        }
    }
    bail!("the device thread ended")
}

struct Session {
    commands: mpsc::Sender<Command>,
    answer: mpsc::Sender<FromShard>,
    /// The epoch that the device is in or on its way into, and what gets it out.
    group: Option<(Epoch, Abort)>,
    /// Epochs up to this one are over.
    ended: Option<Epoch>,
    /// An epoch that the device has to leave, and until when.
    leaving: Option<(Epoch, Instant)>,
}

impl Session {
    async fn run(
        mut self,
        mut receiver: LinkReceiver<ToShard>,
        mut writer: JoinHandle<Result<String>>,
        (mut left, mut orphaned): (
            watch::Receiver<Option<Epoch>>,
            Pin<&mut impl Future<Output = ()>>,
        ),
    ) -> Result<End> {
        loop {
            // Far away while there is nothing to leave; the branch is disabled then.
            let deadline = self.leaving.map_or_else(far_away, |(_, deadline)| deadline);
            tokio::select! {
                biased;
                message = receiver.recv() => {
                    let message = message.context("receive from the coordinator")?;
                    if message == ToShard::Stop {
                        return Ok(End::Stopped);
                    }
                    self.handle(message)?;
                }
                // An error is a device thread that is gone: the writer will say so.
                Ok(()) = left.changed() => self.device_left(*left.borrow_and_update()),
                () = sleep_until(deadline), if self.leaving.is_some() => return Ok(End::Stuck),
                ended = &mut writer => bail!("{}", ended.context("send answers")??),
                () = &mut orphaned => bail!("the coordinator's process is gone"),
            }
        }
    }

    /// Never waits: what does not fit the queue breaks the protocol.
    fn handle(&mut self, message: ToShard) -> Result<()> {
        match message {
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
                let abort = Abort::default();
                self.group = Some((epoch, abort.clone()));
                self.command(Command::JoinComm { epoch, id, abort })
            }
            ToShard::Run(plan) => self.command(Command::Run(plan)),
            ToShard::Abort { epoch } => self.abort(epoch),
            ToShard::Welcome { .. } => bail!("the coordinator said Welcome twice"),
            ToShard::Stop => Ok(()),
        }
    }

    fn is_over(&self, epoch: Epoch) -> bool {
        self.ended.is_some_and(|ended| epoch <= ended)
    }

    fn abort(&mut self, epoch: Epoch) -> Result<()> {
        self.ended = self.ended.max(Some(epoch));
        match self.group.take_if(|(current, _)| *current <= epoch) {
            Some((_, abort)) => {
                abort.abort();
                self.leaving = Some((epoch, Instant::now() + LEAVE_LIMIT));
                self.command(Command::Leave(epoch))
            }
            // Asked again while the device is on its way out: the answer to the first serves both.
            None if self.leaving.is_some_and(|(leaving, _)| epoch <= leaving) => Ok(()),
            // Nothing to leave, so the device is not asked: it may be loading for minutes.
            None => {
                let answer = FromShard::Aborted { epoch };
                self.answer.try_send(answer).context("answer an abort")
            }
        }
    }

    fn device_left(&mut self, epoch: Option<Epoch>) {
        self.leaving.take_if(|(leaving, _)| epoch >= Some(*leaving));
    }

    fn command(&self, command: Command) -> Result<()> {
        self.commands
            .try_send(command)
            .context("the coordinator sent more commands than may wait, or the device is gone")
    }
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}
