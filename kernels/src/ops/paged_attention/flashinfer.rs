//! Attention through FlashInfer's kernels (`flashinfer.cuh`), for the shapes that were compiled.
//!
//! Prefill and decode rows go in one launch. A step is cut into tiles and chunks once for each window that its layers
//! have, on the host; the cut goes to the device in one copy and serves all those layers. How keys are cut
//! into chunks depends on the whole step, so results agree from batch to batch within rounding only.
//! Not here: other shapes, which `paged_attention.cu` computes; nothing of this is emulated.
//!
//! Invariant: memory is taken at start, for the largest step; a plan that needs more is an error.

#![cfg_attr(
    not(feature = "cuda-emulation"),
    expect(unsafe_code, reason = "FlashInfer is reached through C functions")
)]

use crate::backend::{Attention, DeviceError, Element, KvLayout};
use crate::cuda::device::{Device, Memory, Pinned};
use crate::cuda::{CudaBackend, CudaBatch, CudaKvCache, CudaTensor, element_code};
use std::ffi::{c_int, c_void};

/// Query heads for each key head, at most: the index workspace is sized by it.
const MOST_GROUPED: usize = 64;

/// Windows that the layers of one model have, at most; layers with further ones are not taken.
const WINDOWS: usize = 2;

/// Blocks of threads that a multiprocessor runs at once; keys are cut to fill them.
const BLOCKS_EACH: usize = 2;

/// Elements of the largest tile of results, and its rows, over all head sizes.
const TILE_ELEMENTS: usize = 128 * 128;
const TILE_ROWS: usize = 128;

/// What a plan is made of, as in `flashinfer.cu`.
#[repr(C)]
struct Step {
    row_starts: *const u32,
    context_lens: *const u32,
    rows: u32,
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    block_size: u32,
    window_left: i32,
    multiprocessors: u32,
}

/// How a step is cut, as in `flashinfer.cuh`. That of a decode step depends on the number of its rows alone; what
/// depends on more is in the index workspace.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Plan {
    tile: u32,
    items: u32,
    split: u32,
    partial_rows: u32,
    words: u32,
    /// Where seven arrays begin in the index workspace.
    arrays: [u32; 7],
}

/// One layer's attention, as in `flashinfer.cuh`.
#[repr(C)]
struct Call {
    queries: *const c_void,
    keys: *const c_void,
    values: *const c_void,
    out: *mut c_void,
    row_starts: *const u32,
    context_lens: *const u32,
    block_starts: *const u32,
    blocks: *const u32,
    partials: *mut c_void,
    indices: *const c_void,
    rows: u32,
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    head_dim: u32,
    query_stride: u32,
    block_size: u32,
    block_stride: u32,
    head_stride: u32,
    window_left: i32,
    scale: f32,
    soft_cap: f32,
}

/// Memory for plans and partial results, and the plans of the current step.
#[derive(Debug)]
pub(crate) struct FlashInfer {
    partials: Memory,
    cuts: [Cut; WINDOWS],
    multiprocessors: usize,
}

/// The plan for the layers of one window.
#[derive(Debug)]
struct Cut {
    indices: Memory,
    pinned: Pinned,
    plan: Plan,
    /// What it was made for; `None` before its first use.
    made_for: Option<Key>,
}

/// What a plan depends on beside the arrays of an upload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    upload: u64,
    window_left: i32,
    heads: usize,
    layout: (usize, usize, usize),
}

/// A plan that a step had, to be made for another step of the same size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned {
    place: usize,
    key: Key,
    plan: Plan,
}

/// Whether attention of this shape was compiled.
pub(crate) fn takes(element: Element, layout: &KvLayout, attention: &Attention) -> bool {
    FlashInfer::is_for(element)
        && (element == layout.element || layout.element == Element::Fp8)
        && is_compiled(layout, attention.logit_soft_cap.is_some())
        && attention.local_heads <= layout.local_kv_heads * MOST_GROUPED
        && attention.sliding_window != Some(0)
}

/// Whether heads of this size were compiled, with a soft cap or without: no published model has one with heads of 64. Those
/// are not compiled for 8-bit keys either.
fn is_compiled(layout: &KvLayout, has_soft_cap: bool) -> bool {
    match layout.head_dim {
        64 => !has_soft_cap && layout.element != Element::Fp8,
        128 | 256 => true,
        _ => false,
    }
}

/// 32-bit words that the plan of any step up to this size takes.
fn index_words(max_tokens: usize, max_rows: usize, multiprocessors: usize) -> usize {
    // Tiles have 16 rows where a sequence brings no more on average, and 64 or 128 otherwise; every
    // sequence may have a tile that is not full. Tiles times chunks are no more than fill the device.
    let tiles = max_tokens * MOST_GROUPED / 64 + 2 * max_rows + BLOCKS_EACH * multiprocessors;
    let valid = tiles.div_ceil(size_of::<u32>());
    let arrays = [tiles, tiles, tiles, max_rows + 1, 1, max_tokens + 1, valid];
    arrays
        .map(|words: usize| words.next_multiple_of(4))
        .iter()
        .sum()
}

