//! The bytes of every message, pinned.
//!
//! Another layout must come with another [`WIRE_VERSION`]: the files of a version never change once
//! they are there. `UPDATE_GOLDEN=1` writes files that are missing, and no others.

use crate::random::{Random, seed};
use crate::samples::{command_kind, commands, random_plan, replies, reply_kind};
use std::collections::BTreeSet;
use std::path::PathBuf;
use topology::wire::codec::{LENGTH_BYTES, body_length, encode_frame, encode_run};
use topology::wire::{FromShard, Preamble, ToShard, WIRE_VERSION, WireError, decode, encode};

fn encoded() -> Vec<(String, Vec<u8>)> {
    let commands = commands().into_iter().map(|command| {
        let bytes = encode(&command).expect("a short message");
        (format!("to_{}.bin", command_kind(&command)), bytes)
    });
    let replies = replies().into_iter().map(|reply| {
        let bytes = encode(&reply).expect("a short message");
        (format!("from_{}.bin", reply_kind(&reply)), bytes)
    });
    commands.chain(replies).collect()
}

#[test]
fn the_bytes_are_those_of_this_version() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let directory = directory.join(format!("tests/golden/v{WIRE_VERSION}"));
    let may_write = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut names = BTreeSet::new();
    for (name, bytes) in encoded() {
        let path = directory.join(&name);
        if may_write && !path.exists() {
            std::fs::create_dir_all(&directory).unwrap();
            std::fs::write(&path, &bytes).unwrap();
        }
        let golden = std::fs::read(&path).unwrap_or_else(|e| {
            panic!("{path:?}: {e}; after a change of messages raise WIRE_VERSION and run with UPDATE_GOLDEN=1")
        });
        assert_eq!(
            bytes, golden,
            "{name}: the layout has changed, so WIRE_VERSION must be raised"
        );
        assert!(names.insert(name.clone()), "{name} is there twice");
    }
    // A kind that went away is a change as well.
    for entry in std::fs::read_dir(&directory).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(
            names.contains(&name),
            "{name} is of no message any more: raise WIRE_VERSION"
        );
    }
}

#[test]
fn every_message_comes_back() {
    for command in commands() {
        assert_eq!(decode::<ToShard>(&encode(&command).unwrap()), Ok(command));
    }
    for reply in replies() {
        assert_eq!(decode::<FromShard>(&encode(&reply).unwrap()), Ok(reply));
    }
    let mut random = Random::new(seed(1));
    for _ in 0..300 {
        let command = ToShard::Run(Box::new(random_plan(&mut random)));
        let frame = encode_frame(&command).unwrap();
        let (length, body) = frame.split_first_chunk::<LENGTH_BYTES>().unwrap();
        assert_eq!(body_length(*length), Ok(body.len()));
        assert_eq!(body, encode(&command).unwrap());
        assert_eq!(decode::<ToShard>(body), Ok(command));
    }
}

#[test]
fn equal_plans_have_equal_digests_and_others_do_not() {
    let mut random = Random::new(seed(2));
    let mut digests = BTreeSet::new();
    for step in 0..200 {
        let mut plan = random_plan(&mut random);
        plan.step.0 = step;
        // As the sender, who encodes it anyway, has it; and as a rank that got it.
        let (frame, digest) = encode_run(plan.clone()).unwrap();
        assert_eq!(plan.digest(), digest);
        let message = ToShard::Run(Box::new(plan));
        assert_eq!(frame, encode_frame(&message).unwrap());
        assert!(digests.insert(digest), "two plans, one digest");
    }
}

#[test]
fn the_preamble_has_a_layout_that_never_changes() {
    let preamble = Preamble {
        version: 0x0102_0304,
        build: *b"0123456789abcdef",
    };
    assert_eq!(
        &preamble.to_bytes(),
        b"cluster\n\x04\x03\x02\x010123456789abcdef"
    );
    let ours = Preamble::ours();
    assert_eq!(ours.version, WIRE_VERSION);
    assert_eq!(ours.check(&ours.to_bytes()), Ok(()));
    let mut bytes = ours.to_bytes();
    for at in 0..Preamble::BYTES {
        bytes[at] ^= 1;
        let error = ours.check(&bytes).unwrap_err();
        let right = match at {
            0..8 => error == WireError::Magic,
            8..12 => matches!(error, WireError::Version { .. }),
            _ => matches!(error, WireError::Build { .. }),
        };
        assert!(right, "byte {at}: {error}");
        bytes[at] ^= 1;
    }
}
