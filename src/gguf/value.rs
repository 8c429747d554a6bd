//! The values of GGUF metadata: twelve scalars and arrays of them, kept as compactly as in the file.

use std::fmt::{self, Display};
use std::io::Read;

use super::reader::{Fault, Reader, bad, grow, quoted};
use crate::{Error, Result};

/// Arrays may hold arrays up to this depth.
const MAX_DEPTH: usize = 4;
/// Arrays inside arrays that one file may have, because each costs more memory than its 12 bytes in the file.
pub(crate) const MAX_INNER_ARRAYS: usize = 65_536;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are GGUF's value types")]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    /// Bytes; UTF-8 as a rule, which the reader does not check.
    String(Vec<u8>),
    Array(Array),
    U64(u64),
    I64(i64),
    F64(f64),
}

/// An array of metadata values of one type.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs, reason = "the variants are GGUF's value types")]
pub enum Array {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    F32(Vec<f32>),
    Bool(Vec<bool>),
    String(StringArray),
    Array(Vec<Array>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F64(Vec<f64>),
}

/// Strings in one buffer: a vocabulary of 128 k tokens is two allocations.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StringArray {
    /// Where each string ends in `bytes`; at most 4 GiB.
    ends: Vec<u32>,
    bytes: Vec<u8>,
}

impl StringArray {
    /// The number of strings.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is no string.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The bytes of string `i`.
    pub fn get(&self, i: usize) -> Option<&[u8]> {
        let end = *self.ends.get(i)? as usize;
        let start = i.checked_sub(1).map_or(0, |i| self.ends[i] as usize);
        Some(&self.bytes[start..end])
    }

    /// String `i` as text.
    ///
    /// # Errors
    /// [`Error::BadModel`] if there is no such string or it is no UTF-8.
    pub fn get_str(&self, i: usize) -> Result<&str> {
        let bytes = self.get(i).ok_or_else(|| {
            Error::BadModel(format!(
                "string {i}: expected an index below {}",
                self.len()
            ))
        })?;
        std::str::from_utf8(bytes).map_err(|_| {
            Error::BadModel(format!(
                "string {i}: expected UTF-8, found {}",
                quoted(bytes)
            ))
        })
    }

    /// The bytes of each string.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> {
        (0..self.len()).map(|i| self.get(i).expect("i is below the number of strings"))
    }

    /// Appends a string.
    ///
    /// # Errors
    /// [`Error::Invalid`] if all strings together would exceed 4 GiB.
    pub fn push(&mut self, string: impl AsRef<[u8]>) -> Result<()> {
        let string = string.as_ref();
        let end = u32::try_from(self.bytes.len() + string.len())
            .map_err(|_| Error::Invalid("string array: expected at most 4 GiB of text".into()))?;
        self.bytes.extend_from_slice(string);
        self.ends.push(end);
        Ok(())
    }

    /// An array of `strings`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if all strings together exceed 4 GiB.
    pub fn from_strings(strings: impl IntoIterator<Item = impl AsRef<[u8]>>) -> Result<Self> {
        let mut out = Self::default();
        for string in strings {
            out.push(string)?;
        }
        Ok(out)
    }
}

impl fmt::Debug for StringArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.iter().map(String::from_utf8_lossy))
            .finish()
    }
}

/// For each number type: GGUF's number, the variant (the same in `Value` and `Array`), the type, its name.
macro_rules! numbers {
    ($do:ident) => {
        $do! {
            0, U8, u8; 1, I8, i8; 2, U16, u16; 3, I16, i16; 4, U32, u32; 5, I32, i32;
            6, F32, f32; 10, U64, u64; 11, I64, i64; 12, F64, f64;
        }
    };
}

const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

