//! libFuzzer's way into [`cluster_fuzz::targets::wire`].

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cluster_fuzz::targets::wire(data));
