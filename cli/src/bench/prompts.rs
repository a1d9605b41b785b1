//! What a benchmark asks.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::BenchError;

/// One prompt of the file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Chat { messages: Vec<Message> },
    Text { prompt: String },
}

/// One turn of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub(super) struct Message {
    pub(super) role: String,
    pub(super) content: String,
}

/// The prompts of a JSONL file.
pub(super) fn read(path: &Path) -> Result<Vec<Prompt>, BenchError> {
    let text = std::fs::read_to_string(path).map_err(|source| BenchError::Prompts {
        path: path.to_owned(),
        source,
    })?;
    let lines = text.lines().enumerate();
    let prompts: Vec<Prompt> = lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|source| BenchError::Prompt {
                path: path.to_owned(),
                line: index + 1,
                source,
            })
        })
        .collect::<Result<_, _>>()?;
    if prompts.is_empty() {
        return Err(BenchError::NoPrompts {
            path: path.to_owned(),
        });
    }
    Ok(prompts)
}

/// A few short questions.
pub(super) fn builtin() -> Vec<Prompt> {
    let questions = [
        "What is a shoal of fish?",
        "How does a bicycle stay upright?",
        "Explain what a cache is to a child.",
        "Write a short poem about the sea.",
        "What should I pack for a week in the mountains?",
        "How do I boil an egg?",
        "Why is the sky blue?",
        "Tell me a story about a lighthouse.",
    ];
    let chat = |content: &str| Prompt::Chat {
        messages: vec![Message {
            role: "user".to_owned(),
            content: content.to_owned(),
        }],
    };
    questions.map(chat).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_read_and_faults_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("prompts.jsonl");
        let chat = r#"{"messages":[{"role":"user","content":"Hi"}],"id":7}"#;
        std::fs::write(&path, format!("{chat}\n\n{{\"prompt\":\"Once\"}}\n")).unwrap();
        let prompts = read(&path).unwrap();
        assert!(matches!(&prompts[0], Prompt::Chat { messages } if messages[0].content == "Hi"));
        assert!(matches!(&prompts[1], Prompt::Text { prompt } if prompt == "Once"));

        std::fs::write(&path, format!("{chat}\n{{\"other\":1}}\n")).unwrap();
        let error = read(&path).unwrap_err();
        assert!(
            matches!(error, BenchError::Prompt { line: 2, .. }),
            "{error:?}"
        );
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(read(&path), Err(BenchError::NoPrompts { .. })));
    }
}
