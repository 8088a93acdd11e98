//! The one place where the coordinator reads a clock.
//!
//! The engine's loop, the fleet and the command line ask here and hand the instant on; the
//! scheduler and everything below it never do.

use std::time::{Duration, Instant};

/// Now, on the clock that timers run on: tests that pause it measure the time they let pass.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Time that went by since `start`.
pub fn since(start: Instant) -> Duration {
    now().saturating_duration_since(start)
}

/// Seconds since 1970 in UTC, for time stamps in answers; never for measuring.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the edge where time enters"
)]
pub fn unix_seconds() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| elapsed.as_secs())
}
