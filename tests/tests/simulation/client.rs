//! Clients: what they ask for, and what they were answered.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{Rng, RngExt, rngs::StdRng, seq::IndexedRandom};
use shoal_proto::inference::{
    GenerateRequest, Sampling, Stopping, TokenIds, generate_request::Prompt,
    inference_client::InferenceClient,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Status, transport::Channel};

use crate::worker::LETTERS;

/// A request that a client will make.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) id: u64,
    /// Since the start.
    pub(crate) at: Duration,
    pub(crate) prompt: Vec<u32>,
    pub(crate) max_tokens: u32,
    pub(crate) temperature: f32,
    pub(crate) seed: u64,
    pub(crate) choices: u32,
    /// Ends a choice before it.
    pub(crate) stop: Option<String>,
    pub(crate) session: String,
    pub(crate) user: String,
    pub(crate) streamed: bool,
    pub(crate) deadline: Option<Duration>,
    /// The client leaves.
    pub(crate) leaves: Option<Duration>,
}

/// How a request ended.
#[derive(Clone, Debug)]
pub(crate) enum End {
    Complete,
    Failed(Code, String),
    /// The client left.
    Left,
}

/// What became of a request.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) plan: Plan,
    /// Of each choice.
    pub(crate) tokens: Vec<Vec<u32>>,
    pub(crate) end: End,
    pub(crate) took: Duration,
}

impl Plan {
    /// A request at some time.
    pub(crate) fn draw(id: u64, at: Duration, rng: &mut StdRng) -> Self {
        let ms = |rng: &mut StdRng, range| Duration::from_millis(rng.random_range(range));
        // A few beginnings that many have, and an end of its own.
        let shared = rng.random_range(0..3u32);
        let mut prompt = vec![LETTERS.start + shared; 32 * rng.random_range(0..3usize)];
        for _ in 0..rng.random_range(1..40) {
            prompt.push(rng.random_range(LETTERS));
        }
        Self {
            id,
            at,
            prompt,
            max_tokens: rng.random_range(1..120),
            temperature: if rng.random_bool(0.5) { 0.0 } else { 1.0 },
            seed: rng.next_u64() >> 11,
            stop: rng.random_bool(0.3).then(|| {
                let letters = (0..rng.random_range(1..3)).map(|_| rng.random_range('a'..='z'));
                letters.collect()
            }),
            session: ["", "", "one", "two"]
                .choose(rng)
                .copied()
                .unwrap_or("")
                .into(),
            user: ["", "ann", "bob", "eve", "joe"]
                .choose(rng)
                .copied()
                .unwrap_or("")
                .into(),
            choices: if rng.random_bool(0.1) { 2 } else { 1 },
            streamed: rng.random_bool(0.7),
            deadline: rng.random_bool(0.2).then(|| ms(rng, 100..4000)),
            leaves: rng.random_bool(0.2).then(|| ms(rng, 1..3000)),
        }
    }

    /// The same without a deadline or an impatient client.
    pub(crate) fn whole(id: u64, at: Duration, rng: &mut StdRng) -> Self {
        Self {
            deadline: None,
            leaves: None,
            ..Self::draw(id, at, rng)
        }
    }

    /// Whether the client reads its stream slowly.
    pub(crate) fn is_slow(&self) -> bool {
        self.id.is_multiple_of(7)
    }

    /// Of the tokens that a worker makes, those that are the answer.
    pub(crate) fn answer<'a>(&self, tokens: &'a [u32]) -> &'a [u32] {
        let Some(stop) = &self.stop else {
            return tokens;
        };
        let stop: Vec<u32> = stop.bytes().map(u32::from).collect();
        let end = tokens
            .windows(stop.len())
            .position(|letters| letters == stop);
        &tokens[..end.unwrap_or(tokens.len())]
    }

    fn request(&self) -> Request<GenerateRequest> {
        let mut request = Request::new(GenerateRequest {
            request_id: self.id.to_string(),
            prompt: Some(Prompt::TokenIds(TokenIds {
                ids: self.prompt.clone(),
            })),
            sampling: Some(Sampling {
                temperature: Some(self.temperature),
                seed: Some(self.seed),
                n: Some(self.choices),
                ..Sampling::default()
            }),
            stopping: Some(Stopping {
                max_tokens: Some(self.max_tokens),
                ignore_eos: true,
                stop: self.stop.iter().cloned().collect(),
                ..Stopping::default()
            }),
            session_id: self.session.clone(),
            user: self.user.clone(),
            ..GenerateRequest::default()
        });
        if let Some(deadline) = self.deadline {
            let value = format!("{}m", deadline.as_millis());
            // The client itself waits: what the router does about it is what is looked at.
            request
                .metadata_mut()
                .insert("grpc-timeout", value.parse().unwrap());
        }
        request
    }
}

/// Makes the request when its time comes.
pub(crate) async fn ask(client: InferenceClient<Channel>, plan: Plan, start: Instant) -> Outcome {
    tokio::time::sleep_until(start + plan.at).await;
    let begun = Instant::now();
    tracing::info!(id = plan.id, tokens = plan.max_tokens, "asks");
    let tokens = Arc::new(Mutex::new(vec![Vec::new(); plan.choices as usize]));
    let answer = answer(client, &plan, tokens.clone());
    let answer = async {
        match plan.leaves {
            Some(patience) => timeout(patience, answer).await.ok(),
            None => Some(answer.await),
        }
    };
    let end = match answer.await {
        None => End::Left,
        Some(Ok(())) => End::Complete,
        Some(Err(status)) => End::Failed(status.code(), status.message().to_owned()),
    };
    let tokens = std::mem::take(&mut *tokens.lock().unwrap());
    tracing::info!(id = plan.id, ?end, tokens = tokens[0].len(), "answered");
    Outcome {
        tokens,
        end,
        took: begun.elapsed(),
        plan,
    }
}

async fn answer(
    mut client: InferenceClient<Channel>,
    plan: &Plan,
    tokens: Arc<Mutex<Vec<Vec<u32>>>>,
) -> Result<(), Status> {
    if !plan.streamed {
        let answer = client.generate(plan.request()).await?.into_inner();
        for choice in answer.choices {
            tokens.lock().unwrap()[choice.index as usize] = choice.token_ids;
        }
        return Ok(());
    }
    let mut chunks = client.generate_stream(plan.request()).await?.into_inner();
    while let Some(chunk) = chunks.message().await? {
        tokens.lock().unwrap()[chunk.index as usize].extend(chunk.token_ids);
        if plan.is_slow() {
            sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}
