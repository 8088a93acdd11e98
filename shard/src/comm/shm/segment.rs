//! A piece of memory that the ranks of one host share, and the rounds in which they exchange.
//!
//! One file in `/dev/shm` with a random name, taken in full when it is made (a full tmpfs is an
//! error there, not a bus error later) and unlinked as soon as all ranks are attached, so that not
//! even `kill -9` leaves anything behind. Arithmetic is not done here; see [`super`].
//!
//! ```text
//! header page(s)   identity | gate: rounds completed, sleepers | one line per rank: attached, arrived
//! slots            [2 buffers][rank] label line | slot_elements × f32
//! ```
//!
//! Invariant: in round `n` a rank writes only its own slot of buffer `n % 2`, then arrives, and
//! reads the others' only once all have arrived. A rank that writes in round `n + 2` has seen all
//! arrive in round `n + 1`, hence all have finished reading round `n`: two buffers need one
//! barrier per exchange.

#![expect(
    unsafe_code,
    reason = "memory shared between processes has no safe view"
)]

use crate::clock;
use crate::comm::rounds::{self, Rounds};
use crate::comm::{Abort, CommError};
use memmap2::MmapRaw;
use rustix::fs::{FallocateFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::futex;
use std::ffi::c_void;
use std::fs::File;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::slice;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MAGIC: [u8; 8] = *b"clshm\0\0\x01";
const LINE: usize = 64;
const PAGE: usize = 4096;
/// Bytes of the identity at the start of the file.
const IDENTITY_BYTES: usize = 36;
/// Where the gate lies in the file; the ranks' lines follow it.
const GATE_AT: usize = LINE;

/// Ranks of one host; more is a mistake in a message rather than a machine.
const MAX_RANKS: u32 = 64;
/// Above this a slot helps nothing: larger tensors go in pieces.
const MAX_SLOT_ELEMENTS: usize = 64 << 10;

/// Looks at the gate before sleeping, some 20 µs: a peer on its own core is rarely later, and where
/// cores are shared after all, longer spinning only keeps others from arriving.
const SPINS: u32 = 400;
/// Longest sleep before looking whether the collective was aborted.
const SLICE: Duration = Duration::from_millis(2);

/// Which segment, and how it is cut. Travels through the coordinator as opaque bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    name: [u8; 16],
    world_size: u32,
    slot_elements: usize,
}

/// The counters every rank looks at.
#[repr(C, align(64))]
struct Gate {
    /// The last round in which all ranks have arrived; ranks sleep on it.
    complete: AtomicU32,
    /// Ranks asleep. A rank killed in its sleep leaves it too high: a needless wake, no more.
    sleepers: AtomicU32,
}

/// One rank's counters, on a cache line of their own.
#[repr(C, align(64))]
struct Seat {
    attached: AtomicU32,
    /// The last round this rank has arrived in.
    arrived: AtomicU32,
}

/// What a rank says about its slot, so that ranks that have diverged stop instead of adding up.
#[repr(C, align(64))]
struct Label {
    tag: [AtomicU64; 2],
    elements: AtomicU64,
}

impl Identity {
    /// Makes the segment. Nothing is mapped: the maker attaches like any other rank.
    pub(super) fn make(world_size: u32, max_elements: usize) -> Result<Self, CommError> {
        check_world_size(world_size)?;
        let mut name = [0; 16];
        File::open("/dev/urandom")
            .and_then(|mut source| source.read_exact(&mut name))
            .map_err(|e| CommError::Failed(format!("cannot read /dev/urandom: {e}")))?;
        let identity = Self {
            name,
            world_size,
            slot_elements: max_elements.clamp(1, MAX_SLOT_ELEMENTS),
        };
        identity.write_file().inspect_err(|_| identity.unlink())?;
        Ok(identity)
    }

