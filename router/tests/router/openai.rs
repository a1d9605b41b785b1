//! Whole answers of OpenAI's API, and the native requests that they become.

use serde_json::{Value, json};
use shoal_core::Namespace;

use crate::{
    mock::{CONTEXT, MODEL, Mock, Script, tokens},
    support::{Router, chat_body, content},
};

#[tokio::test]
async fn a_chat_is_answered() {
    let mut mock = Mock::start(Script::answer("Hello, ça va?")).await;
    let router = Router::ready(&[&mock]).await;
    let answer = router.chat(json!({"seed": 7})).await;
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], MODEL);
    assert_eq!(answer["seed"], 7);
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(
        answer["choices"],
        json!([{
            "index": 0,
            "message": {"role": "assistant", "content": "Hello, ça va?", "refusal": null},
            "logprobs": null,
            "finish_reason": "stop",
        }])
    );
    // <user> H i <bot>, and 14 bytes with the end token.
    assert_eq!(
        answer["usage"],
        json!({
            "prompt_tokens": 4, "completion_tokens": 15, "total_tokens": 19,
            "prompt_tokens_details": {"cached_tokens": 2},
        })
    );
    let submit = mock.submitted().await;
    assert_eq!(submit.prompt, [257, 72, 105, 258]);
    assert_eq!((submit.seed, submit.attempt, submit.choice), (7, 0, 0));
    assert_eq!(
        submit.cache_namespace,
        Namespace::new("default", "").as_bytes()
    );
    assert_eq!(submit.stopping.unwrap().max_tokens, CONTEXT - 4);
    router.stop().await;
}

#[tokio::test]
async fn every_sampling_field_reaches_the_worker() {
    let mut mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    router
        .chat(json!({
            "model": MODEL, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125,
            "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5,
            "logit_bias": {"65": 2.0, "66": -100}, "max_completion_tokens": 9, "min_tokens": 2,
            "ignore_eos": true, "stop_token_ids": [5], "seed": -1, "user": "u",
            "cache_salt": "salt", "priority": "bulk",
        }))
        .await;
    let submit = mock.submitted().await;
    let sampling = submit.sampling.unwrap();
    assert_eq!((sampling.temperature, sampling.top_p), (0.5, 0.25));
    assert_eq!((sampling.top_k, sampling.min_p), (3, 0.125));
    assert_eq!(
        (sampling.presence_penalty, sampling.frequency_penalty),
        (1.0, -1.0)
    );
    assert_eq!(sampling.repetition_penalty, 1.5);
    assert_eq!(sampling.logit_bias, [(65, 2.0), (66, -100.0)].into());
    let stopping = submit.stopping.unwrap();
    assert_eq!((stopping.max_tokens, stopping.min_tokens), (9, 2));
    assert_eq!(stopping.stop_token_ids, [5]);
    assert_eq!(submit.seed, u64::MAX);
    assert_eq!(
        submit.cache_namespace,
        Namespace::new("default", "salt").as_bytes()
    );
    assert_eq!(submit.priority, 1);
    assert!(submit.deadline_in_ms > 0);
}

#[tokio::test]
async fn a_missing_seed_is_drawn_and_returned() {
    let mut mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    let mut seeds = Vec::new();
    for _ in 0..2 {
        let answer = router.chat(json!({})).await;
        let seed = answer["seed"].as_u64().unwrap();
        assert_eq!(mock.submitted().await.seed, seed);
        assert!(seed < 1 << 53);
        seeds.push(seed);
    }
    assert_ne!(seeds[0], seeds[1]);
}

#[tokio::test]
async fn n_choices_share_the_seed_and_differ_in_their_number() {
    let mut mock = Mock::start(Script::answer("abc")).await;
    let router = Router::ready(&[&mock]).await;
    let answer = router.chat(json!({"n": 3, "seed": 5})).await;
    let choices = answer["choices"].as_array().unwrap();
    let indices: Vec<u64> = choices
        .iter()
        .map(|c| c["index"].as_u64().unwrap())
        .collect();
    assert_eq!(indices, [0, 1, 2]);
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    assert_eq!(answer["usage"]["prompt_tokens"], 4);
    let mut seen = Vec::new();
    for _ in 0..3 {
        let submit = mock.submitted().await;
        assert_eq!(submit.seed, 5);
        seen.push(submit.choice);
    }
    seen.sort_unstable();
    assert_eq!(seen, [0, 1, 2]);
}

