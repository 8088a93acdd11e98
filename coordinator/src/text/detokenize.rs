//! The text of a token stream, piece by piece.
//!
//! Does not know about stop strings or JSON. A token costs time in proportion to its own length,
//! however long the text already is.
//!
//! Invariant: the deltas of all [`Detokenizer::push`] calls and of [`Detokenizer::finish`], one
//! after the other, are what decoding all tokens at once gives; at every cut. For that, bytes that may
//! still become a character are held back: at most three under byte-level vocabularies, a run of
//! spelled-out bytes (`<0xE4><0xB8>…`) under those with byte fallback.

use super::pieces::{Joining, Piece, Pieces};
use std::sync::Arc;

/// Turns tokens into text deltas.
#[derive(Debug)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    skip_special: bool,
    /// Bytes that are not yet text.
    pending: Vec<u8>,
    /// No token has been taken since the start of a text.
    first: bool,
    /// Characters that may still be dropped at the start of the text.
    strip: usize,
}

impl Detokenizer {
    /// For a text that starts with the first token pushed.
    pub fn at_start(pieces: Arc<Pieces>, skip_special: bool) -> Self {
        let strip = match pieces.joining() {
            Joining::Texts { strip, .. } => strip,
            _ => 0,
        };
        Self {
            pieces,
            skip_special,
            pending: Vec::new(),
            first: true,
            strip,
        }
    }

    /// For a text that goes on after a prompt: the first token keeps its leading space.
    pub fn after_prompt(pieces: Arc<Pieces>, skip_special: bool) -> Self {
        Self {
            first: false,
            strip: 0,
            ..Self::at_start(pieces, skip_special)
        }
    }

    /// Takes the next token and appends the text that is now certain to `out`.
    pub fn push(&mut self, token: u32, out: &mut String) {
        if self.skip_special && self.pieces.is_special(token) {
            return;
        }
        let pieces = Arc::clone(&self.pieces);
        let text = match pieces.get(token) {
            Piece::Unknown => return,
            Piece::Byte(byte) => {
                self.pending.push(byte);
                self.first = false;
                return;
            }
            Piece::Text(text) => text,
        };
        match pieces.joining() {
            Joining::Bytes => {
                self.pending.extend_from_slice(text);
                self.flush_utf8(out);
            }
            Joining::Texts { .. } => {
                self.flush_run(out);
                self.emit(&String::from_utf8_lossy(text), out);
            }
            Joining::Marked { mark, strip_first } => {
                let text = String::from_utf8_lossy(text);
                if self.first && strip_first {
                    out.push_str(&text.replace(mark, ""));
                } else {
                    out.push_str(&text.replace(mark, " "));
                }
            }
            Joining::Spaced => {
                if !self.first {
                    out.push(' ');
                }
                out.push_str(&String::from_utf8_lossy(text));
            }
        }
        self.first = false;
    }

    /// Ends the text: what was held back and can no longer become a character is U+FFFD.
    pub fn finish(&mut self, out: &mut String) {
        match self.pieces.joining() {
            Joining::Bytes => {
                self.flush_utf8(out);
                if !self.pending.is_empty() {
                    out.push(char::REPLACEMENT_CHARACTER);
                    self.pending.clear();
                }
            }
            _ => self.flush_run(out),
        }
    }

    /// Emits all of `pending` but a character that has only begun.
    fn flush_utf8(&mut self, out: &mut String) {
        let mut rest = self.pending.as_slice();
        loop {
            match std::str::from_utf8(rest) {
                Ok(text) => {
                    out.push_str(text);
                    rest = &[];
                    break;
                }
                Err(error) => {
                    let (valid, after) = rest.split_at(error.valid_up_to());
                    out.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    rest = after;
                    let Some(invalid) = error.error_len() else {
                        break;
                    };
                    out.push(char::REPLACEMENT_CHARACTER);
                    rest = &rest[invalid..];
                }
            }
        }
        let kept = rest.len();
        self.pending.drain(..self.pending.len() - kept);
    }

    /// Emits a run of spelled-out bytes that has ended.
    fn flush_run(&mut self, out: &mut String) {
        if self.pending.is_empty() {
            return;
        }
        let run = std::mem::take(&mut self.pending);
        match String::from_utf8(run) {
            Ok(text) => self.emit(&text, out),
            Err(error) => {
                for _ in error.as_bytes() {
                    self.emit("\u{FFFD}", out);
                }
            }
        }
    }

