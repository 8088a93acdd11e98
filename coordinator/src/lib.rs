//! The library behind the users' process: HTTP facade, scheduler, fleet of shards.

pub mod cli;
pub mod engine;
pub mod metrics;
pub mod scheduler;
