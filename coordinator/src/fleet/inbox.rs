//! Everything that shards say, in one queue.
//!
//! Readers and process watchers put it in; a phase takes out what it waits for, under one
//! deadline. Knows of messages only which epoch they belong to. Invariants: whoever waits here hears
//! of a dead process or a lost link at once, whatever it waits for; nothing that an earlier
//! process of a rank said, and nothing of an earlier epoch, comes out.

use super::fault::{Cause, Fault, Phase};
use std::ops::Range;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};
use topology::ids::{Epoch, Rank};
use topology::wire::FromShard;

/// Messages that may wait per rank. A rank answers one request at a time; only loading says more,
/// and its reader waits when this is full.
pub(super) const CAPACITY_PER_RANK: usize = 64;

/// After a link broke, how long its process may take to be seen as ended: the better reason. One that fell silent had
/// its time.
const EXIT_GRACE: Duration = Duration::from_millis(300);

/// Longest part of an unexpected message that is shown.
const SHOWN: usize = 120;

/// One process of a rank; the next one in its place has the next incarnation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// The rank.
    pub rank: Rank,
    /// Counts the rank's processes.
    pub incarnation: u32,
}

/// What is heard of a rank.
#[derive(Debug)]
pub enum Heard {
    /// A message.
    Message(FromShard),
    /// The process ended, or the link broke; nothing more comes from this source.
    Gone(Cause),
}

/// The end that phases read.
#[derive(Debug)]
pub(super) struct Inbox {
    heard: mpsc::Receiver<(Source, Heard)>,
    outlet: Outlet,
    /// By rank, whose words count.
    incarnations: Vec<u32>,
    /// Ranks that are gone, in the order in which that was heard. They stay gone until replaced.
    gone: Vec<Fault>,
    /// Until when a better reason for that is waited for, once somebody waits.
    explained: Option<Instant>,
    epoch: Epoch,
}

/// The end that readers and watchers write.
pub type Outlet = mpsc::Sender<(Source, Heard)>;

impl Inbox {
    /// For `world_size` ranks, of which nothing was heard yet.
    pub(super) fn new(world_size: usize) -> Self {
        let (outlet, heard) = mpsc::channel(CAPACITY_PER_RANK * world_size.max(1));
        Self {
            heard,
            outlet,
            incarnations: vec![0; world_size],
            gone: Vec::new(),
            explained: None,
            epoch: Epoch::default(),
        }
    }

    /// Where sources put what they hear.
    pub(super) fn outlet(&self) -> &Outlet {
        &self.outlet
    }

    /// Messages of epochs before `epoch` are over.
    pub(super) fn begin(&mut self, epoch: Epoch) {
        self.epoch = epoch;
    }

    /// As what the current process of `rank` speaks.
    pub(super) fn source(&self, rank: Rank) -> Source {
        Source {
            rank,
            incarnation: self.incarnations[rank.index()],
        }
    }

    /// Forgets the process of `rank` and says as what its successor speaks.
    pub(super) fn replace(&mut self, rank: Rank) -> Source {
        self.incarnations[rank.index()] += 1;
        self.gone.retain(|fault| fault.rank != Some(rank));
        if self.gone.is_empty() {
            self.explained = None;
        }
        self.source(rank)
    }

    /// Takes `rank` for gone, if it is not yet.
    pub(super) fn give_up_on(&mut self, rank: Rank, cause: Cause) {
        if !self.is_gone(rank) {
            self.gone.push(Fault::of(rank, cause));
        }
    }

    /// Why `rank` is gone.
    pub(super) fn fault_of(&self, rank: Rank) -> Fault {
        let known = self.gone.iter().find(|fault| fault.rank == Some(rank));
        let unknown = || Fault::of(rank, Cause::LinkLost("it was not replaced".into()));
        known.cloned().unwrap_or_else(unknown)
    }

