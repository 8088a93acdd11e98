//! Lists of numbers of 32 bits, as they lie in memory.
//!
//! A plan is block tables and little else, and they are encoded, hashed, sealed and decoded in every step: a copy takes a
//! small part of what finding the shortest form of each number would. Little endian, their count before them.
//!
//! Invariant: memory is taken for what is there, not for what is claimed.

use bincode::de::Decoder;
use bincode::de::read::Reader;
use bincode::enc::Encoder;
use bincode::enc::write::Writer;
use bincode::error::{DecodeError, EncodeError};
use bincode::{Decode, Encode};

/// Bytes of a number.
const BYTES: usize = size_of::<u32>();

/// Numbers that are written at once.
const AT_ONCE: usize = 256;

/// Writes a list.
pub(super) fn encode<T: Copy, E: Encoder>(
    words: &[T],
    number: impl Fn(T) -> u32,
    encoder: &mut E,
) -> Result<(), EncodeError> {
    words.len().encode(encoder)?;
    for words in words.chunks(AT_ONCE) {
        let mut bytes = [0; AT_ONCE * BYTES];
        for (bytes, word) in bytes.as_chunks_mut().0.iter_mut().zip(words) {
            *bytes = number(*word).to_le_bytes();
        }
        encoder.writer().write(&bytes[..words.len() * BYTES])?;
    }
    Ok(())
}

/// Reads a list.
pub(super) fn decode<T, D: Decoder>(
    word: impl Fn(u32) -> T,
    decoder: &mut D,
) -> Result<Vec<T>, DecodeError> {
    let count = usize::decode(decoder)?;
    decoder.claim_container_read::<u32>(count)?;
    let length = count.checked_mul(BYTES).ok_or(DecodeError::LimitExceeded)?;
    let Some(bytes) = decoder.reader().peek_read(length) else {
        return Err(DecodeError::UnexpectedEnd { additional: length });
    };
    let words = bytes.as_chunks().0.iter();
    let words = words.map(|bytes| word(u32::from_le_bytes(*bytes)));
    let words = words.collect();
    decoder.reader().consume(length);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use crate::ids::BlockId;
    use crate::wire::{PlanRow, decode, encode};

    #[test]
    fn lists_of_all_lengths_come_back_and_none_of_them_cut() {
        for length in [0, 1, 255, 256, 257, 1000, 5000] {
            let numbers =
                |salt: u32| (0..length).map(move |i: u32| i.wrapping_mul(salt).rotate_left(9));
            let row = PlanRow {
                tokens: numbers(0x9e37_79b9).collect(),
                blocks: numbers(0x85eb_ca6b).map(BlockId).collect(),
                targets: numbers(3).take(7).collect(),
                ..PlanRow::default()
            };
            let bytes = encode(&row).unwrap();
            assert_eq!(decode::<PlanRow>(&bytes).unwrap(), row);
            for end in (0..bytes.len()).step_by(97) {
                decode::<PlanRow>(&bytes[..end]).unwrap_err();
            }
        }
    }
}
