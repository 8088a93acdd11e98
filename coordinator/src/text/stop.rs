//! Stop strings in a text that arrives in pieces, and how much of it may be shown already.
//!
//! A text stops at the first character with which any stop string is complete; of several that end
//! there, the longest counts. That is a property of the text alone, so the result does not depend
//! on how the text was cut into pieces.
//!
//! Invariant: what is held back is the longest end of the text that may still become a stop string, and
//! nothing else.

/// Watches a text for stop strings.
#[derive(Debug)]
pub struct StopMatcher {
    patterns: Vec<Pattern>,
    include: bool,
    /// The end of the text, not shown yet.
    held: String,
}

/// One stop string as a Knuth-Morris-Pratt automaton over bytes.
#[derive(Debug)]
struct Pattern {
    text: String,
    /// `fallback[i]`: length of the longest proper prefix of `text[..=i]` that is also its suffix.
    fallback: Vec<usize>,
    /// Bytes of `text` that the seen text ends with.
    matched: usize,
}

/// What a piece of text led to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Released {
    /// Text that may be shown now.
    pub text: String,
    /// The stop string that ends the text; nothing may be pushed after it.
    pub stop: Option<String>,
}

impl StopMatcher {
    /// Watches for `stops`, none of them empty. With `include` the stop string itself is shown.
    pub fn new(stops: &[String], include: bool) -> Self {
        Self {
            patterns: stops.iter().map(|stop| Pattern::new(stop)).collect(),
            include,
            held: String::new(),
        }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, delta: &str) -> Released {
        if self.patterns.is_empty() {
            return Released {
                text: delta.to_owned(),
                stop: None,
            };
        }
        let before = self.held.len();
        self.held.push_str(delta);
        for (seen, &byte) in delta.as_bytes().iter().enumerate() {
            let mut complete: Option<&str> = None;
            for pattern in &mut self.patterns {
                if pattern.advance(byte) && complete.is_none_or(|it| it.len() < pattern.text.len())
                {
                    complete = Some(&pattern.text);
                }
            }
            if let Some(stop) = complete {
                let end = before + seen + 1;
                let end = if self.include { end } else { end - stop.len() };
                let stop = Some(stop.to_owned());
                self.held.truncate(end);
                let text = std::mem::take(&mut self.held);
                return Released { text, stop };
            }
        }
        let held = self.patterns.iter().map(|it| it.matched).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - held);
        Released {
            text: std::mem::replace(&mut self.held, rest),
            stop: None,
        }
    }

    /// Takes a piece of text that no stop string may begin or end in (before `min_tokens`).
    pub fn pass(&mut self, delta: &str) -> String {
        let text = self.finish() + delta;
        for pattern in &mut self.patterns {
            pattern.matched = 0;
        }
        text
    }

    /// The text has ended without a stop string: gives what was held back.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut fallback = vec![0; bytes.len()];
        for i in 1..bytes.len() {
            let mut length = fallback[i - 1];
            while length > 0 && bytes[i] != bytes[length] {
                length = fallback[length - 1];
            }
            fallback[i] = length + usize::from(bytes[i] == bytes[length]);
        }
        Self {
            text: text.to_owned(),
            fallback,
            matched: 0,
        }
    }

    /// Takes one byte; whether the stop string is complete with it.
    fn advance(&mut self, byte: u8) -> bool {
        let bytes = self.text.as_bytes();
        while self.matched > 0 && bytes[self.matched] != byte {
            self.matched = self.fallback[self.matched - 1];
        }
        self.matched += usize::from(bytes[self.matched] == byte);
        self.matched == bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::tokenizer::tests::Rng;

    /// The definition, read off the whole text.
    fn naive(text: &str, stops: &[String], include: bool) -> (String, Option<String>) {
        for (end, _) in text.char_indices().map(|(i, c)| (i + c.len_utf8(), c)) {
            let complete = stops.iter().filter(|stop| text[..end].ends_with(*stop));
            if let Some(stop) = complete.max_by_key(|stop| stop.len()) {
                let end = if include { end } else { end - stop.len() };
                return (text[..end].to_owned(), Some(stop.clone()));
            }
        }
        (text.to_owned(), None)
    }

    fn random_text(rng: &mut Rng, length: u32) -> String {
        // Few letters, so that stop strings overlap themselves and each other; some of two bytes.
        (0..length)
            .map(|_| ['a', 'b', 'ä', 'c'][rng.below(4) as usize])
            .collect()
    }

    #[test]
    fn pieces_stop_where_the_whole_text_does() {
        for seed in 0..20_000 {
            let mut rng = Rng::new(seed);
            let length = rng.below(30);
            let text = random_text(&mut rng, length);
            let stops: Vec<String> = (0..rng.below(4))
                .map(|_| {
                    let length = 1 + rng.below(4);
                    random_text(&mut rng, length)
                })
                .collect();
            let include = rng.below(2) == 0;
            let mut matcher = StopMatcher::new(&stops, include);
            let (mut shown, mut stopped) = (String::new(), None);
            let chars: Vec<char> = text.chars().collect();
            let mut at = 0;
            while at < chars.len() && stopped.is_none() {
                let next = (at + rng.below(4) as usize).min(chars.len());
                let piece: String = chars[at..next].iter().collect();
                let released = matcher.push(&piece);
                shown += &released.text;
                stopped = released.stop;
                at = next;
                if stopped.is_none() {
                    let seen: String = chars[..at].iter().collect();
                    assert_eq!(shown.clone() + &matcher.held, seen, "seed {seed}");
                    let longest = stops
                        .iter()
                        .flat_map(|stop| stop.char_indices().map(|(i, _)| &stop[..i]))
                        .filter(|prefix| seen.ends_with(prefix))
                        .map(str::len)
                        .max();
                    assert_eq!(matcher.held.len(), longest.unwrap_or(0), "seed {seed}");
                }
            }
            if stopped.is_none() {
                shown += &matcher.finish();
            }
            assert_eq!(
                (shown, stopped),
                naive(&text, &stops, include),
                "seed {seed}: {text:?} {stops:?}"
            );
        }
    }

    #[test]
    fn text_before_min_tokens_is_not_searched() {
        let mut matcher = StopMatcher::new(&["END".to_owned()], false);
        assert_eq!(matcher.pass("END EN"), "END EN");
        assert_eq!(matcher.push("D.").text, "D.");
        assert_eq!(matcher.push("x E").text, "x ");
        assert_eq!(matcher.push("NDy").stop.as_deref(), Some("END"));
    }
}