#[tokio::test]
async fn content_parts_are_joined() {
    let mut mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    let parts = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let messages = json!([{"role": "developer", "content": parts}]);
    router.chat(json!({"messages": messages})).await;
    assert_eq!(mock.submitted().await.prompt, [257, 97, 98, 258]);
}

#[tokio::test]
async fn harmless_values_of_unsupported_fields_are_fine() {
    let mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    router
        .chat(json!({
            "response_format": {"type": "text"}, "tool_choice": "none", "tools": [],
            "functions": null, "a_field_of_tomorrow": {"x": 1},
        }))
        .await;
}

#[tokio::test]
async fn max_tokens_over_the_context_is_clamped() {
    let mut mock = Mock::start(Script::answer(&"z".repeat(2000))).await;
    let router = Router::ready(&[&mock]).await;
    let answer = router.chat(json!({"max_tokens": 100_000})).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], CONTEXT - 4);
    assert_eq!(
        mock.submitted().await.stopping.unwrap().max_tokens,
        CONTEXT - 4
    );
}

#[tokio::test]
async fn a_stop_string_ends_the_text_before_it() {
    let mock = Mock::start(Script::answer("one two three")).await;
    let router = Router::ready(&[&mock]).await;
    let answer = router
        .chat(json!({"stop": ["zzz", "two"], "logprobs": true}))
        .await;
    assert_eq!(content(&answer), "one ");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    assert_eq!(answer["usage"]["completion_tokens"], 7);
    let logprobs = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(logprobs.len(), 4, "the tokens of the text alone");
}

#[tokio::test]
async fn chat_logprobs_have_openais_shape() {
    let mock = Mock::start(Script::answer("é")).await;
    let router = Router::ready(&[&mock]).await;
    let answer = router
        .chat(json!({"logprobs": true, "top_logprobs": 2}))
        .await;
    let logprobs = &answer["choices"][0]["logprobs"];
    assert!(logprobs["refusal"].is_null());
    let content = logprobs["content"].as_array().unwrap();
    assert_eq!(content.len(), 2);
    assert_eq!(content[0]["bytes"], json!([0xc3]));
    assert_eq!(content[0]["logprob"], -0.5);
    assert_eq!(
        content[0]["top_logprobs"],
        json!([
            {"token": "a", "logprob": -0.5, "bytes": [97]},
            {"token": "b", "logprob": -1.5, "bytes": [98]},
        ])
    );
}

#[tokio::test]
async fn completions_take_text_token_ids_and_several_of_them() {
    let mut mock = Mock::start(Script::answer("out")).await;
    let router = Router::ready(&[&mock]).await;
    for (prompt, expected) in [
        (json!("ab"), vec![tokens("ab")]),
        (json!(["ab"]), vec![tokens("ab")]),
        (json!([97, 98]), vec![tokens("ab")]),
        (json!([[97], [98]]), vec![tokens("a"), tokens("b")]),
        (json!(["a", "b"]), vec![tokens("a"), tokens("b")]),
    ] {
        let answer = router
            .ok("/v1/completions", json!({"prompt": prompt, "n": 2}))
            .await;
        assert_eq!(answer["object"], "text_completion");
        let choices = answer["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * expected.len());
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], "out");
        }
        let total: usize = expected.iter().map(Vec::len).sum();
        assert_eq!(answer["usage"]["prompt_tokens"], total);
        let mut prompts = Vec::new();
        for _ in choices {
            prompts.push(mock.submitted().await.prompt);
        }
        for prompt in expected {
            assert_eq!(prompts.iter().filter(|p| **p == prompt).count(), 2);
        }
    }
}