/// Bytes that the partial results of any step take: of each tile that fills the device, and their
/// logarithms of sums.
fn partial_bytes(multiprocessors: usize) -> usize {
    let tiles = BLOCKS_EACH * multiprocessors;
    tiles * (TILE_ELEMENTS * Element::Bf16.bytes() + TILE_ROWS * size_of::<f32>())
}

impl FlashInfer {
    /// Whether any attention with these elements was compiled.
    pub(crate) fn is_for(element: Element) -> bool {
        cfg!(not(feature = "cuda-emulation")) && element != Element::F32
    }

    /// Memory for the largest step.
    pub(crate) fn new(
        device: &Device,
        max_tokens: usize,
        max_rows: usize,
    ) -> Result<Self, DeviceError> {
        let multiprocessors = device.multiprocessors();
        let bytes = index_words(max_tokens, max_rows, multiprocessors) * size_of::<u32>();
        let cut = || {
            Ok(Cut {
                indices: device.allocate("the plan of a step's attention", bytes)?,
                pinned: device.pinned("the plan of a step's attention", bytes)?,
                plan: Plan::default(),
                made_for: None,
            })
        };
        Ok(Self {
            partials: device.allocate(
                "partial results of attention",
                partial_bytes(multiprocessors),
            )?,
            cuts: [cut()?, cut()?],
            multiprocessors,
        })
    }

    /// The place of the plan for `key`: one that is there, or one that can be made over.
    fn place(&self, key: Key) -> Option<usize> {
        let same = |cut: &Cut| cut.made_for == Some(key);
        let old = |cut: &Cut| cut.made_for.is_none_or(|made| made.upload != key.upload);
        let cuts = &self.cuts;
        cuts.iter()
            .position(same)
            .or_else(|| cuts.iter().position(old))
    }

    /// The plans that were made for the step of this `upload`.
    pub(crate) fn planned(&self, upload: u64) -> Vec<Planned> {
        let cuts = self.cuts.iter().enumerate();
        let planned = |(place, cut): (usize, &Cut)| {
            let key = cut.made_for.filter(|key| key.upload == upload)?;
            let plan = cut.plan;
            Some(Planned { place, key, plan })
        };
        cuts.filter_map(planned).collect()
    }

    /// Makes the plans of an earlier step for the current one, in the same places and of the same shape, as work
    /// that was recorded expects them.
    ///
    /// # Errors
    /// [`DeviceError::Failed`] if a plan comes out otherwise, which a decode step's does not.
    pub(crate) fn prepare(
        &mut self,
        plans: &[Planned],
        device: &Device,
        batch: &CudaBatch,
    ) -> Result<(), DeviceError> {
        for &Planned { place, key, plan } in plans {
            let upload = batch.uploads();
            self.make(place, Key { upload, ..key }, device, batch)?;
            // How much of the index workspace is used is not the launches' business.
            let words = self.cuts[place].plan.words;
            if self.cuts[place].plan != (Plan { words, ..plan }) {
                return Err(failed(device, "a decode step was cut into another shape"));
            }
        }
        Ok(())
    }

    fn make(
        &mut self,
        place: usize,
        key: Key,
        device: &Device,
        batch: &CudaBatch,
    ) -> Result<(), DeviceError> {
        let host = batch.host();
        let (kv_heads, head_dim, block_size) = key.layout;
        let step = Step {
            row_starts: host.row_starts.as_ptr(),
            context_lens: host.context_lens.as_ptr(),
            rows: small(host.num_rows()),
            tokens: small(host.num_tokens()),
            heads: small(key.heads),
            kv_heads: small(kv_heads),
            head_dim: small(head_dim),
            block_size: small(block_size),
            window_left: key.window_left,
            multiprocessors: small(self.multiprocessors),
        };
        let cut = &mut self.cuts[place];
        cut.made_for = None;
        let words: &mut [u32] = bytemuck::cast_slice_mut(cut.pinned.write()?);
        cut.plan = interface::plan(&step, words, self.partials.bytes())
            .map_err(|reason| failed(device, &reason))?;
        let used = cut.plan.words as usize * size_of::<u32>();
        device.upload(&cut.pinned, used, (&mut cut.indices, 0))?;
        cut.made_for = Some(key);
        Ok(())
    }
}

