//! Collectives between GPUs, through NCCL.
//!
//! Collectives are queued on the backend's one stream and return at once; they sum in the tensor's element
//! type. Every wait looks at the device, at NCCL's errors and at the abort flag, and none blocks inside
//! the driver, so that a dead peer costs no more than the abort that follows. With one rank there is no
//! communicator and no NCCL: a single GPU needs no library for it.
//!
//! Invariant: at most [`FENCE_EVERY`] times [`FENCES`] collectives are queued and not done, so that the
//! driver's queue of launches never fills and the device's thread is never stuck inside it.

#![expect(unsafe_code, reason = "NCCL's and the driver's interfaces are C")]

mod event;
mod gather;
mod handle;
pub(crate) mod library;
mod timing;
mod window;

use super::{Abort, Comm, CommError, CommTimings, Seat};
use cudarc::nccl::sys::{self, ncclDataType_t, ncclRedOp_t, ncclResult_t, ncclUniqueId};
use event::{Event, Stream, wait};
use gather::Scratch;
use handle::Handle;
use kernels::backend::{Backend, Element};
use kernels::cuda::{CudaBackend, CudaTensor};
use std::ffi::c_void;
use std::mem::offset_of;
use std::net::IpAddr;
use std::time::Duration;
use timing::Timing;
use window::Windows;

/// Collectives between two fences; with [`FENCES`] of them, some 50 layers' launches.
const FENCE_EVERY: u32 = 32;
const FENCES: usize = 2;

/// How long ranks may take to connect for the first collective of a kind, which happens in the background.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// Whether what is launched is done when the call returns: an abort must then get through to it. What was recorded keeps
/// the communicator's memory until it is forgotten.
const EMULATED: bool = cfg!(feature = "cuda-emulation");

/// Bytes of a communicator's identity.
const ID_BYTES: usize = size_of::<ncclUniqueId>();

/// What NCCL wants at the start of its configuration, and the version whose fields are filled in.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const CONFIG_VERSION: u32 = 21903;

/// One rank's end of a group of GPUs.
#[derive(Debug)]
pub struct NcclComm {
    /// `None` with one rank.
    group: Option<Group>,
    abort: Abort,
}

#[derive(Debug)]
struct Group {
    rank: usize,
    world_size: u32,
    stream: Stream,
    handle: Handle,
    timing: Timing,
    fences: Fences,
    windows: Windows,
    scratch: Option<Scratch>,
}

/// Marks that the queue is not allowed to run away from.
#[derive(Debug)]
struct Fences {
    marks: [Event; FENCES],
    queued: u32,
    next: usize,
}

impl Group {
    fn join(backend: &CudaBackend, seat: &Seat<'_>) -> Result<Self, CommError> {
        let version = library::load().map_err(CommError::Failed)?;
        library::check_sharing(version, library::shares_gpu()).map_err(CommError::Failed)?;
        let id = unique_id(seat.id)?;
        let rank = int(seat.rank)?;
        // Never freed: NCCL's thread writes there once more when the communicator is formed, also late.
        let comm = Box::leak(Box::new(std::ptr::null_mut()));
        let mut config = config();
        // SAFETY: the place for the communicator stays, and the configuration is read during the call.
        let code = unsafe {
            sys::ncclCommInitRankConfig(
                &raw mut *comm,
                int(seat.world_size)?,
                id,
                rank,
                &raw mut config,
            )
        };
        if !matches!(
            code,
            ncclResult_t::ncclSuccess | ncclResult_t::ncclInProgress
        ) {
            return Err(handle::failed("form the communicator", code));
        }
        let handle = Handle::new(*comm, seat.abort)?;
        handle.settle((seat.world_size, seat.limit))?;
        Ok(Self {
            rank: seat.rank as usize,
            world_size: seat.world_size,
            stream: Stream(backend.stream().cast()),
            handle,
            timing: Timing::default(),
            fences: Fences::new()?,
            windows: Windows::default(),
            scratch: None,
        })
    }