    fn write_file(&self) -> Result<(), CommError> {
        let path = self.path();
        let context = |e: std::io::Error| {
            CommError::Failed(format!(
                "cannot make {} of {} bytes for collectives: {e}; free space in /dev/shm \
                 (in a container, raise its size, for docker with --shm-size)",
                path.display(),
                self.file_bytes()
            ))
        };
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        let fd = rustix::fs::open(&path, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| context(e.into()))?;
        let bytes = self.file_bytes() as u64;
        rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, bytes)
            .map_err(|e| context(e.into()))?;
        File::from(fd).write_all(&self.to_bytes()).map_err(context)
    }

    /// Removes the name. The memory lives until the last rank has let go of it.
    pub(super) fn unlink(&self) {
        // Every rank unlinks, so that any one of them suffices; it is gone already for the others.
        let _ = std::fs::remove_file(self.path());
    }

    /// For the wire and the start of the file: magic, name, world size, slot size.
    pub(super) fn to_bytes(self) -> [u8; IDENTITY_BYTES] {
        let mut bytes = [0; IDENTITY_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..24].copy_from_slice(&self.name);
        bytes[24..28].copy_from_slice(&self.world_size.to_le_bytes());
        bytes[28..].copy_from_slice(&(self.slot_elements as u64).to_le_bytes());
        bytes
    }

    /// Reads what [`Self::to_bytes`] wrote, with its limits.
    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, CommError> {
        let malformed = || CommError::Failed("the communicator's identity is malformed".to_owned());
        let bytes: &[u8; IDENTITY_BYTES] = bytes.try_into().map_err(|_| malformed())?;
        let (magic, rest) = bytes.split_at(8);
        let (name, rest) = rest.split_at(16);
        let (world_size, slot_elements) = rest.split_at(4);
        let identity = Self {
            name: name.try_into().map_err(|_| malformed())?,
            world_size: u32::from_le_bytes(world_size.try_into().map_err(|_| malformed())?),
            slot_elements: usize::try_from(u64::from_le_bytes(
                slot_elements.try_into().map_err(|_| malformed())?,
            ))
            .map_err(|_| malformed())?,
        };
        check_world_size(identity.world_size)?;
        if magic != MAGIC || !(1..=MAX_SLOT_ELEMENTS).contains(&identity.slot_elements) {
            return Err(malformed());
        }
        Ok(identity)
    }

    pub(super) fn world_size(&self) -> u32 {
        self.world_size
    }

    /// The file, for as long as not all ranks are attached.
    pub(super) fn path(&self) -> PathBuf {
        let name = u128::from_be_bytes(self.name);
        PathBuf::from(format!("/dev/shm/cluster-{name:032x}"))
    }

    fn header_bytes(&self) -> usize {
        (GATE_AT + size_of::<Gate>() + self.world_size as usize * size_of::<Seat>())
            .next_multiple_of(PAGE)
    }

    fn slot_bytes(&self) -> usize {
        (size_of::<Label>() + self.slot_elements * 4).next_multiple_of(LINE)
    }

    fn file_bytes(&self) -> usize {
        self.header_bytes() + 2 * self.world_size as usize * self.slot_bytes()
    }
}

fn check_world_size(world_size: u32) -> Result<(), CommError> {
    if (1..=MAX_RANKS).contains(&world_size) {
        Ok(())
    } else {
        Err(CommError::Failed(format!(
            "a communicator has 1 to {MAX_RANKS} ranks, not {world_size}"
        )))
    }
}

/// One rank's view of the segment.
#[derive(Debug)]
pub(super) struct Segment {
    map: MmapRaw,
    identity: Identity,
    rank: u32,
    round: u32,
    spins: u32,
    abort: Abort,
    /// Asleep or spinning for others since the caller last took it.
    waited: Duration,
}

impl Segment {
    /// Attaches in a seat and waits until all ranks have, who share so many cores. Unlinks the file in every case.
    pub(super) fn join(
        identity: Identity,
        seat: &super::Seat<'_>,
        cores: usize,
    ) -> Result<Self, CommError> {
        let limit = seat.limit;
        let joined = Self::attach(identity, seat.rank, seat.abort).and_then(|mut segment| {
            // With more ranks than cores, spinning takes the core from the rank waited for.
            if identity.world_size as usize > cores {
                segment.spins = 0;
            }
            segment.arrive();
            let deadline = clock::now() + limit;
            match segment.wait(Some(deadline)) {
                Ok(()) => Ok(segment),
                Err(CommError::Incomplete {
                    joined, world_size, ..
                }) => Err(CommError::Incomplete {
                    joined,
                    world_size,
                    limit,
                }),
                Err(other) => Err(other),
            }
        });
        // Complete, so the name is of no more use; or failed, and then nobody else can succeed.
        identity.unlink();
        joined
    }

