//! The values of metadata.

use std::fmt;

use bytes::Bytes;

use crate::cursor::Cursor;
use crate::{Fault, GgufError};

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // Each is what its name says.
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    Str(String),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of metadata, its elements all of one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)] // Each is what its name says.
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    Str(Strings),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// The type of a metadata value, in GGUF's numbering.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // Each is what its name says.
pub enum ValueType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    Str = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl ValueType {
    const ALL: [Self; 13] = [
        Self::U8,
        Self::I8,
        Self::U16,
        Self::I16,
        Self::U32,
        Self::I32,
        Self::F32,
        Self::Bool,
        Self::Str,
        Self::Array,
        Self::U64,
        Self::I64,
        Self::F64,
    ];

    fn read(cursor: &mut Cursor<'_>) -> Result<Self, Fault> {
        let id = cursor.u32()?;
        let known = Self::ALL.get(id as usize).copied();
        known.ok_or(Fault::UnknownValueType { id })
    }
}

impl fmt::Display for ValueType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::U8 => "u8",
            Self::I8 => "i8",
            Self::U16 => "u16",
            Self::I16 => "i16",
            Self::U32 => "u32",
            Self::I32 => "i32",
            Self::F32 => "f32",
            Self::Bool => "bool",
            Self::Str => "string",
            Self::Array => "array",
            Self::U64 => "u64",
            Self::I64 => "i64",
            Self::F64 => "f64",
        })
    }
}

/// An array of strings that stays where it is in the file: a vocabulary has 150,000.
#[derive(Clone)]
pub struct Strings {
    /// As in the file: each a length of 8 bytes, then its UTF-8.
    encoded: Bytes,
    /// Where each string's length is in `encoded`.
    starts: Vec<usize>,
}

impl Strings {
    /// How many there are.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The string at `index`.
    pub fn get(&self, index: usize) -> Option<&str> {
        let start = *self.starts.get(index)? + 8;
        let end = self.starts.get(index + 1).copied();
        let end = end.unwrap_or(self.encoded.len());
        std::str::from_utf8(&self.encoded[start..end]).ok()
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &str> {
        (0..self.len()).map(|index| self.get(index).unwrap_or_default())
    }

    fn read(cursor: &mut Cursor<'_>) -> Result<Self, Fault> {
        let count = cursor.count("strings", 8)?;
        let base = cursor.offset();
        let mut starts = Vec::with_capacity(count);
        for _ in 0..count {
            starts.push(cursor.offset() - base);
            cursor.str()?;
        }
        Ok(Self {
            encoded: cursor.since(base),
            starts,
        })
    }
}

impl<S: AsRef<str>> FromIterator<S> for Strings {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Self {
        let (mut encoded, mut starts) = (Vec::new(), Vec::new());
        for string in strings {
            starts.push(encoded.len());
            write_str(&mut encoded, string.as_ref());
        }
        Self {
            encoded: encoded.into(),
            starts,
        }
    }
}

impl PartialEq for Strings {
    fn eq(&self, other: &Self) -> bool {
        self.encoded == other.encoded
    }
}

impl fmt::Debug for Strings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

/// Appends a string as GGUF has it.
pub(crate) fn write_str(out: &mut Vec<u8>, string: &str) {
    out.extend((string.len() as u64).to_le_bytes());
    out.extend(string.as_bytes());
}

fn bool_of(byte: u8) -> Result<bool, Fault> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Fault::NotBool { byte }),
    }
}

/// A whole array of numbers, each made of `N` bytes.
fn numbers<const N: usize, T>(
    cursor: &mut Cursor<'_>,
    number: impl Fn([u8; N]) -> T,
) -> Result<Vec<T>, Fault> {
    let count = cursor.count("elements", N)?;
    let bytes = cursor.take((count * N) as u64)?;
    Ok(bytes.as_chunks().0.iter().map(|&b| number(b)).collect())
}

