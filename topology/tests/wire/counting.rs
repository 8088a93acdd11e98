//! An allocator that remembers, for each thread, the largest single request and the most that was in use.
//!
//! Counts only while [`measure`] runs. Invariant: memory that was freed by another thread than took
//! it makes the figures larger, never smaller.

#![expect(
    unsafe_code,
    reason = "an allocator is an unsafe trait; this one forwards every call"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// Largest request and most in use, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) largest: usize,
    pub(crate) peak: usize,
}

thread_local! {
    // `const`, so that first use allocates nothing.
    static USAGE: Cell<Usage> = const { Cell::new(Usage { largest: 0, peak: 0 }) };
    static IN_USE: Cell<usize> = const { Cell::new(0) };
}

/// What `work` takes beyond what this thread had in use before.
pub(crate) fn measure<T>(work: impl FnOnce() -> T) -> (T, Usage) {
    USAGE.set(Usage::default());
    IN_USE.set(0);
    let result = work();
    (result, USAGE.get())
}

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

fn took(bytes: usize) {
    // A thread that is ending has no such variables any more, and nothing to measure.
    let _ = IN_USE.try_with(|in_use| {
        in_use.set(in_use.get().saturating_add(bytes));
        let _ = USAGE.try_with(|usage| {
            let Usage { largest, peak } = usage.get();
            usage.set(Usage {
                largest: largest.max(bytes),
                peak: peak.max(in_use.get()),
            });
        });
    });
}

fn gave(bytes: usize) {
    let _ = IN_USE.try_with(|in_use| in_use.set(in_use.get().saturating_sub(bytes)));
}

// SAFETY: every call is forwarded to the system's allocator with the caller's own arguments; the
// counting beside it neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        took(layout.size());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        gave(layout.size());
        // SAFETY: the caller's promises are handed on.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        gave(layout.size());
        took(size);
        // SAFETY: the caller's promises are handed on.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[test]
fn it_counts() {
    let (kept, usage) = measure(|| {
        drop(vec![0u8; 1000]);
        let mut grown = Vec::with_capacity(10);
        grown.resize(500, 1u8);
        (grown, vec![0u64; 10])
    });
    assert_eq!(
        usage,
        Usage {
            largest: 1000,
            peak: 1000
        }
    );
    let ((), usage) = measure(|| drop((vec![0u8; 300], vec![0u8; 400])));
    assert_eq!(
        usage,
        Usage {
            largest: 400,
            peak: 700
        }
    );
    drop(kept);
}
