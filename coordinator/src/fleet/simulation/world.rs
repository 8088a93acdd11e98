//! The simulated machines: processes, links, collectives, and what goes wrong with them.
//!
//! Everything that happens draws from one seeded generator, in the order in which it happens, on
//! tokio's paused clock; so a seed is a run. Records what must never happen as a violation and
//! goes on. Invariant: a process that died does, says and answers nothing more; what it said
//! before may arrive at any time after.

use super::super::fault::Cause;
use super::super::inbox::{Heard, Outlet, Source};
use super::faults::{Ill, Plan};
use fastrand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::hash::{DefaultHasher, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use topology::ids::{Epoch, Rank, Step};
use topology::link::IDLE_LIMIT;
use topology::wire::PlanDigest;

/// Index of a process, over all that ever were.
pub(super) type ProcId = usize;

/// Both directions of a link.
pub(super) const TO_SHARD: usize = 0;
pub(super) const FROM_SHARD: usize = 1;

pub(super) const MS: Duration = Duration::from_millis(1);

/// What all simulated parts share.
#[derive(Debug)]
pub(super) struct World {
    state: Mutex<State>,
    /// Told after every change that someone may wait for.
    changed: Notify,
}

/// A process that was started.
#[derive(Debug)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a fact of its own: all combinations occur"
)]
pub(super) struct Proc {
    pub(super) source: Source,
    pub(super) alive: bool,
    /// It has said `Hello`.
    pub(super) admitted: bool,
    /// Something was done to it, so that it may be given up.
    pub(super) struck: bool,
    /// It does nothing until then.
    pub(super) frozen_until: Instant,
    /// By direction, until when nothing passes.
    pub(super) blocked_until: [Instant; 2],
    pub(super) link_lost: bool,
    /// The epoch whose communicator it holds.
    pub(super) joined: Option<Epoch>,
    /// The last epoch that its device left.
    pub(super) left: Option<Epoch>,
    tasks: Vec<AbortHandle>,
    outlet: Outlet,
}

/// What ranks brought to one collective: the plan they serve, and a share for each row.
pub(super) type Parts = BTreeMap<Rank, (PlanDigest, Vec<u64>)>;

/// A communicator.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) epoch: Epoch,
    /// Who took a seat, by rank.
    pub(super) seats: BTreeMap<Rank, ProcId>,
    /// What ranks brought to each collective of each step.
    pub(super) brought: BTreeMap<(Step, u8), Parts>,
}

/// What is kept behind the lock.
#[derive(Debug)]
pub(super) struct State {
    pub(super) rng: Rng,
    pub(super) plan: Plan,
    pub(super) procs: Vec<Proc>,
    pub(super) groups: Vec<Group>,
    /// Which plan each rank computed.
    pub(super) computed: BTreeMap<(Epoch, Step), BTreeMap<Rank, PlanDigest>>,
    /// Steps to which a rank gave an answer that does not agree with the others'.
    pub(super) lies: BTreeSet<(Epoch, Step)>,
    /// Some answer was wrong.
    pub(super) lied: bool,
    /// Processes may be ended without being to blame: the fleet starts or stops.
    pub(super) ending: bool,
    pub(super) violations: Vec<String>,
    began: Instant,
    trace: DefaultHasher,
    /// What happened, in words, if someone is to read it.
    log: Option<Vec<String>>,
}

impl World {
    pub(super) fn new(rng: Rng, plan: Plan, verbose: bool) -> Arc<Self> {
        let state = State {
            rng,
            plan,
            procs: Vec::new(),
            groups: Vec::new(),
            computed: BTreeMap::new(),
            lies: BTreeSet::new(),
            lied: false,
            ending: false,
            violations: Vec::new(),
            began: Instant::now(),
            trace: DefaultHasher::new(),
            log: verbose.then(Vec::new),
        };
        Arc::new(Self {
            state: Mutex::new(state),
            changed: Notify::new(),
        })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        let state = self.state.lock();
        state.expect("no one panics while holding the state")
    }

