//! Whether CPU and system let this process use tiles.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};

/// AMX-BF16, AMX-TILE and AMX-INT8, and that the system has turned tiles on.
pub(super) fn cpu_has_tiles() -> bool {
    // Who has AVX-512 has these leaves, and a system that saves registers with `xsave`.
    let tiles = 1 << 22 | 1 << 24 | 1 << 25;
    if __cpuid_count(0, 0).eax < 7 || __cpuid_count(7, 0).edx & tiles != tiles {
        return false;
    }
    let (config, data) = (1 << 17, 1 << 18);
    // SAFETY: only called where AVX-512 was found, which includes asking the system by this instruction.
    let saved = unsafe { _xgetbv(0) };
    saved & (config | data) == config | data
}

/// Asks Linux to save the tiles' contents, which it does for those who asked only.
#[cfg(target_os = "linux")]
pub(super) fn system_saves_tiles() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let answer: i64;
    // SAFETY: a system call that takes numbers alone; the registers that it changes are named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
pub(super) fn system_saves_tiles() -> bool {
    false
}
