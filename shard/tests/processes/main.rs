//! Real shard processes, driven over the real link: start, steps, `kill -9`, recovery, stop.
//!
//! Its own `main`, because it starts itself: called with `shard` it is a shard process, called with
//! `collectives` one rank of a group that only adds up. Otherwise it runs the checks below, or those
//! whose names contain the first argument. With `CLUSTER_TEST_GPU=0` both ranks are on that GPU.
//!
//! Invariant: every wait has a deadline, so a check that hangs fails.

mod collectives;
mod doubles;
mod group;
mod hold;
mod life;
#[path = "../engine/reference.rs"]
mod reference;
mod references;
mod replay;
#[path = "../../src/testing.rs"]
mod testing;

use std::panic::catch_unwind;
use std::process::ExitCode;

const CHECKS: [(&str, fn()); 13] = [
    (
        "sums_are_the_same_in_all_processes",
        collectives::sums_are_the_same_in_all_processes,
    ),
    (
        "two_processes_give_the_references_logits",
        references::two_processes_give_the_references_logits,
    ),
    (
        "a_killed_rank_is_replaced_and_the_answers_go_on",
        life::a_killed_rank_is_replaced,
    ),
    (
        "a_join_that_stays_incomplete_can_be_aborted",
        life::an_incomplete_join_can_be_aborted,
    ),
    (
        "a_late_plan_of_an_old_epoch_changes_nothing",
        life::a_late_plan_changes_nothing,
    ),
    (
        "steps_sent_ahead_give_the_same",
        life::steps_sent_ahead_give_the_same,
    ),
    (
        "replayed_steps_give_what_queued_ones_do",
        replay::replayed_steps_give_what_queued_ones_do,
    ),
    (
        "stop_ends_with_0_and_a_lost_parent_with_1",
        life::stop_and_a_lost_parent,
    ),
    (
        "another_coordinator_is_served_and_none_of_the_past",
        hold::another_coordinator_is_served_and_none_of_the_past,
    ),
    (
        "nobody_else_is_served_and_waiting_ends",
        hold::nobody_else_is_served_and_waiting_ends,
    ),
    (
        "a_model_that_cannot_be_loaded_is_told_in_a_sentence",
        life::a_missing_model,
    ),
    (
        "a_plan_that_cannot_be_computed_is_told_in_a_sentence",
        life::a_bad_plan,
    ),
    (
        "the_same_over_doubles_of_cuda_and_nccl",
        doubles::the_same_over_doubles_of_cuda_and_nccl,
    ),
];

#[expect(clippy::print_stdout, reason = "a test harness reports here")]
fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("shard") => {
            let log = "warn,shard::run=debug".to_owned();
            return shard::run(&shard::Options { log, after: None }, &[]);
        }
        Some("collectives") => return collectives::child(&arguments[1..]),
        _ => {}
    }
    let is_list = arguments.iter().any(|argument| argument == "--list");
    let filter = arguments.iter().find(|argument| !argument.starts_with('-'));
    let mut failed = 0;
    for (name, check) in CHECKS {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        if is_list {
            println!("{name}: test");
            continue;
        }
        let is_ok = catch_unwind(check).is_ok();
        failed += usize::from(!is_ok);
        println!("test {name} ... {}", if is_ok { "ok" } else { "FAILED" });
    }
    if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
