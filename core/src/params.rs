//! The parameters of a request, and the limits that the router and the worker both check.

use crate::TokenId;

/// Most alternatives reported beside a token.
pub const MAX_TOP_LOGPROBS: u32 = 20;
/// Most entries of a logit bias.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most stop token ids.
pub const MAX_STOP_TOKENS: usize = 256;

/// Added to the logits of single tokens.
pub type LogitBias = Vec<(TokenId, f32)>;

/// How an output token is drawn from its logits.
///
/// Order of application: logit bias; repetition penalty (Keskar et al. 2019: positive
/// logits are divided, negative ones multiplied) over prompt and output; presence and
/// frequency penalties over the output; temperature; top-k; top-p; min-p. Log-probabilities
/// are reported from the logits before all of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0 is greedy: the best logit wins, the lowest id where two are equal.
    pub temperature: f32,
    /// Keeps the smallest set of most likely tokens whose mass reaches this; (0, 1].
    pub top_p: f32,
    /// Keeps this many most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the tokens of at least this share of the best one's probability; [0, 1].
    pub min_p: f32,
    /// Subtracted once from the logit of every token of the output; [-2, 2].
    pub presence_penalty: f32,
    /// Subtracted per occurrence in the output; [-2, 2].
    pub frequency_penalty: f32,
    /// 1 is none; (0, 10].
    pub repetition_penalty: f32,
    /// Sorted by token, no token twice; each in [-100, 100].
    pub logit_bias: LogitBias,
    /// With the choice and the output position, the key of the noise.
    pub seed: u64,
    /// Which choice of the request this is.
    pub choice: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: Vec::new(),
            seed: 0,
            choice: 0,
        }
    }
}

/// When an answer ends.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stopping {
    /// Most output tokens, those of a resumed output included; 0 scores the prompt only.
    pub max_tokens: u32,
    /// Until there are this many, no stop token is drawn.
    pub min_tokens: u32,
    /// Tokens that end the answer; the end-of-text tokens are among them unless ignored.
    pub stop_tokens: Vec<TokenId>,
}

/// Which log-probabilities are reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scoring {
    /// Alternatives beside each output token; `None` reports no log-probabilities.
    pub output_top: Option<u32>,
    /// The same for the prompt tokens.
    pub prompt_top: Option<u32>,
}

/// A parameter outside its range.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{param} must be {expected}, not {value}")]
pub struct ParamError {
    /// The parameter's name on the wire.
    pub param: &'static str,
    /// The range that holds.
    pub expected: &'static str,
    /// What was given.
    pub value: String,
}

fn check(
    holds: bool,
    param: &'static str,
    expected: &'static str,
    value: impl ToString,
) -> Result<(), ParamError> {
    if holds {
        return Ok(());
    }
    let value = value.to_string();
    Err(ParamError {
        param,
        expected,
        value,
    })
}

impl Sampling {
    /// Checks every range. NaN is in none.
    pub fn validate(&self, vocab: u32) -> Result<(), ParamError> {
        let t = self.temperature;
        check((0.0..=100.0).contains(&t), "temperature", "in [0, 100]", t)?;
        let p = self.top_p;
        check(p > 0.0 && p <= 1.0, "top_p", "in (0, 1]", p)?;
        let p = self.min_p;
        check((0.0..=1.0).contains(&p), "min_p", "in [0, 1]", p)?;
        for (param, p) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            check((-2.0..=2.0).contains(&p), param, "in [-2, 2]", p)?;
        }
        let r = self.repetition_penalty;
        let holds = r > 0.0 && r <= 10.0;
        check(holds, "repetition_penalty", "in (0, 10]", r)?;
        let bias = &self.logit_bias;
        let holds = bias.len() <= MAX_LOGIT_BIAS;
        check(holds, "logit_bias", "at most 1024 entries", bias.len())?;
        for &(token, b) in bias {
            check(token < vocab, "logit_bias", "on known token ids", token)?;
            let holds = (-100.0..=100.0).contains(&b);
            check(holds, "logit_bias", "in [-100, 100]", b)?;
        }
        let sorted = bias.windows(2).all(|w| w[0].0 < w[1].0);
        check(sorted, "logit_bias", "sorted by token id", "unsorted")
    }
}

impl Stopping {
    /// Checks every range.
    pub fn validate(&self, vocab: u32) -> Result<(), ParamError> {
        let holds = self.min_tokens <= self.max_tokens;
        check(holds, "min_tokens", "at most max_tokens", self.min_tokens)?;
        let stops = &self.stop_tokens;
        let holds = stops.len() <= MAX_STOP_TOKENS;
        check(holds, "stop_token_ids", "at most 256", stops.len())?;
        for &token in stops {
            check(token < vocab, "stop_token_ids", "known token ids", token)?;
        }
        // Stop tokens may not be drawn before there are `min_tokens`.
        let holds = self.min_tokens == 0 || stops.len() < vocab as usize;
        let expected = "fewer than the vocabulary where min_tokens is set";
        check(holds, "stop_token_ids", expected, stops.len())
    }
}

impl Scoring {
    /// Checks every range.
    pub fn validate(&self) -> Result<(), ParamError> {
        for top in [self.output_top, self.prompt_top].into_iter().flatten() {
            let holds = top <= MAX_TOP_LOGPROBS;
            check(holds, "top_logprobs", "at most 20", top)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_token_is_left_before_the_least_length() {
        let stopping = |min_tokens, tokens| Stopping {
            min_tokens,
            max_tokens: 1,
            stop_tokens: (0..tokens).collect(),
        };
        assert_eq!(stopping(1, 9).validate(10), Ok(()));
        assert_eq!(stopping(0, 10).validate(10), Ok(()));
        let error = stopping(1, 10).validate(10).unwrap_err();
        assert_eq!(error.param, "stop_token_ids");
    }

    #[test]
    fn defaults_are_valid() {
        assert_eq!(Sampling::default().validate(10), Ok(()));
        assert_eq!(Stopping::default().validate(10), Ok(()));
        assert_eq!(Scoring::default().validate(), Ok(()));
    }

    #[test]
    fn nan_is_out_of_every_range() {
        let base = Sampling::default;
        let nan = f32::NAN;
        for sampling in [
            Sampling {
                temperature: nan,
                ..base()
            },
            Sampling {
                top_p: nan,
                ..base()
            },
            Sampling {
                min_p: nan,
                ..base()
            },
            Sampling {
                presence_penalty: nan,
                ..base()
            },
            Sampling {
                frequency_penalty: nan,
                ..base()
            },
            Sampling {
                repetition_penalty: nan,
                ..base()
            },
            Sampling {
                logit_bias: vec![(1, nan)],
                ..base()
            },
        ] {
            assert!(sampling.validate(10).is_err(), "{sampling:?}");
        }
    }

    #[test]
    fn unknown_tokens_are_named() {
        let sampling = Sampling {
            logit_bias: vec![(10, 1.0)],
            ..Sampling::default()
        };
        let error = sampling.validate(10).unwrap_err();
        assert_eq!(
            error.to_string(),
            "logit_bias must be on known token ids, not 10"
        );
        let stopping = Stopping {
            stop_tokens: vec![10],
            max_tokens: 1,
            min_tokens: 0,
        };
        assert!(stopping.validate(10).is_err());
    }
}