macro_rules! number_impls {
    ($($id:literal, $variant:ident, $t:ident;)*) => {
        impl Value {
            /// GGUF's number for the type.
            pub(crate) fn type_id(&self) -> u32 {
                match self {
                    $(Value::$variant(_) => $id,)*
                    Value::Bool(_) => BOOL,
                    Value::String(_) => STRING,
                    Value::Array(_) => ARRAY,
                }
            }

            /// Reads a value of the type with GGUF's number `id`. `inner_arrays` is what the file may still have of
            /// arrays inside arrays.
            pub(crate) fn read<R: Read>(
                r: &mut Reader<R>,
                id: u32,
                inner_arrays: &mut usize,
            ) -> Result<Self, Fault> {
                Ok(match id {
                    $($id => Value::$variant($t::from_le_bytes(r.array(stringify!($t))?)),)*
                    BOOL => Value::Bool(decode_bool(r.array("bool")?)?),
                    STRING => {
                        let mut bytes = Vec::new();
                        r.string(&mut bytes, "string", usize::MAX)?;
                        Value::String(bytes)
                    }
                    ARRAY => Value::Array(Array::read(r, 1, inner_arrays)?),
                    _ => return bad!("value type: expected 0 to 12, found {id}"),
                })
            }

            /// Appends the value as the file has it.
            pub(crate) fn write(&self, out: &mut Vec<u8>) {
                match self {
                    $(Value::$variant(x) => out.extend_from_slice(&x.to_le_bytes()),)*
                    Value::Bool(x) => out.push(u8::from(*x)),
                    Value::String(x) => write_string(out, x),
                    Value::Array(x) => x.write(out),
                }
            }
        }

        impl Array {
            /// The number of elements.
            pub fn len(&self) -> usize {
                match self {
                    $(Array::$variant(v) => v.len(),)*
                    Array::Bool(v) => v.len(),
                    Array::String(v) => v.len(),
                    Array::Array(v) => v.len(),
                }
            }

            /// GGUF's number for the type of the elements.
            fn type_id(&self) -> u32 {
                match self {
                    $(Array::$variant(_) => $id,)*
                    Array::Bool(_) => BOOL,
                    Array::String(_) => STRING,
                    Array::Array(_) => ARRAY,
                }
            }

            /// Element `i` by itself: a copy.
            pub fn get(&self, i: usize) -> Option<Value> {
                Some(match self {
                    $(Array::$variant(v) => Value::$variant(*v.get(i)?),)*
                    Array::Bool(v) => Value::Bool(*v.get(i)?),
                    Array::String(v) => Value::String(v.get(i)?.to_vec()),
                    Array::Array(v) => Value::Array(v.get(i)?.clone()),
                })
            }

            fn read<R: Read>(
                r: &mut Reader<R>,
                depth: usize,
                inner_arrays: &mut usize,
            ) -> Result<Self, Fault> {
                let id = r.u32("array element type")?;
                Ok(match id {
                    $($id => {
                        let n = r.count(
                            concat!("count of ", stringify!($t), " in an array"),
                            size_of::<$t>() as u64,
                            usize::MAX,
                        )?;
                        Array::$variant(r.values(n, |b| Ok($t::from_le_bytes(b)))?)
                    })*
                    BOOL => {
                        let n = r.count("count of bools in an array", 1, usize::MAX)?;
                        Array::Bool(r.values(n, decode_bool)?)
                    }
                    STRING => {
                        let n = r.count("count of strings in an array", 8, usize::MAX)?;
                        Array::String(read_strings(r, n)?)
                    }
                    ARRAY => {
                        if depth == MAX_DEPTH {
                            return bad!("array: expected at most {MAX_DEPTH} levels, found more");
                        }
                        let n = r.count("count of arrays in an array", 12, *inner_arrays)?;
                        *inner_arrays -= n;
                        let mut v = Vec::new();
                        for _ in 0..n {
                            grow(&mut v, 1, n)?;
                            v.push(Array::read(r, depth + 1, inner_arrays)?);
                        }
                        Array::Array(v)
                    }
                    _ => return bad!("array element type: expected 0 to 12, found {id}"),
                })
            }

            fn write(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.type_id().to_le_bytes());
                out.extend_from_slice(&(self.len() as u64).to_le_bytes());
                match self {
                    $(Array::$variant(v) => v.iter().for_each(|x| out.extend_from_slice(&x.to_le_bytes())),)*
                    Array::Bool(v) => v.iter().for_each(|x| out.push(u8::from(*x))),
                    Array::String(v) => v.iter().for_each(|x| write_string(out, x)),
                    Array::Array(v) => v.iter().for_each(|x| x.write(out)),
                }
            }
        }

        $(impl From<$t> for Value {
            fn from(x: $t) -> Self {
                Value::$variant(x)
            }
        }

        impl From<Vec<$t>> for Value {
            fn from(v: Vec<$t>) -> Self {
                Value::Array(Array::$variant(v))
            }
        })*

        fn type_name(id: u32) -> &'static str {
            match id {
                $($id => stringify!($t),)*
                BOOL => "bool",
                STRING => "string",
                _ => "array",
            }
        }
    };
}
numbers!(number_impls);

fn decode_bool([byte]: [u8; 1]) -> Result<bool, Fault> {
    match byte {
        0 => Ok(false),
        1 => Ok(true),
        _ => bad!("bool: expected 0 or 1, found {byte}"),
    }
}