    /// Lets all ranks reach a tensor directly, once: all ranks meet the same tensors in the same order.
    fn share(&mut self, x: &mut CudaTensor) -> Result<(), CommError> {
        let limit = (self.world_size, CONNECT_LIMIT);
        self.windows.share(&self.handle, limit, x)
    }

    /// Queues one collective over `bytes` per rank.
    fn queue(
        &mut self,
        backend: &CudaBackend,
        (what, bytes): (&str, usize),
        call: impl FnOnce(sys::ncclComm_t, sys::cudaStream_t) -> ncclResult_t,
    ) -> Result<(), CommError> {
        let (stream, limit) = (self.stream.0.cast(), (self.world_size, CONNECT_LIMIT));
        // In a recording there is nothing to wait for, and marks would be the recording's.
        let is_recording = backend.is_recording();
        if is_recording {
            self.timing.skip();
        } else {
            self.fence()?;
        }
        self.timing.before(self.stream, bytes)?;
        self.handle.call(what, limit, |comm| call(comm, stream))?;
        self.timing.after(self.stream)
    }

    /// Waits for the fence before the last, now and then.
    fn fence(&mut self) -> Result<(), CommError> {
        self.fences.queued += 1;
        if !self.fences.queued.is_multiple_of(FENCE_EVERY) {
            return Ok(());
        }
        let mark = &self.fences.marks[self.fences.next];
        // An event that was never recorded counts as done.
        self.until(|| mark.is_done())?;
        mark.record(self.stream)?;
        self.fences.next = (self.fences.next + 1) % FENCES;
        Ok(())
    }

    /// Waits for the device. Ends with the abort, and with an error of NCCL.
    fn until(&self, is_done: impl Fn() -> Result<bool, CommError>) -> Result<(), CommError> {
        wait(|| {
            let done = is_done()?;
            if !done {
                // What it says of the background does not matter here; that it fails does.
                self.handle.is_busy()?;
            }
            Ok(done)
        })
    }

    /// Ends the oldest step, which the device has done. Microseconds inside its collectives.
    fn end_step(&mut self) -> Result<u64, CommError> {
        let total_us = self.timing.end();
        self.handle.is_busy()?;
        total_us
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The handle goes first: it ends what is running. The stream is another's, but nothing of this
        // group may be on it when its memory goes. Where that takes too long, the session ends the process.
        let (rank, world_size) = (self.rank, self.world_size);
        self.handle.end();
        if let Err(error) = wait(|| self.stream.is_done()) {
            tracing::warn!(rank, world_size, "after the communicator's end: {error}");
        }
    }
}

impl Fences {
    fn new() -> Result<Self, CommError> {
        Ok(Self {
            marks: [Event::untimed()?, Event::untimed()?],
            queued: 0,
            next: 0,
        })
    }
}

impl Comm<CudaBackend> for NcclComm {
    fn prepare(backend: &mut CudaBackend, world_size: u32) {
        if world_size > 1 && window::is_supported() {
            backend.take_tensors_from(window::SOURCE);
        }
    }

    // NCCL picks its interface itself, or is told by `NCCL_SOCKET_IFNAME`.
    fn new_id(
        world_size: u32,
        _max_elements: usize,
        _interface: Option<IpAddr>,
    ) -> Result<Vec<u8>, CommError> {
        if world_size == 1 {
            return Ok(Vec::new());
        }
        library::load().map_err(CommError::Failed)?;
        let id = cudarc::nccl::result::get_uniqueid();
        let id = id.map_err(|error| handle::failed("make a communicator's identity", error.0))?;
        Ok(id
            .internal
            .iter()
            .map(|byte| byte.to_ne_bytes()[0])
            .collect())
    }

    fn discard_id(_: &[u8]) {
        // Its listener ends with the process that made it.
    }

    fn join(backend: &CudaBackend, seat: &Seat<'_>) -> Result<Self, CommError> {
        // Also with one rank: a long step ends where it waits for the device.
        backend.interrupt_with(&seat.abort.flag());
        let group = match seat.world_size {
            1 => None,
            _ => Some(Group::join(backend, seat)?),
        };
        let abort = seat.abort.clone();
        Ok(Self { group, abort })
    }

