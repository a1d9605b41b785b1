//! A whole worker over real sockets, with a backend that needs no model.

#![allow(clippy::unwrap_used)]

mod bulk;
mod fake;
mod group;
mod life;
mod load;
mod member;
mod model;
mod rig;
mod service;
mod session;
