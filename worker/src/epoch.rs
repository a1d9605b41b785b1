//! Epochs tell one start of an engine, or of a rank group, from those before it.

use std::time::SystemTime;

/// The time, in microseconds: it rises with every start on one machine.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    now.map_or(1, |time| time.as_micros() as u64)
}
