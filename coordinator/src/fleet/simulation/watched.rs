//! The real fleet, watched: what it passes on, what it calls a fault, and what it leaves behind.
//!
//! Changes nothing of what the engine and the fleet say to each other. Checks what the simulated
//! machines know and the fleet cannot: who computed what, who is to blame, who sits in which epoch.

use super::host::SimHost;
use super::world::World;
use crate::fleet::{Cause, Fault, Fleet, Group, StepOutcome};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use topology::ids::{Epoch, Rank, Step};
use topology::wire::{PlanDigest, StepPlan};

#[derive(Debug)]
pub(super) struct Watched {
    pub(super) fleet: Fleet<SimHost>,
    pub(super) world: Arc<World>,
    pub(super) world_size: u32,
    pub(super) epoch: Epoch,
    /// Plans under way.
    pub(super) sent: VecDeque<(Epoch, Step, PlanDigest)>,
    /// How often the group was formed again.
    pub(super) recoveries: Arc<AtomicU32>,
}

impl Group for Watched {
    async fn send(&mut self, plan: StepPlan) -> Result<(), Fault> {
        let (epoch, step, digest) = (plan.epoch, plan.step, plan.digest());
        let rows = plan.rows.len();
        self.world
            .note(format_args!("plan {epoch}/{step} of {rows} rows"));
        self.sent.push_back((epoch, step, digest));
        let sent = self.fleet.send(plan).await;
        if let Err(fault) = &sent {
            self.judge(fault);
        }
        sent
    }

    async fn receive(&mut self) -> Result<StepOutcome, Fault> {
        let outcome = self.fleet.receive().await;
        if let Err(fault) = &outcome {
            self.judge(fault);
            return outcome;
        }
        let (epoch, step, digest) = self.sent.pop_front().expect("a plan was sent");
        let mut state = self.world.lock();
        let ranks = state.computed.get(&(epoch, step));
        let agreed = |rank| ranks.is_some_and(|ranks| ranks.get(&Rank(rank)) == Some(&digest));
        let all = (0..self.world_size).all(agreed);
        if !all {
            state.violation(format_args!(
                "{epoch}/{step} counts, and not all computed it"
            ));
        }
        if state.lies.contains(&(epoch, step)) {
            state.violation(format_args!("a lie about {epoch}/{step} was believed"));
        }
        outcome
    }

    async fn fault(&mut self) -> Fault {
        let fault = self.fleet.fault().await;
        self.judge(&fault);
        fault
    }

    async fn recover(&mut self, fault: &Fault) -> Result<Epoch, Fault> {
        self.judge(fault);
        let formed = self.fleet.recover(fault).await;
        let epoch = match &formed {
            Ok(epoch) => *epoch,
            Err(fault) => {
                self.judge(fault);
                return formed;
            }
        };
        self.recoveries.fetch_add(1, Ordering::Relaxed);
        self.sent.clear();
        let mut state = self.world.lock();
        state.note(format_args!("epoch {epoch} begins"));
        if epoch <= self.epoch {
            let old = self.epoch;
            state.violation(format_args!("epoch {epoch} follows {old}"));
        }
        self.epoch = epoch;
        let alive = state.procs.iter().filter(|proc| proc.alive);
        let elsewhere = alive.filter(|proc| proc.joined != Some(epoch));
        let elsewhere: Vec<_> = elsewhere.map(|p| (p.source, p.joined)).collect();
        if !elsewhere.is_empty() {
            state.violation(format_args!("not in epoch {epoch}: {elsewhere:?}"));
        }
        formed
    }

    async fn stop(self) {
        self.world.note(format_args!("the fleet is stopped"));
        self.world.lock().ending = true;
        self.fleet.stop().await;
    }

    async fn kill(self) {
        self.world.note(format_args!("the fleet is killed"));
        self.world.lock().ending = true;
        self.fleet.kill().await;
    }
}

impl Watched {
    /// Whether such a fault can be, given what was done to the machines.
    fn judge(&self, fault: &Fault) {
        let mut state = self.world.lock();
        state.note(format_args!("fault: {fault}"));
        let possible = match &fault.cause {
            Cause::Diverged
            | Cause::ChoseOtherwise
            | Cause::Answer(_)
            | Cause::Unexpected { .. } => state.lied,
            Cause::Failed(_) | Cause::NoRoom(_) | Cause::Coordinator(_) => false,
            Cause::Launch(_)
            | Cause::Exited(_)
            | Cause::LinkLost(_)
            | Cause::Silent(_)
            | Cause::Deadline { .. } => state.plan.struck > 0 || state.plan.no_launch,
        };
        if !possible {
            state.violation(format_args!("a fault without a reason: {fault}"));
        }
    }
}
