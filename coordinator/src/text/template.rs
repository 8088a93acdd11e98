//! Chat templates: a conversation as the text the model was trained on.
//!
//! Templates are Jinja programs written by whoever made the model. They are compiled once, from
//! the model's files only (never from a request), and run with bounds on instructions, nesting and output.
//! Differences between minijinja and the Jinja2 of the model's authors are evened out by
//! `super::python`; a differential test against `transformers` says how well.

use super::config::SPECIAL_TOKENS;
use super::python::{self, strftime, tojson};
use crate::clock::unix_seconds;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::Map;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Instructions one rendering may take; the longest published templates take some hundred for each
/// message.
const FUEL: u64 = 20_000_000;

/// Nesting of blocks, macros and values.
const RECURSION: usize = 200;

/// Most bytes a conversation may become; a request's body is at most a few MiB.
const OUTPUT_BYTES: usize = 32 << 20;

const NAME: &str = "chat";

/// Names that requests may not give templates, besides those of special tokens and of functions: what templates are
/// always given, and arguments of `transformers`' renderer that are none of a template's.
const TAKEN: [&str; 7] = [
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "documents",
    "messages",
    "tokenize",
    "tools",
];

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
}

/// One message as templates see it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, `tool`, ….
    pub role: String,
    /// The text; absent in an assistant's message that only calls tools.
    pub content: Option<String>,
    /// Anything else a template may ask for (`name`, `tool_calls`, `tool_call_id`).
    #[serde(flatten)]
    pub extra: Map<String, serde_json::Value>,
}

impl Message {
    /// Bytes of its text, for deciding where to render it.
    pub fn size(&self) -> usize {
        self.content.as_deref().map_or(0, str::len)
    }
}

/// What a rendering is to end with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ending {
    /// The opening of the assistant's answer.
    pub add_generation_prompt: bool,
    /// The last message is not closed, so that the model goes on with it.
    pub continue_final_message: bool,
}

/// Why a conversation has no text.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The template itself objects, as to roles that do not alternate; its own words.
    #[error("{0}")]
    Raised(String),
    /// The template does not show the last message's text, so it cannot be continued.
    #[error(
        "the model's chat template does not show the last message's content as it is, so it cannot be \
         continued; leave out continue_final_message"
    )]
    NotContinuable,
    /// The last message calls tools: calls stand after its text and close it.
    #[error(
        "the last message has tool_calls, so it cannot be continued; leave them out, or \
         continue_final_message"
    )]
    CallsTools,
    /// The template failed or ran past its bounds.
    #[error("the model's chat template cannot render this conversation: {0}")]
    Failed(String),
}

impl ChatTemplate {
    /// Compiles `source`; `special_tokens` are the variables `bos_token` and so on.
    ///
    /// # Errors
    /// If the source is not a template; says where.
    pub fn new(source: &str, special_tokens: &[(String, String)]) -> Result<Self, Error> {
        Self::with_clock(source, special_tokens, unix_seconds)
    }

