//! The one place of this crate that reads the clock.
//!
//! Time is measured here for deadlines and for the timings a step reports; no decision about what
//! to compute depends on it.

use std::time::Instant;

/// Now, on the monotonic clock.
#[expect(
    clippy::disallowed_methods,
    reason = "the shard's edge: deadlines of waits and the timings it reports"
)]
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Whole microseconds since `start`.
pub(crate) fn micros_since(start: Instant) -> u64 {
    micros(start, now())
}

/// Whole microseconds from `start` to `end`.
pub(crate) fn micros(start: Instant, end: Instant) -> u64 {
    u64::try_from(end.duration_since(start).as_micros()).unwrap_or(u64::MAX)
}

/// Seconds since 1970, for people.
pub(crate) fn unix_seconds() -> u64 {
    unix_micros() / 1_000_000
}

/// Microseconds since 1970, for comparing the clocks of nodes; never for measuring.
#[expect(
    clippy::disallowed_methods,
    reason = "what is asked for is the clock itself"
)]
pub(crate) fn unix_micros() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| {
            u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
        })
}
