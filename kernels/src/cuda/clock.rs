//! How long the device works on a step, by marks around it.
//!
//! Measuring is no reason to fail: a mark that cannot be made leaves the step untimed.
//!
//! Invariant: a time is between two marks of the same step.

use super::device::{Device, Mark};
use std::cell::RefCell;

/// The marks of the current step.
#[derive(Debug, Default)]
pub(crate) struct Clock(RefCell<(Option<Mark>, Option<Mark>)>);

impl Clock {
    /// A step's first operation is queued next.
    pub(crate) fn start(&self, device: &Device) {
        *self.0.borrow_mut() = (device.mark_now().ok(), None);
    }

    /// What is queued so far is a step's last, unless this is called again.
    pub(crate) fn stop(&self, device: &Device) {
        self.0.borrow_mut().1 = device.mark_now().ok();
    }

    /// Microseconds between the two, where both were made and the device is done.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "microseconds of one step"
    )]
    pub(crate) fn elapsed_us(&self) -> Option<u64> {
        let marks = self.0.borrow();
        let (start, end) = (marks.0.as_ref()?, marks.1.as_ref()?);
        end.micros_since(start).ok().flatten().map(|us| us as u64)
    }
}
