//! Streams an answer over gRPC: `generate URL PROMPT`.

use std::io::Write;

use shoal_proto::inference::{
    ChatMessage, ChatPrompt, GenerateRequest, Sampling, Stopping, generate_request::Prompt,
    inference_client::InferenceClient,
};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(url), Some(content)) = (arguments.next(), arguments.next()) else {
        return Err("usage: generate URL PROMPT".into());
    };
    let mut client = InferenceClient::connect(url).await?;
    let message = ChatMessage {
        role: "user".into(),
        content,
        ..Default::default()
    };
    let request = GenerateRequest {
        prompt: Some(Prompt::Chat(ChatPrompt {
            messages: vec![message],
            ..Default::default()
        })),
        sampling: Some(Sampling {
            temperature: Some(0.7),
            ..Default::default()
        }),
        stopping: Some(Stopping {
            max_tokens: Some(128),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut chunks = client.generate_stream(request).await?.into_inner();
    while let Some(chunk) = chunks.message().await? {
        print!("{}", chunk.text);
        std::io::stdout().flush()?;
    }
    println!();
    Ok(())
}
