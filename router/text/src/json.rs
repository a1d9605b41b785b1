//! JSON laid out as Python's `json.dumps` lays it out.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Serializer;
use serde_json::ser::{Formatter, PrettyFormatter};

/// Writes `value` as JSON: on one line, or with `indent` blanks per level.
pub(crate) fn write_python(
    value: &impl Serialize,
    indent: Option<usize>,
    out: &mut impl Write,
) -> Result<(), serde_json::Error> {
    match indent {
        None => value.serialize(&mut Serializer::with_formatter(out, OneLine)),
        Some(width) => {
            let indent = vec![b' '; width.min(MAX_INDENT)];
            let layout = PrettyFormatter::with_indent(&indent);
            value.serialize(&mut Serializer::with_formatter(out, layout))
        }
    }
}

const MAX_INDENT: usize = 16;

/// A blank after each comma and colon.
struct OneLine;

impl Formatter for OneLine {
    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        out.write_all(if first { b"" } else { b", " })
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(b": ")
    }
}

#[cfg(test)]
mod tests {
    use super::write_python;
    use serde_json::{Value, json};

    fn python(value: &Value, indent: Option<usize>) -> String {
        let mut out = Vec::new();
        write_python(value, indent, &mut out).expect("JSON");
        String::from_utf8(out).expect("JSON is UTF-8")
    }

    #[test]
    fn the_layout_is_pythons() {
        let value = json!({"a": [1, 2.5, null], "b": {}, "c": "<é'\n>"});
        assert_eq!(
            python(&value, None),
            r#"{"a": [1, 2.5, null], "b": {}, "c": "<é'\n>"}"#
        );
        assert_eq!(
            python(&json!({"a": [1], "b": []}), Some(2)),
            "{\n  \"a\": [\n    1\n  ],\n  \"b\": []\n}"
        );
    }
}
