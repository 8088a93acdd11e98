//! Sampling on a GPU: requests packed for the kernel of `cuda.cu`, and answers made of its results.
//!
//! A call's requests, their sparse lists and the rows they are about go to the device in one copy and the results
//! come back in one; more than fits goes in several. Randomness and logarithms are computed here, by the CPU path's
//! own functions. A request that no memory taken at start can hold is answered by the CPU path.
//!
//! What is deferred is queued like everything else and read later. Its tokens stay among the results, where the next
//! step's operations find them: results take turns in two halves of their memory, so that one kernel can read the
//! tokens of the step before while it writes its own. The host's buffers take turns with them.
//!
//! Invariant: every answer is the CPU path's, bit for bit, to the same logits.

#![expect(unsafe_code, reason = "the launcher is C")]

use super::packed::{Packed, RESULT, RESULT_WORDS, WORDS, fits};
use super::{SCRATCH, answer, check, check_known};
use crate::backend::{DeviceError, Element};
use crate::cpu::simd::Isa;
use crate::cuda::clock::Span;
use crate::cuda::device::{Device, Memory, Pinned};
use crate::cuda::launch::{long, unsigned};
use crate::cuda::{CudaBackend, CudaTensor};
use crate::sampling::{Choice, SampleRequest, SampleResult};
use std::ffi::{c_int, c_void};

/// Runs of the kernel whose results are there at the same time.
const TURNS: usize = 2;

unsafe extern "C" {
    fn cluster_sample(
        stream: *mut c_void,
        logits: *mut c_void,
        width: i64,
        vocab: i64,
        words: *mut c_void,
        requests_at: i64,
        rows_at: i64,
        rows: i64,
        before: *const c_void,
        results: *mut c_void,
    ) -> c_int;
}

/// Memory for requests and results, taken at start.
#[derive(Debug)]
pub(crate) struct Space {
    words: Memory,
    /// [`TURNS`] times [`RESULT_WORDS`].
    results: Memory,
    slots: [Slot; TURNS],
    /// Runs of the kernel so far; the next one's slot and results follow from it.
    runs: u64,
    /// Requests of the last run, if that was deferred.
    deferred: usize,
}

/// What belongs to one run.
#[derive(Debug)]
struct Slot {
    upload: Pinned,
    download: Pinned,
    packed: Packed,
}

/// A step that was queued: its marks, and the run of the kernel that it ends with, if it samples.
#[derive(Debug)]
pub struct CudaPending {
    span: Span,
    run: Option<Run>,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    number: u64,
    vocab: usize,
}

impl Space {
    /// Takes the memory.
    pub(crate) fn new(device: &Device) -> Result<Self, DeviceError> {
        let (up, down) = (WORDS * size_of::<u32>(), RESULT_WORDS * size_of::<u32>());
        let slot = || {
            Ok(Slot {
                upload: device.pinned("sampling requests", up)?,
                download: device.pinned("sampling results", down)?,
                packed: Packed::default(),
            })
        };
        Ok(Self {
            words: device.allocate("sampling requests", up)?,
            results: device.allocate("sampling results", TURNS * down)?,
            slots: [slot()?, slot()?],
            runs: 0,
            deferred: 0,
        })
    }

    /// Results of all turns, on the device; the first word of each is its token.
    pub(crate) fn results(&self) -> *const u32 {
        self.results.pointer().cast()
    }

    /// The word of the token among [`Self::results`] that `request` of the last run chooses, if that was deferred.
    pub(crate) fn place(&self, request: u32) -> Option<u32> {
        let is_there = (request as usize) < self.deferred;
        // The run before the next one.
        let half = turn(self.runs + 1) * RESULT_WORDS;
        is_there.then(|| unsigned(half + request as usize * RESULT))
    }

    fn next_slot(&mut self) -> &mut Slot {
        &mut self.slots[turn(self.runs)]
    }
}

fn turn(run: u64) -> usize {
    usize::from(!run.is_multiple_of(2))
}

/// Whether [`defer`] takes such requests.
pub(crate) fn defers(requests: &[SampleRequest]) -> bool {
    fits(requests)
}

