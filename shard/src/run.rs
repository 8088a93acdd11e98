//! One step on one rank: what is queued for a plan that was laid out, and the answers to its requests.
//!
//! Decode steps are filled up to sizes that come again and replayed by backends that record. Knows no plan, no epoch
//! and no order of steps, which the engine checked.
//!
//! Invariant: what collectives a step makes follows from its plan alone.

use crate::clock;
use crate::comm::Comm;
use crate::engine::StepError;
use crate::ladder::{self, Spare};
use crate::models::decoder::Decoder;
use kernels::backend::{Backend, DeviceError, Queued};
use kernels::batch::Batch;
use kernels::sampling::{SampleRequest, SampleResult};

/// What a step gave, or what there is to wait for.
#[derive(Debug)]
pub(crate) struct Answers<P> {
    pub(crate) results: Vec<SampleResult>,
    /// The results are with it.
    pub(crate) pending: Option<P>,
}

/// What one step works with.
pub(crate) struct Run<'a, B: Backend, C> {
    pub(crate) backend: &'a B,
    pub(crate) comm: &'a mut C,
    pub(crate) decoder: &'a mut Decoder<B>,
    pub(crate) batch: &'a mut B::DeviceBatch,
    /// Tokens to choose among, on the rank that samples.
    pub(crate) vocab: Option<usize>,
    pub(crate) spare: Option<Spare>,
    pub(crate) max_rows: usize,
    pub(crate) sample_us: u64,
}

impl<B: Backend, C: Comm<B>> Run<'_, B, C> {
    /// The forward pass, and the answers to `requests` where this rank samples. Waits for none of it where the backend
    /// need not, and the logits fit one piece.
    pub(crate) fn compute(
        &mut self,
        host: &mut Batch,
        cache: &mut B::KvCache,
        mut requests: Vec<SampleRequest>,
    ) -> Result<Answers<B::Pending>, StepError> {
        // The head is applied to as many rows at a time as fit; the first piece of them goes with the
        // batch, so that there is one upload in the usual case.
        let wanted = std::mem::take(&mut host.logit_tokens);
        let size = self.fill(host);
        let mut pieces = wanted.chunks(self.decoder.logit_rows());
        let first = pieces.next().unwrap_or_default();
        self.upload(host, first)?;
        self.backend.start_clock();
        self.decoder.set_tokens(self.backend, host.num_tokens());
        self.forward(size, cache)?;

        let mut answers = Answers {
            results: Vec::new(),
            pending: None,
        };
        let is_whole = pieces.len() == 0;
        if !first.is_empty() {
            self.answer((first.len(), is_whole), &mut requests, &mut answers)?;
        }
        for piece in pieces {
            self.upload(host, piece)?;
            self.answer((piece.len(), is_whole), &mut requests, &mut answers)?;
        }
        // Give the batch its memory back.
        host.logit_tokens = wanted;
        if answers.pending.is_none() {
            self.mark_end(&mut answers)?;
        }
        Ok(answers)
    }

    /// Has the end of a step that deferred no sampling be waited for: at once if it sampled, as its tokens are not kept
    /// on the device then.
    fn mark_end(&self, answers: &mut Answers<B::Pending>) -> Result<(), DeviceError> {
        let end = self.backend.defer(None, &[])?;
        if answers.results.is_empty() {
            answers.pending = end;
        } else if let Some(end) = end {
            self.backend.finish(end)?;
        }
        Ok(())
    }

    /// Fills a decode step up to a size that comes again, where the backend and the communicator can make use of it.
    fn fill(&mut self, host: &mut Batch) -> Option<usize> {
        let spare = self.spare.filter(|_| ladder::is_decode(host))?;
        let size = ladder::size(host.num_rows(), self.max_rows)?;
        if !self.comm.is_recordable() {
            return None;
        }
        ladder::fill(host, size, spare);
        Some(size)
    }

    /// Queues the layers: as they come, or as what was recorded of a decode step of `size` rows.
    fn forward(&mut self, size: Option<usize>, cache: &mut B::KvCache) -> Result<(), StepError> {
        let (backend, batch) = (self.backend, &*self.batch);
        let Some(rows) = size else {
            return Ok(self.decoder.forward(backend, self.comm, batch, cache)?);
        };
        if backend.is_recorded(rows) {
            return self.comm.replay(|| Ok(backend.replay(rows, batch)?));
        }
        let (decoder, comm) = (&mut *self.decoder, &mut *self.comm);
        let queued = backend.queue(rows, batch, || {
            Ok::<_, StepError>(decoder.forward(backend, comm, batch, cache)?)
        })?;
        if queued != Queued::Done {
            // Collectives are replayed by all ranks or by none.
            if comm.agree(backend, queued == Queued::Recorded)? {
                tracing::debug!(rows, "decode steps of this size are replayed from now on");
                comm.replay(|| Ok::<_, StepError>(backend.replay(rows, batch)?))?;
            } else {
                backend.stop_recording(rows);
                decoder.forward(backend, comm, batch, cache)?;
            }
        }
        if let Some(notice) = backend.take_notice() {
            tracing::warn!("decode steps are queued one kernel at a time from now on: {notice}");
        }
        Ok(())
    }

    fn upload(&mut self, host: &mut Batch, logit_tokens: &[u32]) -> Result<(), DeviceError> {
        host.logit_tokens.clear();
        host.logit_tokens.extend_from_slice(logit_tokens);
        self.backend.upload(host, self.batch)
    }

    /// Computes the next `rows` rows of logits and answers the requests about them, which are taken off
    /// the front of `requests`; the rows of the rest are counted from there. Does not wait for the answers if these are
    /// all rows and the backend defers.
    fn answer(
        &mut self,
        (rows, is_whole): (usize, bool),
        requests: &mut Vec<SampleRequest>,
        answers: &mut Answers<B::Pending>,
    ) -> Result<(), StepError> {
        let logits = self
            .decoder
            .logits(self.backend, self.comm, (self.batch, rows))?;
        let Some(vocab) = self.vocab else {
            return Ok(());
        };
        let start = clock::now();
        let later = requests.split_off(requests.partition_point(|request| request.row < rows));
        if is_whole {
            answers.pending = self.backend.defer(Some((&mut *logits, vocab)), requests)?;
        }
        if answers.pending.is_none() {
            let results = self.backend.sample(logits, vocab, requests)?;
            answers.results.extend(results);
        }
        *requests = later;
        for request in requests {
            request.row -= rows;
        }
        self.sample_us += clock::micros_since(start);
        Ok(())
    }
}
