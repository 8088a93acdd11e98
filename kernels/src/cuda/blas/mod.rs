//! Matrix products by cuBLASLt, f32 sums whatever the elements are.
//!
//! cuBLASLt thinks in columns: `out = x · weightᵀ` by rows is `outᵀ = weight · xᵀ` by columns, where the stored bytes
//! of a matrix by rows are its transpose by columns. So A is the weight (transposed), B is `x`, and the bias runs
//! along the rows of D, as its epilogue has it.
//!
//! Factors of 8 bits are multiplied where the device and the library can, sums scaled by row and by output where the
//! library knows how.
//!
//! The library names some algorithms for a shape, the one it believes in first. That one computes the process's first
//! step, so that the first token is not late; after it all are tried in the products of the steps that come,
//! and the fastest is kept ([`Trials`]). Numbers of rows share one with those of about their size. No device memory
//! is taken after the start.
//!
//! Invariant: `emulated_blas.rs` is this file's twin and computes the same within rounding.

#![expect(unsafe_code, reason = "the library's interface is C")]

mod descriptions;

use super::device::{Device, Memory};
use super::libraries;
use super::product::{Factors, Product};
use super::trials::{TRIES, Trials};
use crate::backend::{DeviceError, Element};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use descriptions::{Description, Layout, Preference, data_type};
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;

/// What NVIDIA recommends for Hopper; sums of divided products are kept in it.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms that are asked for.
const CANDIDATES: usize = 8;

/// `CUBLAS_OP_T`, which the bindings of cuBLASLt leave to those of cuBLAS.
const TRANSPOSED: i32 = 1;

/// cuBLASLt on one device.
#[derive(Debug)]
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: RefCell<Memory>,
    /// `None` where the library has no algorithm.
    plans: RefCell<HashMap<Shape, Option<Plan>>>,
    /// Whether algorithms are tried.
    tries: Cell<bool>,
}

// SAFETY: the handle and descriptors are plain memory of the library, bound to no thread; one thread at a time
// uses them, since `Blas` is not `Sync`.
unsafe impl Send for Blas {}

/// Products that share an algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    inputs: usize,
    outputs: usize,
    factors: Kind,
    out: Element,
    out_stride: usize,
    /// Bytes, of D and of the bias; a power of two.
    out_alignment: u32,
    biased: bool,
}

/// [`Factors`] without their addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Dense(Element),
    Fp8 { scaled: bool },
}

/// A product's description and its algorithm.
#[derive(Debug)]
struct Plan {
    problem: Problem,
    choice: Choice,
    /// Products that could be tries since the last [`Blas::forget`]; `None` before its first product after it.
    count: Option<usize>,
}

#[derive(Debug)]
struct Problem {
    product: Description,
    weight: Layout,
    x: Layout,
    out: Layout,
}

#[derive(Debug)]
enum Choice {
    Open(Trials<sys::cublasLtMatmulAlgo_t>),
    Made(sys::cublasLtMatmulAlgo_t),
}

impl Blas {
    /// Opens the library.
    pub(crate) fn new(device: &Device) -> Result<Self, DeviceError> {
        libraries::check_cublaslt(device.name())?;
        let workspace = device.allocate("the workspace of matrix products", WORKSPACE_BYTES)?;
        let handle = result::create_handle().map_err(|error| DeviceError::Failed {
            device: device.name().to_owned(),
            reason: format!("cuBLASLt cannot start ({error})"),
        })?;
        Ok(Self {
            handle,
            workspace: RefCell::new(workspace),
            plans: RefCell::default(),
            tries: Cell::new(false),
        })
    }

    /// Whether from now on algorithms are tried. Not while work is recorded: a try is one product's.
    pub(crate) fn set_tries(&self, tries: bool) {
        self.tries.set(tries);
    }

    /// Keeps what was found out so far; the device is done with it. Comes before work is recorded, which is no time to
    /// ask the device.
    pub(crate) fn settle(&self) {
        for plan in self.plans.borrow_mut().values_mut().flatten() {
            plan.settle();
        }
    }

