//! The shard's end of the link: turns the coordinator's messages into commands for the device thread
//! and carries the answers back.
//!
//! Never waits for the device: an [`Abort`](ToShard::Abort) takes effect while a collective is under
//! way. Decides nothing about what is computed, nor what becomes of a shard that lost its coordinator.
//!
//! Invariants: an epoch that was aborted never comes back, whatever arrives late or out of order; a
//! device that does not leave its collective within [`LEAVE_LIMIT`] ends the process.

use crate::comm::Abort;
use crate::device::{Command, Device};
use anyhow::{Context, Error, Result, bail};
use std::pin::{Pin, pin};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};
use topology::ids::Epoch;
use topology::link::{Connected, LinkError, LinkReceiver, LinkSender};
use topology::wire::{FromShard, Held, Load, Loaded, ToShard};

/// How long a device may take to leave its collective after an abort.
pub(crate) const LEAVE_LIMIT: Duration = Duration::from_secs(2);
/// How long the last message may take to reach the coordinator.
const FAREWELL_LIMIT: Duration = Duration::from_secs(2);

/// How a session ended, where neither end broke the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The coordinator said so.
    Stopped,
    /// The device did not leave its collective; nothing but the end of the process gets it out.
    Stuck,
    /// The coordinator is gone, or does not answer; why, in a sentence.
    Lost(String),
}

/// One device's session with one coordinator after the other.
pub(crate) struct Session {
    commands: mpsc::Sender<Command>,
    /// For answers that need no device; `None` once the device thread is gone.
    answer: Option<mpsc::Sender<FromShard>>,
    /// Taken out while a coordinator is served.
    outbox: Option<Outbox>,
    left: watch::Receiver<Option<Epoch>>,
    /// The load that was asked for, once it was.
    load: Option<Load>,
    num_blocks: u32,
    /// The epoch that the device is in or on its way into, and what gets it out.
    group: Option<(Epoch, Abort)>,
    /// Epochs up to this one are over.
    ended: Option<Epoch>,
    /// An epoch that the device has to leave, and until when.
    leaving: Option<(Epoch, Instant)>,
}

/// Answers on their way, and what they said of this device.
struct Outbox {
    answers: mpsc::Receiver<FromShard>,
    loaded: Option<Loaded>,
    kv_bytes: Option<u64>,
}

impl Outbox {
    /// Carries answers to the coordinator. Ends after a [`FromShard::Failed`], which it returns.
    async fn write(&mut self, mut sender: LinkSender<FromShard>) -> Result<String, LinkError> {
        while let Some(answer) = self.next().await {
            sender.send(&answer).await?;
            if let FromShard::Failed { reason } = answer {
                // The sentence matters more than whether it arrives: it is logged here too.
                let _ = sender.finish(FAREWELL_LIMIT).await;
                return Ok(reason);
            }
        }
        Ok("the device thread ended".to_owned())
    }

    async fn next(&mut self) -> Option<FromShard> {
        let answer = self.answers.recv().await?;
        match &answer {
            FromShard::Loaded(loaded) => self.loaded = Some(loaded.clone()),
            FromShard::Allocated { kv_bytes } => self.kv_bytes = Some(*kv_bytes),
            _ => {}
        }
        Some(answer)
    }
}

impl Session {
    /// Over a device that was not told anything yet.
    pub(crate) fn new(device: Device) -> Self {
        Self {
            commands: device.commands,
            answer: Some(device.answer),
            outbox: Some(Outbox {
                answers: device.answers,
                loaded: None,
                kv_bytes: None,
            }),
            left: device.left,
            load: None,
            num_blocks: 0,
            group: None,
            ended: None,
            leaving: None,
        }
    }

    /// Serves a coordinator until it says stop or is lost; `gone` ends, and says how, when its process has.
    ///
    /// # Errors
    /// The coordinator closed the link, the protocol was broken, or the device failed (which the
    /// coordinator has been told).
    pub(crate) async fn serve(
        &mut self,
        link: Connected,
        gone: impl Future<Output = End>,
    ) -> Result<End> {
        let Connected {
            sender, receiver, ..
        } = link;
        let mut outbox = self.outbox.take().context("a coordinator is served")?;
        let writer = outbox.write(sender);
        let ended = self.turns(receiver, pin!(writer), pin!(gone)).await;
        self.outbox = Some(outbox);
        ended
    }

