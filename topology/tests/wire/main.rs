//! The messages as bytes: what they are, that they come back whole, and that hostile ones do no harm.
//!
//! All in one executable, because [`counting`] replaces the allocator of the whole process.

#[cfg(test)]
mod counting;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod hostile;
#[cfg(test)]
#[path = "../common/random.rs"]
mod random;
#[cfg(test)]
mod samples;
#[cfg(test)]
mod types;