    /// Counts products from here on. What was chosen is kept.
    pub(crate) fn forget(&self) {
        for plan in self.plans.borrow_mut().values_mut().flatten() {
            plan.count = None;
        }
    }

    /// Whether no more algorithms will be tried for products of `rows` rows, as far as follows from the products since the
    /// last [`Self::forget`]: a rank that has chosen before waits for those that have not.
    pub(crate) fn has_chosen(&self, rows: usize) -> bool {
        let (plans, shared) = (self.plans.borrow(), bucket(rows));
        let mut plans = plans.iter();
        plans.all(|(shape, plan)| {
            let concerned = shape.rows == rows || shape.rows == shared;
            let count = plan.as_ref().and_then(|plan| plan.count);
            !concerned || count.is_none_or(|count| count >= TRIES)
        })
    }

    /// Queues the product, of at least one row. `false`, and nothing queued, where the library has no algorithm for such
    /// factors on this device.
    pub(crate) fn multiply(&self, device: &Device, product: &Product) -> Result<bool, String> {
        let exact = Shape::of(product);
        let shared = Shape {
            rows: bucket(exact.rows),
            ..exact
        };
        let mut plans = self.plans.borrow_mut();
        let mut run = |shape: Shape| {
            let plan = match plans.entry(shape) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let plan = Plan::choose(self, shape);
                    new.insert(not_supported(plan)?)
                }
            };
            let run = |plan: &mut Plan| plan.run((self, device), product);
            plan.as_mut().map_or(Err(NOT_SUPPORTED), run)
        };
        // An algorithm may refuse numbers of rows near the one it was chosen for; these get their own.
        match run(shared).or_else(|_| run(exact)) {
            Ok(()) => Ok(true),
            Err(NOT_SUPPORTED) if !matches!(exact.factors, Kind::Dense(_)) => Ok(false),
            Err(error) => Err(format!("cuBLASLt failed ({error}) at {exact:?}")),
        }
    }
}

const NOT_SUPPORTED: CublasError = CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED);

/// `None` where it is not supported.
fn not_supported(plan: Result<Plan, CublasError>) -> Result<Option<Plan>, CublasError> {
    match plan {
        Ok(plan) => Ok(Some(plan)),
        // What a library that is older than a scale mode, or a device without such cores, says.
        Err(CublasError(
            sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED
            | sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE
            | sys::cublasStatus_t::CUBLAS_STATUS_ARCH_MISMATCH,
        )) => Ok(None),
        Err(error) => Err(error),
    }
}

