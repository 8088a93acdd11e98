//! Everything that shards say, in one queue.
//!
//! Readers and process watchers put it in; a phase takes out what it waits for, under one
//! deadline. Knows nothing of what messages mean. Invariant: whoever waits here hears of a dead
//! process or a lost link at once, whatever it waits for.

use super::fault::{Cause, Fault, Phase};
use std::ops::Range;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout, timeout_at};
use topology::ids::Rank;
use topology::wire::FromShard;

/// Messages that may wait per rank. A rank answers one request at a time; only loading says more,
/// and its reader waits when this is full.
pub(super) const CAPACITY_PER_RANK: usize = 64;

/// After a link is lost, how long its process may take to be seen as ended: the better reason.
const EXIT_GRACE: Duration = Duration::from_millis(300);

/// Longest part of an unexpected message that is shown.
const SHOWN: usize = 120;

/// What is heard of a rank.
#[derive(Debug)]
pub(super) enum Heard {
    /// A message.
    Message(FromShard),
    /// The process ended, or the link broke; nothing more comes from this source.
    Gone(Cause),
}

/// The end that phases read.
#[derive(Debug)]
pub(super) struct Inbox {
    heard: mpsc::Receiver<(Rank, Heard)>,
    /// The first fault; it does not pass.
    fault: Option<Fault>,
}

/// The end that readers and watchers write.
pub(super) type Outlet = mpsc::Sender<(Rank, Heard)>;

impl Inbox {
    /// Both ends.
    pub(super) fn new(world_size: usize) -> (Self, Outlet) {
        let (outlet, heard) = mpsc::channel(CAPACITY_PER_RANK * world_size.max(1));
        (Self { heard, fault: None }, outlet)
    }

    /// One value from each of `ranks`, which begin at 0, in order.
    ///
    /// `take` turns a message into the value; `Ok(None)` passes over one that is allowed but not
    /// the awaited one, `Err` gives back one that is not allowed.
    pub(super) async fn gather<T>(
        &mut self,
        ranks: Range<usize>,
        phase: Phase,
        limit: Duration,
        mut take: impl FnMut(Rank, FromShard) -> Result<Option<T>, FromShard>,
    ) -> Result<Vec<T>, Fault> {
        let deadline = Instant::now() + limit;
        let mut values: Vec<Option<T>> = ranks.map(|_| None).collect();
        while let Some(missing) = values.iter().position(Option::is_none) {
            let next = timeout_at(deadline, self.next(phase)).await;
            let Ok(next) = next else {
                let missing = Rank(u32::try_from(missing).unwrap_or(u32::MAX));
                return Err(Fault::of(missing, Cause::Deadline { phase, limit }));
            };
            let (rank, message) = next?;
            match take(rank, message) {
                Ok(None) => {}
                Ok(Some(value)) => {
                    let Some(place @ None) = values.get_mut(rank.index()) else {
                        let message = "an answer that was not asked for".to_owned();
                        return Err(Fault::of(rank, Cause::Unexpected { phase, message }));
                    };
                    *place = Some(value);
                }
                Err(message) => return Err(unexpected(rank, phase, &message)),
            }
        }
        Ok(values.into_iter().flatten().collect())
    }

    /// Waits for a fault while nothing is asked of the shards. Cancel-safe.
    pub(super) async fn fault(&mut self) -> Fault {
        match self.next(Phase::Idle).await {
            Err(fault) => fault,
            Ok((rank, message)) => unexpected(rank, Phase::Idle, &message),
        }
    }

    /// The next message, or the fault that takes its place. Cancel-safe: a fault that was heard of
    /// is kept, and every later call answers it.
    async fn next(&mut self, phase: Phase) -> Result<(Rank, FromShard), Fault> {
        if self.fault.is_none() {
            match self.heard.recv().await {
                Some((rank, Heard::Message(FromShard::Failed { reason }))) => {
                    self.fault = Some(Fault::of(rank, Cause::Failed(reason)));
                }
                Some((rank, Heard::Message(message))) => return Ok((rank, message)),
                Some((rank, Heard::Gone(cause))) => self.fault = Some(Fault::of(rank, cause)),
                None => {
                    let why = format!("no one listens to the shards ({})", phase.name());
                    self.fault = Some(Fault::group(Cause::Coordinator(why)));
                }
            }
        }
        if let Some(lost) = &self.fault
            && matches!(lost.cause, Cause::LinkLost(_))
            && let Ok(Some(better)) = timeout(EXIT_GRACE, better_reason(&mut self.heard)).await
        {
            self.fault = Some(better);
        }
        Err(self.fault.clone().expect("set above"))
    }
}