    /// [`ChatTemplate::new`] with the seconds since 1970 that `strftime_now` shows, in UTC.
    ///
    /// # Errors
    /// If the source is not a template; says where.
    pub fn with_clock(
        source: &str,
        special_tokens: &[(String, String)],
        now: fn() -> u64,
    ) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()?,
        );
        environment.set_unknown_method_callback(python::method);
        environment.set_formatter(python::format);
        environment.add_test("iterable", python::is_iterable);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.add_filter("tojson", tojson);
        environment.add_function("raise_exception", |message: String| {
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message).with_source(Raised))
        });
        environment.add_function("strftime_now", move |format: &str| strftime(now(), format));
        environment.add_template_owned(NAME, python::source(source))?;
        Ok(Self {
            environment,
            special_tokens: special_tokens.to_vec(),
        })
    }

    /// Whether `name` means something to templates already, so that no request may give it another meaning.
    pub fn is_taken(&self, name: &str) -> bool {
        let mut special = self.special_tokens.iter().map(|(name, _)| name.as_str());
        let mut functions = self.environment.globals();
        TAKEN.contains(&name)
            || SPECIAL_TOKENS.contains(&name)
            || special.any(|known| known == name)
            || functions.any(|(known, _)| known == name)
    }

    /// The text of a conversation, with further variables of the template's own.
    ///
    /// # Errors
    /// [`TemplateError`], a sentence for whoever sent the conversation.
    pub fn render(
        &self,
        messages: &[Message],
        variables: &Map<String, serde_json::Value>,
        ending: Ending,
    ) -> Result<String, TemplateError> {
        let (Some((last, others)), true) = (messages.split_last(), ending.continue_final_message)
        else {
            return self.render_with(messages, variables, ending.add_generation_prompt);
        };
        let calls = last.extra.get("tool_calls").and_then(|it| it.as_array());
        if calls.is_some_and(|calls| !calls.is_empty()) {
            return Err(TemplateError::CallsTools);
        }
        // What is to be continued may stand anywhere else in the text too, and the template may trim it: a word that
        // stands nowhere else marks its end.
        let mark = mark(messages, variables);
        let mut marked = last.clone();
        marked.content.get_or_insert_default().push_str(&mark);
        let messages: Vec<&Message> = others.iter().chain([&marked]).collect();
        let mut text = self.render_with(&messages, variables, ending.add_generation_prompt)?;
        let end = text.find(&mark).ok_or(TemplateError::NotContinuable)?;
        text.truncate(end);
        Ok(text)
    }

    /// Renders any list of messages, with further variables (`tools` among them).
    ///
    /// # Errors
    /// [`TemplateError`], a sentence for whoever sent the conversation.
    pub fn render_with<M: Serialize + ?Sized>(
        &self,
        messages: &M,
        variables: &Map<String, serde_json::Value>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| explain(&error))?;
        let special = self
            .special_tokens
            .iter()
            .map(|(name, token)| (name.as_str(), Value::from(token.as_str())));
        let given = variables
            .iter()
            .map(|(name, value)| (name.as_str(), Value::from(Serde(value))));
        let always = [
            // Templates ask `tools is not none`, which an undefined variable would pass.
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("messages", Value::from(Serde(messages))),
            ("add_generation_prompt", Value::from(add_generation_prompt)),
        ];
        let context: BTreeMap<&str, Value> =
            always.into_iter().chain(special).chain(given).collect();
        let mut output = Bounded(Vec::new());
        // minijinja 3.0.5 panics where an empty list is sliced backwards (`[][::-1]`), and a
        // message may be empty: that must not end the connection.
        let rendered = catch_unwind(AssertUnwindSafe(|| {
            template
                .render_captured_to(Value::from(context), &mut output)
                .map(drop)
        }));
        match rendered {
            Ok(Ok(())) => Ok(String::from_utf8_lossy(&output.0).into_owned()),
            Ok(Err(error)) => Err(explain(&error)),
            Err(_) => Err(TemplateError::Failed(
                "it reached a fault in Jinja".to_owned(),
            )),
        }
    }
}

/// A word that is in nothing of what a request said, as nobody can write a text that contains its own hash. It has letters of both cases, so
/// that a template that changes case changes it.
fn mark(messages: &[Message], variables: &Map<String, serde_json::Value>) -> String {
    let written = serde_json::to_vec(&(messages, variables)).expect("they came as JSON");
    let digest: [u8; 32] = Sha256::digest(written).into();
    let (half, _) = digest.split_at(16);
    let half = half
        .iter()
        .fold(0, |all, byte| all << 8 | u128::from(*byte));
    format!("Z{half:032x}")
}

/// Marks an error as the template's own word.
#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct Raised;