    fn world_size(&self) -> u32 {
        self.group.as_ref().map_or(1, |group| group.world_size)
    }

    fn begin_step(&mut self, _digest: [u8; 16]) {
        // Comparing digests would take a collective of its own; the coordinator compares them.
        if let Some(group) = &mut self.group {
            group.timing.begin();
        }
    }

    fn is_recordable(&mut self) -> bool {
        let group = self.group.as_mut();
        group.is_none_or(|group| group.timing.may_replay())
    }

    fn agree(&mut self, backend: &CudaBackend, mine: bool) -> Result<bool, CommError> {
        match &mut self.group {
            Some(group) => group.agree(backend, mine),
            None => Ok(mine),
        }
    }

    fn replay<E: From<CommError>>(
        &mut self,
        launch: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        if self.abort.is_aborted() {
            return Err(CommError::Aborted.into());
        }
        let Some(group) = &mut self.group else {
            return launch();
        };
        group.timing.skip();
        if EMULATED {
            return launch();
        }
        group.handle.with(|_| launch())?
    }

    fn all_reduce_sum(
        &mut self,
        backend: &CudaBackend,
        x: &mut CudaTensor,
    ) -> Result<(), CommError> {
        if self.abort.is_aborted() {
            return Err(CommError::Aborted);
        }
        let Some(group) = &mut self.group else {
            return Ok(());
        };
        group.share(x)?;
        let (count, dtype) = (x.rows() * x.width(), data_type(x.element()));
        let (bytes, pointer) = (x.bytes(), x.pointer_mut());
        group.queue(backend, ("add up activations", bytes), |comm, stream| {
            // SAFETY: the tensor holds `count` elements and is not freed before the stream is done with it.
            unsafe {
                sys::ncclAllReduce(
                    pointer,
                    pointer,
                    count,
                    dtype,
                    ncclRedOp_t::ncclSum,
                    comm,
                    stream,
                )
            }
        })
    }

