//! Text to tokens, over the `tokenizers` crate, with the rules of the model's configuration.
//!
//! Does not decode streams (see [`super::detokenize`]) and knows no template. Long texts are encoded
//! off the async threads, a few at a time: a prompt of 256k tokens takes hundreds of milliseconds.

use super::config::TokenizerConfig;
use super::pieces::Pieces;
use anyhow::{anyhow, ensure};
use serde_json::Value;
use std::sync::Arc;
use tokenizers::{AddedToken, Tokenizer};
use tokio::sync::Semaphore;

/// Texts up to this many bytes are encoded where they are: less than a millisecond.
const INLINE_BYTES: usize = 8 << 10;

/// A model's tokenizer.
#[derive(Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    pieces: Arc<Pieces>,
    bos: Option<u32>,
    bos_rule: BosRule,
    /// Long texts that may be encoded at one time.
    encoders: Semaphore,
}

/// What to do about the beginning-of-text token when special tokens are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BosRule {
    /// `tokenizer.json` does it right.
    Keep,
    /// `tokenizer.json` does not add it, the configuration wants it.
    Add,
    /// `tokenizer.json` adds it, the configuration does not want it.
    Remove,
}

impl TextTokenizer {
    /// From the bytes of `tokenizer.json` and what the configuration says.
    ///
    /// # Errors
    /// If the file is not valid or its decoder cannot be followed.
    pub fn new(tokenizer_json: &[u8], config: &TokenizerConfig) -> anyhow::Result<Self> {
        let mut inner =
            Tokenizer::from_bytes(tokenizer_json).map_err(|error| anyhow!("{error}"))?;
        // Some files carry the settings of their training; a prompt is never cut or padded.
        inner
            .with_truncation(None)
            .map_err(|error| anyhow!("{error}"))?;
        inner.with_padding(None);
        for (id, content, special) in &config.added_tokens {
            if inner.token_to_id(content).is_some() {
                continue;
            }
            inner
                .add_tokens([AddedToken::from(content.clone(), *special)])
                .map_err(|error| anyhow!("{error}"))?;
            let given = inner.token_to_id(content);
            ensure!(
                given == Some(*id),
                "the token {content} has id {id} in tokenizer_config.json but would get {given:?}"
            );
        }
        let file: Value = serde_json::from_slice(tokenizer_json)?;
        let added = inner.get_added_vocabulary();
        let special = |id| {
            inner
                .id_to_token(id)
                .is_some_and(|token| added.is_special_token(&token))
        };
        let pieces = Pieces::new(&inner, file.get("decoder").unwrap_or(&Value::Null), special)?;
        let bos = config
            .special("bos_token")
            .and_then(|token| inner.token_to_id(token));
        let empty = inner
            .encode_fast("", true)
            .map_err(|error| anyhow!("{error}"))?;
        let adds = bos.is_some() && empty.get_ids().first().copied() == bos;
        let bos_rule = match config.add_bos_token {
            Some(true) if !adds => BosRule::Add,
            Some(false) if adds => BosRule::Remove,
            _ => BosRule::Keep,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Self {
            inner,
            pieces: Arc::new(pieces),
            bos,
            bos_rule,
            encoders: Semaphore::new((cores / 2).max(1)),
        })
    }

