//! One model's files: found, checked against each other, and read for what text needs.
//!
//! Reads the small files and the headers of weights, and all of them where there is a manifest and shards are to be
//! started; loads no weights. Invariant: a [`Model`] that comes out has a configuration, weights and a tokenizer that fit each
//! other; every error is one sentence that says what to change.

use crate::builtin;
use crate::cli::args::Up;
use crate::cli::progress::{Meter, Notes};
use crate::cli::values;
use crate::text::TextModel;
use crate::text::config::GenerationDefaults;
use anyhow::{Context, Result, ensure};
use std::borrow::Cow;
use std::fs;
use std::path::{Path, PathBuf};
use topology::checkpoint::Checkpoint;
use topology::manifest::{self, MANIFEST_FILE, ManifestError, Verified};
use topology::model_files::ModelFiles;
use topology::model_shape::ModelShape;
use topology::wire::ModelLocation;

/// A model's files and names.
#[derive(Clone, Debug)]
pub struct Model {
    /// Where they are read.
    pub files: ModelFiles,
    /// The same for shards.
    pub location: ModelLocation,
    /// What the API calls it; the first name is shown.
    pub names: Vec<String>,
    /// Its `config.json`.
    pub shape: ModelShape,
    /// SHA-256 of its manifest, if it has one; all files it lists are as it says, weights if they were not loaded before.
    pub manifest: Option<String>,
}

impl Model {
    /// What the API shows.
    pub fn name(&self) -> &str {
        self.names.first().map_or("", String::as_str)
    }

    /// Finds the model and checks that its configuration, weights and tokenizer are there and fit
    /// each other. Weights that `are_loaded` are not read.
    pub(super) fn open(up: &Up, are_loaded: bool) -> Result<Self> {
        let given = up.model.first();
        let (name, files, location) = match given {
            None => (
                builtin::NAME.to_owned(),
                ModelFiles::BuiltIn(builtin::FILES),
                ModelLocation::BuiltIn,
            ),
            Some(given) => {
                let (name, dir) = values::model(given);
                let files = ModelFiles::directory(dir)?;
                let path = fs::canonicalize(dir).with_context(|| format!("cannot open {dir}"))?;
                let text = path
                    .to_str()
                    .context("the model directory's name is not UTF-8")?;
                let last = path.file_name().and_then(|name| name.to_str());
                let name = name.or(last).unwrap_or(text).to_owned();
                (name, files, ModelLocation::Directory(text.to_owned()))
            }
        };
        let mut names = up.served_model_name.clone();
        if names.is_empty() {
            names.push(name);
            // As in `vllm serve`, the model also answers to what was typed.
            names.extend(given.map(|given| values::model(given).1.to_owned()));
        }
        names.dedup();
        let verified = if are_loaded {
            manifest::verify_without_weights(&files)?
        } else {
            verify(&files, Notes(up.log_format))?
        };
        let manifest = verified.map(|verified| verified.manifest);
        let config = files.read_json("config.json")?;
        let shape = ModelShape::from_config(&config)
            .with_context(|| format!("{files} cannot be served"))?;
        let weights = Checkpoint::open(&files).and_then(|weights| weights.check(&shape));
        weights.with_context(|| format!("{files} cannot be served"))?;
        for note in shape.quantization.iter().flat_map(|stored| &stored.notes) {
            tracing::warn!("{note}");
        }
        ensure!(
            files.exists("tokenizer.json"),
            "{files} has no tokenizer.json; convert its tokenizer with `transformers` \
             (`AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)`)"
        );
        for path in [&up.chat_template, &generation_config_dir(up)]
            .into_iter()
            .flatten()
        {
            ensure!(
                path.exists(),
                "{} does not exist; give a path that does",
                path.display()
            );
        }
        Ok(Self {
            files,
            location,
            names,
            shape,
            manifest,
        })
    }

    /// Compares all its files with its manifest, if it has one.
    ///
    /// # Errors
    /// A sentence naming the file.
    pub(in crate::cli) fn verify(&self, notes: Notes) -> Result<()> {
        verify(&self.files, notes)?;
        Ok(())
    }

    /// Reads tokenizer, template and defaults. Takes a second for the largest vocabularies.
    ///
    /// # Errors
    /// A sentence naming the file.
    pub(super) fn load_text(&self, up: &Up) -> Result<TextModel> {
        let (read, shape) = (|name: &str| self.text_file(up, name), &self.shape);
        let mut text = TextModel::load(&read, &shape.eos_token_ids, shape.vocab_size)?;
        if up.generation_config == "vllm" {
            // The model's proposals are not wanted; its ends of text still are.
            text.defaults = GenerationDefaults::default();
        }
        if generation_config_dir(up).is_some() {
            // As in `vllm serve`: in a file of the operator's own it is a bound.
            text.defaults.bound = text.defaults.max_new_tokens;
        }
        Ok(text)
    }

    fn text_file(&self, up: &Up, name: &str) -> Result<Option<Cow<'static, [u8]>>> {
        let elsewhere = match name {
            "chat_template.jinja" => up.chat_template.clone(),
            "generation_config.json" if !["auto", "vllm"].contains(&&*up.generation_config) => {
                Some(Path::new(&up.generation_config).join(name))
            }
            _ => None,
        };
        if let Some(path) = elsewhere {
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            return Ok(Some(bytes.into()));
        }
        let files = &self.files;
        Ok(if files.exists(name) {
            Some(files.read(name)?)
        } else {
            None
        })
    }
}

fn verify(files: &ModelFiles, notes: Notes) -> Result<Option<Verified>, ManifestError> {
    let meter = Meter::new(notes, format!("{files}: checking {MANIFEST_FILE}"));
    let verified = manifest::verify(files, &|done, total| meter.tell(done, total))?;
    if let Some(verified) = &verified {
        let (files, bytes) = (verified.digests.len(), verified.bytes);
        tracing::info!(files, bytes, "the model is what its {MANIFEST_FILE} lists");
    }
    Ok(verified)
}

fn generation_config_dir(up: &Up) -> Option<PathBuf> {
    let named = !["auto", "vllm"].contains(&&*up.generation_config);
    named.then(|| Path::new(&up.generation_config).join("generation_config.json"))
}
