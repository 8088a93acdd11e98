//! What a fleet refuses: programs that are no shards. The rest needs real
//! shards, and is tested with the binary.

use super::{Cause, Fleet, Limits, LocalHost, Program, RankSite, Setup};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use topology::placement::Device;
use topology::wire::{Load, ModelLocation};

fn setup(program: &str, alive: mpsc::Sender<()>) -> (LocalHost, Setup) {
    let cpu = Device::Cpu {
        threads: 1,
        cores: Vec::new(),
    };
    let host = LocalHost::new(Program {
        path: program.into(),
        log_level: "warn".into(),
        cpu_isa: "auto".into(),
        sites: vec![RankSite::here(cpu.clone()), RankSite::here(cpu)],
        address: std::net::Ipv4Addr::LOCALHOST.into(),
        alive,
        witness: Arc::new(()),
        keeper: None,
    });
    let setup = Setup {
        load: Load {
            model: ModelLocation::BuiltIn,
            tensor_parallel_size: 2,
            dtype: "auto".into(),
            quantization: "auto".to_owned(),
            kv_cache_dtype: "auto".to_owned(),
            block_size: 16,
            max_model_len: 64,
            max_num_batched_tokens: 64,
            max_num_seqs: 4,
            async_scheduling: true,
            enforce_eager: false,
        },
        limits: Limits {
            startup: Duration::from_secs(5),
            step: Duration::from_secs(5),
        },
        generation: 0,
    };
    (host.unwrap(), setup)
}

#[tokio::test]
async fn a_program_that_is_no_shard_is_named_and_nothing_stays() {
    for (program, said) in [
        ("/no/such/program", "cannot start /no/such/program"),
        ("/bin/false", "ended before it announced itself"),
        ("/bin/echo", "the handshake went wrong"),
        ("/bin/ls", "it wrote: "),
    ] {
        let (alive, mut all_gone) = mpsc::channel(1);
        let (host, setup) = setup(program, alive);
        let started = Fleet::start(host, setup, |_| Ok(1), |_| {}).await;
        let fault = started.expect_err("it is no shard");
        assert!(fault.rank.is_some(), "{fault}");
        assert!(
            matches!(&fault.cause, Cause::Launch(why) if why.contains(said)),
            "{fault}"
        );
        let fault = fault.to_string();
        assert!(fault.matches("the handshake").count() < 2, "{fault}");
        assert_eq!(all_gone.recv().await, None);
    }
}
