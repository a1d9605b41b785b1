//! Streams, event by event.

use serde_json::{Value, json};

use crate::{
    mock::{Mock, Script},
    support::{Router, joined},
};

#[tokio::test]
async fn a_chat_streams_as_openais_does() {
    let mock = Mock::gated(Script::answer("Hé")).await;
    let router = Router::ready(&[&mock]).await;
    let fields = json!({"stream_options": {"include_usage": true}, "seed": 3});
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (mut events, ()) = tokio::join!(router.stream(fields), begin);
    // One step at a time: what comes faster than it is read goes into one chunk.
    let mut chunks = vec![events.chunk().await, events.chunk().await];
    mock.step(2);
    chunks.push(events.chunk().await);
    mock.step(1);
    chunks.extend(events.rest().await);
    for chunk in &chunks {
        assert_eq!(chunk["object"], "chat.completion.chunk");
        assert_eq!(chunk["id"], chunks[0]["id"]);
        assert_eq!(chunk["created"], chunks[0]["created"]);
        assert!(chunk.as_object().unwrap().contains_key("usage"));
    }
    let choices: Vec<&Value> = chunks.iter().map(|chunk| &chunk["choices"]).collect();
    let choice = |delta: Value, finish: Option<&str>| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": finish}]);
    assert_eq!(
        *choices[0],
        choice(json!({"role": "assistant", "content": ""}), None)
    );
    assert_eq!(*choices[1], choice(json!({"content": "H"}), None));
    assert_eq!(*choices[2], choice(json!({"content": "é"}), None));
    assert_eq!(*choices[3], choice(json!({}), Some("stop")));
    assert_eq!(chunks[3]["seed"], 3);
    assert_eq!(*choices[4], json!([]));
    assert_eq!(chunks[3]["usage"], Value::Null);
    assert_eq!(
        chunks[4]["usage"],
        json!({
            "prompt_tokens": 4, "completion_tokens": 4, "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 2},
        })
    );
    assert_eq!(chunks.len(), 5);
}

#[tokio::test]
async fn without_include_usage_there_is_none() {
    let mock = Mock::start(Script::answer("ab")).await;
    let router = Router::ready(&[&mock]).await;
    let chunks = router.stream(json!({})).await.rest().await;
    assert_eq!(joined(&chunks, 0), "ab");
    for chunk in &chunks {
        assert!(!chunk.as_object().unwrap().contains_key("usage"));
        assert_eq!(chunk["choices"].as_array().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn stop_strings_are_found_across_chunks_and_never_shown() {
    for per_step in [1, 2, 3, 50] {
        let script = Script {
            per_step,
            ..Script::answer("a ST b STOP c")
        };
        let mock = Mock::start(script).await;
        let router = Router::ready(&[&mock]).await;
        let chunks = router.stream(json!({"stop": "STOP"})).await.rest().await;
        assert_eq!(joined(&chunks, 0), "a ST b ", "{per_step} tokens per step");
        let last = chunks.last().unwrap();
        assert_eq!(last["choices"][0]["finish_reason"], "stop");
    }
}

#[tokio::test]
async fn a_stop_string_cancels_at_once() {
    let mut mock = Mock::gated(Script::answer("a STOP b")).await;
    let router = Router::ready(&[&mock]).await;
    let fields = json!({"stop": "STOP", "stream_options": {"include_usage": true}});
    let stream = router.stream(fields);
    let begin = async {
        mock.live(1).await;
        mock.step(6);
    };
    let (events, ()) = tokio::join!(stream, begin);
    let chunks = events.rest().await;
    assert_eq!(joined(&chunks, 0), "a ");
    assert_eq!(
        chunks.last().unwrap()["usage"],
        json!({
            "prompt_tokens": 4, "completion_tokens": 6, "total_tokens": 10,
            "prompt_tokens_details": {"cached_tokens": 2},
        })
    );
    mock.cancelled().await;
    mock.live(0).await;
}

#[tokio::test]
async fn choices_stream_side_by_side() {
    let mock = Mock::start(Script::answer("side")).await;
    let router = Router::ready(&[&mock]).await;
    let fields = json!({"n": 2, "stream_options": {"include_usage": true}});
    let chunks = router.stream(fields).await.rest().await;
    for index in [0, 1] {
        assert_eq!(joined(&chunks, index), "side");
    }
    let of = |field: &'static str, value: Value| {
        chunks
            .iter()
            .filter(move |c| c["choices"][0].pointer(field) == Some(&value))
            .count()
    };
    assert_eq!(of("/delta/role", json!("assistant")), 2);
    assert_eq!(of("/finish_reason", json!("stop")), 2);
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 10);
}

#[tokio::test]
async fn completions_stream_with_logprobs_and_offsets() {
    let mock = Mock::start(Script::answer("xyz")).await;
    let router = Router::ready(&[&mock]).await;
    let body = json!({"prompt": ["p", "q"], "stream": true, "echo": true, "logprobs": 0});
    let chunks = router.events("/v1/completions", body).await.rest().await;
    for (index, text) in [(0, "pxyz"), (1, "qxyz")] {
        assert_eq!(joined(&chunks, index), text);
        let own = chunks
            .iter()
            .map(|c| &c["choices"][0])
            .filter(|c| c["index"] == index);
        let offsets = own.flat_map(|c| c["logprobs"]["text_offset"].as_array().unwrap().clone());
        assert_eq!(offsets.collect::<Vec<_>>(), [0, 1, 2, 3]);
    }
    assert_eq!(chunks[0]["object"], "text_completion");
}

#[tokio::test]
async fn each_step_is_sent_when_it_is_made() {
    let mock = Mock::gated(Script::answer("ab")).await;
    let router = Router::ready(&[&mock]).await;
    let begin = async {
        mock.live(1).await;
        mock.step(1);
    };
    let (mut events, ()) = tokio::join!(router.stream(json!({})), begin);
    assert_eq!(events.text().await, "a");
    mock.step(1);
    assert_eq!(events.text().await, "b");
    mock.step(1);
    assert_eq!(events.rest().await.len(), 1);
}