    fn all_gather(
        &mut self,
        backend: &CudaBackend,
        part: &CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<(), CommError> {
        if self.abort.is_aborted() {
            return Err(CommError::Aborted);
        }
        let Some(group) = &mut self.group else {
            return copy_alone(backend, part, out);
        };
        let ranks = group.world_size as usize;
        assert_eq!(
            out.bytes(),
            ranks * part.bytes(),
            "out holds every rank's part"
        );
        let (count, dtype) = (part.rows() * part.width(), data_type(part.element()));
        let (from, bytes, target) = (part.pointer(), part.bytes(), out.pointer_mut());
        // Ranks' parts come one after the other; with one row that is what is wanted.
        let gathered = if part.rows() <= 1 {
            target
        } else {
            let room = out.capacity() * out.width() * out.element().bytes();
            group.scratch(room)? as *mut c_void
        };
        group.queue(backend, ("gather logits", bytes), |comm, stream| {
            // SAFETY: `gathered` holds all parts, and both are freed only when the stream is done with them.
            unsafe { sys::ncclAllGather(from, gathered, count, dtype, comm, stream) }
        })?;
        if gathered != target {
            let shape = (part.rows(), part.width() * part.element().bytes());
            group.interleave(gathered as u64, shape, target)?;
        }
        Ok(())
    }

    /// How long a rank waited for the others NCCL does not tell.
    fn take_timings(&mut self) -> CommTimings {
        let Some(group) = &mut self.group else {
            return CommTimings::default();
        };
        match group.end_step() {
            Ok(total_us) => CommTimings {
                total_us,
                wait_us: 0,
            },
            // The next collective says it to somebody who can act on it.
            Err(error) => {
                tracing::debug!("no timings: {error}");
                CommTimings::default()
            }
        }
    }
}

/// With one rank, through the host: no decoder asks for it.
fn copy_alone(
    backend: &CudaBackend,
    part: &CudaTensor,
    out: &mut CudaTensor,
) -> Result<(), CommError> {
    let mut values = Vec::new();
    let copied = backend.read(part, &mut values);
    let copied = copied.and_then(|()| backend.write(&values, out));
    copied.map_err(|error| CommError::Failed(error.to_string()))
}

fn data_type(element: Element) -> ncclDataType_t {
    match element {
        Element::F32 => ncclDataType_t::ncclFloat32,
        Element::Bf16 => ncclDataType_t::ncclBfloat16,
        Element::F16 => ncclDataType_t::ncclFloat16,
        Element::Fp8 => unreachable!("activations are not floats of 8 bits"),
    }
}

fn int(number: u32) -> Result<i32, CommError> {
    i32::try_from(number).map_err(|_| CommError::Failed(format!("{number} is no rank")))
}

fn unique_id(bytes: &[u8]) -> Result<ncclUniqueId, CommError> {
    let bytes: &[u8; ID_BYTES] = bytes.try_into().map_err(|_| {
        CommError::Failed(format!(
            "the communicator's identity has {} bytes and not {ID_BYTES}",
            bytes.len()
        ))
    })?;
    Ok(ncclUniqueId {
        internal: bytes.map(|byte| std::ffi::c_char::from_ne_bytes([byte])),
    })
}

/// All as NCCL would choose, except that no call waits inside NCCL.
fn config() -> sys::ncclConfig_t {
    const NOT_SAID: i32 = i32::MIN;
    sys::ncclConfig_t {
        // The library takes so many bytes and no more: the fields of the version that is named.
        size: offset_of!(sys::ncclConfig_t, collnetEnable),
        magic: CONFIG_MAGIC,
        version: CONFIG_VERSION,
        blocking: 0,
        cgaClusterSize: NOT_SAID,
        minCTAs: NOT_SAID,
        maxCTAs: NOT_SAID,
        netName: std::ptr::null(),
        splitShare: NOT_SAID,
        trafficClass: NOT_SAID,
        commName: std::ptr::null(),
        collnetEnable: NOT_SAID,
        CTAPolicy: NOT_SAID,
        shrinkShare: NOT_SAID,
        nvlsCTAs: NOT_SAID,
        nChannelsPerNetPeer: NOT_SAID,
        nvlinkCentricSched: NOT_SAID,
        graphUsageMode: NOT_SAID,
        numRmaCtx: NOT_SAID,
        maxP2pPeers: NOT_SAID,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_says_nothing_but_that_no_call_waits() {
        let config = config();
        assert_eq!((config.blocking, config.magic), (0, CONFIG_MAGIC));
        assert_eq!(config.size, 56, "the fields of the version that is named");
        assert!(config.netName.is_null() && config.commName.is_null());
        for field in [
            config.cgaClusterSize,
            config.minCTAs,
            config.maxCTAs,
            config.splitShare,
        ] {
            assert_eq!(field, i32::MIN);
        }
        assert_eq!(config.trafficClass, i32::MIN);
    }

    #[test]
    fn identities_are_of_one_size() {
        let bytes: Vec<u8> = (0..128).map(|i| i * 2 + 1).collect();
        let id = unique_id(&bytes).unwrap();
        assert_eq!(id.internal.map(|byte| byte.to_ne_bytes()[0])[..], bytes[..]);
        let refused = unique_id(&bytes[1..]).unwrap_err().to_string();
        assert!(refused.contains("127 bytes"), "{refused}");
    }

    /// With NCCL on the host, identities are made for real, which needs no GPU.
    #[test]
    fn one_rank_needs_no_library_and_two_get_an_identity_of_it() {
        assert!(NcclComm::new_id(1, 0, None).unwrap().is_empty());
        match (library::find(), NcclComm::new_id(2, 0, None)) {
            (Ok(_), made) => {
                let (first, second) = (made.unwrap(), NcclComm::new_id(2, 0, None).unwrap());
                assert_eq!(first.len(), ID_BYTES);
                assert_ne!(first, second);
            }
            (Err(missing), made) => {
                println!("skipped: {missing}");
                let refused = made.unwrap_err().to_string();
                assert!(refused.contains(&missing), "{refused}");
            }
        }
    }
}
