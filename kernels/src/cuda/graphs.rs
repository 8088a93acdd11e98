//! Decode steps as graphs: a step of a size that came before is queued with one call instead of hundreds.
//!
//! The first step of a size is queued one operation after the other, so that libraries make their choices and take
//! what they need; a later one is recorded and then queued as a whole, as is every one after it. What a step
//! works on stays where it is, so a recording holds until [`forget`](Backend::forget). A device that does not
//! record goes on without: the reason is told once, as a notice.
//!
//! Invariant: a recording is made and queued only for batches of its number of rows, each with one token.

use super::batch::CudaBatch;
use super::{CudaBackend, graph};
use crate::backend::{Backend, DeviceError};
use crate::ops::paged_attention::flashinfer::Planned;
use graph::Graph;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;

/// What recordings may take of the device, which is kept free for them.
pub(crate) const RESERVE_BYTES: u64 = 256 << 20;

/// Recordings by their number of rows.
#[derive(Debug, Default)]
pub(crate) struct Graphs {
    steps: RefCell<HashMap<usize, Step>>,
    is_recording: Cell<bool>,
    /// Why nothing more is recorded.
    ended: RefCell<Option<String>>,
    /// Whether `ended` was told.
    told: Cell<bool>,
    bytes: Cell<u64>,
}

/// A size of step, with the plans of attention it has.
#[derive(Debug)]
enum Step {
    /// It was queued one operation after the other.
    Seen(Vec<Planned>),
    /// It was recorded.
    Recorded(Vec<Planned>, Graph),
}

impl Graphs {
    /// Whether what is queued now is recorded, and not done before a later call.
    pub(crate) fn is_recording(&self) -> bool {
        self.is_recording.get()
    }

    /// Whether a step of `rows` rows can be replayed.
    pub(crate) fn holds(&self, rows: usize) -> bool {
        matches!(self.steps.borrow().get(&rows), Some(Step::Recorded(..)))
    }

    /// Drops all recordings. Sizes have to be seen again, too: who replaces a communicator has to meet its windows.
    pub(crate) fn clear(&self) {
        self.steps.borrow_mut().clear();
        self.bytes.set(0);
    }

    /// Why steps are no longer recorded, the first time it is asked.
    pub(crate) fn notice(&self) -> Option<String> {
        let ended = self.ended.borrow();
        ended.clone().filter(|_| !self.told.replace(true))
    }

    fn end(&self, reason: String) {
        self.ended.borrow_mut().get_or_insert(reason);
    }

    fn has_ended(&self) -> bool {
        self.ended.borrow().is_some()
    }
}

impl CudaBackend {
    /// [`Backend::queue`] for a step of `rows` rows.
    pub(crate) fn queue_step<E: From<DeviceError>>(
        &self,
        rows: usize,
        batch: &CudaBatch,
        mut ops: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        let seen = match self.graphs.steps.borrow().get(&rows) {
            Some(Step::Seen(plans)) => Some(plans.clone()),
            Some(Step::Recorded(..)) => return Ok(self.replay(rows, batch)?),
            None => None,
        };
        match seen {
            // While the library still tries algorithms, it would be the wrong ones that are kept.
            Some(plans) if !self.graphs.has_ended() && self.blas.has_chosen(rows) => {
                self.record_step((rows, plans), batch, ops)
            }
            _ => {
                ops()?;
                let mut steps = self.graphs.steps.borrow_mut();
                steps.insert(rows, Step::Seen(batch.plans()));
                Ok(())
            }
        }
    }

    /// Queues a recorded step with the batch's arrays.
    pub(crate) fn replay_step(&self, rows: usize, batch: &CudaBatch) -> Result<(), DeviceError> {
        assert_eq!(
            (batch.num_rows(), batch.num_tokens()),
            (rows, rows),
            "a recording is for so many rows of one token"
        );
        let steps = self.graphs.steps.borrow();
        let Some(Step::Recorded(plans, graph)) = steps.get(&rows) else {
            return Err(DeviceError::Failed {
                device: self.device.name().to_owned(),
                reason: format!("has no recording of a step of {rows} rows"),
            });
        };
        batch.prepare(&self.device, plans)?;
        graph.launch(&self.device)
    }

    fn record_step<E: From<DeviceError>>(
        &self,
        (rows, plans): (usize, Vec<Planned>),
        batch: &CudaBatch,
        mut ops: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        self.check()?;
        // These are copies to the device, which are not part of what is recorded.
        batch.prepare(&self.device, &plans)?;
        // What was tried can be read once it is done.
        self.device.synchronize()?;
        let free = self.device.memory().1;
        if let Err(error) = graph::begin(&self.device) {
            self.graphs.end(error.to_string());
            return ops();
        }
        self.graphs.is_recording.set(true);
        self.blas.set_tries(false);
        let queued = ops();
        self.graphs.is_recording.set(false);
        let graph = graph::end(&self.device);
        // Nothing of it was done, so what was refused is no fault of the device's yet.
        let refused = self.failure.take();
        queued?;
        let graph = match (graph, refused) {
            (Ok(graph), None) => graph,
            (Err(error), None) => return self.without_recording(error.to_string(), ops),
            (_, Some(refused)) => return self.without_recording(refused, ops),
        };
        graph.launch(&self.device)?;
        let taken = free.saturating_sub(self.device.memory().1);
        let bytes = self.graphs.bytes.get() + taken;
        self.graphs.bytes.set(bytes);
        if bytes > RESERVE_BYTES {
            self.graphs.end(format!(
                "recordings of steps take {} MiB, which is all that was kept for them",
                bytes >> 20
            ));
        }
        let mut steps = self.graphs.steps.borrow_mut();
        steps.insert(rows, Step::Recorded(plans, graph));
        Ok(())
    }

    /// Gives up recording, and queues what could not be recorded.
    fn without_recording<E>(
        &self,
        reason: String,
        mut ops: impl FnMut() -> Result<(), E>,
    ) -> Result<(), E> {
        self.graphs.end(reason);
        ops()
    }
}
