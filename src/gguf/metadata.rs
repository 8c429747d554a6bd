//! The metadata of a model file: an ordered map with typed getters.
//!
//! A getter accepts what fits (any integer type for `u32`), and its error names the key, what was expected and what
//! was found. The `opt_` forms return `None` for an absent key; a present value of a wrong type is an error there too.

use std::borrow::Cow;

use super::reader::quoted;
use super::value::{Array, StringArray, Value};
use crate::{Error, Result};

/// More layers than any model has; bounds what a per-layer getter allocates.
const MAX_LAYERS: usize = 65_536;

/// Keys and values in the order of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata {
    entries: Vec<(Box<str>, Value)>,
    /// Indices into `entries`, sorted by key.
    by_key: Vec<u32>,
}

fn wrong(key: &str, expected: &str, found: Option<&Value>) -> Error {
    let found = match found {
        None => "nothing".into(),
        Some(v @ Value::Array(_)) => v.type_name(),
        Some(v) => format!("{} {v}", v.type_name()),
    };
    Error::BadModel(format!(
        "metadata key {}: expected {expected}, found {found}",
        quoted(key.as_bytes())
    ))
}

/// A getter and its optional form: `$convert` turns a value into what is wanted, or `None`.
macro_rules! getters {
    ($($(#[$doc:meta])* $name:ident, $opt:ident -> $t:ty, $expected:literal, $convert:expr;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// [`Error::BadModel`] if the key is absent or its value is something else.
        pub fn $name(&self, key: &str) -> Result<$t> {
            self.$opt(key)?.ok_or_else(|| wrong(key, $expected, None))
        }

        $(#[$doc])*
        /// `None` if the key is absent.
        ///
        /// # Errors
        /// [`Error::BadModel`] if the value is something else.
        pub fn $opt(&self, key: &str) -> Result<Option<$t>> {
            self.convert(key, $expected, $convert)
        }
    )*};
}

fn integer<T: TryFrom<i128>>(v: &Value) -> Option<T> {
    v.as_integer().and_then(|x| T::try_from(x).ok())
}

/// The elements of an integer array; `None` if one does not fit.
fn integers<T: TryFrom<i128>>(a: &Array) -> Option<Vec<T>> {
    a.integers()?.map(|x| T::try_from(x).ok()).collect()
}

impl Metadata {
    /// No keys.
    pub fn new() -> Self {
        Self::default()
    }

    /// A map of `entries`; `Err` is a key that occurs twice.
    pub(crate) fn from_entries(entries: Vec<(Box<str>, Value)>) -> Result<Self, Box<str>> {
        let mut by_key: Vec<u32> = (0..entries.len() as u32).collect();
        let key = |i: &u32| &*entries[*i as usize].0;
        by_key.sort_unstable_by(|a, b| key(a).cmp(key(b)));
        if let Some(pair) = by_key.windows(2).find(|w| key(&w[0]) == key(&w[1])) {
            return Err(key(&pair[0]).into());
        }
        Ok(Self { entries, by_key })
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Keys and values in the order of the file.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.entries.iter().map(|(k, v)| (&**k, v))
    }

    fn search(&self, key: &str) -> Result<usize, usize> {
        self.by_key
            .binary_search_by(|i| (*self.entries[*i as usize].0).cmp(key))
    }

    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        let at = self.search(key).ok()?;
        Some(&self.entries[self.by_key[at] as usize].1)
    }

    /// Sets `key`: in its place if it exists, else as the last one.
    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        match self.search(key) {
            Ok(at) => self.entries[self.by_key[at] as usize].1 = value.into(),
            Err(at) => {
                self.by_key.insert(at, self.entries.len() as u32);
                self.entries.push((key.into(), value.into()));
            }
        }
    }

    /// Takes `key` out.
    pub fn remove(&mut self, key: &str) -> Option<Value> {
        let at = self.search(key).ok()?;
        let removed = self.by_key.remove(at);
        for i in &mut self.by_key {
            *i -= u32::from(*i > removed);
        }
        Some(self.entries.remove(removed as usize).1)
    }

    fn convert<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.get(key)
            .map(|v| convert(v).ok_or_else(|| wrong(key, expected, Some(v))))
            .transpose()
    }

    getters! {
        /// An integer of any type that fits a `u32`.
        u32, opt_u32 -> u32, "an integer of 32 bits, not negative", integer;
        /// An integer of any type that fits an `i32`.
        i32, opt_i32 -> i32, "an integer of 32 bits", integer;
        /// An integer of any type that fits a `u64`.
        u64, opt_u64 -> u64, "an integer, not negative", integer;
        /// An integer of any type that fits a `usize`.
        usize, opt_usize -> usize, "an integer, not negative", integer;
        /// A float of either type.
        f32, opt_f32 -> f32, "a float", |v| v.as_float().map(|x| x as f32);
        /// A truth value.
        bool, opt_bool -> bool, "a bool", Value::as_bool;
        /// A string that is UTF-8.
        str, opt_str -> &str, "a string in UTF-8", Value::as_str;
        /// The bytes of a string.
        bytes, opt_bytes -> &[u8], "a string", Value::as_bytes;
        /// An array of strings.
        strings, opt_strings -> &StringArray, "an array of strings", |v| match v {
            Value::Array(Array::String(a)) => Some(a),
            _ => None,
        };
        /// An array of floats.
        f32s, opt_f32s -> Cow<'_, [f32]>, "an array of floats", |v| match v {
            Value::Array(Array::F32(a)) => Some(Cow::from(a)),
            Value::Array(Array::F64(a)) => Some(a.iter().map(|x| *x as f32).collect()),
            _ => None,
        };
        /// An array of integers of any type that fit an `i32`.
        i32s, opt_i32s -> Cow<'_, [i32]>, "an array of integers of 32 bits", |v| match v {
            Value::Array(Array::I32(a)) => Some(Cow::from(a)),
            Value::Array(a) => integers(a).map(Cow::from),
            _ => None,
        };
        /// An array of integers of any type that fit a `u32`.
        u32s, opt_u32s -> Cow<'_, [u32]>, "an array of integers of 32 bits, not negative", |v| match v {
            Value::Array(Array::U32(a)) => Some(Cow::from(a)),
            Value::Array(a) => integers(a).map(Cow::from),
            _ => None,
        };
        /// An array of truth values.
        bools, opt_bools -> &[bool], "an array of bools", |v| match v {
            Value::Array(Array::Bool(a)) => Some(&a[..]),
            _ => None,
        };
    }

    fn per_layer<T: Clone>(
        &self,
        key: &str,
        n_layers: usize,
        what: &str,
        one: impl FnOnce(&Value) -> Option<T>,
        many: impl FnOnce(&Array) -> Option<Vec<T>>,
    ) -> Result<Option<Vec<T>>> {
        if n_layers > MAX_LAYERS {
            return Err(Error::BadModel(format!(
                "number of layers: expected at most {MAX_LAYERS}, found {n_layers}"
            )));
        }
        let expected = format!("{what}, or an array of {n_layers} of them");
        self.convert(key, &expected, |v| match v {
            Value::Array(a) if a.len() == n_layers => many(a),
            _ => one(v).map(|x| vec![x; n_layers]),
        })
    }

    /// An integer for each layer: one for all, or an array with one for each.
    ///
    /// # Errors
    /// [`Error::BadModel`] if the key is absent, or its value is neither.
    pub fn per_layer_usize(&self, key: &str, n_layers: usize) -> Result<Vec<usize>> {
        self.opt_per_layer_usize(key, n_layers)?
            .ok_or_else(|| wrong(key, "an integer or an array of them", None))
    }

    /// An integer for each layer: one for all, or an array with one for each. `None` if the key is absent.
    ///
    /// # Errors
    /// [`Error::BadModel`] if the value is neither.
    pub fn opt_per_layer_usize(&self, key: &str, n_layers: usize) -> Result<Option<Vec<usize>>> {
        let what = "an integer, not negative";
        self.per_layer(key, n_layers, what, integer, integers)
    }

    /// A float for each layer: one for all, or an array with one for each. `None` if the key is absent.
    ///
    /// # Errors
    /// [`Error::BadModel`] if the value is neither.
    pub fn opt_per_layer_f32(&self, key: &str, n_layers: usize) -> Result<Option<Vec<f32>>> {
        let one = |v: &Value| v.as_float().map(|x| x as f32);
        self.per_layer(key, n_layers, "a float", one, |a| match a {
            Array::F32(v) => Some(v.clone()),
            Array::F64(v) => Some(v.iter().map(|x| *x as f32).collect()),
            _ => None,
        })
    }

    /// A truth value for each layer: one for all, or an array with one for each. `None` if the key is absent.
    ///
    /// # Errors
    /// [`Error::BadModel`] if the value is neither.
    pub fn opt_per_layer_bool(&self, key: &str, n_layers: usize) -> Result<Option<Vec<bool>>> {
        self.per_layer(key, n_layers, "a bool", Value::as_bool, |a| match a {
            Array::Bool(v) => Some(v.clone()),
            _ => None,
        })
    }
}
