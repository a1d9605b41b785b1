//! Between the wire and the engine.

use std::time::{Duration, Instant};

use shoal_core::{
    Class, DraftScope, MAX_DRAFT_ROWS, Namespace, Sampling, Scoring, Speculation, SpeculationError,
    Stopping,
};
use shoal_draft::{SharedCorpus, Store};
use shoal_engine::request::{
    self as engine, Logprob, Request, SequenceKey, SequenceOutput, SubmitError,
};
use shoal_engine::speculation::{Drafter, MAX_DRAFT_NODES, PushedDraft};
use shoal_proto::worker as proto;

/// What a submission must name rightly.
#[derive(Debug)]
pub(crate) struct Identity {
    /// This start of the worker.
    pub(crate) epoch: u64,
    /// See [`NumericsId`](shoal_engine::backend::NumericsId).
    pub(crate) numerics_id: [u8; 32],
    /// A draft worker.
    pub(crate) drafts: bool,
}

/// Why a submission is refused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Refusal {
    #[error("the worker's epoch is {ours}, not {theirs}")]
    StaleEpoch { ours: u64, theirs: u64 },
    #[error("the worker computes with other numerics")]
    Numerics,
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("the cache namespace has {0} bytes, not 16")]
    Namespace(usize),
    #[error("a draft scope has {0} bytes, not 16")]
    DraftScope(usize),
    #[error("a draft worker takes no sequences of its own")]
    Drafts,
    #[error(transparent)]
    Speculation(#[from] SpeculationError),
    #[error(transparent)]
    Engine(#[from] SubmitError),
}

impl Refusal {
    pub(crate) fn reason(&self) -> proto::RejectReason {
        match self {
            Self::StaleEpoch { .. } => proto::RejectReason::StaleEpoch,
            Self::Numerics => proto::RejectReason::NumericsMismatch,
            // A router that knows no draft workers asks another one.
            Self::Drafts => proto::RejectReason::Draining,
            Self::Missing(_) | Self::Namespace(_) | Self::DraftScope(_) | Self::Speculation(_) => {
                proto::RejectReason::Invalid
            }
            Self::Engine(error) => match error.class() {
                Class::Backpressure => proto::RejectReason::Overloaded,
                Class::Retry => proto::RejectReason::Draining,
                Class::Client | Class::Fatal => proto::RejectReason::Invalid,
            },
        }
    }
}

/// A submission as the engine takes it. The engine checks the values.
pub(crate) fn request(
    submit: proto::Submit,
    session: u64,
    identity: &Identity,
    store: &Store,
    now: Instant,
) -> Result<Request, Refusal> {
    if submit.epoch != 0 && submit.epoch != identity.epoch {
        return Err(Refusal::StaleEpoch {
            ours: identity.epoch,
            theirs: submit.epoch,
        });
    }
    if !submit.numerics_id.is_empty() && submit.numerics_id != identity.numerics_id {
        return Err(Refusal::Numerics);
    }
    if identity.drafts && submit.lead.is_none() {
        return Err(Refusal::Drafts);
    }
    let namespace = &submit.cache_namespace;
    let namespace = Namespace::from_bytes(namespace).ok_or(Refusal::Namespace(namespace.len()))?;
    let corpora = corpora(&submit, store)?;
    let sampling = submit.sampling.ok_or(Refusal::Missing("sampling"))?;
    let stopping = submit.stopping.ok_or(Refusal::Missing("stopping"))?;
    let scoring = submit.scoring.unwrap_or_default();
    let mut logit_bias: Vec<_> = sampling.logit_bias.into_iter().collect();
    logit_bias.sort_unstable_by_key(|&(token, _)| token);
    let deadline = Duration::from_millis(submit.deadline_in_ms.into());
    Ok(Request {
        key: SequenceKey {
            session,
            sequence: submit.sequence,
            attempt: submit.attempt,
        },
        prompt: submit.prompt,
        resume: submit.resume,
        sampling: Sampling {
            temperature: sampling.temperature,
            top_p: sampling.top_p,
            top_k: sampling.top_k,
            min_p: sampling.min_p,
            presence_penalty: sampling.presence_penalty,
            frequency_penalty: sampling.frequency_penalty,
            repetition_penalty: sampling.repetition_penalty,
            logit_bias,
            seed: submit.seed,
            choice: submit.choice,
        },
        stopping: Stopping {
            max_tokens: stopping.max_tokens,
            min_tokens: stopping.min_tokens,
            stop_tokens: stopping.stop_token_ids,
        },
        scoring: Scoring {
            output_top: scoring.output_top,
            prompt_top: scoring.prompt_top,
        },
        namespace,
        priority: submit.priority,
        deadline: (!deadline.is_zero()).then(|| now + deadline),
        speculation: match submit.draft_rows {
            None => Speculation::Auto,
            Some(0) => Speculation::Off,
            Some(rows) => Speculation::fixed(rows.into())?,
        },
        corpora,
        lead: submit.lead.map(|tokens| tokens.min(MAX_DRAFT_ROWS)),
    })
}

/// The texts that may draft for a submission.
fn corpora(submit: &proto::Submit, store: &Store) -> Result<Vec<(Drafter, SharedCorpus)>, Refusal> {
    let mut corpora = Vec::new();
    for (drafter, scope) in [
        (Drafter::User, &submit.draft_user),
        (Drafter::Tenant, &submit.draft_tenant),
        (Drafter::Public, &submit.draft_public),
    ] {
        if scope.is_empty() {
            continue;
        }
        let scope = DraftScope::from_bytes(scope).ok_or(Refusal::DraftScope(scope.len()))?;
        corpora.extend(store.get(&scope).map(|corpus| (drafter, corpus)));
    }
    Ok(corpora)
}

/// A draft as the engine takes it, and whose it is.
pub(crate) fn draft(mut draft: proto::Draft, session: u64) -> (SequenceKey, PushedDraft) {
    draft.tokens.truncate(MAX_DRAFT_NODES);
    draft.parents.truncate(MAX_DRAFT_NODES);
    let key = SequenceKey {
        session,
        sequence: draft.sequence,
        attempt: draft.attempt,
    };
    let pushed = PushedDraft {
        base: draft.base,
        anchor: draft.anchor,
        tokens: draft.tokens,
        parents: draft.parents,
    };
    (key, pushed)
}

/// What a step made for a sequence, as it goes over the wire.
pub(crate) fn output(output: SequenceOutput) -> proto::SequenceOutput {
    let (finish, usage) = match output.finish {
        None => (proto::Finish::Unspecified, None),
        Some((end, cost)) => (finish(end), Some(usage(&cost))),
    };
    proto::SequenceOutput {
        sequence: output.key.sequence,
        attempt: output.key.attempt,
        output_offset: output.offset,
        tokens: output.tokens,
        logprobs: output.logprobs.into_iter().map(logprob).collect(),
        prompt_logprobs: output.prompt_logprobs.into_iter().map(logprob).collect(),
        finish: finish.into(),
        usage,
    }
}

fn logprob(logprob: Logprob) -> proto::Logprob {
    let (top_tokens, top_logprobs) = logprob.top.into_iter().unzip();
    proto::Logprob {
        logprob: logprob.logprob.unwrap_or_default(),
        top_tokens,
        top_logprobs,
        unscored: logprob.logprob.is_none(),
    }
}

fn finish(finish: engine::Finish) -> proto::Finish {
    match finish {
        engine::Finish::Stop => proto::Finish::Stop,
        engine::Finish::Length => proto::Finish::Length,
        engine::Finish::Cancelled => proto::Finish::Cancelled,
        engine::Finish::Deadline => proto::Finish::Deadline,
        engine::Finish::Preempted => proto::Finish::Preempted,
    }
}

fn usage(usage: &engine::Usage) -> proto::SequenceUsage {
    let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
    proto::SequenceUsage {
        cached_tokens: usage.cached_tokens,
        queue_us: micros(usage.queued),
        prefill_us: micros(usage.prefill),
        preemptions: usage.preemptions,
        drafted: usage.drafted,
        accepted: usage.accepted,
    }
}

/// The engine's load, as it goes over the wire.
pub(crate) fn load(load: &engine::Load) -> proto::Load {
    proto::Load {
        running: load.running,
        waiting: load.waiting,
        waiting_uncached_tokens: load.waiting_uncached_tokens,
        kv_usage: load.kv_usage,
        prefill_tps: load.prefill_tps,
        decode_tps: load.decode_tps,
        step_ms_p50: load.step_ms_p50,
        step_ms_p99: load.step_ms_p99,
        step_base_ms: load.step_base_ms,
        step_row_ms: load.step_row_ms,
        prompt_row_ms: load.prompt_row_ms,
        // Saturates where no row has a chance.
        admit_milli: (load.draft_price * 1e3).round() as u32,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        epoch: 7,
        numerics_id: [1; 32],
        drafts: false,
    };

    fn store() -> Store {
        Store::new(1 << 20, Duration::from_secs(60))
    }

    fn submit() -> proto::Submit {
        proto::Submit {
            sequence: 3,
            prompt: vec![1],
            sampling: Some(proto::Sampling {
                logit_bias: [(9, 1.0), (2, -1.0), (5, 0.5)].into(),
                ..proto::Sampling::default()
            }),
            stopping: Some(proto::Stopping::default()),
            cache_namespace: vec![0; 16],
            ..proto::Submit::default()
        }
    }

    fn refused(submit: proto::Submit) -> proto::RejectReason {
        let result = request(submit, 1, &IDENTITY, &store(), Instant::now());
        result.expect_err("a refusal").reason()
    }

    #[test]
    fn logit_bias_comes_sorted() {
        let request = request(submit(), 1, &IDENTITY, &store(), Instant::now()).unwrap();
        assert_eq!(request.sampling.logit_bias, [(2, -1.0), (5, 0.5), (9, 1.0)]);
    }

    #[test]
    fn drafts_come_from_the_scopes_that_are_named() {
        let (store, now) = (store(), Instant::now());
        let scope = DraftScope::tenant("m", b"t", "acme", "");
        store.add(scope, None, &[1, 2, 3, 4, 5], Duration::ZERO);
        let mut named = submit();
        named.draft_tenant = scope.as_bytes().to_vec();
        named.draft_user = scope.user("alice").as_bytes().to_vec();
        let request = request(named, 1, &IDENTITY, &store, now).unwrap();
        let drafters: Vec<Drafter> = request.corpora.iter().map(|(d, _)| *d).collect();
        assert_eq!(drafters, [Drafter::Tenant]);
        assert_eq!(request.speculation, Speculation::Auto);
    }

    #[test]
    fn zero_is_no_deadline() {
        let now = Instant::now();
        assert_eq!(
            request(submit(), 1, &IDENTITY, &store(), now)
                .unwrap()
                .deadline,
            None
        );
        let mut soon = submit();
        soon.deadline_in_ms = 5;
        let deadline = request(soon, 1, &IDENTITY, &store(), now).unwrap().deadline;
        assert_eq!(deadline, Some(now + Duration::from_millis(5)));
    }

    #[test]
    fn identities_are_checked_where_they_are_named() {
        let mut named = submit();
        (named.epoch, named.numerics_id) = (7, vec![1; 32]);
        assert!(request(named, 1, &IDENTITY, &store(), Instant::now()).is_ok());
        let mut stale = submit();
        stale.epoch = 6;
        assert_eq!(refused(stale), proto::RejectReason::StaleEpoch);
        let mut other = submit();
        other.numerics_id = vec![2; 32];
        assert_eq!(refused(other), proto::RejectReason::NumericsMismatch);
    }

    #[test]
    fn a_draft_worker_only_runs_ahead() {
        let drafts = Identity {
            drafts: true,
            ..IDENTITY
        };
        let ask = |submit| request(submit, 1, &drafts, &store(), Instant::now());
        let refused = ask(submit()).unwrap_err();
        assert_eq!(refused.reason(), proto::RejectReason::Draining);
        let mut ahead = submit();
        ahead.lead = Some(1000);
        assert_eq!(ask(ahead).unwrap().lead, Some(MAX_DRAFT_ROWS));
    }

    #[test]
    fn missing_and_wrong_parts_are_invalid() {
        for spoil in [
            |s: &mut proto::Submit| s.draft_rows = Some(33),
            |s: &mut proto::Submit| s.draft_tenant = vec![0; 15],
            |s: &mut proto::Submit| s.sampling = None,
            |s: &mut proto::Submit| s.stopping = None,
            |s: &mut proto::Submit| s.cache_namespace.clear(),
        ] {
            let mut submit = submit();
            spoil(&mut submit);
            assert_eq!(refused(submit), proto::RejectReason::Invalid);
        }
    }
}
