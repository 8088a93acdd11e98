//! Collectives of CPU ranks in terms of rounds, in which every rank shows values to all others.
//!
//! The arithmetic is here, once; how values get from rank to rank is [`super::shm`]'s and
//! [`super::tcp`]'s. So a group gives the same bits over shared memory and over a network.
//!
//! Invariant: the result of an element is `((part_0 + part_1) + part_2) + …`, whatever the tensor's
//! length and however it was cut into pieces.

use super::{Abort, CommError, CommTimings};
use crate::clock;
use std::time::Duration;

/// What one rank shows in a round is seen by all, or the round has failed.
pub(super) trait Rounds {
    /// All ranks' values of a round. Borrowed, so that no round begins while another is read.
    type Parts<'a>: Parts
    where
        Self: 'a;

    /// Ranks of the group.
    fn world_size(&self) -> u32;

    /// Most values in one round; the same on every rank.
    fn piece_elements(&self) -> usize;

    /// One round: shows `values`, at most [`Self::piece_elements`], to all ranks and waits for
    /// theirs, which must be as many and carry the same `tag`.
    fn exchange(&mut self, tag: [u64; 2], values: &[f32]) -> Result<Self::Parts<'_>, CommError>;

    /// Time without progress since the last call.
    fn take_waited(&mut self) -> Duration;
}

/// All ranks' values of one round.
pub(super) trait Parts {
    /// What `rank` showed.
    fn of(&self, rank: u32) -> &[f32];
}

/// One rank's end of a group. With one rank it is nothing and costs nothing.
#[derive(Debug)]
pub(super) struct Member<R> {
    rounds: Option<R>,
    abort: Abort,
    tag: [u64; 2],
    total: Duration,
}

impl<R: Rounds> Member<R> {
    /// A member that meets the others in `rounds`, if there are others.
    pub(super) fn new(rounds: Option<R>, abort: &Abort) -> Self {
        Self {
            rounds,
            abort: abort.clone(),
            tag: [0; 2],
            total: Duration::ZERO,
        }
    }

    pub(super) fn world_size(&self) -> u32 {
        self.rounds.as_ref().map_or(1, Rounds::world_size)
    }

    /// Names the plan being computed: ranks with different ones fail instead of adding up.
    pub(super) fn set_tag(&mut self, digest: [u8; 16]) {
        self.tag = tag(digest);
    }

    /// See [`all_reduce`].
    pub(super) fn all_reduce(&mut self, x: &mut [f32]) -> Result<(), CommError> {
        self.check_abort()?;
        let Some(rounds) = &mut self.rounds else {
            return Ok(());
        };
        let start = clock::now();
        all_reduce(rounds, self.tag, x)?;
        self.total += clock::now().duration_since(start);
        Ok(())
    }

    /// See [`all_gather_rows`].
    pub(super) fn all_gather_rows(
        &mut self,
        (part, width): (&[f32], usize),
        out: &mut [f32],
    ) -> Result<(), CommError> {
        self.check_abort()?;
        let Some(rounds) = &mut self.rounds else {
            out.copy_from_slice(part);
            return Ok(());
        };
        let start = clock::now();
        all_gather_rows(rounds, self.tag, (part, width), out)?;
        self.total += clock::now().duration_since(start);
        Ok(())
    }

    /// Also with one rank: a long step ends at its next collective.
    fn check_abort(&self) -> Result<(), CommError> {
        if self.abort.is_aborted() {
            return Err(CommError::Aborted);
        }
        Ok(())
    }

    /// Time inside collectives since the last call.
    pub(super) fn take_timings(&mut self) -> CommTimings {
        let waited = self.rounds.as_mut().map(Rounds::take_waited);
        CommTimings::new(std::mem::take(&mut self.total), waited.unwrap_or_default())
    }
}

/// `x = sum over ranks of x`, in rank order. All ranks pass the same length.
///
/// Every rank adds up all parts itself, so that all hold the same bits. That reads `world_size` times
/// the tensor on each, which for the few ranks of a group of CPUs costs less than a second round.
fn all_reduce(rounds: &mut impl Rounds, tag: [u64; 2], x: &mut [f32]) -> Result<(), CommError> {
    let world_size = rounds.world_size();
    let piece = rounds.piece_elements();
    for x in x.chunks_mut(piece) {
        let parts = rounds.exchange(tag, x)?;
        x.copy_from_slice(parts.of(0));
        for rank in 1..world_size {
            for (sum, part) in x.iter_mut().zip(parts.of(rank)) {
                *sum += part;
            }
        }
    }
    Ok(())
}

/// `out[row] = part_0[row] ++ part_1[row] ++ …` for rows of `width` elements: `part: [rows, width]`,
/// `out: [rows, world_size * width]`.
fn all_gather_rows(
    rounds: &mut impl Rounds,
    tag: [u64; 2],
    (part, width): (&[f32], usize),
    out: &mut [f32],
) -> Result<(), CommError> {
    let world_size = rounds.world_size() as usize;
    assert_eq!(
        out.len(),
        part.len() * world_size,
        "out holds every rank's part"
    );
    let piece = rounds.piece_elements();
    for (index, values) in part.chunks(piece).enumerate() {
        let parts = rounds.exchange(tag, values)?;
        for rank in 0..world_size {
            let theirs = parts.of(u32::try_from(rank).expect("at most 64 ranks"));
            // The piece may begin and end inside a row.
            let mut at = index * piece;
            let mut rest = theirs;
            while !rest.is_empty() {
                let (row, column) = (at / width, at % width);
                let (run, after) = rest.split_at(rest.len().min(width - column));
                let to = (row * world_size + rank) * width + column;
                out[to..to + run.len()].copy_from_slice(run);
                at += run.len();
                rest = after;
            }
        }
    }
    Ok(())
}

/// The digest of a plan, as rounds carry it.
fn tag(digest: [u8; 16]) -> [u64; 2] {
    let (low, high) = digest.split_at(8);
    let word = |b: &[u8]| b.iter().fold(0, |word, byte| word << 8 | u64::from(*byte));
    [word(low), word(high)]
}