    pub(super) fn note(&self, what: fmt::Arguments<'_>) {
        self.lock().note(what);
    }

    pub(super) fn violation(&self, what: fmt::Arguments<'_>) {
        self.lock().violation(what);
    }

    /// Tells those who wait in [`Self::until`] to look again.
    pub(super) fn tell(&self) {
        self.changed.notify_waiters();
    }

    /// A random time of `from..=to` milliseconds.
    pub(super) fn some_ms(&self, from: u64, to: u64) -> Duration {
        Duration::from_millis(self.lock().rng.u64(from..=to))
    }

    /// Until `ready` gives something; `None` once `abort` is set or `deadline` has passed.
    pub(super) async fn until<T>(
        &self,
        abort: &AtomicBool,
        deadline: Instant,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        loop {
            let changed = self.changed.notified();
            if abort.load(Ordering::Relaxed) {
                return None;
            }
            let value = ready(&mut self.lock());
            if value.is_some() {
                return value;
            }
            timeout_at(deadline, changed).await.ok()?;
        }
    }

    /// A process for `source`, which does nothing yet.
    pub(super) fn start(&self, source: Source, outlet: Outlet) -> ProcId {
        let mut state = self.lock();
        let rank = source.rank;
        if let Some(other) = state.alive_of(rank) {
            let other = state.procs[other].source;
            state.violation(format_args!("{source:?} starts while {other:?} lives"));
        }
        state.note(format_args!("{source:?} starts"));
        let now = Instant::now();
        state.procs.push(Proc {
            source,
            alive: true,
            admitted: false,
            struck: false,
            frozen_until: now,
            blocked_until: [now; 2],
            link_lost: false,
            joined: None,
            left: None,
            tasks: Vec::new(),
            outlet,
        });
        state.procs.len() - 1
    }

    /// A task that ends with the process.
    pub(super) fn spawn(&self, proc: ProcId, task: impl Future<Output = ()> + Send + 'static) {
        let task = tokio::spawn(task).abort_handle();
        self.lock().procs[proc].tasks.push(task);
    }

    /// Waits while the process is frozen.
    pub(super) async fn awake(&self, proc: ProcId) {
        loop {
            let until = self.lock().procs[proc].frozen_until;
            if until <= Instant::now() {
                return;
            }
            sleep_until(until).await;
        }
    }

    /// Waits while nothing passes the link in `direction`; false: nothing ever will.
    pub(super) async fn passable(&self, proc: ProcId, direction: usize) -> bool {
        loop {
            let (lost, until) = {
                let proc = &self.lock().procs[proc];
                (proc.link_lost, proc.blocked_until[direction])
            };
            if lost || until <= Instant::now() {
                return !lost;
            }
            sleep_until(until.min(Instant::now() + IDLE_LIMIT)).await;
        }
    }

    /// The process ends. Its parent sees that soon, and the link's other end at some time.
    pub(super) fn die(self: &Arc<Self>, proc: ProcId, how: &str) {
        let mut state = self.lock();
        let it = &state.procs[proc];
        if !it.alive {
            return;
        }
        let (source, struck) = (it.source, it.struck);
        state.note(format_args!("{source:?} ends: {how}"));
        if !struck && !state.ending {
            state.violation(format_args!("{source:?} ends and is not to blame: {how}"));
        }
        let cause = Cause::Exited(how.to_owned());
        let exit = Duration::from_millis(state.rng.u64(0..=20));
        let lost = Duration::from_millis(state.rng.u64(0..=2000));
        drop(state);
        self.kill(proc);
        let world = Arc::clone(self);
        tokio::spawn(async move {
            sleep(exit).await;
            world.report(proc, Heard::Gone(cause)).await;
        });
        let world = Arc::clone(self);
        tokio::spawn(async move {
            sleep(lost).await;
            world.lose_link(proc).await;
        });
    }

