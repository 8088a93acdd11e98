//! The step loop and the handle by which the rest of the process reaches it.

pub mod handle;
