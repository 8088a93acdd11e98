//! The scheduler against a model of what it owes, from a seed.
//!
//! Random clients, a shard that checks every slot it is told to read, faults at any moment; after
//! every operation the scheduler's whole accounting is recomputed and the clients' view compared.
//! That preempted = undisturbed, cache hit = miss, chunked = whole and faulted = fault-free follows
//! from tokens being a hash of all tokens before them: any other history gives other tokens.
//!
//! A failure prints the seed of its world: `SIM_SEED=n cargo test -p coordinator --test
//! scheduler_model` runs that world first. `SIM_OPERATIONS` sets how many operations are run.

mod ledger;
mod oracle;
mod requests;
mod shard;
mod world;

use std::panic::catch_unwind;
use world::{Seen, World};

/// Operations of a run, all worlds together.
const OPERATIONS: u64 = 1_000_000;

/// Operations of one world, before it comes to rest.
const OPERATIONS_PER_WORLD: u64 = 2_500;

const DEFAULT_SEED: u64 = 20_240_229;

#[test]
fn a_million_operations_keep_every_invariant() {
    let seed = from_env("SIM_SEED", DEFAULT_SEED);
    let worlds = from_env("SIM_OPERATIONS", OPERATIONS).div_ceil(OPERATIONS_PER_WORLD);
    println!("SIM_SEED={seed}, {worlds} worlds");
    let half = |first: u64| {
        let mut seen = Seen::default();
        for world in (first..worlds).step_by(2) {
            seen += run(seed + world, OPERATIONS_PER_WORLD).0;
        }
        seen
    };
    let seen = std::thread::scope(|scope| {
        let other = scope.spawn(|| half(1));
        let mut seen = half(0);
        seen += other.join().expect("the other half holds too");
        seen
    });
    println!("{seen:?}");
    assert!(seen.operations >= worlds * OPERATIONS_PER_WORLD);
    // Rare things have to happen often enough to mean something.
    let rarest = [
        seen.finished,
        seen.cancelled,
        seen.cancelled_in_step,
        seen.refused,
        seen.resets,
        seen.recomputations,
        seen.preemptions,
        seen.hit_tokens,
        seen.bad_answers,
        seen.scored_prompts,
        seen.ahead,
        seen.left_to_shard,
        seen.discarded,
    ];
    let rarest = rarest.iter().min().copied().unwrap_or(0);
    assert!(
        worlds < 40 || rarest >= worlds,
        "something hardly happened: {seen:?}"
    );
    // It takes six faults without a token.
    assert!(worlds < 40 || seen.given_up > 0, "no one was given up");
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let seed = from_env("SIM_SEED", DEFAULT_SEED);
    let traces = |first: u64| -> Vec<u64> {
        let traces = (first..first + 4).map(|seed| run(seed, 1_000).1);
        traces.collect()
    };
    let (once, again, other) = (traces(seed), traces(seed), traces(seed + 4));
    println!("SIM_SEED={seed}: {once:016x?}");
    assert_eq!(once, again);
    assert_ne!(once, other);
}

/// One world; says how to see it again if it fails.
#[expect(clippy::print_stdout, reason = "a failing test shows its output")]
fn run(seed: u64, operations: u64) -> (Seen, u64) {
    catch_unwind(|| World::new(seed).run(operations)).unwrap_or_else(|panic| {
        println!("SIM_SEED={seed} reproduces this failure");
        std::panic::resume_unwind(panic)
    })
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test's seed comes from the environment"
)]
fn from_env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => default,
    }
}
