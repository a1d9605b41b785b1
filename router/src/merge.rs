//! Several streams as one. Most answers have one choice, which then costs no bookkeeping.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use futures::{Stream, StreamExt, stream::SelectAll};

/// The items of all streams, as they come.
pub(crate) enum Merge<S> {
    One(S),
    Many(SelectAll<S>),
    Ended,
}

impl<S: Stream + Unpin> FromIterator<S> for Merge<S> {
    fn from_iter<I: IntoIterator<Item = S>>(streams: I) -> Self {
        let mut streams = streams.into_iter();
        match (streams.next(), streams.next()) {
            (None, _) => Self::Ended,
            (Some(one), None) => Self::One(one),
            (Some(first), Some(second)) => {
                Self::Many([first, second].into_iter().chain(streams).collect())
            }
        }
    }
}

impl<S: Stream + Unpin> Stream for Merge<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        let next = match &mut *self {
            Self::One(stream) => stream.poll_next_unpin(cx),
            Self::Many(streams) => streams.poll_next_unpin(cx),
            Self::Ended => Poll::Ready(None),
        };
        if let Poll::Ready(None) = next {
            *self = Self::Ended;
        }
        next
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, stream};

    use super::*;

    #[test]
    fn every_item_comes_and_the_end_stays() {
        for count in 0..4 {
            let mut merged: Merge<_> = (0..count).map(|i| stream::iter([i, i + 10])).collect();
            let mut items = Vec::new();
            while let Some(item) = merged.next().now_or_never().unwrap() {
                items.push(item);
            }
            items.sort_unstable();
            let expected: Vec<i32> = (0..count).chain(10..10 + count).collect();
            assert_eq!(items, expected);
            assert_eq!(merged.next().now_or_never(), Some(None));
        }
    }
}
