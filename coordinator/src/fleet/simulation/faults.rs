//! What may happen to a simulated process, and when.
//!
//! A seed has a budget of faults. Each moment at which a process does something may take one from it,
//! and often another process suffers at the same time. Invariant: once the budget is spent or the
//! time for faults is over, nothing new goes wrong; what was frozen for ever stays so.

use super::world::{FROM_SHARD, ProcId, State, TO_SHARD, World};
use fastrand::Rng;
use std::future::pending;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;
use topology::ids::Rank;

/// As good as for ever.
pub(super) const FOR_EVER: Duration = Duration::from_secs(10_000_000);

/// What can happen to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ill {
    /// It dies at once.
    Kill,
    /// It does nothing for a time, and then goes on as if nothing had been.
    Freeze(Duration),
    /// Nothing passes its link in one direction for a time.
    Cut(usize, Duration),
    /// Its device never comes back from what it does; the process lives.
    Hang,
    /// What it does takes so much longer.
    Slow(Duration),
    /// It gives a wrong answer.
    Lie,
}

/// What a process is about to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Moment {
    Launch,
    Load,
    Allocate,
    MakeComm,
    Join,
    Step,
    Collective,
    Answer,
    Abort,
    Leave,
}

/// One thing that is to go wrong at a moment that a test chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Strike {
    pub(super) rank: Rank,
    pub(super) moment: Moment,
    /// So often the moment goes by first.
    pub(super) after: u32,
    pub(super) ill: Ill,
}

/// What is to go wrong in a run.
#[derive(Clone, Debug, Default)]
pub(super) struct Plan {
    /// Faults that may still come.
    pub(super) budget: u32,
    /// Faults that came.
    pub(super) struck: u32,
    /// One in so many moments is one, in setup and recovery.
    pub(super) odds: u32,
    /// How often two processes suffer at once: one in so many.
    pub(super) companions: u32,
    /// No fault comes after this time.
    pub(super) over_at: Duration,
    /// Messages may take this many milliseconds where the network is rough.
    pub(super) rough_ms: u64,
    /// No process can be started any more.
    pub(super) no_launch: bool,
    /// What is to come besides what is drawn.
    pub(super) script: Vec<Strike>,
}

impl Plan {
    /// Faults that a seed brings; none in one of ten.
    pub(super) fn draw(rng: &mut Rng) -> Self {
        let quiet = rng.u32(0..10) == 0;
        Self {
            budget: if quiet { 0 } else { rng.u32(1..=8) },
            struck: 0,
            odds: [3, 8, 20, 60][rng.usize(0..4)],
            companions: rng.u32(1..=6),
            over_at: Duration::from_secs(rng.u64(5..=200)),
            rough_ms: [0, 0, 40, 300][rng.usize(0..4)],
            no_launch: false,
            script: Vec::new(),
        }
    }

    /// How long a message travels.
    pub(super) fn delay(&self, rng: &mut Rng) -> Duration {
        let lost = self.rough_ms > 0 && rng.u32(0..12) == 0;
        let ms = if lost { rng.u64(0..=self.rough_ms) } else { 0 };
        Duration::from_millis(ms + rng.u64(0..=2))
    }
}

impl State {
    fn draw(&mut self, one_in: u32) -> bool {
        let open = self.plan.budget > 0 && self.elapsed() < self.plan.over_at;
        let drawn = open && self.rng.u32(0..one_in.max(1)) == 0;
        if drawn {
            self.plan.budget -= 1;
            self.plan.struck += 1;
        }
        drawn
    }

    /// What is to happen to a process at this moment.
    fn scripted(&mut self, proc: ProcId, moment: Moment) -> Option<Ill> {
        let rank = self.procs[proc].source.rank;
        let script = &mut self.plan.script;
        let is_now = |strike: &Strike| (strike.rank, strike.moment) == (rank, moment);
        let next = script.iter().position(is_now)?;
        if let Some(left) = script[next].after.checked_sub(1) {
            script[next].after = left;
            return None;
        }
        self.plan.struck += 1;
        Some(script.remove(next).ill)
    }

    /// Something that comes from outside.
    fn outer_ill(&mut self) -> Ill {
        let rng = &mut self.rng;
        let time = match rng.u32(0..4) {
            0 => Duration::from_millis(rng.u64(50..1900)),
            1 => Duration::from_millis(rng.u64(1900..6000)),
            2 => Duration::from_millis(rng.u64(6000..40_000)),
            _ => FOR_EVER,
        };
        match rng.u32(0..6) {
            0..=2 => Ill::Kill,
            3 => Ill::Freeze(time),
            4 => Ill::Cut(TO_SHARD, time),
            _ => Ill::Cut(FROM_SHARD, time),
        }
    }

    /// Something that happens to a process while it does something.
    fn ill(&mut self, moment: Moment) -> Ill {
        let inner = self.rng.u32(0..3) == 0;
        match moment {
            Moment::Answer if inner => Ill::Lie,
            Moment::Launch | Moment::Abort => self.outer_ill(),
            _ if inner && self.rng.bool() => Ill::Hang,
            _ if inner => Ill::Slow(Duration::from_millis(self.rng.u64(100..20_000))),
            _ => self.outer_ill(),
        }
    }

    fn someone(&mut self) -> Option<ProcId> {
        let alive: Vec<ProcId> = (0..self.procs.len())
            .filter(|proc| self.procs[*proc].alive && self.procs[*proc].admitted)
            .collect();
        self.rng.choice(alive)
    }
}

impl World {
    /// A process is about to do something; it may suffer, and wait or never come back. True: it lies.
    pub(super) async fn at(self: &Arc<Self>, proc: ProcId, moment: Moment) -> bool {
        let ill = {
            let mut state = self.lock();
            // Of these there are many more than of the others.
            let steps = matches!(moment, Moment::Step | Moment::Collective | Moment::Answer);
            let odds = state.plan.odds * if steps { 25 } else { 1 };
            let scripted = state.scripted(proc, moment);
            scripted.or_else(|| state.draw(odds).then(|| state.ill(moment)))
        };
        if let Some(ill) = ill {
            self.note(format_args!("at {moment:?}"));
            self.strike(proc, ill);
            self.strike_another();
            match ill {
                Ill::Kill | Ill::Hang => pending().await,
                Ill::Slow(time) => sleep(time).await,
                Ill::Freeze(_) | Ill::Cut(..) | Ill::Lie => {}
            }
        }
        self.awake(proc).await;
        ill == Some(Ill::Lie)
    }

    fn strike_another(self: &Arc<Self>) {
        let another = {
            let mut state = self.lock();
            let companions = state.plan.companions;
            let drawn = state.draw(companions);
            drawn.then(|| state.someone()).flatten()
        };
        if let Some(proc) = another {
            let ill = self.lock().outer_ill();
            self.strike(proc, ill);
        }
    }

    /// Faults that come while nothing particular is done.
    pub(super) async fn storm(self: &Arc<Self>) {
        loop {
            sleep(self.some_ms(50, 6000)).await;
            let over = {
                let state = self.lock();
                state.plan.budget == 0 || state.elapsed() > state.plan.over_at
            };
            if over {
                return;
            }
            let struck = {
                let mut state = self.lock();
                let drawn = state.draw(3);
                drawn.then(|| state.someone()).flatten()
            };
            if let Some(proc) = struck {
                let ill = self.lock().outer_ill();
                self.strike(proc, ill);
                self.strike_another();
            }
        }
    }

    /// From now on nothing new goes wrong.
    pub(super) fn calm_down(&self) {
        self.lock().plan.budget = 0;
    }
}
