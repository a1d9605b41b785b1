//! A small model and requests to it, for unit tests.

use std::{sync::Arc, time::Duration};

use prost::Message as _;
use sha2::{Digest, Sha256};
use shoal_proto::{
    inference::{GenerateRequest, TokenIds, generate_request::Prompt},
    worker::ModelDescription,
};
use tokio::time::Instant;

use crate::{
    keys::{Caller, Tenant},
    model::{Model, TextCache},
    request::{Arrival, Job},
};

#[path = "../tests/router/bundle.rs"]
mod bundle;

pub(crate) use bundle::END;

/// A token of several characters; the others are bytes.
pub(crate) const WORD: u32 = 259;
/// The text of [`WORD`].
pub(crate) const WORD_TEXT: &str = "wxyz";

/// The byte-level model with one [`WORD`] more.
fn model() -> Arc<Model> {
    let mut bundle = bundle::bundle();
    bundle.tokens.push(WORD_TEXT.into());
    bundle.token_types.push(1);
    let description = ModelDescription {
        model: "tiny".into(),
        context_length: 512,
        vocab_size: WORD + 1,
        ..ModelDescription::default()
    };
    let encoded = bundle.encode_to_vec();
    let hash = Sha256::digest(&encoded).into();
    let text = TextCache::default().add(&encoded, hash).unwrap();
    Arc::new(Model::new(description, text, 0))
}

/// A job of the request, whose prompt is `ab` where it has none.
pub(crate) async fn job(mut request: GenerateRequest) -> Arc<Job> {
    let ids = b"ab".map(u32::from).to_vec();
    let prompt = Prompt::TokenIds(TokenIds { ids });
    request.prompt.get_or_insert(prompt);
    let now = Instant::now();
    let arrival = Arrival {
        caller: Caller {
            tenant: Arc::new(Tenant::unlimited("t")),
            user: "".into(),
            router: false,
            operator: false,
        },
        request_id: "r".into(),
        at: now,
        deadline: now + Duration::from_secs(60),
    };
    Arc::new(Job::new(request, arrival, model(), None).await.unwrap())
}
