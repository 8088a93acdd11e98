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
        answer: Some(device.answer),
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
    /// For answers that need no device; `None` once the device thread is gone.
    answer: Option<mpsc::Sender<FromShard>>,
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
                changed = left.changed(), if self.answer.is_some() => match changed {
                    Ok(()) => self.device_left(*left.borrow_and_update()),
                    // The device thread is gone. With the last sender of answers the writer ends, after
                    // whatever the thread said last.
                    Err(_) => self.answer = None,
                },
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
                let sender = self.answer.as_ref().context("the device thread ended")?;
                sender.try_send(answer).context("answer an abort")
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{About, OpenComm};
    use std::future::pending;
    use topology::ids::{Rank, Step};
    use topology::link::{Admitted, Identity, Listener, connect};
    use topology::wire::{Hello, StepPlan};

    const PATIENCE: Duration = Duration::from_secs(30);

    /// The channels that a device thread would hold.
    struct FakeDevice {
        commands: mpsc::Receiver<Command>,
        answer: mpsc::Sender<FromShard>,
        left: watch::Sender<Option<Epoch>>,
    }

    impl FakeDevice {
        async fn next(&mut self) -> Command {
            let command = tokio::time::timeout(PATIENCE, self.commands.recv()).await;
            command.expect("in time").expect("the session lives")
        }
    }

    fn device() -> (Device, FakeDevice) {
        let (commands, inbox) = mpsc::channel(4);
        let (answer, answers) = mpsc::channel(4);
        let (left_sender, left) = watch::channel(None);
        let name = String::new();
        let device = Device {
            about: About {
                name,
                total_bytes: 0,
                free_bytes: 0,
            },
            commands,
            answers,
            answer: answer.clone(),
            left,
            open_comm: OpenComm::default(),
        };
        (
            device,
            FakeDevice {
                commands: inbox,
                answer,
                left: left_sender,
            },
        )
    }

    /// A session under way, and the coordinator's end of its link.
    async fn start(device: Device) -> (JoinHandle<Result<End>>, Admitted) {
        let mut listener = Listener::bind(std::net::Ipv4Addr::LOCALHOST.into()).unwrap();
        let identity = Identity::generate().unwrap();
        listener.expect(Rank(0), identity.certificate().clone());
        let address = listener.local_addr().unwrap();
        let coordinator = listener.certificate().clone();
        let session = tokio::spawn(async move {
            let hello = Hello {
                rank: Rank(0),
                pid: 1,
                device: String::new(),
                free_bytes: 0,
                total_bytes: 0,
            };
            let link = connect(address, &coordinator, &identity, hello, PATIENCE).await?;
            serve(link, device, pending()).await
        });
        let mut admitted = listener.accept(PATIENCE).await.unwrap();
        admitted
            .sender
            .send(&ToShard::Welcome {
                world_size: 1,
                generation: 0,
                pid: std::process::id(),
            })
            .await
            .unwrap();
        // The listener's socket carries the link.
        tokio::spawn(async move {
            pending::<()>().await;
            drop(listener);
        });
        (session, admitted)
    }

    async fn end(session: JoinHandle<Result<End>>) -> Result<End> {
        tokio::time::timeout(PATIENCE, session)
            .await
            .unwrap()
            .unwrap()
    }

    fn join(epoch: u32) -> ToShard {
        ToShard::JoinComm {
            epoch: Epoch(epoch),
            comm_id: vec![7],
        }
    }

    #[tokio::test]
    async fn a_device_that_stays_in_its_collective_ends_the_process() {
        let (device, mut fake) = device();
        let (session, mut coordinator) = start(device).await;
        coordinator.sender.send(&join(1)).await.unwrap();
        let Command::JoinComm { abort, .. } = fake.next().await else {
            panic!("not a join");
        };
        assert!(!abort.is_aborted());
        let started = Instant::now();
        coordinator
            .sender
            .send(&ToShard::Abort { epoch: Epoch(1) })
            .await
            .unwrap();
        assert!(matches!(fake.next().await, Command::Leave(Epoch(1))));
        assert!(abort.is_aborted(), "before the device is asked to leave");
        assert_eq!(end(session).await.unwrap(), End::Stuck);
        let elapsed = started.elapsed();
        assert!(
            (LEAVE_LIMIT..LEAVE_LIMIT + Duration::from_secs(1)).contains(&elapsed),
            "{elapsed:?}"
        );
    }

    #[tokio::test]
    async fn a_device_that_leaves_in_time_lives_on() {
        let (device, mut fake) = device();
        let (session, mut coordinator) = start(device).await;
        coordinator.sender.send(&join(1)).await.unwrap();
        fake.next().await;
        coordinator
            .sender
            .send(&ToShard::Abort { epoch: Epoch(1) })
            .await
            .unwrap();
        fake.next().await;
        fake.left.send_replace(Some(Epoch(1)));
        fake.answer
            .send(FromShard::Aborted { epoch: Epoch(1) })
            .await
            .unwrap();
        let heard = coordinator.receiver.recv().await.unwrap();
        assert_eq!(heard, FromShard::Aborted { epoch: Epoch(1) });
        tokio::time::sleep(LEAVE_LIMIT + Duration::from_millis(200)).await;
        coordinator.sender.send(&join(2)).await.unwrap();
        assert!(matches!(
            fake.next().await,
            Command::JoinComm {
                epoch: Epoch(2),
                ..
            }
        ));
        coordinator.sender.send(&ToShard::Stop).await.unwrap();
        assert_eq!(end(session).await.unwrap(), End::Stopped);
    }

    #[tokio::test]
    async fn an_abort_that_overtakes_ends_what_comes_after_it() {
        let (device, mut fake) = device();
        let (_session, mut coordinator) = start(device).await;
        coordinator
            .sender
            .send(&ToShard::Abort { epoch: Epoch(3) })
            .await
            .unwrap();
        let heard = coordinator.receiver.recv().await.unwrap();
        assert_eq!(heard, FromShard::Aborted { epoch: Epoch(3) });
        let plan = StepPlan {
            epoch: Epoch(3),
            step: Step(0),
            rows: vec![],
        };
        for late in [
            join(3),
            join(2),
            ToShard::MakeComm { epoch: Epoch(3) },
            ToShard::Run(Box::new(plan)),
        ] {
            coordinator.sender.send(&late).await.unwrap();
        }
        coordinator
            .sender
            .send(&ToShard::MakeComm { epoch: Epoch(4) })
            .await
            .unwrap();
        let first = fake.next().await;
        assert!(matches!(first, Command::MakeComm(Epoch(4))), "{first:?}");
    }

    #[tokio::test]
    async fn more_commands_than_may_wait_break_the_protocol() {
        let (device, _fake) = device();
        let (session, mut coordinator) = start(device).await;
        for epoch in 0..5 {
            coordinator
                .sender
                .send(&ToShard::MakeComm {
                    epoch: Epoch(epoch),
                })
                .await
                .unwrap();
        }
        let error = end(session).await.unwrap_err();
        assert!(
            format!("{error:#}").contains("more commands than may wait"),
            "{error:#}"
        );
    }

    #[tokio::test]
    async fn a_device_thread_that_is_gone_ends_the_session() {
        for last_words in [None, Some("the sentence")] {
            let (device, fake) = device();
            let (session, mut coordinator) = start(device).await;
            if let Some(reason) = last_words {
                let reason = reason.to_owned();
                fake.answer
                    .send(FromShard::Failed { reason })
                    .await
                    .unwrap();
            }
            drop(fake);
            let error = end(session).await.unwrap_err().to_string();
            assert_eq!(error, last_words.unwrap_or("the device thread ended"));
            if let Some(reason) = last_words {
                let reason = reason.to_owned();
                let heard = coordinator.receiver.recv().await.unwrap();
                assert_eq!(heard, FromShard::Failed { reason });
            }
        }
    }
}
