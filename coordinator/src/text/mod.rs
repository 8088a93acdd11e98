//! Text on the users' side: tokenizer, chat template, text of a token stream, stop strings.
//!
//! Everything here is a function of the model's files and of its arguments: no HTTP, no engine, no
//! clock but the one template function that asks for the date. Nothing a request contains is ever
//! compiled or executed; templates come from the model directory alone.

pub mod config;
pub mod detokenize;
pub mod pieces;
mod python;
pub mod stop;
pub mod template;
pub mod tokenizer;

use anyhow::Context;
use config::{GenerationDefaults, TokenizerConfig};
use std::borrow::Cow;
use std::sync::Arc;
use template::ChatTemplate;
use tokenizer::TextTokenizer;

/// Reads one file of a model by its name; `None` if the model has no such file.
pub type ReadFile<'a> = dyn Fn(&str) -> anyhow::Result<Option<Cow<'a, [u8]>>> + 'a;

/// All that is known about a model's text.
#[derive(Debug)]
pub struct TextModel {
    /// Text to tokens and back.
    pub tokenizer: Arc<TextTokenizer>,
    /// `None`: the model has no chat template, and chat requests are refused.
    pub template: Option<ChatTemplate>,
    /// What `generation_config.json` proposes where a request says nothing.
    pub defaults: GenerationDefaults,
    /// Tokens that end a text, ascending, each once; those of all configuration files together, as far as the model can
    /// say them.
    pub eos_token_ids: Vec<u32>,
}

impl TextModel {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and
    /// `generation_config.json`; only the first must exist. `config_eos` are the end-of-text tokens
    /// of `config.json`, and its tokens are below `vocab_size`.
    ///
    /// # Errors
    /// A sentence naming the file, if one is missing, is not valid, or needs something we lack.
    pub fn load(read: &ReadFile<'_>, config_eos: &[u32], vocab_size: u32) -> anyhow::Result<Self> {
        let tokenizer_json = read("tokenizer.json")?.context(
            "the model has no tokenizer.json; convert its tokenizer with `transformers` \
             (`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`)",
        )?;
        let config = match read("tokenizer_config.json")? {
            Some(bytes) => TokenizerConfig::parse(&bytes).context("read tokenizer_config.json")?,
            None => TokenizerConfig::default(),
        };
        let defaults = match read("generation_config.json")? {
            Some(bytes) => {
                GenerationDefaults::parse(&bytes).context("read generation_config.json")?
            }
            None => GenerationDefaults::default(),
        };
        let tokenizer =
            TextTokenizer::new(&tokenizer_json, &config).context("read tokenizer.json")?;
        let source = match read("chat_template.jinja")? {
            Some(bytes) => {
                Some(String::from_utf8(bytes.into_owned()).context("read chat_template.jinja")?)
            }
            None => config.chat_template.clone(),
        };
        let template = source
            .map(|source| ChatTemplate::new(&source, &config.special_tokens))
            .transpose()
            .context("compile the model's chat template")?;

        let mut eos_token_ids = config_eos.to_vec();
        eos_token_ids.extend(&defaults.eos_token_ids);
        eos_token_ids.extend(
            config
                .special("eos_token")
                .and_then(|token| tokenizer.token_to_id(token)),
        );
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        // Shards refuse a step that names a token which is not there, as one that it bans.
        let known = eos_token_ids.partition_point(|id| *id < vocab_size);
        for id in eos_token_ids.split_off(known) {
            tracing::warn!(
                "token {id} is said to end a text, but the vocabulary has only {vocab_size} tokens; it is ignored"
            );
        }
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            template,
            defaults,
            eos_token_ids,
        })
    }
}
