//! What each token of a vocabulary stands for, worked out once when a model is loaded.
//!
//! The `decoder` of `tokenizer.json` is a chain of small steps. Read as a whole it comes down to a
//! [`Piece`] for each token and a [`Joining`] for their sequence. Decoders that are not a function of
//! that form (`WordPiece`, `CTC`, regular expressions) are refused when the model is loaded rather
//! than decoded almost correctly.
//!
//! Invariant: a piece depends on its token alone; everything that depends on neighbours is in
//! [`Joining`], which [`super::detokenize`] carries out.

use anyhow::{Context, bail, ensure};
use serde_json::Value;
use tokenizers::Tokenizer;

/// What one token stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Piece<'a> {
    /// These bytes; under [`Joining::Bytes`] not always whole characters.
    Text(&'a [u8]),
    /// One byte of a character that is spelled out (`<0xE4>`).
    Byte(u8),
    /// Nothing: the id names no token.
    Unknown,
}

/// How pieces become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Joining {
    /// The bytes one after the other, read as UTF-8 with U+FFFD for what is not.
    Bytes,
    /// Texts one after the other; each run of [`Piece::Byte`] is read as UTF-8 as a whole, or
    /// is U+FFFD once for each byte. Up to `strip` of the `content` characters at the very start
    /// of the text are dropped.
    Texts {
        /// Dropped at the start.
        content: char,
        /// How many at most.
        strip: usize,
    },
    /// Texts in which `mark` is a space; the first token of a text loses its marks.
    Marked {
        /// Stands for a space.
        mark: char,
        /// Whether the first token loses its marks.
        strip_first: bool,
    },
    /// Texts with a space between.
    Spaced,
}

/// The pieces of a vocabulary.
#[derive(Debug)]
pub struct Pieces {
    joining: Joining,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
    longest: usize,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    start: u32,
    len: u32,
    known: bool,
    special: bool,
    byte: Option<u8>,
}

impl Pieces {
    /// Works out all pieces of `tokenizer`, whose `tokenizer.json` has this `decoder`. `special` is
    /// asked for each id whether `skip_special_tokens` leaves it out.
    ///
    /// # Errors
    /// If the decoder has a step that is not known here.
    pub fn new(
        tokenizer: &Tokenizer,
        decoder: &Value,
        special: impl Fn(u32) -> bool,
    ) -> anyhow::Result<Self> {
        let plan = Plan::read(decoder)?;
        let size = tokenizer
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        // Ids far beyond the number of tokens would make the table, not the vocabulary, the size.
        ensure!(size <= 1 << 22, "token id {} is too large", size - 1);
        let byte_of = byte_level_alphabet();
        let mut pieces = Self {
            joining: plan.joining,
            bytes: Vec::new(),
            entries: vec![Entry::default(); size],
            longest: 1,
        };
        for (id, entry) in (0..).zip(&mut pieces.entries) {
            let Some(mut token) = tokenizer.id_to_token(id) else {
                continue;
            };
            for (from, to) in &plan.replace {
                token = token.replace(from, to);
            }
            let start = pieces.bytes.len();
            if plan.joining == Joining::Bytes {
                let mapped: Option<Vec<u8>> = token.chars().map(&byte_of).collect();
                pieces
                    .bytes
                    .extend(mapped.unwrap_or_else(|| token.into_bytes()));
            } else {
                entry.byte = plan.byte_fallback.then(|| spelled_byte(&token)).flatten();
                pieces.bytes.extend(token.as_bytes());
            }
            entry.known = true;
            entry.special = special(id);
            entry.start = u32::try_from(start).context("the vocabulary is too large")?;
            entry.len = u32::try_from(pieces.bytes.len() - start).context("a token is too long")?;
            pieces.longest = pieces.longest.max(pieces.bytes.len() - start);
        }
        Ok(pieces)
    }

    /// What the token stands for.
    pub fn get(&self, id: u32) -> Piece<'_> {
        match self.entry(id) {
            None => Piece::Unknown,
            Some(Entry {
                byte: Some(byte), ..
            }) => Piece::Byte(byte),
            Some(entry) => {
                let start = entry.start as usize;
                Piece::Text(&self.bytes[start..start + entry.len as usize])
            }
        }
    }

    /// Whether `skip_special_tokens` leaves the token out.
    pub fn is_special(&self, id: u32) -> bool {
        self.entry(id).is_some_and(|entry| entry.special)
    }

    /// How pieces become text.
    pub fn joining(&self) -> Joining {
        self.joining
    }

    /// Bytes of the longest piece: a text of `n` bytes has at least `n / longest` tokens.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// One more than the largest token id.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no tokens at all.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The token's own bytes, as in the middle of a text.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match (self.get(id), self.joining) {
            (Piece::Unknown, _) => Vec::new(),
            (Piece::Byte(byte), _) => vec![byte],
            (Piece::Text(text), Joining::Marked { mark, .. }) => String::from_utf8_lossy(text)
                .replace(mark, " ")
                .into_bytes(),
            (Piece::Text(text), _) => text.to_vec(),
        }
    }

    /// The token as a text of its own: what it stands for, or `bytes:\xe4\xb8` if that is only a
    /// part of a character. Different tokens that are no text thus keep different names.
    pub fn token_text(&self, id: u32) -> String {
        use std::fmt::Write;
        String::from_utf8(self.token_bytes(id)).unwrap_or_else(|error| {
            let mut text = "bytes:".to_owned();
            for byte in error.as_bytes() {
                write!(text, "\\x{byte:02x}").expect("writing to a String cannot fail");
            }
            text
        })
    }

    fn entry(&self, id: u32) -> Option<Entry> {
        self.entries
            .get(id as usize)
            .copied()
            .filter(|entry| entry.known)
    }
}

