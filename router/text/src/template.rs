//! Chat templates: messages to a prompt, as the model was trained to read it.
//!
//! Templates are Jinja as Hugging Face renders it: a block takes its line with it, the string
//! methods of Python work, and `raise_exception`, `strftime_now` and a plain `tojson` exist.

use std::io::{self, Write};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value, context, escape_formatter};
use minijinja_contrib::pycompat::unknown_method_callback;
use shoal_core::TokenId;
use shoal_proto::worker::TokenizerBundle;
use time::OffsetDateTime;
use time::format_description::parse_strftime_borrowed;

use crate::error::TemplateError;
use crate::json;

/// Steps of a rendering, and units of text that it makes: 16 MiB at most.
const FUEL: u64 = 1 << 18;
/// Bytes in a unit of text.
const BYTES_PER_FUEL: u64 = 64;

/// The one template of an environment.
const NAME: &str = "chat_template";

/// For models without a template whose vocabulary has the tokens of ChatML.
const CHATML: &str = "{% for message in messages %}\
    {{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// One message of a chat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: system, user, assistant, or whatever else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
    /// The speaker's name, where several share a role.
    pub name: Option<String>,
}

impl Message {
    /// As templates see it; without a name there is no such key.
    fn value(&self) -> Value {
        let fields = [
            ("role", Some(&self.role)),
            ("content", Some(&self.content)),
            ("name", self.name.as_ref()),
        ];
        Value::from_pairs(
            fields
                .into_iter()
                .filter_map(|(key, text)| Some((key, text?.as_str()))),
        )
    }
}

/// The chat template of a model.
///
/// A rendering has a budget of steps and of text, so that neither long chats nor most hostile
/// templates can hold up a router. The budget does not count the items of lists that are
/// joined with `+`: a template that doubles a list dozens of times exhausts the memory, so
/// templates must come from models that are trusted that far.
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles the template of `bundle`, or ChatML's if it has none and the vocabulary
    /// contains `<|im_start|>`.
    ///
    /// # Errors
    /// If there is none, or it is malformed.
    pub fn new(bundle: &TokenizerBundle) -> Result<Self, TemplateError> {
        let source = match bundle.chat_template.as_str() {
            "" if bundle.tokens.iter().any(|token| token == "<|im_start|>") => CHATML,
            "" => return Err(TemplateError::Missing),
            source => source,
        };
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(TemplateError::Syntax)?;
        let mut environment = Environment::new();
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.set_formatter(print);
        environment.add_filter("tojson", to_json);
        environment.add_test("iterable", is_iterable);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        for (name, token) in [("bos_token", bundle.bos), ("eos_token", bundle.eos)] {
            let text = token.and_then(|token: TokenId| bundle.tokens.get(token as usize));
            environment.add_global(name, text.map_or("", String::as_str));
        }
        // Hugging Face defines these even where the request has none.
        environment.add_global("tools", ());
        environment.add_global("documents", ());
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(TemplateError::Syntax)?;
        Ok(Self { environment })
    }

    /// The prompt for `messages`; with `add_generation_prompt` it ends where the assistant's
    /// next message begins. Tokenize it with its special tokens parsed and none added.
    ///
    /// # Errors
    /// If the template refuses the messages, fails, or goes beyond its budget.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        let messages: Value = messages.iter().map(Message::value).collect();
        self.environment
            .get_template(NAME)
            .and_then(|template| template.render(context! { messages, add_generation_prompt }))
            .map_err(classify)
    }
}

/// Replaces the tags that mark what an assistant says, which only training looks at.
fn without_generation_marks(source: &str) -> String {
    let mut plain = String::with_capacity(source.len());
    let mut rest = source;
    while let Some((before, after)) = rest.split_once("{%") {
        let Some((tag, behind)) = after.split_once("%}") else {
            break;
        };
        let name = tag.trim_matches(|char: char| char.is_whitespace() || matches!(char, '-' | '+'));
        let substitute = match name {
            "generation" => "if true",
            "endgeneration" => "endif",
            name => name,
        };
        plain.extend([before, "{%", &tag.replace(name, substitute), "%}"]);
        rest = behind;
    }
    plain.push_str(rest);
    plain
}

/// As in Jinja, where nothing can be done with `none`.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// What `raise_exception` was called with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn classify(error: Error) -> TemplateError {
    if error.kind() == ErrorKind::OutOfFuel {
        return TemplateError::Budget;
    }
    let mut cause = std::error::Error::source(&error);
    while let Some(source) = cause {
        if let Some(Raised(message)) = source.downcast_ref() {
            return TemplateError::Raised {
                message: message.clone(),
            };
        }
        if source
            .downcast_ref::<Error>()
            .is_some_and(|error| error.kind() == ErrorKind::OutOfFuel)
        {
            return TemplateError::Budget;
        }
        cause = source.source();
    }
    TemplateError::Render(error)
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(
        Error::new(ErrorKind::InvalidOperation, "raised by the template")
            .with_source(Raised(message)),
    )
}

/// The current date and time (UTC) in a format of strftime(3).
fn strftime_now(format: &str) -> Result<String, Error> {
    let invalid = |what| Error::new(ErrorKind::InvalidOperation, what);
    let items = parse_strftime_borrowed(format)
        .map_err(|error| invalid("unknown date format").with_source(error))?;
    OffsetDateTime::now_utc()
        .format(&items)
        .map_err(|error| invalid("the date cannot be formatted").with_source(error))
}

/// JSON as Python writes it, without the escapes that HTML needs.
fn to_json(state: &State, value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let ensure_ascii: Option<bool> = options.get("ensure_ascii")?;
    if ensure_ascii == Some(true) {
        return Err(Error::new(
            ErrorKind::InvalidOperation,
            "tojson writes characters as they are",
        ));
    }
    options.assert_all_used()?;
    metered(state, value, |out| json::write_python(value, indent, out)).map(Value::from)
}

/// Prints lists and maps against the budget, the rest as ever.
fn print(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Plain => {
            let text = metered(state, value, |out| write!(out, "{value}"))?;
            Ok(out.write_str(&text)?)
        }
        _ => escape_formatter(out, state, value),
    }
}

/// What `write` writes of `value`, if there is fuel for it.
fn metered<E: std::error::Error + Send + Sync + 'static>(
    state: &State,
    value: &Value,
    write: impl FnOnce(&mut Metered) -> Result<(), E>,
) -> Result<String, Error> {
    state.consume_fuel(value.len().unwrap_or(0) as u64)?;
    let mut out = Metered {
        state,
        bytes: Vec::new(),
        failure: None,
    };
    let written = write(&mut out);
    if let Some(failure) = out.failure {
        return Err(failure);
    }
    written.map_err(|error| {
        Error::new(ErrorKind::BadSerialization, "not to be written").with_source(error)
    })?;
    Ok(String::from_utf8_lossy(&out.bytes).into_owned())
}

/// Takes fuel for what is written to it: lists that share their parts are small in memory and
/// may be of any size in writing.
struct Metered<'a> {
    state: &'a State<'a, 'a>,
    bytes: Vec<u8>,
    /// Why writing was refused.
    failure: Option<Error>,
}

impl Write for Metered<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let units = |length: usize| length as u64 / BYTES_PER_FUEL;
        let before = units(self.bytes.len());
        self.bytes.extend_from_slice(bytes);
        match self.state.consume_fuel(units(self.bytes.len()) - before) {
            Ok(()) => Ok(bytes.len()),
            Err(failure) => {
                self.failure = Some(failure);
                Err(io::ErrorKind::FileTooLarge.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
