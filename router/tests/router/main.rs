//! A router over real sockets, before scripted workers.

mod disconnect;
mod errors;
mod failover;
mod grpc;
mod health;
mod limits;
mod mock;
mod openai;
mod stream;
mod support;