#[tokio::test]
async fn a_completion_without_a_limit_has_sixteen_tokens() {
    let mock = Mock::start(Script::answer(&"y".repeat(40))).await;
    let router = Router::ready(&[&mock]).await;
    let answer = router.ok("/v1/completions", json!({"prompt": "a"})).await;
    assert_eq!(answer["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn echo_scores_the_prompt() {
    let mock = Mock::start(Script::answer("!")).await;
    let router = Router::ready(&[&mock]).await;
    let body = json!({"prompt": "aéb", "echo": true, "max_tokens": 0, "logprobs": 1});
    let answer = router.ok("/v1/completions", body).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "aéb");
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 0);
    let logprobs = &choice["logprobs"];
    assert_eq!(
        logprobs["tokens"],
        json!(["a", "bytes:\\xc3", "bytes:\\xa9", "b"])
    );
    assert_eq!(logprobs["token_logprobs"], json!([null, -0.5, -0.5, -0.5]));
    assert_eq!(logprobs["text_offset"], json!([0, 1, 2, 2]));
    assert_eq!(logprobs["top_logprobs"][0], Value::Null);
    assert_eq!(logprobs["top_logprobs"][1], json!({"a": -0.5}));

    let body = json!({"prompt": [97, 98], "echo": true, "max_tokens": 5, "logprobs": 0});
    let answer = router.ok("/v1/completions", body).await;
    assert_eq!(answer["choices"][0]["text"], "ab!");
    assert_eq!(
        answer["choices"][0]["logprobs"]["text_offset"],
        json!([0, 1, 2])
    );
}

#[tokio::test]
async fn scores_of_a_prompt_that_break_off_come_whole_from_the_next_attempt() {
    let script = Script {
        break_in_scores: true,
        ..Script::answer("!")
    };
    let mut mock = Mock::start(script).await;
    let router = Router::ready(&[&mock]).await;
    let body = json!({"prompt": "abcdefg", "echo": true, "max_tokens": 5, "logprobs": 0});
    let answer = router.ok("/v1/completions", body).await;
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], "abcdefg!");
    assert_eq!(
        choice["logprobs"]["text_offset"],
        json!([0, 1, 2, 3, 4, 5, 6, 7])
    );
    for attempt in 0..2 {
        let submit = mock.submitted().await;
        assert_eq!(submit.attempt, attempt);
        assert_eq!(submit.scoring.unwrap().prompt_top, Some(0));
    }
}

#[tokio::test]
async fn models_are_listed() {
    let mock = Mock::start(Script::answer("")).await;
    let router = Router::ready(&[&mock]).await;
    let (status, list) = router.get("/v1/models").await;
    assert_eq!((status, &list["object"]), (200, &json!("list")));
    assert_eq!(list["data"][0]["id"], MODEL);
    assert_eq!(list["data"][0]["object"], "model");
    assert!(list["data"][0]["created"].as_u64().unwrap() > 0);
    let (status, model) = router.get(&format!("/v1/models/{MODEL}")).await;
    assert_eq!((status, &model), (200, &list["data"][0]));
    let (status, error) = router.get("/v1/models/other/one").await;
    assert_eq!(
        (status, &error["error"]["code"]),
        (404, &json!("model_not_found"))
    );
}

#[tokio::test]
async fn text_and_tokens_translate() {
    let mock = Mock::start(Script::answer("")).await;
    let router = Router::ready(&[&mock]).await;
    let body = json!({"content": "<user>é", "parse_special": true});
    assert_eq!(
        router.ok("/tokenize", body).await,
        json!({"tokens": [257, 0xc3, 0xa9]})
    );
    let body = json!({"content": "<u", "add_special": true, "parse_special": false});
    assert_eq!(
        router.ok("/tokenize", body).await,
        json!({"tokens": [60, 117]})
    );
    let body = json!({"tokens": [257, 0xc3, 0xa9]});
    assert_eq!(
        router.ok("/detokenize", body).await,
        json!({"content": "<user>é"})
    );
    let (status, error) = router.error("/detokenize", json!({"tokens": [259]})).await;
    assert_eq!((status, &error["param"]), (400, &json!("tokens")));
}

#[tokio::test]
async fn a_request_id_goes_through_or_is_made() {
    let mut mock = Mock::start(Script::answer("x")).await;
    let router = Router::ready(&[&mock]).await;
    let url = format!("{}/v1/chat/completions", router.base);
    let request = router.http.post(&url).json(&chat_body(json!({})));
    let response = request
        .header("x-request-id", "mine-1")
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-request-id"], "mine-1");
    let answer: Value = response.json().await.unwrap();
    assert_eq!(answer["id"], "chatcmpl-mine-1");
    assert_eq!(mock.submitted().await.request_id, "mine-1");

    let request = router.http.post(&url).json(&chat_body(json!({})));
    let response = request
        .header("x-request-id", "not fit")
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-request-id"].len(), 32);
}