/// A link is lost when its process dies, and is heard of first; the exit status, or the last words
/// of the rank that failed first, say more.
async fn better_reason(heard: &mut mpsc::Receiver<(Rank, Heard)>) -> Option<Fault> {
    while let Some((rank, heard)) = heard.recv().await {
        match heard {
            Heard::Gone(cause @ Cause::Exited(_)) => return Some(Fault::of(rank, cause)),
            Heard::Message(FromShard::Failed { reason }) => {
                return Some(Fault::of(rank, Cause::Failed(reason)));
            }
            Heard::Message(_) | Heard::Gone(_) => {}
        }
    }
    None
}

fn unexpected(rank: Rank, phase: Phase, message: &FromShard) -> Fault {
    let mut message = format!("{message:?}");
    if let Some((cut, _)) = message.char_indices().nth(SHOWN) {
        message.truncate(cut);
    }
    Fault::of(rank, Cause::Unexpected { phase, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use topology::ids::Epoch;

    fn joined(epoch: u32) -> Heard {
        Heard::Message(FromShard::Joined {
            epoch: Epoch(epoch),
        })
    }

    fn take(_: Rank, message: FromShard) -> Result<Option<u32>, FromShard> {
        match message {
            FromShard::Joined { epoch } => Ok(Some(epoch.0)),
            FromShard::Progress { .. } => Ok(None),
            other => Err(other),
        }
    }

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn answers_come_in_rank_order() {
        let (mut inbox, outlet) = Inbox::new(3);
        let progress = FromShard::Progress {
            bytes_done: 1,
            bytes_total: 2,
        };
        outlet
            .send((Rank(1), Heard::Message(progress)))
            .await
            .unwrap();
        for (rank, value) in [(2, 12), (0, 10), (1, 11)] {
            outlet.send((Rank(rank), joined(value))).await.unwrap();
        }
        assert_eq!(
            inbox.gather(0..3, Phase::Join, LIMIT, take).await,
            Ok(vec![10, 11, 12])
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_rank_is_named_after_the_deadline() {
        let (mut inbox, outlet) = Inbox::new(2);
        outlet.send((Rank(0), joined(0))).await.unwrap();
        let fault = inbox
            .gather(0..2, Phase::Join, LIMIT, take)
            .await
            .unwrap_err();
        let cause = Cause::Deadline {
            phase: Phase::Join,
            limit: LIMIT,
        };
        assert_eq!(fault, Fault::of(Rank(1), cause));
        assert_eq!(fault.to_string(), "rank 1: no answer within 5s (join)");
    }

    #[tokio::test(start_paused = true)]
    async fn the_exit_is_a_better_reason_than_the_lost_link() {
        let (mut inbox, outlet) = Inbox::new(2);
        let lost = || Heard::Gone(Cause::LinkLost("timed out".into()));
        outlet.send((Rank(1), lost())).await.unwrap();
        let exited = Cause::Exited("signal: 9 (SIGKILL)".into());
        outlet
            .send((Rank(1), Heard::Gone(exited.clone())))
            .await
            .unwrap();
        assert_eq!(inbox.fault().await, Fault::of(Rank(1), exited.clone()));
        assert_eq!(
            inbox.fault().await,
            Fault::of(Rank(1), exited),
            "it does not pass"
        );
        let (mut inbox, outlet) = Inbox::new(2);
        outlet.send((Rank(0), lost())).await.unwrap();
        let fault = inbox.fault().await;
        assert_eq!(
            fault,
            Fault::of(Rank(0), Cause::LinkLost("timed out".into()))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_is_not_lost_with_who_waited_for_it() {
        let (mut inbox, outlet) = Inbox::new(1);
        let lost = Cause::LinkLost("timed out".into());
        outlet
            .send((Rank(0), Heard::Gone(lost.clone())))
            .await
            .unwrap();
        let cut = timeout(EXIT_GRACE / 2, inbox.fault()).await;
        assert!(cut.is_err(), "it waits for a better reason");
        assert_eq!(inbox.fault().await, Fault::of(Rank(0), lost));
    }

    #[tokio::test(start_paused = true)]
    async fn what_no_one_asked_for_is_a_fault() {
        let (mut inbox, outlet) = Inbox::new(1);
        outlet.send((Rank(0), joined(3))).await.unwrap();
        let fault = inbox.fault().await;
        assert!(
            matches!(
                fault.cause,
                Cause::Unexpected {
                    phase: Phase::Idle,
                    ..
                }
            ),
            "{fault}"
        );
        outlet.send((Rank(0), joined(3))).await.unwrap();
        outlet.send((Rank(0), joined(3))).await.unwrap();
        assert_eq!(
            inbox.gather(0..1, Phase::Join, LIMIT, take).await,
            Ok(vec![3])
        );
        let failed = FromShard::Failed {
            reason: "no memory".into(),
        };
        outlet
            .send((Rank(0), Heard::Message(failed)))
            .await
            .unwrap();
        assert_eq!(
            inbox.fault().await.cause.to_string(),
            "unexpected message (idle): Joined { epoch: Epoch(3) }"
        );
        assert_eq!(
            inbox.fault().await,
            Fault::of(Rank(0), Cause::Failed("no memory".into()))
        );
    }
}