/// What is the same for every type of number.
macro_rules! for_numbers {
    ($($variant:ident $number:ty),*) => {
        impl Value {
            /// Its type.
            pub fn value_type(&self) -> ValueType {
                match self {
                    $(Self::$variant(_) => ValueType::$variant,)*
                    Self::Bool(_) => ValueType::Bool,
                    Self::Str(_) => ValueType::Str,
                    Self::Array(_) => ValueType::Array,
                }
            }

            pub(crate) fn read(cursor: &mut Cursor<'_>) -> Result<Self, Fault> {
                Ok(match ValueType::read(cursor)? {
                    $(ValueType::$variant => {
                        Self::$variant(<$number>::from_le_bytes(cursor.array()?))
                    })*
                    ValueType::Bool => {
                        let [byte] = cursor.array()?;
                        Self::Bool(bool_of(byte)?)
                    }
                    ValueType::Str => Self::Str(cursor.str()?.to_owned()),
                    ValueType::Array => Self::Array(Array::read(cursor)?),
                })
            }

            /// Appends type and value.
            pub(crate) fn write(&self, out: &mut Vec<u8>) {
                out.extend((self.value_type() as u32).to_le_bytes());
                match self {
                    $(Self::$variant(number) => out.extend(number.to_le_bytes()),)*
                    Self::Bool(value) => out.push(u8::from(*value)),
                    Self::Str(string) => write_str(out, string),
                    Self::Array(array) => array.write(out),
                }
            }
        }

        impl Array {
            /// The type of its elements.
            pub fn element_type(&self) -> ValueType {
                match self {
                    $(Self::$variant(_) => ValueType::$variant,)*
                    Self::Bool(_) => ValueType::Bool,
                    Self::Str(_) => ValueType::Str,
                }
            }

            /// How many elements there are.
            pub fn len(&self) -> usize {
                match self {
                    $(Self::$variant(numbers) => numbers.len(),)*
                    Self::Bool(values) => values.len(),
                    Self::Str(strings) => strings.len(),
                }
            }

            fn read(cursor: &mut Cursor<'_>) -> Result<Self, Fault> {
                Ok(match ValueType::read(cursor)? {
                    $(ValueType::$variant => {
                        Self::$variant(numbers(cursor, <$number>::from_le_bytes)?)
                    })*
                    ValueType::Bool => {
                        let bytes = numbers(cursor, |[byte]: [u8; 1]| byte)?;
                        Self::Bool(bytes.into_iter().map(bool_of).collect::<Result<_, _>>()?)
                    }
                    ValueType::Str => Self::Str(Strings::read(cursor)?),
                    ValueType::Array => return Err(Fault::NestedArray),
                })
            }

            fn write(&self, out: &mut Vec<u8>) {
                out.extend((self.element_type() as u32).to_le_bytes());
                out.extend((self.len() as u64).to_le_bytes());
                match self {
                    $(Self::$variant(numbers) => {
                        out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
                    })*
                    Self::Bool(values) => out.extend(values.iter().map(|&value| u8::from(value))),
                    Self::Str(strings) => out.extend_from_slice(&strings.encoded),
                }
            }
        }

        $(
            impl From<$number> for Value {
                fn from(number: $number) -> Self {
                    Self::$variant(number)
                }
            }

            impl From<Vec<$number>> for Value {
                fn from(numbers: Vec<$number>) -> Self {
                    Self::Array(Array::$variant(numbers))
                }
            }
        )*
    };
}

for_numbers!(U8 u8, I8 i8, U16 u16, I16 i16, U32 u32, I32 i32, F32 f32, U64 u64, I64 i64, F64 f64);