    fn attach(identity: Identity, rank: u32, abort: &Abort) -> Result<Self, CommError> {
        let path = identity.path();
        let failed = |what: String| CommError::Failed(format!("{}: {what}", path.display()));
        if rank >= identity.world_size {
            return Err(failed(format!("rank {rank} of {}", identity.world_size)));
        }
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = rustix::fs::open(&path, flags, Mode::empty()).map_err(|e| {
            failed(format!(
                "cannot open the segment ({e}); another rank gave up, or it lies on another host"
            ))
        })?;
        let mut file = File::from(fd);
        let mut stored = [0; IDENTITY_BYTES];
        file.read_exact(&mut stored)
            .map_err(|e| failed(e.to_string()))?;
        let bytes = file.metadata().map_err(|e| failed(e.to_string()))?.len();
        // The mapping's bounds below follow from the identity: both must be the maker's.
        if stored != identity.to_bytes() || bytes != identity.file_bytes() as u64 {
            return Err(failed("the segment is not the one announced".to_owned()));
        }
        let map = MmapRaw::map_raw(&file).map_err(|e| failed(e.to_string()))?;
        let segment = Self {
            map,
            identity,
            rank,
            round: 0,
            spins: SPINS,
            abort: abort.clone(),
            waited: Duration::ZERO,
        };
        if segment.seat(rank).attached.swap(1, Ordering::SeqCst) == 0 {
            Ok(segment)
        } else {
            Err(failed(format!("rank {rank} is attached already")))
        }
    }

    /// All ranks must be in the same collective of the same step.
    fn check_labels(&self, buffer: u32, tag: [u64; 2], elements: usize) -> Result<(), CommError> {
        for rank in 0..self.identity.world_size {
            let label = self.label(buffer, rank);
            let theirs = [0, 1].map(|i| label.tag[i].load(Ordering::Relaxed));
            let count = label.elements.load(Ordering::Relaxed);
            if theirs != tag || count != elements as u64 {
                return Err(CommError::Failed(format!(
                    "ranks {} and {rank} have diverged: {elements} and {count} elements, plans {:016x} and {:016x}",
                    self.rank, tag[0], theirs[0]
                )));
            }
        }
        Ok(())
    }

    /// Says that this rank's part of the next round is in place.
    fn arrive(&mut self) {
        self.round = self.round.wrapping_add(1);
        let round = self.round;
        // Sequentially consistent, here and in `wait`: of the ranks that arrive together at least one
        // sees all others, and either it sees a sleeper or the sleeper sees the round complete.
        self.seat(self.rank).arrived.store(round, Ordering::SeqCst);
        let all = (0..self.identity.world_size)
            .all(|rank| has_reached(self.seat(rank).arrived.load(Ordering::SeqCst), round));
        if all {
            let gate = self.gate();
            gate.complete.store(round, Ordering::SeqCst);
            if gate.sleepers.load(Ordering::SeqCst) > 0 {
                // Not private: the sleepers are other processes. A failed wake costs one slice.
                let _ = futex::wake(&gate.complete, futex::Flags::empty(), i32::MAX as u32);
            }
        }
    }

    /// Waits until all ranks have arrived: a short spin, then sleep in slices.
    fn wait(&self, deadline: Option<Instant>) -> Result<(), CommError> {
        let gate = self.gate();
        for _ in 0..self.spins {
            if has_reached(gate.complete.load(Ordering::SeqCst), self.round) {
                return Ok(());
            }
            std::hint::spin_loop();
        }
        gate.sleepers.fetch_add(1, Ordering::SeqCst);
        let result = self.sleep(deadline);
        gate.sleepers.fetch_sub(1, Ordering::SeqCst);
        result
    }

    fn sleep(&self, deadline: Option<Instant>) -> Result<(), CommError> {
        let gate = self.gate();
        let slice = futex::Timespec {
            tv_sec: 0,
            tv_nsec: i64::from(SLICE.subsec_nanos()),
        };
        loop {
            let complete = gate.complete.load(Ordering::SeqCst);
            if has_reached(complete, self.round) {
                return Ok(());
            }
            if self.abort.is_aborted() {
                return Err(CommError::Aborted);
            }
            if deadline.is_some_and(|deadline| clock::now() >= deadline) {
                return Err(self.incomplete());
            }
            match futex::wait(
                &gate.complete,
                futex::Flags::empty(),
                complete,
                Some(&slice),
            ) {
                Ok(()) | Err(Errno::AGAIN | Errno::INTR | Errno::TIMEDOUT) => {}
                Err(e) => return Err(CommError::Failed(format!("cannot wait: {e}"))),
            }
        }
    }