fn explain(error: &Error) -> TemplateError {
    let raised =
        std::error::Error::source(error).is_some_and(<dyn std::error::Error>::is::<Raised>);
    match error.detail() {
        Some(detail) if raised => TemplateError::Raised(detail.to_owned()),
        // The kind and the template's line are enough; details may quote other users' data.
        _ => TemplateError::Failed(format!(
            "{} in line {}",
            error.kind(),
            error.line().unwrap_or(0)
        )),
    }
}

/// Output that refuses to grow beyond [`OUTPUT_BYTES`].
struct Bounded(Vec<u8>);

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_BYTES {
            return Err(io::Error::other("the text is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value as Json;

    fn user(content: &str) -> Message {
        Message {
            role: "user".into(),
            content: Some(content.into()),
            ..Message::default()
        }
    }

    fn assistant(content: &str) -> Message {
        Message {
            role: "assistant".into(),
            ..user(content)
        }
    }

    fn render(source: &str) -> Result<String, TemplateError> {
        let special = [("bos_token".to_owned(), "<s>".to_owned())];
        ChatTemplate::new(source, &special).unwrap().render(
            &[user("hi <b> & 'you'")],
            &Map::new(),
            Ending::default(),
        )
    }

    #[test]
    fn json_is_python_s() {
        let text = render("{{ messages | tojson }}").unwrap();
        assert_eq!(text, r#"[{"role": "user", "content": "hi <b> & 'you'"}]"#);
        let text = render("{{ {'b': [1, true], 'a': none} | tojson(indent=2, sort_keys=true) }}");
        assert_eq!(
            text.unwrap(),
            "{\n  \"a\": null,\n  \"b\": [\n    1,\n    true\n  ]\n}"
        );
        let text = render("{{ {'a': [1, 2]} | tojson(separators=(',', ':')) }}").unwrap();
        assert_eq!(text, r#"{"a":[1,2]}"#);
    }

    #[test]
    fn templates_can_object_in_their_own_words() {
        let error = render("{{ raise_exception('Roles must alternate') }}").unwrap_err();
        assert_eq!(error.to_string(), "Roles must alternate");
        let error = render("\n{{ messages.x.y }}").unwrap_err();
        assert!(
            matches!(&error, TemplateError::Failed(it) if it.contains("line 2")),
            "{error}"
        );
    }

    #[test]
    fn generation_marks_vanish_with_their_white_space_control() {
        let text = render("a {%- generation -%} b {% endgeneration %} c{{ bos_token }}").unwrap();
        assert_eq!(text, "ab  c<s>");
    }

    #[test]
    fn runaway_templates_end() {
        for source in [
            "{% for i in range(10000) %}{% for j in range(10000) %}{% endfor %}{% endfor %}",
            "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
            "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}{% for i in range(40) %}\
             {% set ns.s = ns.s ~ ns.s %}{{ ns.s }}{% endfor %}",
        ] {
            assert!(
                matches!(render(source), Err(TemplateError::Failed(_))),
                "{source}"
            );
        }
    }

    #[test]
    fn a_final_message_can_be_continued() {
        let source = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}[end]{% endfor %}\
                      {% if add_generation_prompt %}[assistant]{% endif %}";
        let template = ChatTemplate::new(source, &[]).unwrap();
        let mut messages = vec![user("hi")];
        let ending = Ending {
            add_generation_prompt: true,
            continue_final_message: false,
        };
        assert_eq!(
            template.render(&messages, &Map::new(), ending).unwrap(),
            "[user]hi[end][assistant]"
        );
        messages.push(assistant(" The answer"));
        let ending = Ending {
            add_generation_prompt: false,
            continue_final_message: true,
        };
        assert_eq!(
            template.render(&messages, &Map::new(), ending).unwrap(),
            "[user]hi[end][assistant]The answer"
        );
    }

    #[test]
    fn a_final_message_is_continued_where_it_ends() {
        let ending = Ending {
            add_generation_prompt: false,
            continue_final_message: true,
        };
        let chat_ml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}";
        let trims = chat_ml.replace("m.content", "m.content | trim");
        let before = "<|im_start|>user\nAnswer: 1<|im_end|>\n<|im_start|>assistant\n";
        for begun in ["Answer: ", "```json\n", "<", "im_end", "\n", ""] {
            let template = ChatTemplate::new(chat_ml, &[]).unwrap();
            let messages = [user("Answer: 1"), assistant(begun)];
            let text = template.render(&messages, &Map::new(), ending).unwrap();
            assert_eq!(text, format!("{before}{begun}"));
            // What white space there is at its end is what the client wants to go on from.
            let template = ChatTemplate::new(&trims, &[]).unwrap();
            let text = template.render(&messages, &Map::new(), ending).unwrap();
            assert_eq!(text, format!("{before}{}", begun.trim_start()));
        }
        let calls = Message {
            content: None,
            ..assistant("")
        };
        let template = ChatTemplate::new(chat_ml, &[]).unwrap();
        let text = template
            .render(&[user("Answer: 1"), calls], &Map::new(), ending)
            .unwrap();
        assert_eq!(text, before);
        let mut calls = assistant("Answer: ");
        for (value, is_refused) in [
            (serde_json::json!([{"type": "function"}]), true),
            (serde_json::json!([]), false),
            (Json::Null, false),
        ] {
            calls.extra.insert("tool_calls".into(), value);
            let text = template.render(&[user("a"), calls.clone()], &Map::new(), ending);
            let is_error = matches!(text, Err(TemplateError::CallsTools));
            assert_eq!(is_error, is_refused, "{text:?}");
        }
        for source in [
            "{{ messages[0].content }}",
            "{{ messages[1].content | upper }}",
            "{{ messages[1].content | lower }}",
        ] {
            let template = ChatTemplate::new(source, &[]).unwrap();
            let refused = template.render(&[user("a"), assistant("a")], &Map::new(), ending);
            let refused = refused.unwrap_err();
            assert!(matches!(refused, TemplateError::NotContinuable), "{source}");
            assert!(refused.to_string().contains("continue_final_message"));
        }
    }

    /// Renders what `scripts/template_fixtures.py` rendered with `transformers`.
    #[test]
    fn templates_render_as_in_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/templates.json");
        let cases: Vec<Json> =
            serde_json::from_slice(&std::fs::read(path).expect("read the fixture")).unwrap();
        let mut wrong = Vec::new();
        for case in &cases {
            let name = case["name"].as_str().unwrap();
            let special: Vec<(String, String)> = ["bos_token", "eos_token"]
                .into_iter()
                .filter_map(|key| Some((key.to_owned(), case[key].as_str()?.to_owned())))
                .collect();
            assert_eq!(
                case["now"], "2026-03-09T14:05:07",
                "the clock below is that of the fixture"
            );
            let source = case["template"].as_str().unwrap();
            let rendered = ChatTemplate::with_clock(source, &special, || 1_773_065_107)
                .map_err(|error| explain(&error))
                .and_then(|template| {
                    let variables = case["kwargs"].as_object().unwrap();
                    let prompt = case["add_generation_prompt"].as_bool().unwrap();
                    template.render_with(&case["messages"], variables, prompt)
                });
            let right = match (&rendered, case["error_kind"].as_str()) {
                (Ok(text), None) => case["rendered"] == text.as_str(),
                (Err(TemplateError::Raised(words)), Some("raised")) => {
                    case["error"] == words.as_str()
                }
                (Err(TemplateError::Failed(_)), Some("template")) => true,
                _ => false,
            };
            if !right {
                wrong.push(format!(
                    "{name}: {rendered:?}\n  expected {} {}",
                    case["rendered"], case["error"]
                ));
            }
        }
        assert!(cases.len() > 50, "the fixture has shrunk");
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}
