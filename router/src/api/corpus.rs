//! `shoal.inference.v1.Corpus`: text that drafts for the caller's tenant.

use std::sync::Arc;

use shoal_core::DraftScope;
use shoal_draft::Owner;
use shoal_proto::inference::{
    DropTextRequest, DropTextResponse, EraseAnswersRequest, EraseAnswersResponse, ListTextsRequest,
    ListTextsResponse, LoadTextRequest, LoadTextResponse, PublicText, corpus_server,
};
use shoal_text::EncodeOptions;
use tonic::{Request, Response, Status};

use super::{admin, context::Context};
use crate::{error::RequestError, keys::Tenant, model::Model, request::whose, service::Service};

/// The gRPC service.
#[derive(Debug)]
pub(crate) struct Corpus(pub(super) Arc<Service>);

fn owner(model: &Model, tenant: &Tenant) -> Owner {
    let tokenizer = &model.description.tokenizer_sha256;
    Owner {
        model: model.name.clone(),
        tenant: tenant.name.clone(),
        scope: DraftScope::tenant(&model.name, tokenizer, &tenant.name, ""),
    }
}

impl Corpus {
    fn tenant<T>(&self, request: &mut Request<T>) -> Result<Arc<Tenant>, RequestError> {
        let context = request.extensions_mut().remove::<Context>();
        context.ok_or(RequestError::Unauthenticated)?.tenant()
    }

    async fn load(
        &self,
        mut request: Request<LoadTextRequest>,
    ) -> Result<LoadTextResponse, RequestError> {
        let tenant = self.tenant(&mut request)?;
        let LoadTextRequest { model, name, text } = request.into_inner();
        if name.is_empty() {
            return Err(RequestError::invalid("name", "a text needs a name"));
        }
        let options = EncodeOptions {
            add_special: false,
            parse_special: false,
        };
        let tokens = admin::encode(&self.0, &model, text, options).await?;
        let owner = owner(&*self.0.cluster.model(&model)?, &tenant);
        let count = tokens.len() as u32;
        let loaded = self.0.cluster.corpora.load(owner, name, tokens);
        loaded.map_err(|full| RequestError::invalid("text", full.to_string()))?;
        Ok(LoadTextResponse { tokens: count })
    }

    fn list(
        &self,
        mut request: Request<ListTextsRequest>,
    ) -> Result<ListTextsResponse, RequestError> {
        let tenant = self.tenant(&mut request)?;
        let listed = self.0.cluster.corpora.list(&tenant.name).into_iter();
        let texts = listed.map(|text| PublicText {
            name: text.name,
            model: text.model.to_string(),
            tokens: text.tokens as u32,
        });
        Ok(ListTextsResponse {
            texts: texts.collect(),
        })
    }

    fn unload(
        &self,
        mut request: Request<DropTextRequest>,
    ) -> Result<DropTextResponse, RequestError> {
        let tenant = self.tenant(&mut request)?;
        let name = request.into_inner().name;
        if self.0.cluster.corpora.unload(&tenant.name, &name) {
            Ok(DropTextResponse {})
        } else {
            let message = format!("there is no text {name:?}");
            Err(RequestError::invalid("name", message))
        }
    }

    async fn erase(
        &self,
        mut request: Request<EraseAnswersRequest>,
    ) -> Result<EraseAnswersResponse, RequestError> {
        let tenant = self.tenant(&mut request)?;
        let whose = whose(&tenant, &request.into_inner().user);
        let corpora = self.0.cluster.corpora.clone();
        corpora.erase(whose).await?;
        Ok(EraseAnswersResponse {})
    }

    fn answer<T>(&self, result: Result<T, RequestError>) -> Result<Response<T>, Status> {
        result.map(Response::new).map_err(|error| {
            self.0.metrics.rejected(error.code());
            error.into()
        })
    }
}

#[tonic::async_trait]
impl corpus_server::Corpus for Corpus {
    async fn load_text(
        &self,
        request: Request<LoadTextRequest>,
    ) -> Result<Response<LoadTextResponse>, Status> {
        let result = self.load(request).await;
        self.answer(result)
    }

    async fn list_texts(
        &self,
        request: Request<ListTextsRequest>,
    ) -> Result<Response<ListTextsResponse>, Status> {
        self.answer(self.list(request))
    }

    async fn drop_text(
        &self,
        request: Request<DropTextRequest>,
    ) -> Result<Response<DropTextResponse>, Status> {
        self.answer(self.unload(request))
    }

    async fn erase_answers(
        &self,
        request: Request<EraseAnswersRequest>,
    ) -> Result<Response<EraseAnswersResponse>, Status> {
        let result = self.erase(request).await;
        self.answer(result)
    }
}
