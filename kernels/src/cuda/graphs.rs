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
        // How long tries took is known once they are done.
        self.device.synchronize()?;
        self.blas.settle();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Precision;
    use crate::batch::Batch;
    use crate::cuda::testing::{each_element, read, values};
    use crate::cuda::{CudaTensor, CudaWeight};
    use crate::testing::{Rng, tensor, weight};

    const VOCAB: usize = 40;
    const WIDTH: usize = 24;
    const OUTPUTS: usize = 16;

    /// A decode step: any tokens, any number of blocks for each.
    fn step(rng: &mut Rng, rows: usize) -> Batch {
        let mut batch = Batch {
            row_starts: vec![0],
            block_starts: vec![0],
            ..Batch::default()
        };
        for row in 0..rows {
            batch.token_ids.push(rng.within(0..VOCAB) as u32);
            batch.positions.push(rng.within(0..9) as u32);
            batch.slots.push(row as u32);
            batch.row_starts.push(row as u32 + 1);
            batch.context_lens.push(1);
            for _ in 0..rng.within(1..4) {
                batch.blocks.push(rng.within(0..9) as u32);
            }
            batch.block_starts.push(batch.blocks.len() as u32);
        }
        batch.logit_tokens = (0..rng.within(0..rows + 1) as u32).collect();
        batch
    }

    /// Embeds tokens, and multiplies.
    struct Model {
        table: CudaWeight,
        weight: CudaWeight,
        embedded: CudaTensor,
        out: CudaTensor,
    }

    impl Model {
        fn new(cuda: &CudaBackend, rng: &mut Rng, rows: usize) -> Self {
            Self {
                table: weight(rng, cuda, (VOCAB, WIDTH), cuda.element()).0,
                weight: weight(rng, cuda, (OUTPUTS, WIDTH), cuda.element()).0,
                embedded: tensor(cuda, &values(cuda, rng, rows * WIDTH), WIDTH),
                out: cuda.allocate(rows, OUTPUTS, Precision::F32).unwrap(),
            }
        }

        fn compute(&mut self, cuda: &CudaBackend, batch: &CudaBatch) {
            cuda.embed(batch, &self.table, 0, 1.0, &mut self.embedded);
            cuda.linear(&self.embedded, &self.weight, None, &mut self.out);
        }
    }

    #[test]
    fn a_replay_is_the_same_work_on_the_new_arrays() {
        each_element(131, |cuda, rng| {
            let rows = rng.within(1..7);
            let mut model = Model::new(cuda, rng, rows);
            let mut batch = cuda.batch(rows, rows, 4 * rows).unwrap();
            let mut called = 0;
            // The library's algorithms are tried first, where there is one.
            for turn in 0..40 {
                cuda.upload(&step(rng, rows), &mut batch).unwrap();
                if turn % 10 == 9 {
                    assert!(cuda.is_recorded(rows) || turn < 30, "turn {turn}");
                }
                let before = called;
                if cuda.is_recorded(rows) {
                    cuda.replay(rows, &batch).unwrap();
                } else {
                    let ops = || {
                        called += 1;
                        model.compute(cuda, &batch);
                        Ok::<_, DeviceError>(())
                    };
                    cuda.queue(rows, &batch, ops).unwrap();
                }
                assert!(called <= before + 1, "work is queued once");
                let found = read(cuda, &model.out);
                model.compute(cuda, &batch);
                let expected = read(cuda, &model.out);
                crate::testing::assert_close(&found, &expected, 1e-5, 1e-5);
            }
            cuda.forget();
            assert!(!cuda.is_recorded(rows));
            assert!(cuda.replay(rows, &batch).is_err());
            assert_eq!(cuda.take_notice(), None);
        });
    }

    #[test]
    fn what_cannot_be_recorded_is_queued_all_the_same_and_said_once() {
        each_element(137, |cuda, rng| {
            let rows = 3;
            let mut model = Model::new(cuda, rng, rows);
            let mut batch = cuda.batch(rows, rows, 4 * rows).unwrap();
            let mut said = Vec::new();
            for _ in 0..40 {
                cuda.upload(&step(rng, rows), &mut batch).unwrap();
                let ops = || {
                    if cuda.is_recording() {
                        cuda.fail("no kernel for this".to_owned());
                    }
                    model.compute(cuda, &batch);
                    Ok::<_, DeviceError>(())
                };
                cuda.queue(rows, &batch, ops).unwrap();
                said.extend(cuda.take_notice());
                let found = read(cuda, &model.out);
                model.compute(cuda, &batch);
                let expected = read(cuda, &model.out);
                crate::testing::assert_close(&found, &expected, 1e-5, 1e-5);
            }
            assert_eq!(said, ["no kernel for this"]);
            assert!(!cuda.is_recorded(rows));
        });
    }

    /// As a device, the emulation takes no copies in a recording; nothing of a step that failed is kept.
    #[cfg(feature = "cuda-emulation")]
    #[test]
    fn a_recording_that_fails_is_no_recording() {
        each_element(139, |cuda, rng| {
            let mut model = Model::new(cuda, rng, 2);
            let mut batch = cuda.batch(2, 2, 8).unwrap();
            cuda.upload(&step(rng, 2), &mut batch).unwrap();
            let mut values = Vec::new();
            for turn in 0..3 {
                let ops = || {
                    model.compute(cuda, &batch);
                    cuda.read(&model.out, &mut values)
                };
                let queued = cuda.queue(2, &batch, ops);
                assert_eq!(queued.is_ok(), turn == 0, "{queued:?}");
                assert!(!cuda.is_recorded(2) && !cuda.is_recording());
            }
        });
    }
}