    /// Whether `rank` has no process that could be asked anything.
    pub(super) fn is_gone(&self, rank: Rank) -> bool {
        self.gone.iter().any(|fault| fault.rank == Some(rank))
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
        let mut values: Vec<Option<T>> = ranks.map(|_| None).collect();
        let deadline = Instant::now() + limit;
        while let Some(missing) = values.iter().position(Option::is_none) {
            let next = timeout_at(deadline, self.next()).await;
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
        match self.next().await {
            Err(fault) => fault,
            Ok((rank, message)) => unexpected(rank, Phase::Idle, &message),
        }
    }

    /// The next message, or the fault that takes its place. Cancel-safe: a fault that was heard of
    /// is kept, and every later call answers it until its rank is replaced.
    pub(super) async fn next(&mut self) -> Result<(Rank, FromShard), Fault> {
        if self.gone.is_empty()
            && let (rank, Some(message)) = self.hear().await
        {
            return Ok((rank, message));
        }
        // A link is lost when its process dies, and may be heard of first; the exit status, or the
        // last words of the rank that failed first, say more. Who is cut off while waiting for that waits no
        // longer for it.
        let explained = Instant::now() + EXIT_GRACE;
        let explained = *self.explained.get_or_insert(explained);
        let better = async {
            while self.best_fault().is_none_or(is_broken) {
                self.hear().await;
            }
        };
        // What is known after that is what there is to say.
        let _ = timeout_at(explained, better).await;
        Err(self.best_fault().cloned().expect("someone is gone"))
    }

    /// The next message of this epoch from a process that counts; without a message, the rank is gone.
    /// Cancel-safe.
    pub(super) async fn hear(&mut self) -> (Rank, Option<FromShard>) {
        loop {
            let heard = self.heard.recv().await;
            let (source, heard) = heard.expect("this inbox holds an outlet itself");
            let rank = source.rank;
            if source != self.source(rank) {
                continue;
            }
            let cause = match heard {
                Heard::Message(FromShard::Failed { reason }) => Cause::Failed(reason),
                Heard::Message(message) if epoch_of(&message).is_some_and(|e| e < self.epoch) => {
                    continue;
                }
                Heard::Message(message) => return (rank, Some(message)),
                Heard::Gone(cause) => cause,
            };
            match self.gone.iter_mut().find(|fault| fault.rank == Some(rank)) {
                Some(known) if is_unexplained(known) => known.cause = cause,
                Some(_) => {}
                None => self.gone.push(Fault::of(rank, cause)),
            }
            return (rank, None);
        }
    }

    /// What says most about why ranks are gone, if any is.
    fn best_fault(&self) -> Option<&Fault> {
        let telling = self.gone.iter().find(|fault| !is_unexplained(fault));
        telling.or(self.gone.first())
    }
}

/// Whether the process may have more to say about it.
fn is_unexplained(fault: &Fault) -> bool {
    matches!(fault.cause, Cause::LinkLost(_) | Cause::Silent(_))
}

fn is_broken(fault: &Fault) -> bool {
    matches!(fault.cause, Cause::LinkLost(_))
}

/// The epoch to which a message means something.
fn epoch_of(message: &FromShard) -> Option<Epoch> {
    match message {
        FromShard::CommMade { epoch, .. } | FromShard::Joined { epoch } => Some(*epoch),
        FromShard::Ran(ran) => Some(ran.epoch),
        // The end of an epoch is awaited by the next one.
        FromShard::Aborted { epoch } => Some(epoch.next()),
        FromShard::Hello(_)
        | FromShard::Held(_)
        | FromShard::Progress { .. }
        | FromShard::Loaded(_)
        | FromShard::Allocated { .. }
        | FromShard::Failed { .. } => None,
    }
}

pub(super) fn unexpected(rank: Rank, phase: Phase, message: &FromShard) -> Fault {
    let mut message = format!("{message:?}");
    if let Some((cut, _)) = message.char_indices().nth(SHOWN) {
        message.truncate(cut);
    }
    Fault::of(rank, Cause::Unexpected { phase, message })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::timeout;
    use topology::ids::Epoch;

    fn rank(rank: u32) -> Source {
        let incarnation = 0;
        let rank = Rank(rank);
        Source { rank, incarnation }
    }

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
        let mut inbox = Inbox::new(3);
        let outlet = inbox.outlet().clone();
        let progress = FromShard::Progress {
            bytes_done: 1,
            bytes_total: 2,
        };
        outlet
            .send((rank(1), Heard::Message(progress)))
            .await
            .unwrap();
        for (from, value) in [(2, 12), (0, 10), (1, 11)] {
            outlet.send((rank(from), joined(value))).await.unwrap();
        }
        assert_eq!(
            inbox.gather(0..3, Phase::Join, LIMIT, take).await,
            Ok(vec![10, 11, 12])
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_rank_is_named_after_the_deadline() {
        let mut inbox = Inbox::new(2);
        let outlet = inbox.outlet().clone();
        outlet.send((rank(0), joined(0))).await.unwrap();
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
        let mut inbox = Inbox::new(2);
        let outlet = inbox.outlet().clone();
        let lost = || Heard::Gone(Cause::LinkLost("the link was closed".into()));
        outlet.send((rank(1), lost())).await.unwrap();
        let exited = Cause::Exited("signal: 9 (SIGKILL)".into());
        outlet
            .send((rank(1), Heard::Gone(exited.clone())))
            .await
            .unwrap();
        assert_eq!(inbox.fault().await, Fault::of(Rank(1), exited.clone()));
        assert_eq!(
            inbox.fault().await,
            Fault::of(Rank(1), exited),
            "it does not pass"
        );
        let mut inbox = Inbox::new(2);
        let outlet = inbox.outlet().clone();
        outlet.send((rank(0), lost())).await.unwrap();
        let fault = inbox.fault().await;
        assert_eq!(
            fault,
            Fault::of(Rank(0), Cause::LinkLost("the link was closed".into()))
        );
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_is_not_lost_with_who_waited_for_it() {
        let mut inbox = Inbox::new(1);
        let outlet = inbox.outlet().clone();
        let lost = Cause::LinkLost("the link was closed".into());
        outlet
            .send((rank(0), Heard::Gone(lost.clone())))
            .await
            .unwrap();
        let begun = Instant::now();
        for _ in 0..9 {
            let cut = timeout(EXIT_GRACE / 10, inbox.fault()).await;
            assert!(cut.is_err(), "it waits for a better reason");
        }
        assert_eq!(inbox.fault().await, Fault::of(Rank(0), lost));
        let waited = begun.elapsed();
        assert!(
            waited < EXIT_GRACE * 11 / 10,
            "{waited:?}: cut off often, it waits no longer"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_a_fault_at_once_and_is_explained_by_what_comes_later() {
        let mut inbox = Inbox::new(1);
        let outlet = inbox.outlet().clone();
        let silent = Cause::Silent(Duration::from_secs(2));
        let heard = Heard::Gone(silent.clone());
        outlet.send((rank(0), heard)).await.unwrap();
        let begun = Instant::now();
        assert_eq!(inbox.fault().await, Fault::of(Rank(0), silent));
        assert_eq!(begun.elapsed(), Duration::ZERO);
        let exited = Cause::Exited("signal 9".into());
        let heard = Heard::Gone(exited.clone());
        outlet.send((rank(0), heard)).await.unwrap();
        inbox.hear().await;
        assert_eq!(inbox.fault().await, Fault::of(Rank(0), exited));
    }

    #[tokio::test(start_paused = true)]
    async fn what_no_one_asked_for_is_a_fault() {
        let mut inbox = Inbox::new(1);
        let outlet = inbox.outlet().clone();
        outlet.send((rank(0), joined(3))).await.unwrap();
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
        outlet.send((rank(0), joined(3))).await.unwrap();
        outlet.send((rank(0), joined(3))).await.unwrap();
        assert_eq!(
            inbox.gather(0..1, Phase::Join, LIMIT, take).await,
            Ok(vec![3])
        );
        let failed = FromShard::Failed {
            reason: "no memory".into(),
        };
        outlet
            .send((rank(0), Heard::Message(failed)))
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