/// A decoder read as a whole.
struct Plan {
    joining: Joining,
    replace: Vec<(String, String)>,
    byte_fallback: bool,
}

impl Plan {
    fn read(decoder: &Value) -> anyhow::Result<Self> {
        let mut plan = Self {
            joining: Joining::Texts {
                content: ' ',
                strip: 0,
            },
            replace: Vec::new(),
            byte_fallback: false,
        };
        if decoder.is_null() {
            plan.joining = Joining::Spaced;
            return Ok(plan);
        }
        let mut steps = Vec::new();
        flatten(decoder, &mut steps);
        let mut fused = false;
        let mut last = false;
        for step in steps {
            let name = step.get("type").and_then(Value::as_str).unwrap_or("?");
            ensure!(
                !last,
                "its decoder has {name} after the step that makes the text"
            );
            match name {
                "Replace" if !fused && !plan.byte_fallback => {
                    let pattern = step.pointer("/pattern/String").and_then(Value::as_str);
                    let pattern = pattern.context("its decoder replaces a regular expression")?;
                    let content = step.get("content").and_then(Value::as_str);
                    let content = content.context("Replace without content")?;
                    plan.replace.push((pattern.to_owned(), content.to_owned()));
                }
                "ByteFallback" if !fused => plan.byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused => {
                    let number = |key| step.get(key).and_then(Value::as_u64).unwrap_or(0);
                    ensure!(number("stop") == 0, "its decoder strips the end of a text");
                    let content = step.get("content").and_then(Value::as_str).unwrap_or(" ");
                    plan.joining = Joining::Texts {
                        content: content.chars().next().context("Strip without content")?,
                        strip: usize::try_from(number("start")).context("Strip")?,
                    };
                    last = true;
                }
                "ByteLevel" if !fused && !plan.byte_fallback => {
                    plan.joining = Joining::Bytes;
                    last = true;
                }
                "Metaspace" if !fused && !plan.byte_fallback => {
                    let mark = step
                        .get("replacement")
                        .and_then(Value::as_str)
                        .unwrap_or("▁");
                    // The older form of the file says `add_prefix_space` instead of a scheme.
                    let scheme = step.get("prepend_scheme").and_then(Value::as_str);
                    let prefix = step.get("add_prefix_space").and_then(Value::as_bool);
                    plan.joining = Joining::Marked {
                        mark: mark
                            .chars()
                            .next()
                            .context("Metaspace without replacement")?,
                        strip_first: scheme != Some("never") && prefix != Some(false),
                    };
                    last = true;
                }
                _ => bail!("its decoder step {name} is not supported at this place"),
            }
        }
        Ok(plan)
    }
}

fn flatten<'a>(decoder: &'a Value, steps: &mut Vec<&'a Value>) {
    match decoder.get("decoders").and_then(Value::as_array) {
        Some(inner) => inner.iter().for_each(|step| flatten(step, steps)),
        None => steps.push(decoder),
    }
}

/// `<0xE4>` as the byte it spells.
fn spelled_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2)
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}

/// GPT-2's alphabet: each byte has a printable character; 0x20 is `Ġ`.
fn byte_level_alphabet() -> impl Fn(char) -> Option<u8> {
    let printable = |byte: u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut bytes = [None; 512];
    let mut next = 256;
    for byte in 0..=255 {
        if printable(byte) {
            bytes[usize::from(byte)] = Some(byte);
        } else {
            bytes[next] = Some(byte);
            next += 1;
        }
    }
    move |c| bytes.get(c as usize).copied().flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn alphabet_is_that_of_the_tokenizers_crate() {
        let of = byte_level_alphabet();
        let theirs = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let mut seen = [false; 256];
        for c in theirs {
            seen[usize::from(of(c).unwrap())] = true;
        }
        assert_eq!(seen, [true; 256]);
        assert_eq!(
            (of('Ġ'), of('Ċ'), of('a')),
            (Some(b' '), Some(b'\n'), Some(b'a'))
        );
        assert_eq!(of(' '), None);
    }

    #[test]
    fn decoders_that_we_cannot_follow_are_refused() {
        for decoder in [
            json!({"type": "WordPiece"}),
            json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}),
            json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}),
            json!({"type": "Sequence", "decoders": [
                {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]}),
            json!({"type": "Sequence", "decoders": [
                {"type": "ByteLevel"}, {"type": "Replace", "pattern": {"String": "a"}, "content": ""}]}),
        ] {
            assert!(Plan::read(&decoder).is_err(), "{decoder}");
        }
    }
}
