//! JSON bodies, with errors that name what is wrong.

use std::sync::Arc;

use axum::{
    body::{Body, to_bytes},
    extract::{FromRequest, Request},
};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde_json::error::Category;

use crate::{error::RequestError, service::Service};

/// A body of JSON. Fields that `T` does not have are ignored, with one warning per request.
#[derive(Debug)]
pub(super) struct JsonBody<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<Service>> for JsonBody<T> {
    type Rejection = RequestError;

    async fn from_request(request: Request, service: &Arc<Service>) -> Result<Self, RequestError> {
        let bytes = read(request.into_body(), service.max_body_bytes).await?;
        parse(&bytes).map(Self)
    }
}

async fn read(body: Body, limit: usize) -> Result<Bytes, RequestError> {
    to_bytes(body, limit).await.map_err(|error| {
        let mut source = std::error::Error::source(&error);
        while let Some(cause) = source {
            if cause.is::<http_body_util::LengthLimitError>() {
                return RequestError::BodyTooLarge { limit };
            }
            source = cause.source();
        }
        RequestError::Invalid {
            code: "incomplete_body",
            param: None,
            message: "the body ended early".into(),
        }
    })
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, RequestError> {
    let text = std::str::from_utf8(bytes).map_err(|error| RequestError::Invalid {
        code: "invalid_utf8",
        param: None,
        message: format!("the body is not UTF-8: {error}").into(),
    })?;
    let mut ignored: Vec<String> = Vec::new();
    let mut json = serde_json::Deserializer::from_str(text);
    let mut track = serde_path_to_error::Track::new();
    let deserializer = serde_path_to_error::Deserializer::new(&mut json, &mut track);
    let result = serde_ignored::deserialize(deserializer, |path| {
        if ignored.len() < 16 {
            ignored.push(path.to_string());
        }
    });
    let value: T = result.map_err(|error| invalid(&error, &track.path().to_string()))?;
    json.end().map_err(|error| invalid(&error, "."))?;
    if !ignored.is_empty() {
        tracing::warn!(fields = ignored.join(", "), "unknown fields ignored");
    }
    Ok(value)
}

fn invalid(error: &serde_json::Error, path: &str) -> RequestError {
    let wrong_type = error.classify() == Category::Data;
    let param = (wrong_type && path != ".").then(|| path.to_owned());
    RequestError::Invalid {
        code: if wrong_type {
            "invalid_type"
        } else {
            "invalid_json"
        },
        message: match &param {
            Some(param) => format!("{param}: {error}").into(),
            None => format!("the body is not valid: {error}").into(),
        },
        param: param.map(Into::into),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    struct Inner {
        #[serde(rename = "b")]
        _b: u32,
    }

    #[derive(Debug, Deserialize)]
    struct Outer {
        #[serde(rename = "a")]
        _a: Vec<Inner>,
    }

    fn error(json: &[u8]) -> (&'static str, Option<String>) {
        let error = parse::<Outer>(json).unwrap_err();
        (error.code(), error.param().map(str::to_owned))
    }

    #[test]
    fn wrong_types_name_their_field() {
        assert_eq!(
            error(br#"{"a":[{"b":1},{"b":"x"}]}"#),
            ("invalid_type", Some("a[1].b".into()))
        );
        assert_eq!(error(br#"{"a":[{"b":1}]} x"#), ("invalid_json", None));
        assert_eq!(error(br#"{"a":NaN}"#), ("invalid_json", None));
        assert_eq!(error(b"{\"a\":\"\xff\"}"), ("invalid_utf8", None));
        assert_eq!(error(b""), ("invalid_json", None));
    }

    #[test]
    fn unknown_fields_are_no_error() {
        parse::<Outer>(br#"{"a":[{"b":1,"c":2}],"d":{"e":[]}}"#).unwrap();
    }
}