    /// Nothing remains of the process but what it sent.
    pub(super) fn kill(&self, proc: ProcId) {
        let mut state = self.lock();
        state.procs[proc].alive = false;
        let tasks = std::mem::take(&mut state.procs[proc].tasks);
        drop(state);
        tasks.iter().for_each(AbortHandle::abort);
        self.tell();
    }

    /// The fleet hears something of the process.
    pub(super) async fn report(&self, proc: ProcId, heard: Heard) {
        let (source, outlet) = {
            let proc = &self.lock().procs[proc];
            (proc.source, proc.outlet.clone())
        };
        // Without a reader the fleet is gone.
        let _ = outlet.send((source, heard)).await;
    }

    async fn lose_link(&self, proc: ProcId) {
        if !std::mem::replace(&mut self.lock().procs[proc].link_lost, true) {
            self.report(proc, Heard::Gone(Cause::Silent(IDLE_LIMIT)))
                .await;
        }
    }

    /// After a freeze or a cut: a link that stays silent is lost, and its process ends.
    pub(super) fn watch_link(self: &Arc<Self>, proc: ProcId) {
        let world = Arc::clone(self);
        tokio::spawn(async move {
            sleep(IDLE_LIMIT).await;
            if !world.lock().procs[proc].is_silent() {
                return;
            }
            world.lose_link(proc).await;
            sleep(world.some_ms(0, 2000)).await;
            world.awake(proc).await;
            world.die(proc, "exit status: 1");
        });
    }

    /// Something happens to the process from outside.
    pub(super) fn strike(self: &Arc<Self>, proc: ProcId, ill: Ill) {
        let now = Instant::now();
        let mut state = self.lock();
        let it = &mut state.procs[proc];
        it.struck = true;
        let source = it.source;
        match ill {
            Ill::Freeze(time) => it.frozen_until = it.frozen_until.max(now + time),
            Ill::Cut(direction, time) => {
                let until = &mut it.blocked_until[direction];
                *until = (*until).max(now + time);
            }
            Ill::Kill | Ill::Hang | Ill::Slow(_) | Ill::Lie => {}
        }
        state.note(format_args!("{source:?} suffers {ill:?}"));
        drop(state);
        match ill {
            Ill::Kill => self.die(proc, "signal: 9 (SIGKILL)"),
            Ill::Freeze(_) | Ill::Cut(..) => self.watch_link(proc),
            Ill::Hang | Ill::Slow(_) | Ill::Lie => {}
        }
    }

    /// The hash of all that happened, what must not have, and the log.
    pub(super) fn report_all(&self) -> (u64, Vec<String>, Vec<String>) {
        let mut state = self.lock();
        let violations = std::mem::take(&mut state.violations);
        let log = state.log.take().unwrap_or_default();
        (state.trace.finish(), violations, log)
    }
}

impl Proc {
    /// Whether nothing that it says or acknowledges arrives.
    fn is_silent(&self) -> bool {
        let now = Instant::now();
        self.frozen_until > now || self.blocked_until.iter().any(|until| *until > now)
    }
}

impl State {
    /// Time since the beginning.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    pub(super) fn note(&mut self, what: fmt::Arguments<'_>) {
        struct Sink<'a>(&'a mut DefaultHasher);
        impl Write for Sink<'_> {
            fn write_str(&mut self, text: &str) -> fmt::Result {
                self.0.write(text.as_bytes());
                Ok(())
            }
        }
        let at = self.elapsed().as_micros();
        let written = writeln!(Sink(&mut self.trace), "{at} {what}");
        written.expect("a hasher takes any text");
        if let Some(log) = &mut self.log {
            log.push(format!("{:>12.3} {what}", at as f64 / 1000.0));
        }
    }

    pub(super) fn violation(&mut self, what: fmt::Arguments<'_>) {
        self.note(format_args!("VIOLATION: {what}"));
        self.violations.push(what.to_string());
    }

    /// The living process of a rank.
    pub(super) fn alive_of(&self, rank: Rank) -> Option<ProcId> {
        let is = |proc: &Proc| proc.alive && proc.source.rank == rank;
        self.procs.iter().rposition(is)
    }
}