fn read_strings<R: Read>(r: &mut Reader<R>, n: usize) -> Result<StringArray, Fault> {
    let mut out = StringArray::default();
    for i in 0..n {
        let start = out.bytes.len();
        if start == out.bytes.capacity() {
            grow(&mut out.bytes, 1, usize::MAX)?;
        }
        r.string(&mut out.bytes, "string", u32::MAX as usize - start)
            .map_err(|e| e.within(format_args!("element {i}")))?;
        grow(&mut out.ends, 1, n)?;
        out.ends.push(out.bytes.len() as u32); // no longer than u32::MAX, as the line above asks for
    }
    out.bytes.shrink_to_fit();
    Ok(out)
}

pub(crate) fn write_string(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

impl Array {
    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements as integers, if the type is one.
    pub(crate) fn integers(&self) -> Option<Box<dyn Iterator<Item = i128> + '_>> {
        Some(match self {
            Array::U8(v) => Box::new(v.iter().map(|x| i128::from(*x))),
            Array::I8(v) => Box::new(v.iter().map(|x| i128::from(*x))),
            Array::U16(v) => Box::new(v.iter().map(|x| i128::from(*x))),
            Array::I16(v) => Box::new(v.iter().map(|x| i128::from(*x))),
            Array::U32(v) => Box::new(v.iter().map(|x| i128::from(*x))),
            Array::I32(v) => Box::new(v.iter().map(|x| i128::from(*x))),
            Array::U64(v) => Box::new(v.iter().map(|x| i128::from(*x))),
            Array::I64(v) => Box::new(v.iter().map(|x| i128::from(*x))),
            _ => return None,
        })
    }
}

impl Value {
    /// The value of any integer type.
    pub fn as_integer(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(x) => x.into(),
            Value::I8(x) => x.into(),
            Value::U16(x) => x.into(),
            Value::I16(x) => x.into(),
            Value::U32(x) => x.into(),
            Value::I32(x) => x.into(),
            Value::U64(x) => x.into(),
            Value::I64(x) => x.into(),
            _ => return None,
        })
    }

    /// The value of either float type.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            Value::F32(x) => Some(x.into()),
            Value::F64(x) => Some(x),
            _ => None,
        }
    }

    /// The truth value.
    pub fn as_bool(&self) -> Option<bool> {
        match *self {
            Value::Bool(x) => Some(x),
            _ => None,
        }
    }

    /// The string, if it is one and UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        self.as_bytes().and_then(|x| std::str::from_utf8(x).ok())
    }

    /// The bytes of the string.
    pub fn as_bytes(&self) -> Option<&[u8]> {
        match self {
            Value::String(x) => Some(x),
            _ => None,
        }
    }

    /// The array.
    pub fn as_array(&self) -> Option<&Array> {
        match self {
            Value::Array(x) => Some(x),
            _ => None,
        }
    }

    /// The type in words: `u32`, `array of 12 strings`.
    pub fn type_name(&self) -> String {
        match self {
            Value::Array(x) => format!("array of {} {}s", x.len(), type_name(x.type_id())),
            _ => type_name(self.type_id()).into(),
        }
    }
}

/// The value on one line, safe to print: strings quoted, escaped and cut, arrays cut after a few elements.
impl Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::F32(x) => write!(f, "{x:?}"),
            Value::F64(x) => write!(f, "{x:?}"),
            Value::Bool(x) => write!(f, "{x}"),
            Value::String(x) => f.write_str(&quoted(x)),
            Value::Array(x) => {
                const SHOWN: usize = 6;
                f.write_str("[")?;
                for i in 0..x.len().min(SHOWN) {
                    let comma = if i == 0 { "" } else { ", " };
                    let value = x.get(i).expect("i is below the length");
                    write!(f, "{comma}{value}")?;
                }
                if x.len() > SHOWN {
                    write!(f, ", … ({} in all)", x.len())?;
                }
                f.write_str("]")
            }
            _ => match self.as_integer() {
                Some(x) => write!(f, "{x}"),
                None => f.write_str(&self.type_name()),
            },
        }
    }
}

impl From<bool> for Value {
    fn from(x: bool) -> Self {
        Value::Bool(x)
    }
}

impl From<&str> for Value {
    fn from(x: &str) -> Self {
        Value::String(x.into())
    }
}

impl From<String> for Value {
    fn from(x: String) -> Self {
        Value::String(x.into_bytes())
    }
}

impl From<StringArray> for Value {
    fn from(x: StringArray) -> Self {
        Value::Array(Array::String(x))
    }
}

impl From<Vec<bool>> for Value {
    fn from(v: Vec<bool>) -> Self {
        Value::Array(Array::Bool(v))
    }
}
