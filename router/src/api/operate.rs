//! The operators' door: `shoal.admin.v1`.

use std::{sync::Arc, time::Duration};

use shoal_proto::admin::{
    DrainRequest, DrainResponse, GetLoadRequest, GetLoadResponse, GetStatusRequest,
    GetStatusResponse, UndrainRequest, UndrainResponse, admin_server,
};
use tonic::{Request, Response, Status};

use super::context::Context;
use crate::{drain, error::RequestError, service::Service, status};

/// The gRPC service.
#[derive(Debug)]
pub(crate) struct Admin(pub(super) Arc<Service>);

impl Admin {
    /// The request's message, where its caller is an operator.
    fn admit<T>(&self, mut request: Request<T>) -> Result<T, RequestError> {
        let context = request.extensions_mut().remove::<Context>();
        let context = context.ok_or(RequestError::Unauthenticated)?;
        context.authorize_operator()?;
        Ok(request.into_inner())
    }

    fn status(&self, error: RequestError) -> Status {
        self.0.metrics.rejected(error.code());
        error.into()
    }
}

#[tonic::async_trait]
impl admin_server::Admin for Admin {
    async fn get_status(
        &self,
        request: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusResponse>, Status> {
        self.admit(request).map_err(|error| self.status(error))?;
        Ok(Response::new(status::status(&self.0)))
    }

    async fn get_load(
        &self,
        request: Request<GetLoadRequest>,
    ) -> Result<Response<GetLoadResponse>, Status> {
        self.admit(request).map_err(|error| self.status(error))?;
        Ok(Response::new(status::load(&self.0)))
    }

    async fn drain(
        &self,
        request: Request<DrainRequest>,
    ) -> Result<Response<DrainResponse>, Status> {
        let drain = async {
            let request = self.admit(request)?;
            let deadline = Duration::from_millis(request.deadline_ms.into());
            let deadline = (!deadline.is_zero()).then_some(deadline);
            drain::drain(&self.0.cluster, &request.group, deadline, request.wait).await
        };
        let left = drain.await.map_err(|error| self.status(error))?;
        Ok(Response::new(left))
    }

    async fn undrain(
        &self,
        request: Request<UndrainRequest>,
    ) -> Result<Response<UndrainResponse>, Status> {
        let undrain = async {
            let request = self.admit(request)?;
            drain::undrain(&self.0.cluster, &request.group).await
        };
        undrain.await.map_err(|error| self.status(error))?;
        Ok(Response::new(UndrainResponse {}))
    }
}
