//! Decoders. There is one, read from a [`topology::model_shape::ModelShape`]; families differ in data.

pub mod decoder;
pub mod rope;
