//! Decode steps as graphs: a step of a size that came before is queued with one call instead of hundreds.
//!
//! The first step of a size is queued one operation after the other, so that libraries make their choices and take
//! what they need; a later one is recorded and then queued as a whole, as is every one after it. What a step
//! works on stays where it is, so a recording holds until [`forget`](crate::backend::Backend::forget). A device that does
//! not record goes on without: the reason is told once, as a notice. Collectives are recorded by all ranks or by none, so
//! when a step is recorded depends on the steps since the last `forget` alone, and whether that is replayed on what all
//! ranks' devices said.
//!
//! Invariant: a recording is made and queued only for batches of its number of rows, each with one token.

use super::batch::CudaBatch;
use super::{CudaBackend, graph};
use crate::backend::{DeviceError, Queued};
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
    /// Whether a step was queued since the last [`Self::clear`].
    begun: Cell<bool>,
    /// Why this device takes no more recordings. It is asked all the same, until it is told to stop.
    refusal: RefCell<Option<String>>,
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

    /// Drops all recordings, and what became of them: another rank may be a new one that knows nothing of it. Sizes have
    /// to be seen again, too: who replaces a communicator has to meet its windows.
    pub(crate) fn clear(&self) {
        self.steps.borrow_mut().clear();
        self.bytes.set(0);
        self.begun.set(false);
        self.refusal.take();
        self.ended.take();
    }

    /// Whether a step was begun since the last [`Self::clear`]; from now on, one was.
    pub(crate) fn begin(&self) -> bool {
        self.begun.replace(true)
    }

    /// Why steps are no longer recorded, the first time it is asked.
    pub(crate) fn notice(&self) -> Option<String> {
        let ended = self.ended.borrow();
        ended.clone().filter(|_| !self.told.replace(true))
    }

    /// Records nothing more, and not the step of `rows` rows either.
    pub(crate) fn end(&self, rows: usize) {
        self.steps.borrow_mut().remove(&rows);
        let reason = self.refusal.borrow().clone();
        let reason = reason.unwrap_or_else(|| "another rank does not record".to_owned());
        self.ended.borrow_mut().get_or_insert(reason);
    }

    fn refuse(&self, reason: String) -> Queued {
        self.refusal.borrow_mut().get_or_insert(reason);
        Queued::Refused
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
    ) -> Result<Queued, E> {
        let seen = match self.graphs.steps.borrow().get(&rows) {
            Some(Step::Seen(plans)) => Some(plans.clone()),
            Some(Step::Recorded(..)) => return Ok(Queued::Recorded),
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
                Ok(Queued::Done)
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
    ) -> Result<Queued, E> {
        self.check()?;
        if self.graphs.refusal.borrow().is_some() {
            return Ok(Queued::Refused);
        }
        // These are copies to the device, which are not part of what is recorded.
        batch.prepare(&self.device, &plans)?;
        // How long tries took is known once they are done.
        self.device.synchronize()?;
        self.blas.settle();
        let free = self.device.memory().1;
        if let Err(error) = graph::begin(&self.device) {
            return Ok(self.graphs.refuse(error.to_string()));
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
            (Err(error), None) => return Ok(self.graphs.refuse(error.to_string())),
            (_, Some(refused)) => return Ok(self.graphs.refuse(refused)),
        };
        let taken = free.saturating_sub(self.device.memory().1);
        let bytes = self.graphs.bytes.get() + taken;
        self.graphs.bytes.set(bytes);
        if bytes > RESERVE_BYTES {
            // This one is there; the next is too many.
            self.graphs.refuse(format!(
                "recordings of steps take {} MiB, which is all that was kept for them",
                bytes >> 20
            ));
        }
        let mut steps = self.graphs.steps.borrow_mut();
        steps.insert(rows, Step::Recorded(plans, graph));
        Ok(Queued::Recorded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Precision};
    use crate::batch::Batch;
    use crate::cuda::testing::{each_element, queue, read, values};
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
                    queue(cuda, rows, &batch, ops).unwrap();
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
                queue(cuda, rows, &batch, ops).unwrap();
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

    #[test]
    fn what_another_rank_does_not_record_is_not_replayed_until_ranks_begin_anew() {
        each_element(143, |cuda, rng| {
            let mut model = Model::new(cuda, rng, 2);
            let mut batch = cuda.batch(2, 2, 8).unwrap();
            for agreed in [false, true] {
                let mut recorded = 0;
                for _ in 0..40 {
                    cuda.upload(&step(rng, 2), &mut batch).unwrap();
                    let mut ops = || {
                        model.compute(cuda, &batch);
                        Ok::<_, DeviceError>(())
                    };
                    match cuda.queue(2, &batch, &mut ops).unwrap() {
                        Queued::Recorded if agreed => cuda.replay(2, &batch).unwrap(),
                        Queued::Recorded => {
                            recorded += 1;
                            cuda.stop_recording(2);
                            ops().unwrap();
                        }
                        queued => assert_eq!(queued, Queued::Done),
                    }
                    let found = read(cuda, &model.out);
                    model.compute(cuda, &batch);
                    let expected = read(cuda, &model.out);
                    crate::testing::assert_close(&found, &expected, 1e-5, 1e-5);
                }
                assert_eq!(
                    (recorded, cuda.is_recorded(2)),
                    (usize::from(!agreed), agreed)
                );
                let said = (!agreed).then(|| "another rank does not record".to_owned());
                assert_eq!(cuda.take_notice(), said);
                cuda.forget();
            }
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
