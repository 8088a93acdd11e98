//! What cuBLASLt is told about a product: its description, its matrices, and what an algorithm may use.
//!
//! Each is memory of the library's own. Invariant: created once, destroyed once.

use super::{TRANSPOSED, WORKSPACE_BYTES};
use crate::backend::Element;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::ffi::c_void;

pub(super) fn data_type(element: Element) -> sys::cudaDataType {
    match element {
        Element::F32 => sys::cudaDataType::CUDA_R_32F,
        Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Element::F16 => sys::cudaDataType::CUDA_R_16F,
        Element::Fp8 => sys::cudaDataType::CUDA_R_8F_E4M3,
    }
}

/// What is computed: `D = Aᵀ · B (+ bias)`, or `scale · Aᵀ · B (+ bias)`.
#[derive(Debug)]
pub(super) struct Description(pub(super) sys::cublasLtMatmulDesc_t);

impl Description {
    /// With a bias stored as `bias`, or without.
    pub(super) fn new(bias: Option<Element>) -> Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = Self(result::create_matmul_desc(sums, data_type(Element::F32))?);
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if let Some(bias) = bias {
            product.set(
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &(sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32),
            )?;
            product.set(
                Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                &(data_type(bias) as i32),
            )?;
        }
        Ok(product)
    }

    /// From now on, A and B have a factor for each of their columns.
    pub(super) fn scale_columns(&self) -> Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let mode =
            sys::cublasLtMatmulMatrixScale_t::CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F as u32;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_MODE, &mode)?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_MODE, &mode)
    }

    /// Says where the factors of [`Self::scale_columns`] are, of A and of B.
    pub(super) fn set_scales(&self, a: *const c_void, b: *const c_void) -> Result<(), CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &(a as u64))?;
        self.set(Attribute::CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &(b as u64))
    }

    /// Attributes are plain numbers of the size the library expects of each.
    pub(super) fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        let at = std::ptr::from_ref(value).cast();
        // SAFETY: the descriptor is alive, and `value` is read before this returns.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, at, size_of::<T>()) }
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A matrix by columns.
#[derive(Debug)]
pub(super) struct Layout(pub(super) sys::cublasLtMatrixLayout_t);

impl Layout {
    /// `stride` elements from one column to the next.
    pub(super) fn new(
        stored: sys::cudaDataType,
        (rows, columns): (usize, usize),
        stride: usize,
    ) -> Result<Self, CublasError> {
        let stride = i64::try_from(stride).unwrap_or(i64::MAX);
        let layout = result::create_matrix_layout(stored, rows as u64, columns as u64, stride);
        layout.map(Self)
    }

    pub(super) fn set_columns(&self, columns: usize) -> Result<(), CublasError> {
        use sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
        let columns = columns as u64;
        let at = (&raw const columns).cast();
        // SAFETY: the layout is alive, and the number is read before this returns.
        unsafe {
            result::set_matrix_layout_attribute(
                self.0,
                CUBLASLT_MATRIX_LAYOUT_COLS,
                at,
                size_of::<u64>(),
            )
        }
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What an algorithm may use.
pub(super) struct Preference(pub(super) sys::cublasLtMatmulPreference_t);

impl Preference {
    /// D begins at a multiple of `out_alignment` bytes; the other matrices where the device's allocations do.
    pub(super) fn new(out_alignment: u32) -> Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Self(result::create_matmul_pref()?);
        let bytes: usize = WORKSPACE_BYTES;
        preference.set(Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes)?;
        for attribute in [
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            preference.set(attribute, &out_alignment)?;
        }
        Ok(preference)
    }

    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulPreferenceAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        let at = std::ptr::from_ref(value).cast();
        // SAFETY: the preference is alive, and the number is read before this returns.
        unsafe { result::set_matmul_pref_attribute(self.0, attribute, at, size_of::<T>()) }
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
