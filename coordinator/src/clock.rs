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

/// A moment in UTC, as log lines begin: `2026-01-31T23:59:59Z`.
pub fn utc(unix_seconds: u64) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    // Counted from a first of March, a leap day is the last day of its year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

/// Microseconds since 1970, for comparing the clocks of nodes; never for measuring.
#[expect(
    clippy::disallowed_methods,
    reason = "what is asked for is the clock itself"
)]
pub fn unix_micros() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |elapsed| {
            u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX)
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_written_as_in_logs() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_767_225_599, "2025-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
