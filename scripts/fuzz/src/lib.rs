//! The fuzz targets, from where the ordinary tests have them.

#[path = "../../../coordinator/tests/fuzz/targets.rs"]
pub mod targets;
