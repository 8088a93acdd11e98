//! What operations of a decoder's layer are told beside tensors. Invariant: nothing here depends on a device.

/// What attention needs beyond the batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Layer whose blocks are read.
    pub layer: usize,
    /// Query heads of this rank; a multiple of the layout's `local_kv_heads`.
    pub local_heads: usize,
    /// Factor on q·k, usually `1 / sqrt(head_dim)`.
    pub scale: f32,
    /// How many last positions a token sees, itself included; `None` is all.
    pub sliding_window: Option<u32>,
    /// Scores become `cap * tanh(score / cap)`, before the mask; above 0.
    pub logit_soft_cap: Option<f32>,
}

/// What RMSNorm needs beside its weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// Added to the mean of squares, under the root.
    pub eps: f32,
    /// Added in f32 to each stored weight: 0, or 1 where the weights are stored as their distance from 1 (Gemma).
    /// It is not folded into the weights when they are loaded, because their sum may need more bits
    /// than the element that they are kept in has.
    pub weight_offset: f32,
}

/// What a gate goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// `x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))`.
    GeluTanh,
}

/// The heads in a `qkv` matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heads {
    /// Query heads of this rank.
    pub local_heads: usize,
    /// Key and value heads of this rank.
    pub local_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl Heads {
    /// Width of `qkv`.
    pub fn qkv_width(self) -> usize {
        (self.local_heads + 2 * self.local_kv_heads) * self.head_dim
    }
}

/// Two products with a gated activation between them; weights come with what is added to their outputs, if anything.
#[derive(Clone, Copy, Debug)]
pub struct FeedForward<'a, W> {
    /// Gates and then what they gate. `[2 * n, in]`
    pub gate_up: (&'a W, Option<&'a W>),
    /// What gates go through.
    pub activation: Activation,
    /// `[out, n]`
    pub down: (&'a W, Option<&'a W>),
}
