//! Decides what every step computes.

pub mod request;
