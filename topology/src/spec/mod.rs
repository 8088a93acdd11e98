//! What the operator writes for devices: `--gpus 0,1`, `--cpus 4`, `--cpus 0-3,6`; the topology file is
//! [`cluster`]'s.
//!
//! Text to values, nothing more: whether the devices exist is [`crate::placement`]'s to say.
//! Invariant: a list that comes out is not empty and has no entry above a limit; a core is in it once.

pub mod cluster;

use std::str::FromStr;

/// Largest core or GPU number. Beyond it a number is a typing mistake.
const MAX_INDEX: u32 = 4095;

/// Why text is not a list of devices. A sentence.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not a number, range or list.
    #[error("`{text}` is not {expected}")]
    Syntax {
        /// What was written.
        text: String,
        /// What may be written.
        expected: &'static str,
    },
    /// A number that cannot be meant.
    #[error("{0} is above the largest number, {MAX_INDEX}")]
    TooLarge(u64),
    /// A range that runs backwards.
    #[error("the range {first}-{last} is empty; write the smaller number first")]
    Backwards {
        /// Where it starts.
        first: u32,
        /// Where it ends.
        last: u32,
    },
    /// The same device twice.
    #[error("{0} is named twice")]
    Twice(u32),
    /// A count of none.
    #[error("at least one core is needed")]
    None,
}

/// `--cpus`: cores for all shards of this host together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CpuSpec {
    /// So many, wherever the operating system puts them.
    Count(u32),
    /// These, in the order given; threads are pinned to them.
    Cores(Vec<u32>),
}

impl FromStr for CpuSpec {
    type Err = SpecError;

    /// A lone number is a count: `--cpus 3` is three cores, `--cpus 3-3` is core 3.
    fn from_str(text: &str) -> Result<Self, SpecError> {
        const EXPECTED: &str = "a number of cores such as 4, or a list of cores such as 0-3,6";
        let text = text.trim();
        if text.contains([',', '-']) {
            let cores = list(text, EXPECTED)?;
            return match repeated(&cores) {
                Some(core) => Err(SpecError::Twice(core)),
                None => Ok(Self::Cores(cores)),
            };
        }
        match index(text, EXPECTED)? {
            0 => Err(SpecError::None),
            count => Ok(Self::Count(count)),
        }
    }
}

/// `--gpus`: one rank for each entry. A GPU that is named twice gets two ranks, which is meant for tests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuSpec(pub Vec<u32>);

impl FromStr for GpuSpec {
    type Err = SpecError;

    /// Always a list: `--gpus 1` is GPU 1, as everywhere else.
    fn from_str(text: &str) -> Result<Self, SpecError> {
        list(text.trim(), "a list of GPUs such as 0,1 or 0-3").map(Self)
    }
}

pub(crate) fn list(text: &str, expected: &'static str) -> Result<Vec<u32>, SpecError> {
    let mut found = Vec::new();
    for item in text.split(',') {
        let (first, last) = match item.split_once('-') {
            Some((first, last)) => (index(first, expected)?, index(last, expected)?),
            None => (index(item, expected)?, index(item, expected)?),
        };
        if first > last {
            return Err(SpecError::Backwards { first, last });
        }
        found.extend(first..=last);
    }
    Ok(found)
}

/// The first entry that is in the list again.
fn repeated(list: &[u32]) -> Option<u32> {
    let again = list
        .iter()
        .enumerate()
        .find(|(at, number)| list[..*at].contains(number));
    again.map(|(_, number)| *number)
}

fn index(text: &str, expected: &'static str) -> Result<u32, SpecError> {
    let text = text.trim();
    // `parse` alone would accept a sign.
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let number = text.parse::<u64>().ok().filter(|_| digits);
    let number = number.ok_or_else(|| SpecError::Syntax {
        text: text.chars().take(40).flat_map(char::escape_debug).collect(),
        expected,
    })?;
    let index = u32::try_from(number)
        .ok()
        .filter(|index| *index <= MAX_INDEX);
    index.ok_or(SpecError::TooLarge(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_and_lists_are_told_apart() {
        assert_eq!("4".parse(), Ok(CpuSpec::Count(4)));
        assert_eq!(" 0-3, 6 ".parse(), Ok(CpuSpec::Cores(vec![0, 1, 2, 3, 6])));
        assert_eq!("3-3".parse(), Ok(CpuSpec::Cores(vec![3])));
        assert_eq!(
            "6,2".parse(),
            Ok(CpuSpec::Cores(vec![6, 2])),
            "the order is kept"
        );
        assert_eq!("1".parse(), Ok(GpuSpec(vec![1])));
        assert_eq!("0,2-3".parse(), Ok(GpuSpec(vec![0, 2, 3])));
        assert_eq!("0,0".parse(), Ok(GpuSpec(vec![0, 0])), "two ranks");
    }

    #[test]
    fn bad_input_gets_a_sentence() {
        for (text, word) in [
            ("", "list of cores"),
            ("four", "`four`"),
            ("0", "at least one"),
            ("+4", "`+4`"),
            ("1,,2", "list of cores"),
            ("3-1", "smaller number first"),
            ("0-3,2", "2 is named twice"),
            ("0-3,6,5-7", "6 is named twice"),
            ("0-99999999999", "above the largest"),
            ("1-", "list of cores"),
            ("-1", "list of cores"),
            ("99999999999999999999999", "is not"),
        ] {
            let refused = text.parse::<CpuSpec>().unwrap_err().to_string();
            assert!(refused.contains(word), "{text:?}: {refused}");
        }
        assert!(
            "all"
                .parse::<GpuSpec>()
                .unwrap_err()
                .to_string()
                .contains("list of GPUs")
        );
    }
}
