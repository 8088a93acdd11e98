//! Turns names, help texts and labels into handles of one recorder.
//!
//! Knows no name: those are in the parent module. Invariant: whatever is registered is described.

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder};
use metrics_exporter_prometheus::PrometheusRecorder;

const METADATA: Metadata<'static> = Metadata::new("cluster", Level::INFO, None);

/// A label of a metric: its name and value.
pub(super) type Pair<'a> = (&'static str, &'a str);

/// Registers handles with one recorder. All series of a model name it; `vllm:` names also get the other
/// label they are known by.
#[derive(Debug)]
pub(super) struct Registrar<'a> {
    recorder: &'a PrometheusRecorder,
    model_name: Option<&'a str>,
}

impl<'a> Registrar<'a> {
    /// `None`: of the process, and not of one of its models.
    pub(super) fn new(recorder: &'a PrometheusRecorder, model_name: Option<&'a str>) -> Self {
        Self {
            recorder,
            model_name,
        }
    }

    /// A handle; asking twice for the same name and labels gives the same series.
    pub(super) fn make<T: Handle>(
        &self,
        name: &'static str,
        help: &'static str,
        labels: &[Pair<'_>],
    ) -> T {
        let model = self.model_name.map(|model| ("model_name", model));
        // Others defined their names so.
        let engine = name.starts_with("vllm:").then_some(("engine", "0"));
        let common = model.into_iter().chain(engine);
        let labels = common.chain(labels.iter().copied());
        let label = |(key, value): Pair<'_>| Label::new(key, value.to_owned());
        let labels: Vec<Label> = labels.map(label).collect();
        T::register(self.recorder, name, help, &Key::from_parts(name, labels))
    }
}

/// A kind of metric.
pub(super) trait Handle {
    fn register(r: &PrometheusRecorder, name: &'static str, help: &'static str, key: &Key) -> Self;
}

impl Handle for Counter {
    fn register(r: &PrometheusRecorder, name: &'static str, help: &'static str, key: &Key) -> Self {
        r.describe_counter(KeyName::from(name), None, help.into());
        r.register_counter(key, &METADATA)
    }
}

impl Handle for Gauge {
    fn register(r: &PrometheusRecorder, name: &'static str, help: &'static str, key: &Key) -> Self {
        r.describe_gauge(KeyName::from(name), None, help.into());
        r.register_gauge(key, &METADATA)
    }
}

impl Handle for Histogram {
    fn register(r: &PrometheusRecorder, name: &'static str, help: &'static str, key: &Key) -> Self {
        r.describe_histogram(KeyName::from(name), None, help.into());
        r.register_histogram(key, &METADATA)
    }
}

/// A struct of handles and its constructor: `field: Kind = "name", "help" [, ("label", "value")];`.
macro_rules! handles {
    ($(#[$doc:meta])* $group:ident {
        $($field:ident: $kind:ty = $name:literal, $help:expr $(, $label:expr)?;)*
    }) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $group {
            $(#[doc = $help] pub $field: $kind,)*
        }

        impl $group {
            fn new(r: &Registrar<'_>, common: &[registrar::Pair<'_>]) -> Self {
                let make = |own: &[registrar::Pair<'static>]| [common, own].concat();
                Self {
                    $($field: r.make::<$kind>($name, $help, &make(&[$($label)?])),)*
                }
            }
        }
    };
}
pub(super) use handles;
