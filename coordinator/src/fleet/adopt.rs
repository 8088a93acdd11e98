//! A coordinator that takes over the shards of one that is gone.
//!
//! Waits where the old one did until shards come back, has each say what it kept, and goes on as after a fault
//! whose survivors they are: what is missing is replaced, the group forms again in a new epoch. On another node
//! somebody watches in its place. Whether they are wanted at all was decided before. Invariant: a shard that is not
//! taken over does not live on.

use super::Fleet;
use super::child::{Adopted, Body, Child};
use super::fault::{Cause, Fault, Phase};
use super::host::Took;
use super::inbox::Outlet;
use super::legacy::{Holder, Legacy};
use super::local::{LocalHost, LocalShard, Program};
use super::recover::Member;
use super::start::{Ready, Setup, StartEvent, Stopwatch};
use crate::clock::{now, since};
use futures_util::future::join_all;
use std::time::Duration;
use tokio::time::timeout;
use topology::ids::{Epoch, Rank};
use topology::launch::process::Watched;
use topology::link::{Admitted, Listener};
use topology::wire::{FromShard, Held, Hello, Load, ToShard};

/// How long shards that live may take to come: they look for a coordinator several times a second, but on another node
/// they may first have to notice that theirs is silent, and to leave a collective.
const COME_LIMIT: Duration = Duration::from_secs(8);
/// How long another node may take to look after a shard; less than those beside it wait to be spoken to.
const ATTEND_LIMIT: Duration = Duration::from_secs(5);
/// How long one that came may take to say what it has.
const HELD_LIMIT: Duration = Duration::from_secs(2);
/// How often the group may fail to form before that is a fault of the start.
const ATTEMPTS: usize = 3;

/// A shard that came back.
struct Found {
    hello: Hello,
    held: Held,
    shard: LocalShard,
}

impl LocalHost {
    /// Takes the address of the coordinator of `legacy`, with its key. Answers no shard yet, so that all wait on if this
    /// process ends.
    ///
    /// # Errors
    /// [`Cause::Launch`] if that is not possible, as while another process has the port.
    pub fn take_over(program: Program, legacy: &Legacy) -> Result<Self, Box<(Program, Fault)>> {
        let identity = legacy.identity.load();
        let listener = identity.and_then(|identity| Listener::bind_again(legacy.address, identity));
        match listener {
            Ok(listener) => {
                let mut host = Self::over(program, listener);
                for (last, holder) in host.last.iter_mut().zip(&legacy.ranks) {
                    *last = holder.as_ref().and_then(|holder| holder.away.clone());
                }
                Ok(host)
            }
            Err(error) => {
                let why = format!("cannot listen on {} again: {error}", legacy.address);
                Err(Box::new((program, Fault::group(Cause::Launch(why)))))
            }
        }
    }

    /// Waits for the shards of `legacy` that live; by rank, those that have what `load` asks for.
    async fn adopt(
        &mut self,
        legacy: &Legacy,
        (load, welcome): (&Load, &ToShard),
        (sources, outlet): (&[super::Source], &Outlet),
    ) -> Vec<Option<Found>> {
        let mut awaited = self.watch(legacy, (sources, outlet)).await;
        // Where none could be looked after, it can be tried again.
        if awaited.iter().any(Option::is_some) {
            self.call(legacy);
        }
        let begun = now();
        let mut found: Vec<Option<Found>> = sources.iter().map(|_| None).collect();
        let is_missing = |awaited: &[Option<Child>]| {
            let mut awaited = awaited.iter().flatten();
            awaited.any(Child::is_there)
        };
        while is_missing(&awaited) && since(begun) < COME_LIMIT {
            // Short, because a shard that was waited for may die.
            let Ok(came) = self.listener.accept(Duration::from_millis(100)).await else {
                continue;
            };
            let hello = came.hello.clone();
            let place = hello.rank.index();
            // Where nobody watches it, it ends with its link.
            let Some(child) = awaited.get_mut(place).and_then(Option::take) else {
                continue;
            };
            match hear_what_is_held(came, (load, welcome)).await {
                Ok((came, held)) => {
                    self.program.witness.admitted(&hello);
                    let shard = LocalShard::new(child, came, outlet.clone());
                    found[place] = Some(Found { hello, held, shard });
                }
                Err(why) => {
                    tracing::warn!(rank = %hello.rank, "a shard is not taken over: {why}");
                    child.end(Duration::ZERO, false).await;
                }
            }
        }
        let late = awaited.into_iter().flatten();
        join_all(late.map(|child| child.end(Duration::ZERO, false))).await;
        found
    }

