//! The life of a rank other than 0: a process that loads its part of the model and follows.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use shoal_collective::CollectiveError;
use shoal_collective::shm::{Ring, Segment};
use shoal_engine::backend::{Backend, BackendError};
use shoal_engine::cpu::CpuBackend;

use super::GroupError;
use super::line::{Order, Report, receive, send};
use crate::error::WorkerError;
use crate::load;

/// Orders that may wait for a rank that computes.
const ORDERS: usize = 4;

/// Runs a rank, whose standard input is the line to rank 0. When that ends, so does the process,
/// whatever it is doing: a rank has nothing that outlives its group.
///
/// # Errors
/// When the line is none, or the model cannot be loaded.
pub fn run_rank() -> Result<(), WorkerError> {
    let line = io::stdin().as_fd().try_clone_to_owned();
    let line = UnixStream::from(line.map_err(GroupError::Line)?);
    let orders = follow_line(line.try_clone().map_err(GroupError::Line)?)?;
    let mut backend = None;
    while let Ok((order, file)) = orders.recv() {
        match (order, &mut backend) {
            (Order::Load(part), _) => match load::rank(&part) {
                Ok(loaded) => {
                    let numerics_id = loaded.numerics_id().0;
                    backend = Some(loaded);
                    let report = Report::Loaded { numerics_id };
                    send(&line, &report, None).map_err(GroupError::Line)?;
                }
                Err(source) => {
                    let message = source.to_string();
                    send(&line, &Report::Failed { message }, None).map_err(GroupError::Line)?;
                    let path = part.model;
                    return Err(WorkerError::Load { path, source });
                }
            },
            (Order::Meet { epoch, patience_ms }, Some(backend)) => {
                let patience = Duration::from_millis(patience_ms);
                let ended = take_part(backend, epoch, file, patience);
                backend.leave();
                match ended {
                    // Rank 0 calls for another meeting, or the line ends.
                    Err(BackendError::Group(error)) => {
                        tracing::info!(%error, epoch, "the group has ended");
                    }
                    Err(error) => return Err(GroupError::Step(error).into()),
                    Ok(()) => {}
                }
            }
            (Order::Meet { .. }, None) => return Err(GroupError::Order.into()),
        }
    }
    Ok(())
}

/// Steps until the group breaks.
fn take_part(
    backend: &mut CpuBackend,
    epoch: u64,
    file: Option<OwnedFd>,
    patience: Duration,
) -> Result<(), BackendError> {
    let file = file.ok_or(CollectiveError::Segment)?;
    let segment = Arc::new(Segment::open(file)?);
    let seat = Ring::join(segment, backend.rank(), epoch, patience)?;
    backend.join(Box::new(seat))?;
    loop {
        backend.follow()?;
    }
}

/// Passes orders on until the line ends, then ends the process.
fn follow_line(line: UnixStream) -> Result<Receiver<(Order, Option<OwnedFd>)>, GroupError> {
    let (sender, orders) = sync_channel(ORDERS);
    std::thread::Builder::new()
        .name("line".into())
        .spawn(move || {
            let result = pass_on(&line, &sender);
            if let Err(error) = &result {
                tracing::error!(%error, "rank 0 cannot be understood");
            }
            std::process::exit(i32::from(result.is_err()));
        })
        .map_err(GroupError::Line)?;
    Ok(orders)
}

fn pass_on(line: &UnixStream, orders: &SyncSender<(Order, Option<OwnedFd>)>) -> io::Result<()> {
    while let Some(order) = receive(line)? {
        if orders.send(order).is_err() {
            break;
        }
    }
    Ok(())
}
