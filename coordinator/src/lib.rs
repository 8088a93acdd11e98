//! The library behind the users' process: HTTP facade, scheduler, fleet of shards.

pub mod admin;
pub mod builtin;
pub mod cli;
pub mod clock;
pub mod engine;
pub mod fleet;
pub mod http;
pub mod metrics;
pub mod scheduler;
pub mod text;