    /// The tokens of `text`; with `add_special_tokens` those that begin (and end) a text as well.
    ///
    /// # Errors
    /// If the text contains something the vocabulary cannot express.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> anyhow::Result<Vec<u32>> {
        let encoding = self
            .inner
            .encode_fast(text, add_special_tokens)
            .map_err(|error| anyhow!("{error}"))?;
        let mut ids = encoding.get_ids().to_vec();
        if let (true, Some(bos)) = (add_special_tokens, self.bos) {
            match self.bos_rule {
                BosRule::Add if ids.first() != Some(&bos) => ids.insert(0, bos),
                BosRule::Remove if ids.first() == Some(&bos) => {
                    ids.remove(0);
                }
                _ => {}
            }
        }
        Ok(ids)
    }

    /// [`TextTokenizer::encode`] that leaves the async threads free.
    ///
    /// # Errors
    /// As [`TextTokenizer::encode`].
    pub async fn encode_async(
        self: &Arc<Self>,
        text: String,
        add_special_tokens: bool,
    ) -> anyhow::Result<Vec<u32>> {
        if text.len() <= INLINE_BYTES {
            return self.encode(&text, add_special_tokens);
        }
        let this = Arc::clone(self);
        let _permit = self.encoders.acquire().await?;
        tokio::task::spawn_blocking(move || this.encode(&text, add_special_tokens)).await?
    }

    /// The text of `tokens`, decoded as a whole.
    ///
    /// # Errors
    /// If the decoder fails, which those we load do not.
    pub fn decode(&self, tokens: &[u32], skip_special_tokens: bool) -> anyhow::Result<String> {
        self.inner
            .decode(tokens, skip_special_tokens)
            .map_err(|error| anyhow!("{error}"))
    }

    /// What each token stands for.
    pub fn pieces(&self) -> Arc<Pieces> {
        Arc::clone(&self.pieces)
    }

    /// The id of a token given as it is written in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// A token as it is written in the vocabulary (`Ġhello`).
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The least number of tokens a text of so many bytes can have. Normalisation (composing
    /// accents) may shorten a text, hence the allowance of a factor of two.
    pub fn least_tokens(&self, bytes: usize) -> usize {
        bytes / (2 * self.pieces.longest())
    }

    /// The crate's own object, as the reference in tests.
    #[cfg(test)]
    pub(crate) fn inner(&self) -> &Tokenizer {
        &self.inner
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::{Map, json};

    /// A small generator for tests (`SplitMix64`), so that a seed names a case.
    pub(crate) struct Rng(u64);

    impl Rng {
        pub(crate) fn new(seed: u64) -> Self {
            Self(seed)
        }

        pub(crate) fn below(&mut self, bound: u32) -> u32 {
            self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            let z = z ^ (z >> 31);
            u32::try_from((u128::from(z) * u128::from(bound)) >> 64).unwrap()
        }
    }

    /// The kinds of decoder that published models have.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(crate) enum Family {
        /// Llama 3, Qwen.
        ByteLevel,
        /// Llama 2, Mistral.
        ByteFallback,
        /// Older conversions of sentencepiece.
        Metaspace,
        /// No decoder.
        Plain,
    }

    impl Family {
        pub(crate) const ALL: [Self; 4] = [
            Self::ByteLevel,
            Self::ByteFallback,
            Self::Metaspace,
            Self::Plain,
        ];
    }

    /// A tokenizer of the family with a few words, all bytes, and special tokens `<s>`, `</s>`.
    pub(crate) fn tokenizer(family: Family) -> TextTokenizer {
        let config = TokenizerConfig {
            special_tokens: vec![("bos_token".to_owned(), "<s>".to_owned())],
            ..TokenizerConfig::default()
        };
        TextTokenizer::new(tokenizer_json(family).to_string().as_bytes(), &config).unwrap()
    }

    fn tokenizer_json(family: Family) -> Value {
        let mut tokens: Vec<String> = vec!["<unk>".into(), "<s>".into(), "</s>".into()];
        if family == Family::ByteLevel {
            let mut alphabet: Vec<char> =
                tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet()
                    .into_iter()
                    .collect();
            alphabet.sort_unstable();
            tokens.extend(alphabet.into_iter().map(String::from));
            tokens.extend(["Ġw", "He", "llo", "Ġhe", "æ", "ĠðŁ"].map(String::from));
        } else {
            tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
            tokens.extend(
                [
                    "▁", "▁▁", "▁Hello", "▁world", "ä", "a", "e", "▁a", "☃", "x▁y",
                ]
                .map(String::from),
            );
            tokens.extend(('A'..='Z').map(String::from));
        }
        let mut vocab = Map::new();
        for token in tokens {
            let id = vocab.len();
            vocab.entry(token).or_insert(json!(id));
        }
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
                                "trim_offsets": true, "use_regex": true});
        let metaspace = json!({"type": "Metaspace", "replacement": "▁",
                               "prepend_scheme": "always", "split": false});
        let decoder = match family {
            Family::ByteLevel => byte_level.clone(),
            Family::ByteFallback => json!({"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
            Family::Metaspace => metaspace.clone(),
            Family::Plain => Value::Null,
        };
        let fallback = family == Family::ByteFallback;
        let pre_tokenizer = if family == Family::ByteLevel {
            byte_level
        } else {
            metaspace
        };
        let added = [(1, "<s>"), (2, "</s>")].map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        });
        json!({"version": "1.0", "truncation": null, "padding": null,
            "added_tokens": added,
            "normalizer": null, "pre_tokenizer": pre_tokenizer, "post_processor": null,
            "decoder": decoder,
            "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "fuse_unk": false,
                "continuing_subword_prefix": null, "end_of_word_suffix": null,
                "byte_fallback": fallback, "ignore_merges": true, "vocab": vocab, "merges": []}})
    }

    #[test]
    fn the_bos_token_follows_the_configuration() {
        let mut json = tokenizer_json(Family::ByteLevel);
        let encode = |json: &Value, add_bos_token| {
            let config = TokenizerConfig {
                special_tokens: vec![("bos_token".to_owned(), "<s>".to_owned())],
                add_bos_token,
                ..TokenizerConfig::default()
            };
            let tokenizer = TextTokenizer::new(json.to_string().as_bytes(), &config).unwrap();
            assert_eq!(tokenizer.encode("A", false).unwrap().len(), 1);
            tokenizer.encode("A", true).unwrap().len()
        };
        assert_eq!(encode(&json, None), 1);
        assert_eq!(encode(&json, Some(true)), 2);
        json["post_processor"] = json!({"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}});
        assert_eq!(encode(&json, None), 2);
        assert_eq!(encode(&json, Some(true)), 2);
        assert_eq!(encode(&json, Some(false)), 1);
    }

    #[test]
    fn tokens_of_the_configuration_are_added() {
        let json = tokenizer_json(Family::ByteLevel);
        let next = u32::try_from(json["model"]["vocab"].as_object().unwrap().len()).unwrap();
        let config = TokenizerConfig {
            added_tokens: vec![(1, "<s>".into(), true), (next, "<tool>".into(), true)],
            ..TokenizerConfig::default()
        };
        let tokenizer = TextTokenizer::new(json.to_string().as_bytes(), &config).unwrap();
        assert_eq!(tokenizer.encode("<tool>", false).unwrap(), [next]);
        assert!(tokenizer.pieces().is_special(next));
        let wrong = TokenizerConfig {
            added_tokens: vec![(next + 5, "<tool>".into(), true)],
            ..TokenizerConfig::default()
        };
        let error = TextTokenizer::new(json.to_string().as_bytes(), &wrong).unwrap_err();
        assert!(error.to_string().contains("<tool>"), "{error}");
    }

    #[tokio::test]
    async fn long_texts_encode_to_the_same_tokens() {
        let tokenizer = Arc::new(tokenizer(Family::ByteLevel));
        let text = "Hello world ".repeat(2000);
        assert!(text.len() > INLINE_BYTES);
        let tokens = tokenizer.encode_async(text.clone(), false).await.unwrap();
        assert_eq!(tokens, tokenizer.encode(&text, false).unwrap());
        assert!(tokens.len() >= tokenizer.least_tokens(text.len()));
    }

    #[test]
    fn a_token_alone_is_its_text_or_its_bytes() {
        let tokenizer = tokenizer(Family::ByteFallback);
        let pieces = tokenizer.pieces();
        let world = tokenizer.token_to_id("▁world").unwrap();
        assert_eq!(pieces.token_text(world), " world");
        let byte = tokenizer.token_to_id("<0xE4>").unwrap();
        assert_eq!(pieces.token_text(byte), "bytes:\\xe4");
        assert_eq!(pieces.token_bytes(byte), [0xE4]);
        assert_eq!(pieces.token_text(99_999), "");
    }
}