    /// Has the shards of `legacy` come. They are this process's now: one that it does not take over ends when it comes.
    pub fn call(&mut self, legacy: &Legacy) {
        self.own();
        for (rank, holder) in legacy.alive() {
            self.listener.expect(rank, holder.certificate.clone());
        }
        self.listener.answer();
    }

    /// Watches the shards of `legacy` that live, by rank, and says what they are found by elsewhere.
    async fn watch(
        &self,
        legacy: &Legacy,
        (sources, outlet): (&[super::Source], &Outlet),
    ) -> Vec<Option<Child>> {
        let stand_for = async |(rank, holder): (Rank, &Holder)| {
            let body = body(holder).await;
            let body = body.inspect_err(|error| {
                tracing::warn!(%rank, "a shard cannot be taken over: {error}");
            });
            (rank, holder.away.clone(), body)
        };
        // Those of this machine last, for which nobody waits: whoever stands for one ends it with itself.
        let (elsewhere, here): (Vec<_>, Vec<_>) = legacy
            .alive()
            .partition(|(_, holder)| holder.away.is_some());
        let mut bodies = join_all(elsewhere.into_iter().map(stand_for)).await;
        bodies.extend(join_all(here.into_iter().map(stand_for)).await);
        let mut watched: Vec<_> = sources.iter().map(|_| None).collect();
        for (rank, away, body) in bodies {
            let place = sources.get(rank.index());
            if let (Some(source), Ok(body)) = (place, body) {
                let watchers = self.program.watchers();
                let child = Child::watch(*source, (body, away), outlet.clone(), watchers);
                watched[rank.index()] = Some(child);
            }
        }
        watched
    }
}

/// Stands for a shard that somebody else started.
async fn body(holder: &Holder) -> Result<Body, String> {
    let Some(away) = &holder.away else {
        let watched = Watched::new(holder.process.pid).map_err(|e| e.to_string())?;
        // Whom it watches does not change any more.
        let is_it = holder.process.is_running();
        let gone = || "it has ended".to_owned();
        return is_it
            .then(|| Body::Adopted(Adopted(watched)))
            .ok_or_else(gone);
    };
    let attended = timeout(ATTEND_LIMIT, away.attend()).await;
    let late = |_| format!("its node does not answer within {ATTEND_LIMIT:?}");
    let attended = attended.map_err(late);
    let (_, attendant) = attended?.map_err(|e| e.to_string())?;
    // What it printed there reaches this process in another way now.
    holder.ssh.inspect(|ssh| ssh.kill());
    Ok(Body::Attended(Box::new(attendant)))
}

/// Welcomes a shard and has it say what it kept.
async fn hear_what_is_held(
    mut came: Admitted,
    (load, welcome): (&Load, &ToShard),
) -> Result<(Admitted, Held), String> {
    let sent = came.sender.send(welcome).await;
    sent.map_err(|e| e.to_string())?;
    let heard = timeout(HELD_LIMIT, came.receiver.recv()).await;
    match heard.map_err(|_| "it said nothing".to_owned())? {
        Ok(FromShard::Held(held)) if held.load == *load => Ok((came, *held)),
        Ok(FromShard::Held(_)) => Err("it has loaded something else".to_owned()),
        Ok(other) => Err(format!("it said {other:?}")),
        Err(error) => Err(error.to_string()),
    }
}