/// Attention as [`super::attend`] defines it. `false`, and nothing queued, where this shape was not compiled or
/// the model has layers of too many different windows.
pub(crate) fn attend(
    backend: &CudaBackend,
    batch: &CudaBatch,
    attention: &Attention,
    (qkv, cache): (&CudaTensor, &CudaKvCache),
    out: &mut CudaTensor,
) -> Result<bool, DeviceError> {
    let layout = cache.layout();
    let mut space = batch.flashinfer();
    let Some(space) = space
        .as_mut()
        .filter(|_| takes(qkv.element(), &layout, attention))
    else {
        return Ok(false);
    };
    let KvLayout {
        block_size,
        local_kv_heads,
        head_dim,
        element,
        ..
    } = layout;
    let window = attention.sliding_window;
    let key = Key {
        upload: batch.uploads(),
        window_left: window.map_or(-1, |window| i32::try_from(window - 1).unwrap_or(-1)),
        heads: attention.local_heads,
        layout: (local_kv_heads, head_dim, block_size),
    };
    let Some(place) = space.place(key) else {
        return Ok(false);
    };
    if space.cuts[place].made_for != Some(key) {
        space.make(place, key, &backend.device, batch)?;
    }
    if qkv.width() * qkv.rows() > i32::MAX as usize {
        let size = format!("[{}, {}]", qkv.rows(), qkv.width());
        return Err(failed(
            &backend.device,
            &format!("attention of a step of {size} elements"),
        ));
    }

    let head = block_size * head_dim;
    let keys = cache.layer(attention.layer).cast::<u8>();
    let call = Call {
        queries: qkv.pointer(),
        keys: keys.cast(),
        values: keys.wrapping_add(head * element.bytes()).cast(),
        out: out.pointer_mut(),
        row_starts: batch.row_starts(),
        context_lens: batch.context_lens(),
        block_starts: batch.block_starts(),
        blocks: batch.blocks(),
        partials: space.partials.pointer_mut(),
        indices: space.cuts[place].indices.pointer(),
        rows: small(batch.num_rows()),
        tokens: small(batch.num_tokens()),
        heads: small(attention.local_heads),
        kv_heads: small(local_kv_heads),
        head_dim: small(head_dim),
        query_stride: small(qkv.width()),
        block_size: small(block_size),
        block_stride: small(local_kv_heads * 2 * head),
        head_stride: small(2 * head),
        window_left: key.window_left,
        scale: attention.scale,
        soft_cap: attention.logit_soft_cap.unwrap_or(0.0),
    };
    let plan = &space.cuts[place].plan;
    let elements = (element_code(qkv.element()), element_code(element));
    interface::run(backend.stream(), elements, &call, plan)
        .map_err(|reason| failed(&backend.device, &reason))?;
    Ok(true)
}

fn small(size: usize) -> u32 {
    u32::try_from(size).expect("sizes of a step are below 2^32")
}

fn failed(device: &Device, reason: &str) -> DeviceError {
    DeviceError::Failed {
        device: device.name().to_owned(),
        reason: format!("FlashInfer: {reason}"),
    }
}

/// The C functions, as functions that say what went wrong.
#[cfg(not(feature = "cuda-emulation"))]
mod interface {
    use super::{Call, Plan, Step, c_int, c_void};
    use std::ffi::c_char;

    /// A message is cut to this many bytes.
    const MESSAGE: usize = 512;

    unsafe extern "C" {
        fn cluster_flashinfer_plan(
            step: *const Step,
            indices: *mut u32,
            words: usize,
            partial_bytes: usize,
            plan: *mut Plan,
            error: *mut c_char,
            error_bytes: usize,
        ) -> c_int;
        fn cluster_flashinfer_run(
            stream: *mut c_void,
            element: c_int,
            kv_element: c_int,
            call: *const Call,
            plan: *const Plan,
            error: *mut c_char,
            error_bytes: usize,
        ) -> c_int;
    }

    pub(super) fn plan(
        step: &Step,
        indices: &mut [u32],
        partial_bytes: usize,
    ) -> Result<Plan, String> {
        let mut plan = Plan::default();
        let mut message = [0_u8; MESSAGE];
        // SAFETY: `step` points to arrays of the lengths it says, which a checked batch has; the function writes
        // no more than it is given room for.
        let code = unsafe {
            cluster_flashinfer_plan(
                step,
                indices.as_mut_ptr(),
                indices.len(),
                partial_bytes,
                &raw mut plan,
                message.as_mut_ptr().cast(),
                MESSAGE,
            )
        };
        said(code, &message)?;
        Ok(plan)
    }

    pub(super) fn run(
        stream: *mut c_void,
        (element, kv_element): (c_int, c_int),
        call: &Call,
        plan: &Plan,
    ) -> Result<(), String> {
        let mut message = [0_u8; MESSAGE];
        // SAFETY: the pointers are to device memory that outlives the stream's work, of the sizes that go with them.
        let code = unsafe {
            cluster_flashinfer_run(
                stream,
                element,
                kv_element,
                call,
                plan,
                message.as_mut_ptr().cast(),
                MESSAGE,
            )
        };
        said(code, &message)
    }

    fn said(code: c_int, message: &[u8]) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        let end = message.iter().position(|&byte| byte == 0);
        let text = &message[..end.unwrap_or(message.len())];
        Err(String::from_utf8_lossy(text).into_owned())
    }
}

/// [`takes`] says no under emulation, so nothing comes here.
#[cfg(feature = "cuda-emulation")]
mod interface {
    use super::{Call, Plan, Step, c_int, c_void};

    pub(super) fn plan(_: &Step, _: &mut [u32], _: usize) -> Result<Plan, String> {
        Err("is not emulated".to_owned())
    }

    pub(super) fn run(_: *mut c_void, _: (c_int, c_int), _: &Call, _: &Plan) -> Result<(), String> {
        Err("is not emulated".to_owned())
    }
}