/// The operation, as [`super::sample`] defines it. Logits are f32.
pub(crate) fn sample(
    cuda: &CudaBackend,
    logits: &mut CudaTensor,
    vocab: usize,
    requests: &[SampleRequest],
) -> Result<Vec<SampleResult>, DeviceError> {
    assert_eq!(logits.element(), Element::F32, "logits are f32");
    let checked = check((logits.rows(), logits.width()), vocab, requests);
    let checked = checked.and_then(|()| check_known(requests));
    checked.map_err(|reason| failed(cuda, reason))?;
    // A block answers all requests about its row, so they have to follow each other.
    let mut order: Vec<usize> = (0..requests.len()).collect();
    order.sort_by_key(|&place| requests[place].row);

    let mut space = cuda.sampler();
    let mut results = vec![None; requests.len()];
    space.next_slot().packed.clear();
    for place in order {
        let request = &requests[place];
        if space.next_slot().packed.push(place, request, vocab) {
            continue;
        }
        space.run(cuda, logits, vocab, &mut results)?;
        if !space.next_slot().packed.push(place, request, vocab) {
            results[place] = Some(space.answer_on_host(cuda, logits, vocab, request)?);
        }
    }
    space.run(cuda, logits, vocab, &mut results)?;
    Ok(results.into_iter().flatten().collect())
}

/// [`sample`] without waiting, as [`Backend::defer`](crate::backend::Backend::defer) has it.
pub(crate) fn defer(
    cuda: &CudaBackend,
    sampled: Option<(&mut CudaTensor, usize)>,
    requests: &[SampleRequest],
) -> Result<Option<CudaPending>, DeviceError> {
    let mut space = cuda.sampler();
    let Some((logits, vocab)) = sampled.filter(|_| !requests.is_empty()) else {
        space.deferred = 0;
        let span = cuda.clock.span(&cuda.device, None)?;
        return Ok(Some(CudaPending { span, run: None }));
    };
    if !fits(requests) {
        return Ok(None);
    }
    assert_eq!(logits.element(), Element::F32, "logits are f32");
    let checked = check((logits.rows(), logits.width()), vocab, requests);
    let checked = checked.and_then(|()| space.check_last(requests));
    checked.map_err(|reason| failed(cuda, reason))?;
    let slot = space.next_slot();
    slot.packed.clear();
    for (place, request) in requests.iter().enumerate() {
        let is_packed = slot.packed.push(place, request, vocab);
        assert!(is_packed, "what fits by a generous count fits");
    }
    let pending = space.queue(cuda, logits, vocab)?;
    space.deferred = requests.len();
    Ok(Some(pending))
}

/// Waits for what was deferred and reads the answers.
pub(crate) fn finish(
    cuda: &CudaBackend,
    pending: CudaPending,
) -> Result<Vec<SampleResult>, DeviceError> {
    cuda.wait_for(&pending, &mut || false)?;
    let space = cuda.sampler();
    let mut results = Vec::new();
    if let Some(run) = pending.run {
        results.resize(space.slots[turn(run.number)].packed.len(), None);
        space.read(cuda, run, &mut results)?;
    }
    cuda.clock.read(pending.span);
    Ok(results.into_iter().flatten().collect())
}

impl CudaPending {
    /// The marks around it.
    pub(crate) fn span(&self) -> &Span {
        &self.span
    }
}

impl Space {
    /// Answers what is packed.
    fn run(
        &mut self,
        cuda: &CudaBackend,
        logits: &mut CudaTensor,
        vocab: usize,
        results: &mut [Option<SampleResult>],
    ) -> Result<(), DeviceError> {
        if self.next_slot().packed.is_empty() {
            return Ok(());
        }
        self.deferred = 0;
        let pending = self.queue(cuda, logits, vocab)?;
        cuda.wait_for(&pending, &mut || false)?;
        if let Some(run) = pending.run {
            self.read(cuda, run, results)?;
        }
        cuda.clock.read(pending.span);
        self.next_slot().packed.clear();
        Ok(())
    }