impl Array {
    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<&str> for Value {
    fn from(string: &str) -> Self {
        Self::Str(string.to_owned())
    }
}

impl From<String> for Value {
    fn from(string: String) -> Self {
        Self::Str(string)
    }
}

impl From<Strings> for Value {
    fn from(strings: Strings) -> Self {
        Self::Array(Array::Str(strings))
    }
}

impl Value {
    /// Any integer type.
    fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Self::U8(number) => number.into(),
            Self::I8(number) => number.into(),
            Self::U16(number) => number.into(),
            Self::I16(number) => number.into(),
            Self::U32(number) => number.into(),
            Self::I32(number) => number.into(),
            Self::U64(number) => number.into(),
            Self::I64(number) => number.into(),
            _ => return None,
        })
    }

    /// Type, and value if that is a number, for messages.
    pub(crate) fn describe(&self) -> String {
        let ty = self.value_type();
        match self {
            Self::Array(array) => format!("an array of {} {}", array.len(), array.element_type()),
            Self::F32(number) => format!("{ty} {number}"),
            Self::F64(number) => format!("{ty} {number}"),
            Self::Bool(value) => format!("{ty} {value}"),
            _ => match self.as_integer() {
                Some(integer) => format!("{ty} {integer}"),
                None => format!("a {ty}"),
            },
        }
    }
}

/// What a metadata value can be read as.
pub trait FromValue<'a>: Sized {
    /// Reads the value of `key`, or says that it has another type.
    fn from_value(key: &str, value: &'a Value) -> Result<Self, GgufError>;
}

/// Integers convert if they fit: writers disagree about widths.
macro_rules! from_integers {
    ($($integer:ident),*) => {$(
        impl FromValue<'_> for $integer {
            fn from_value(key: &str, value: &Value) -> Result<Self, GgufError> {
                value
                    .as_integer()
                    .and_then(|integer| integer.try_into().ok())
                    .ok_or_else(|| GgufError::wrong_type(key, stringify!($integer), value.describe()))
            }
        }
    )*};
}

from_integers!(u32, u64, usize);

/// Types that are read as they are.
macro_rules! from_same {
    ($($pattern:pat => $result:expr, $target:ty, $name:literal;)*) => {$(
        impl<'a> FromValue<'a> for $target {
            fn from_value(key: &str, value: &'a Value) -> Result<Self, GgufError> {
                match value {
                    $pattern => Ok($result),
                    _ => Err(GgufError::wrong_type(key, $name, value.describe())),
                }
            }
        }
    )*};
}

from_same! {
    Value::F32(number) => *number, f32, "f32";
    Value::Bool(value) => *value, bool, "bool";
    Value::Str(string) => string, &'a str, "a string";
    Value::Array(array) => array, &'a Array, "an array";
    Value::Array(Array::Str(strings)) => strings, &'a Strings, "an array of strings";
    Value::Array(Array::I32(numbers)) => numbers, &'a [i32], "an array of i32";
    Value::Array(Array::F32(numbers)) => numbers, &'a [f32], "an array of f32";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_convert_if_they_fit() {
        assert_eq!(u32::from_value("k", &Value::U64(7)).unwrap(), 7);
        assert_eq!(usize::from_value("k", &Value::I8(7)).unwrap(), 7);
        let error = u32::from_value("k", &Value::I32(-1)).unwrap_err();
        assert_eq!(error.to_string(), "metadata `k` is i32 -1, not u32");
        assert!(u32::from_value("k", &Value::U64(1 << 32)).is_err());
        assert!(u32::from_value("k", &Value::F32(1.0)).is_err());
    }

    #[test]
    fn other_types_do_not_convert() {
        let error = f32::from_value("k", &Value::U32(1)).unwrap_err();
        assert_eq!(error.to_string(), "metadata `k` is u32 1, not f32");
        let array = Value::from(vec![1i32, 2]);
        let error = <&Strings>::from_value("k", &array).unwrap_err();
        assert_eq!(
            error.to_string(),
            "metadata `k` is an array of 2 i32, not an array of strings"
        );
        assert_eq!(<&[i32]>::from_value("k", &array).unwrap(), [1, 2]);
    }

    #[test]
    fn strings_are_found_by_index() {
        let strings: Strings = ["", "ab", "", "ü"].into_iter().collect();
        assert_eq!(strings.iter().collect::<Vec<_>>(), ["", "ab", "", "ü"]);
        assert_eq!(strings.get(3), Some("ü"));
        assert_eq!(strings.get(4), None);
    }

    #[test]
    fn value_types_have_their_numbers() {
        for (id, ty) in ValueType::ALL.into_iter().enumerate() {
            assert_eq!(ty as usize, id);
        }
    }
}