    /// Appends `text`, less what is to be dropped at the start.
    fn emit(&mut self, text: &str, out: &mut String) {
        let mut rest = text;
        if self.strip > 0
            && let Joining::Texts { content, .. } = self.pieces.joining()
        {
            while self.strip > 0 && !rest.is_empty() {
                match rest.strip_prefix(content) {
                    Some(stripped) => {
                        rest = stripped;
                        self.strip -= 1;
                    }
                    // The start of the text is over.
                    None => self.strip = 0,
                }
            }
        }
        out.push_str(rest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::{Family, Rng, tokenizer};

    /// Random tokens: mostly a few kinds that interact (bytes of characters, spaces, specials).
    fn random_tokens(rng: &mut Rng, size: usize) -> Vec<u32> {
        let size = u32::try_from(size).unwrap();
        let pool: Vec<u32> = (0..=rng.below(12)).map(|_| rng.below(size + 2)).collect();
        (0..rng.below(40))
            .map(|_| match rng.below(4) {
                0 => rng.below(size + 2), // two ids beyond the vocabulary, too
                _ => pool[rng.below(u32::try_from(pool.len()).unwrap()) as usize],
            })
            .collect()
    }

    fn run(mut detokenizer: Detokenizer, tokens: &[u32]) -> String {
        let mut text = String::new();
        for &token in tokens {
            detokenizer.push(token, &mut text);
        }
        detokenizer.finish(&mut text);
        text
    }

    #[test]
    fn deltas_make_the_text_of_all_tokens_at_every_cut() {
        for family in Family::ALL {
            let tokenizer = tokenizer(family);
            for seed in 0..1000 {
                let mut rng = Rng::new(seed);
                let tokens = random_tokens(&mut rng, tokenizer.pieces().len());
                let skip = seed % 2 == 0;
                let mut detokenizer = Detokenizer::at_start(tokenizer.pieces(), skip);
                let mut sent = String::new();
                for cut in 0..=tokens.len() {
                    let whole = tokenizer.inner().decode(&tokens[..cut], skip).unwrap();
                    let ended = run(
                        Detokenizer::at_start(tokenizer.pieces(), skip),
                        &tokens[..cut],
                    );
                    assert_eq!(ended, whole, "{family:?} seed {seed} {:?}", &tokens[..cut]);
                    let all = tokenizer.inner().decode(&tokens, skip).unwrap();
                    assert!(
                        all.starts_with(&sent),
                        "{family:?} seed {seed} cut {cut} {tokens:?}"
                    );
                    if cut < tokens.len() {
                        detokenizer.push(tokens[cut], &mut sent);
                    }
                }
            }
        }
    }

    #[test]
    fn a_text_after_a_prompt_is_the_rest_of_the_whole() {
        for family in Family::ALL {
            let tokenizer = tokenizer(family);
            let prompt = match family {
                Family::ByteLevel => tokenizer.encode("Hello world", false).unwrap(),
                _ => ["▁Hello", "▁world"]
                    .map(|it| tokenizer.token_to_id(it).unwrap())
                    .to_vec(),
            };
            let before = tokenizer.inner().decode(&prompt, true).unwrap();
            for seed in 0..1000 {
                let mut rng = Rng::new(seed);
                let tokens = random_tokens(&mut rng, tokenizer.pieces().len());
                let all = [prompt.as_slice(), &tokens].concat();
                let whole = tokenizer.inner().decode(&all, true).unwrap();
                let rest = run(Detokenizer::after_prompt(tokenizer.pieces(), true), &tokens);
                assert_eq!(
                    before.clone() + &rest,
                    whole,
                    "{family:?} seed {seed} {tokens:?}"
                );
            }
        }
    }

    #[test]
    fn an_unfinished_character_waits_and_is_replaced_at_the_end() {
        let tokenizer = tokenizer(Family::ByteLevel);
        let snowman = tokenizer.encode("☃", false).unwrap();
        assert_eq!(snowman.len(), 3);
        let mut detokenizer = Detokenizer::after_prompt(tokenizer.pieces(), true);
        let mut text = String::new();
        detokenizer.push(snowman[0], &mut text);
        detokenizer.push(snowman[1], &mut text);
        assert_eq!(text, "");
        detokenizer.push(snowman[2], &mut text);
        assert_eq!(text, "☃");
        detokenizer.push(snowman[0], &mut text);
        detokenizer.finish(&mut text);
        assert_eq!(text, "☃\u{FFFD}");
    }
}