    /// Queues the kernel on what is packed, and the copy of its results.
    fn queue(
        &mut self,
        cuda: &CudaBackend,
        logits: &mut CudaTensor,
        vocab: usize,
    ) -> Result<CudaPending, DeviceError> {
        let number = self.runs;
        let half = turn(number) * RESULT_WORDS * size_of::<u32>();
        let slot = &mut self.slots[turn(number)];
        let words: &mut [u32] = bytemuck::cast_slice_mut(slot.upload.write()?);
        let (requests_at, rows_at, used) = slot.packed.write(words);
        let bytes = used * size_of::<u32>();
        let begun = cuda.device.mark_now().ok();
        (cuda.device).upload(&slot.upload, bytes, (&mut self.words, 0))?;
        self.launch(cuda, logits, vocab, (requests_at, rows_at));
        cuda.check()?;
        let slot = &mut self.slots[turn(number)];
        let bytes = slot.packed.result_words() * size_of::<u32>();
        (cuda.device).download((&self.results, half), bytes, &mut slot.download)?;
        self.runs += 1;
        Ok(CudaPending {
            span: cuda.clock.span(&cuda.device, begun)?,
            run: Some(Run { number, vocab }),
        })
    }

    /// Reads the results of a run.
    fn read(
        &self,
        cuda: &CudaBackend,
        run: Run,
        results: &mut [Option<SampleResult>],
    ) -> Result<(), DeviceError> {
        if self.runs - run.number > TURNS as u64 {
            let reason = "sampled for two steps before one was asked for its tokens";
            return Err(failed(cuda, reason.to_owned()));
        }
        let slot = &self.slots[turn(run.number)];
        let words: &[u32] = bytemuck::cast_slice(slot.download.read()?);
        for (place, result) in slot.packed.read(words, run.vocab) {
            results[place] = Some(result);
        }
        Ok(())
    }

    fn launch(
        &mut self,
        cuda: &CudaBackend,
        logits: &mut CudaTensor,
        vocab: usize,
        (requests_at, rows_at): (usize, usize),
    ) {
        let width = long(logits.width());
        let half = |run| turn(run) * RESULT_WORDS * size_of::<u32>();
        let rows = long(self.slots[turn(self.runs)].packed.num_rows());
        // SAFETY: rows, tokens and lists are inside the logits and the words, and tokens of the run before among its
        // results: `check`, `check_last` and `Packed` saw to it.
        let code = unsafe {
            cluster_sample(
                cuda.stream(),
                logits.pointer_mut(),
                width,
                long(vocab),
                self.words.pointer_mut(),
                long(requests_at),
                long(rows_at),
                rows,
                self.results.at(half(self.runs + 1)),
                self.results.at_mut(half(self.runs)),
            )
        };
        cuda.launched("sample", code);
    }

    /// Says what is wrong with the tokens of the run before that `requests` name.
    fn check_last(&self, requests: &[SampleRequest]) -> Result<(), String> {
        let last = |request: &SampleRequest| match &request.choice {
            Choice::Sample(params) => params.last,
            Choice::Score(_) => None,
        };
        let mut lasts = requests.iter().filter_map(last);
        match lasts.find(|request| self.place(*request).is_none()) {
            Some(request) => Err(not_deferred(request)),
            None => Ok(()),
        }
    }

    /// For what is too large to pack: the CPU path, on a copy of the row.
    fn answer_on_host(
        &mut self,
        cuda: &CudaBackend,
        logits: &CudaTensor,
        vocab: usize,
        request: &SampleRequest,
    ) -> Result<SampleResult, DeviceError> {
        let mut row: Vec<f32> = Vec::with_capacity(vocab);
        let start = request.row * logits.width();
        let download = &mut self.next_slot().download;
        while row.len() < vocab {
            let count = (vocab - row.len()).min(RESULT_WORDS);
            let at = (start + row.len()) * size_of::<f32>();
            let from = (logits.memory(), at);
            (cuda.device).download(from, count * size_of::<f32>(), download)?;
            let values: &[f32] = bytemuck::cast_slice(download.read()?);
            row.extend_from_slice(&values[..count]);
        }
        let isa = Isa::detect();
        Ok(SCRATCH.with_borrow_mut(|scratch| answer(isa, &row, request, scratch)))
    }
}

/// What is wrong with a token that is on no device.
pub(crate) fn not_deferred(request: u32) -> String {
    format!("a step takes the token of request {request} of the one before it, which left none")
}

fn failed(cuda: &CudaBackend, reason: String) -> DeviceError {
    DeviceError::Failed {
        device: cuda.device.name().to_owned(),
        reason,
    }
}