    async fn turns(
        &mut self,
        mut receiver: LinkReceiver<ToShard>,
        mut writer: Pin<&mut impl Future<Output = Result<String, LinkError>>>,
        mut gone: Pin<&mut impl Future<Output = End>>,
    ) -> Result<End> {
        loop {
            // Far away while there is nothing to leave; the branch is disabled then.
            let deadline = self.leaving.map_or_else(far_away, |(_, deadline)| deadline);
            tokio::select! {
                biased;
                message = receiver.recv() => match message {
                    Ok(ToShard::Stop) => return Ok(End::Stopped),
                    Ok(message) => self.handle(message)?,
                    Err(error) => return lost("receive from the coordinator", error),
                },
                changed = self.left.changed(), if self.answer.is_some() => self.device_left(changed.is_ok()),
                () = sleep_until(deadline), if self.leaving.is_some() => return Ok(End::Stuck),
                ended = &mut writer => match ended {
                    Ok(reason) => bail!("{reason}"),
                    Err(error) => return lost("send to the coordinator", error),
                },
                ended = &mut gone => return Ok(ended),
            }
        }
    }

    /// What this rank has, if it is all that a coordinator needs in order to go on.
    pub(crate) fn held(&self) -> Option<Held> {
        let outbox = self.outbox.as_ref()?;
        Some(Held {
            load: self.load.clone()?,
            loaded: outbox.loaded.clone()?,
            num_blocks: self.num_blocks,
            kv_bytes: outbox.kv_bytes?,
            epoch: self.ended.unwrap_or_default(),
        })
    }

    /// After a coordinator was lost: has the device leave its epoch, and forgets what it answered.
    ///
    /// # Errors
    /// The device failed meanwhile.
    pub(crate) async fn leave(&mut self) -> Result<Option<End>> {
        if let Some((epoch, _)) = &self.group {
            self.abort(*epoch)?;
        }
        let (done, all_done) = oneshot::channel();
        self.command(Command::Report(done))?;
        let drained = async {
            tokio::select! {
                biased;
                failed = self.idle() => failed,
                // What it answered before is in the queue, and taken out below.
                _ = all_done => Ok(()),
            }
        };
        let Ok(drained) = timeout(LEAVE_LIMIT, drained).await else {
            return Ok(Some(End::Stuck));
        };
        drained?;
        self.leaving = None;
        self.left.mark_unchanged();
        let outbox = self.outbox.as_mut().context("a coordinator is served")?;
        while let Ok(answer) = outbox.answers.try_recv() {
            check(&answer)?;
        }
        Ok(None)
    }

    /// Passes over what the device says while there is no coordinator.
    ///
    /// # Errors
    /// Always: the device failed, or its thread is gone.
    pub(crate) async fn idle(&mut self) -> Result<()> {
        let outbox = self.outbox.as_mut().context("a coordinator is served")?;
        loop {
            let answer = outbox.next().await;
            check(&answer.context("the device thread ended")?)?;
        }
    }

    /// Never waits: what does not fit the queue breaks the protocol.
    fn handle(&mut self, message: ToShard) -> Result<()> {
        match message {
            ToShard::Load(load) => {
                self.load = Some(load.clone());
                self.command(Command::Load(load))
            }
            ToShard::Allocate { num_blocks } => {
                self.num_blocks = num_blocks;
                self.command(Command::Allocate(num_blocks))
            }
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
                let sender = self.answer.as_ref().context("the device thread ended")?;
                sender.try_send(answer).context("answer an abort")
            }
        }
    }

    fn device_left(&mut self, is_there: bool) {
        if !is_there {
            // The device thread is gone. With the last sender of answers the writer ends, after
            // whatever the thread said last.
            self.answer = None;
            return;
        }
        let epoch = *self.left.borrow_and_update();
        self.leaving.take_if(|(leaving, _)| epoch >= Some(*leaving));
    }

    fn command(&self, command: Command) -> Result<()> {
        self.commands
            .try_send(command)
            .context("the coordinator sent more commands than may wait, or the device is gone")
    }
}

/// A link that fell silent is a coordinator that is lost; one that was closed is its word.
fn lost(doing: &'static str, error: LinkError) -> Result<End> {
    match error {
        LinkError::TimedOut(_) => Ok(End::Lost(format!("cannot {doing}: {error}"))),
        error => Err(Error::new(error).context(doing)),
    }
}

fn check(answer: &FromShard) -> Result<()> {
    match answer {
        FromShard::Failed { reason } => bail!("{reason}"),
        _ => Ok(()),
    }
}

fn far_away() -> Instant {
    Instant::now() + Duration::from_secs(3600)
}

#[cfg(test)]
mod tests;