impl Shape {
    fn of(product: &Product) -> Self {
        let (out, element) = product.out;
        // What allocations have is as good as any. Epilogues read the bias as they write D, several elements at once.
        let addresses = out as usize | product.bias.map_or(0, |bias| bias as usize);
        let out_alignment = 1 << addresses.trailing_zeros().min(8);
        Self {
            rows: product.rows,
            inputs: product.inputs,
            outputs: product.outputs,
            factors: match product.factors {
                Factors::Dense(element) => Kind::Dense(element),
                Factors::Fp8 { scales } => Kind::Fp8 {
                    scaled: scales.is_some(),
                },
            },
            out: element,
            out_stride: product.out_stride,
            out_alignment,
            biased: product.bias.is_some(),
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle was created once and is destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// The number of rows whose algorithm `rows` rows use: the next of 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, …
fn bucket(rows: usize) -> usize {
    let power = rows.next_power_of_two();
    let between = power / 4 * 3;
    if power >= 16 && rows <= between {
        between
    } else {
        power
    }
}

impl Plan {
    fn choose(blas: &Blas, shape: Shape) -> Result<Self, CublasError> {
        let Shape {
            rows,
            inputs,
            outputs,
            factors,
            out,
            out_stride,
            out_alignment,
            biased,
        } = shape;
        let product = Description::new(biased.then_some(out))?;
        let stored = match factors {
            Kind::Dense(element) => data_type(element),
            Kind::Fp8 { scaled } => {
                if scaled {
                    product.scale_columns()?;
                    // Any that are aligned as the real ones: without, there may be said to be no algorithm.
                    let any = blas.workspace.borrow().pointer();
                    product.set_scales(any, any)?;
                }
                data_type(Element::Fp8)
            }
        };
        let weight = Layout::new(stored, (inputs, outputs), inputs)?;
        let x = Layout::new(stored, (inputs, rows), inputs)?;
        let out = Layout::new(data_type(out), (outputs, rows), out_stride)?;
        let preference = Preference::new(out_alignment)?;

        let mut found: [_; CANDIDATES] = std::array::from_fn(|_| no_result());
        let (mut count, most) = (0, i32::try_from(CANDIDATES).unwrap_or(1));
        // SAFETY: all descriptors are alive, and there is room for `most` results.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                blas.handle,
                product.0,
                weight.0,
                x.0,
                out.0,
                out.0,
                preference.0,
                most,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        status.result()?;
        let count = usize::try_from(count).unwrap_or(0);
        let usable = found.iter().take(count).filter(|one| {
            one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && one.workspaceSize <= WORKSPACE_BYTES
        });
        let usable: Vec<_> = usable.map(|one| one.algo).collect();
        if usable.is_empty() {
            return Err(NOT_SUPPORTED);
        }
        let problem = Problem {
            product,
            weight,
            x,
            out,
        };
        let choice = Choice::Open(Trials::new(usable));
        Ok(Self {
            problem,
            choice,
            count: None,
        })
    }

    /// Makes the choice, if all that it depends on is known.
    fn settle(&mut self) {
        if let Choice::Open(trials) = &mut self.choice
            && let Some(&winner) = trials.winner()
        {
            self.choice = Choice::Made(winner);
        }
    }

    fn run(
        &mut self,
        (blas, device): (&Blas, &Device),
        operands: &Product,
    ) -> Result<(), CublasError> {
        let tries = blas.tries.get();
        *self.count.get_or_insert(0) += usize::from(tries);
        if tries {
            self.settle();
        }
        let problem = &self.problem;
        problem.point_to(operands)?;
        let run = |algorithm: &_| problem.run((blas, device), algorithm, operands);
        match &mut self.choice {
            Choice::Made(algorithm) => run(algorithm),
            Choice::Open(trials) => trials.run(device, tries, run),
        }
    }
}

fn no_result() -> sys::cublasLtMatmulHeuristicResult_t {
    // SAFETY: a structure of numbers, of which all zeros is one.
    unsafe { std::mem::zeroed() }
}

impl Problem {
    /// Puts what differs between products of one plan into the descriptions.
    fn point_to(&self, operands: &Product) -> Result<(), CublasError> {
        self.x.set_columns(operands.rows)?;
        self.out.set_columns(operands.rows)?;
        if let Some(bias) = operands.bias {
            use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            self.product
                .set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &(bias as u64))?;
        }
        if let Factors::Fp8 {
            scales: Some((x, weight)),
        } = operands.factors
        {
            self.product.set_scales(weight, x)?;
        }
        Ok(())
    }

    fn run(
        &self,
        (blas, device): (&Blas, &Device),
        algorithm: &sys::cublasLtMatmulAlgo_t,
        operands: &Product,
    ) -> Result<(), CublasError> {
        let &Product { x, weight, out, .. } = operands;
        let out = out.0;
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: the caller checked that the matrices have the plan's shape; they, the bias and the workspace
        // are freed only after the stream has come by.
        unsafe {
            result::matmul(
                blas.handle,
                self.product.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                weight,
                self.weight.0,
                x,
                self.x.0,
                out,
                self.out.0,
                out,
                self.out.0,
                std::ptr::from_ref(algorithm),
                blas.workspace.borrow_mut().pointer_mut(),
                WORKSPACE_BYTES,
                device.stream().cast(),
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_hold_their_rows_and_are_few() {
        let mut all: Vec<_> = (1..=8192).map(bucket).collect();
        for (rows, bucket) in (1..=8192).zip(&all) {
            assert!(rows <= *bucket && *bucket < 2 * rows, "{rows} in {bucket}");
        }
        all.dedup();
        assert!(all.is_sorted() && all.len() < 30, "{all:?}");
    }
}
