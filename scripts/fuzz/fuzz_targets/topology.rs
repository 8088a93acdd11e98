//! libFuzzer's way into [`cluster_fuzz::targets::topology`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cluster_fuzz::targets::topology(data));
