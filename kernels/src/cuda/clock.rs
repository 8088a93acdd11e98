//! How long the device works on a step, by marks around it.
//!
//! A step may be queued while the one before it runs, so each has marks of its own. That one began cannot be marked is no
//! reason to fail, and leaves the step untimed; its end is what others wait for.
//!
//! Invariant: a time is between two marks of the same step.

use super::device::{Device, Mark};
use crate::backend::{DeviceError, DeviceTime};
use std::cell::RefCell;
use std::sync::Arc;

/// When the step that is queued began, and what is known of the last one that was waited for.
#[derive(Debug, Default)]
pub(crate) struct Clock {
    start: RefCell<Option<Arc<Mark>>>,
    last: RefCell<Option<(Arc<Mark>, DeviceTime)>>,
}

/// A stretch of work that ends a step, or a part of it.
#[derive(Debug)]
pub(crate) struct Span {
    /// The step's start.
    start: Option<Arc<Mark>>,
    /// Where sampling began, if there was any.
    sampling: Option<Mark>,
    end: Mark,
}

impl Span {
    /// The mark behind everything.
    pub(crate) fn end(&self) -> &Mark {
        &self.end
    }
}

impl Clock {
    /// A step's first operation is queued next.
    pub(crate) fn start(&self, device: &Device) {
        self.start.replace(device.mark_now().ok().map(Arc::new));
    }

    /// What is queued so far is a step's last, unless this is called again.
    pub(crate) fn span(
        &self,
        device: &Device,
        sampling: Option<Mark>,
    ) -> Result<Span, DeviceError> {
        Ok(Span {
            start: self.start.borrow().clone(),
            sampling,
            end: device.mark_now()?,
        })
    }

    /// Takes the times of a span that is over.
    pub(crate) fn read(&self, span: Span) {
        let Some(start) = span.start else {
            self.last.take();
            return;
        };
        let sample_us = span.sampling.map_or(0, |begun| micros(&begun, &span.end));
        let total_us = micros(&start, &span.end);
        let mut last = self.last.borrow_mut();
        // A step may sample several times.
        let of_step = last.take().filter(|(begun, _)| Arc::ptr_eq(begun, &start));
        let before = of_step.map_or(0, |(_, time)| time.sample_us);
        let time = DeviceTime {
            total_us,
            sample_us: before + sample_us,
        };
        *last = Some((start, time));
    }

    /// The times of the step that was waited for last, where its marks were made.
    pub(crate) fn last(&self) -> Option<DeviceTime> {
        self.last.borrow().as_ref().map(|(_, time)| *time)
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "microseconds of one step"
)]
fn micros(start: &Mark, end: &Mark) -> u64 {
    let elapsed = end.micros_since(start).ok().flatten();
    elapsed.map_or(0, |us| us as u64)
}
