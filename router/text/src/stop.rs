//! Stop strings in text that arrives piece by piece.

use crate::error::StopError;

/// Most stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 16;
/// Longest stop string, in bytes.
pub const MAX_STOP_BYTES: usize = 1024;

/// Finds the first stop string to be completed in a stream of text, and holds back what may
/// be the beginning of one. Of those completed by the same character the longest counts.
///
/// Each byte costs amortized constant time per stop string (Knuth, Morris & Pratt 1977).
pub struct StopMatcher {
    stops: Vec<Stop>,
    /// Text that may be the beginning of a stop string.
    held: String,
    matched: Option<usize>,
}

impl StopMatcher {
    /// Looks for any of `stops`; none is fine.
    ///
    /// # Errors
    /// If there are too many, or one is empty or too long.
    pub fn new(stops: Vec<String>) -> Result<Self, StopError> {
        if stops.len() > MAX_STOP_STRINGS {
            return Err(StopError::TooMany {
                count: stops.len(),
                limit: MAX_STOP_STRINGS,
            });
        }
        for (index, text) in stops.iter().enumerate() {
            match text.len() {
                0 => return Err(StopError::Empty { index }),
                1..=MAX_STOP_BYTES => {}
                bytes => {
                    return Err(StopError::TooLong {
                        index,
                        bytes,
                        limit: MAX_STOP_BYTES,
                    });
                }
            }
        }
        Ok(Self {
            stops: stops.into_iter().map(Stop::new).collect(),
            held: String::new(),
            matched: None,
        })
    }

    /// Takes the next piece of text and appends to `out` what is safe to show. True once a stop
    /// string is complete: it and all that follows are dropped.
    pub fn push(&mut self, piece: &str, out: &mut String) -> bool {
        if self.matched.is_some() {
            return true;
        }
        self.held.push_str(piece);
        let unseen = self.held.len() - piece.len();
        for (at, byte) in piece.bytes().enumerate() {
            let mut longest = 0;
            for (index, stop) in self.stops.iter_mut().enumerate() {
                if stop.advance(byte) && stop.text.len() > longest {
                    longest = stop.text.len();
                    self.matched = Some(index);
                }
            }
            if self.matched.is_some() {
                out.push_str(&self.held[..unseen + at + 1 - longest]);
                self.held.clear();
                return true;
            }
        }
        let possible = self
            .stops
            .iter()
            .map(|stop| stop.progress)
            .max()
            .unwrap_or(0);
        let safe = self.held.len() - possible;
        out.push_str(&self.held[..safe]);
        self.held.drain(..safe);
        false
    }

    /// Ends the text: appends what was held back, for it became no stop string.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// The stop string that was found.
    pub fn matched(&self) -> Option<&str> {
        self.matched.map(|index| self.stops[index].text.as_str())
    }
}

struct Stop {
    text: String,
    /// For each prefix, the length of its longest proper prefix that is also its suffix.
    borders: Vec<usize>,
    /// How much of `text` the stream ends with; less than all of it.
    progress: usize,
}

impl Stop {
    fn new(text: String) -> Self {
        let bytes = text.as_bytes();
        let mut borders = vec![0; bytes.len()];
        let mut border = 0;
        for at in 1..bytes.len() {
            while border > 0 && bytes[at] != bytes[border] {
                border = borders[border - 1];
            }
            border += usize::from(bytes[at] == bytes[border]);
            borders[at] = border;
        }
        Self {
            text,
            borders,
            progress: 0,
        }
    }

    /// Takes the next byte of the stream; whether it completes the stop string.
    fn advance(&mut self, byte: u8) -> bool {
        let text = self.text.as_bytes();
        while self.progress > 0 && text[self.progress] != byte {
            self.progress = self.borders[self.progress - 1];
        }
        self.progress += usize::from(text[self.progress] == byte);
        let complete = self.progress == text.len();
        if complete {
            self.progress = 0;
        }
        complete
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stream<'t>(
        stops: &[&str],
        pieces: impl IntoIterator<Item = &'t str>,
    ) -> (String, Option<String>) {
        let stops = stops.iter().map(|stop| stop.to_string()).collect();
        let mut matcher = StopMatcher::new(stops).expect("within the limits");
        let mut out = String::new();
        for piece in pieces {
            matcher.push(piece, &mut out);
        }
        matcher.finish(&mut out);
        (out, matcher.matched().map(str::to_owned))
    }

    /// The text up to the stop string that ends first, the longest of those.
    fn naive(stops: &[String], text: &str) -> (String, Option<String>) {
        let first = stops
            .iter()
            .filter_map(|stop| Some((text.find(stop.as_str())?, stop)))
            .min_by_key(|(start, stop)| (start + stop.len(), *start));
        match first {
            Some((start, stop)) => (text[..start].to_owned(), Some(stop.clone())),
            None => (text.to_owned(), None),
        }
    }

    #[test]
    fn a_stop_string_across_pieces_is_found() {
        let found = stream(&["\nUser:"], ["Hello", ".\nUs", "er", ": and more", "!"]);
        assert_eq!(found, ("Hello.".into(), Some("\nUser:".into())));
    }

    #[test]
    fn a_false_start_is_shown_as_soon_as_it_is_one() {
        let mut matcher = StopMatcher::new(vec!["###".into()]).expect("within the limits");
        let mut out = String::new();
        assert!(!matcher.push("a##", &mut out));
        assert_eq!(out, "a");
        assert!(!matcher.push("b#", &mut out));
        assert_eq!(out, "a##b");
        matcher.finish(&mut out);
        assert_eq!(out, "a##b#");
    }

    #[test]
    fn the_longest_of_those_that_end_together_counts() {
        assert_eq!(
            stream(&["b", "ab"], ["xab"]),
            ("x".into(), Some("ab".into()))
        );
        assert_eq!(
            stream(&["abcd", "bc"], ["abcd"]),
            ("a".into(), Some("bc".into()))
        );
    }

    #[test]
    fn limits_are_enforced() {
        let new = |stops| StopMatcher::new(stops).err();
        assert!(matches!(
            new(vec![String::new()]),
            Some(StopError::Empty { index: 0 })
        ));
        assert!(matches!(
            new(vec!["x".repeat(MAX_STOP_BYTES + 1)]),
            Some(StopError::TooLong { index: 0, .. })
        ));
        assert!(matches!(
            new(vec!["x".into(); MAX_STOP_STRINGS + 1]),
            Some(StopError::TooMany { count: 17, .. })
        ));
        assert!(new(vec!["x".repeat(MAX_STOP_BYTES); MAX_STOP_STRINGS]).is_none());
    }

    proptest! {
        #[test]
        fn streaming_equals_a_search_in_the_whole_text(
            stops in prop::collection::vec("[abé]{1,5}", 0..4),
            pieces in prop::collection::vec("[abé]{0,6}", 0..12),
        ) {
            let mut matcher = StopMatcher::new(stops.clone()).expect("within the limits");
            let mut out = String::new();
            let mut seen = String::new();
            for piece in &pieces {
                seen.push_str(piece);
                matcher.push(piece, &mut out);
                // What is held back is no more than the longest possible beginning.
                if matcher.matched().is_none() {
                    let held = &seen[out.len()..];
                    prop_assert!(held.is_empty() || stops.iter().any(|stop| stop.starts_with(held)));
                }
            }
            matcher.finish(&mut out);
            prop_assert_eq!((out, matcher.matched().map(str::to_owned)), naive(&stops, &pieces.concat()));
        }
    }
}