    fn incomplete(&self) -> CommError {
        let attached = |rank: &u32| self.seat(*rank).attached.load(Ordering::SeqCst) == 1;
        let joined = (0..self.identity.world_size).filter(attached).count();
        CommError::Incomplete {
            joined: u32::try_from(joined).unwrap_or(u32::MAX),
            world_size: self.identity.world_size,
            limit: Duration::ZERO,
        }
    }

    fn gate(&self) -> &Gate {
        // SAFETY: the header holds a gate here, 64-byte aligned in a page-aligned mapping that lives as
        // long as `self`; zero bytes are a valid gate and all ranks access it through atomics only.
        unsafe { &*self.at(GATE_AT).cast::<Gate>() }
    }

    fn seat(&self, rank: u32) -> &Seat {
        let at = GATE_AT + size_of::<Gate>() + rank as usize * size_of::<Seat>();
        // SAFETY: as for the gate; `rank < world_size` seats lie in the header (`header_bytes`).
        unsafe { &*self.at(at).cast::<Seat>() }
    }

    fn label(&self, buffer: u32, rank: u32) -> &Label {
        // SAFETY: as for the gate; every slot starts with a label, on a 64-byte boundary.
        unsafe { &*self.at(self.slot_at(buffer, rank)).cast::<Label>() }
    }

    /// The first float of a slot.
    fn slot(&self, buffer: u32, rank: u32) -> *mut f32 {
        self.at(self.slot_at(buffer, rank) + size_of::<Label>())
            .cast()
    }

    fn slot_at(&self, buffer: u32, rank: u32) -> usize {
        assert!(
            rank < self.identity.world_size,
            "ranks are checked when they attach"
        );
        let index = (buffer * self.identity.world_size + rank) as usize;
        self.identity.header_bytes() + index * self.identity.slot_bytes()
    }

    fn at(&self, offset: usize) -> *mut c_void {
        assert!(offset < self.map.len(), "the layout fits the file");
        // SAFETY: the offset is inside the mapping, checked above.
        unsafe { self.map.as_mut_ptr().add(offset) }.cast()
    }
}

impl Rounds for Segment {
    type Parts<'a> = Parts<'a>;

    fn world_size(&self) -> u32 {
        self.identity.world_size
    }

    fn piece_elements(&self) -> usize {
        self.identity.slot_elements
    }

    fn exchange(&mut self, tag: [u64; 2], values: &[f32]) -> Result<Parts<'_>, CommError> {
        assert!(
            values.len() <= self.identity.slot_elements,
            "a piece fits its slot"
        );
        if self.abort.is_aborted() {
            return Err(CommError::Aborted);
        }
        let buffer = self.round & 1;
        let label = self.label(buffer, self.rank);
        label.tag[0].store(tag[0], Ordering::Relaxed);
        label.tag[1].store(tag[1], Ordering::Relaxed);
        label.elements.store(values.len() as u64, Ordering::Relaxed);
        let slot = self.slot(buffer, self.rank);
        // SAFETY: the slot has room for `slot_elements` floats (asserted above), lies in the mapping,
        // and no rank reads it before this one arrives (module invariant), nor does `values` alias it.
        unsafe { slot.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        self.arrive();
        let start = clock::now();
        let waited = self.wait(None);
        self.waited += clock::now().duration_since(start);
        waited?;
        self.check_labels(buffer, tag, values.len())?;
        Ok(Parts {
            segment: self,
            buffer,
            elements: values.len(),
        })
    }

    fn take_waited(&mut self) -> Duration {
        std::mem::take(&mut self.waited)
    }
}

/// Round counters wrap after days; the ranks are never more than two rounds apart.
fn has_reached(counter: u32, round: u32) -> bool {
    counter.wrapping_sub(round) < u32::MAX / 2
}

/// All ranks' values of one round. Borrows the segment, so that the next round cannot begin before
/// this rank has finished reading.
#[derive(Debug)]
pub(super) struct Parts<'a> {
    segment: &'a Segment,
    buffer: u32,
    elements: usize,
}

impl rounds::Parts for Parts<'_> {
    fn of(&self, rank: u32) -> &[f32] {
        let slot = self.segment.slot(self.buffer, rank);
        // SAFETY: `elements` floats were written there before the rank arrived (its label says so,
        // checked), and nobody writes them again before this rank enters its next round, for which it
        // needs the borrow back (module invariant).
        unsafe { slice::from_raw_parts(slot, self.elements) }
    }
}