/// Shards that were taken over and do not work together yet.
#[derive(Debug)]
pub struct TakenOver {
    fleet: Fleet,
    phases: Vec<Took>,
}

impl TakenOver {
    /// Whether there are ranks for which shards have to be started.
    pub fn is_incomplete(&self) -> bool {
        self.fleet.members.iter().any(Option::is_none)
    }

    /// Starts those that are missing, and forms the group.
    ///
    /// # Errors
    /// The [`Fault`] that kept it from forming; no shard is left then.
    pub async fn form(mut self) -> Result<(Fleet, Ready), Fault> {
        let mut watch = Stopwatch::new(self.phases);
        if let Err(fault) = self.fleet.form_anew().await {
            self.fleet.end(Duration::ZERO).await;
            return Err(fault);
        }
        watch.done(Phase::Join);
        let ready = self.fleet.ready(watch.phases);
        Ok((self.fleet, ready))
    }

    /// Ends them, as nobody has use for them.
    pub async fn end(self) {
        self.fleet.end(Duration::ZERO).await;
    }
}

impl Fleet<LocalHost> {
    /// Takes over the shards of `legacy` that come.
    ///
    /// # Errors
    /// Everything back, if none came.
    pub async fn adopt(
        host: LocalHost,
        setup: Setup,
        legacy: &Legacy,
        mut tell: impl FnMut(StartEvent) + Send,
    ) -> Result<TakenOver, (LocalHost, Setup)> {
        let mut fleet = Self::empty(host, setup);
        let mut watch = Stopwatch::new(Vec::new());
        let found = fleet.find(legacy, &mut tell).await;
        let first = found.iter().flatten().next();
        let Some(num_blocks) = first.map(|found| found.held.num_blocks) else {
            return Err((fleet.host, fleet.setup));
        };
        let over = found.iter().flatten().map(|found| found.held.epoch).max();
        fleet.num_blocks = num_blocks;
        fleet.epoch = over.unwrap_or_default();
        fleet.members = found
            .into_iter()
            .map(|found| {
                // With another pool it cannot take part, and is replaced.
                let found = found.filter(|found| found.held.num_blocks == num_blocks)?;
                let Held {
                    loaded, kv_bytes, ..
                } = found.held;
                Some(Member::standing(found.shard, found.hello, loaded, kv_bytes))
            })
            .collect();
        watch.done(Phase::Admit);
        let phases = watch.phases;
        Ok(TakenOver { fleet, phases })
    }

    async fn find(
        &mut self,
        legacy: &Legacy,
        tell: &mut (impl FnMut(StartEvent) + Send),
    ) -> Vec<Option<Found>> {
        let ranks = (0..self.setup.load.tensor_parallel_size).map(Rank);
        let sources: Vec<_> = ranks.map(|rank| self.inbox.source(rank)).collect();
        let [welcome, _] = self.orders();
        let outlet = self.inbox.outlet();
        let wanted = (&self.setup.load, &welcome);
        let found = self.host.adopt(legacy, wanted, (&sources, outlet)).await;
        for Found { hello, .. } in found.iter().flatten() {
            let (rank, pid) = (hello.rank, hello.pid);
            tell(StartEvent::Adopted { rank, pid });
        }
        found
    }

    /// As after a fault, which is the old coordinator's.
    async fn form_anew(&mut self) -> Result<Epoch, Fault> {
        let gone = "the coordinator before this one is gone".to_owned();
        let mut fault = Fault::group(Cause::LinkLost(gone));
        for _ in 0..ATTEMPTS {
            match self.form_again(&fault).await {
                Ok(epoch) => return Ok(epoch),
                Err(next) => fault = next,
            }
        }
        Err(fault)
    }
}
