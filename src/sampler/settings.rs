//! The values of a chain, each with where it came from.

use std::fmt;
use std::ops::RangeInclusive;

use super::presets::Preset;
use crate::error::{Error, Result};

/// Where a value came from. Later ones win.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Source {
    /// Nothing said otherwise.
    Default,
    /// The row of the table of models that has this name.
    Model(&'static str),
    /// The model file: `general.sampling.*`.
    File,
    /// A flag of the command line, or the program that embeds the library.
    Flag,
    /// `/set` in a chat.
    Set,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Default => f.write_str("default"),
            Source::Model(name) => write!(f, "recommended for {name}"),
            Source::File => f.write_str("model file"),
            Source::Flag => f.write_str("command line"),
            Source::Set => f.write_str("/set"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, PartialEq, Debug)]
pub struct Value<T> {
    /// The value.
    pub value: T,
    /// Where it came from.
    pub source: Source,
}

/// A sampler of the chain.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Stage {
    /// Repeat, frequency and presence penalties.
    Penalties,
    /// The `k` likeliest.
    TopK,
    /// Locally typical.
    Typical,
    /// The nucleus.
    TopP,
    /// Relative to the likeliest.
    MinP,
    /// Softer or sharper.
    Temperature,
}

impl Stage {
    /// In the default order.
    pub const ALL: [Stage; 6] = [
        Stage::Penalties,
        Stage::TopK,
        Stage::Typical,
        Stage::TopP,
        Stage::MinP,
        Stage::Temperature,
    ];

    /// llama.cpp's name.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Penalties => "penalties",
            Stage::TopK => "top_k",
            Stage::Typical => "typ_p",
            Stage::TopP => "top_p",
            Stage::MinP => "min_p",
            Stage::Temperature => "temperature",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        let name = name.replace('-', "_");
        match name.as_str() {
            "temp" => Some(Stage::Temperature),
            "typical" | "typical_p" => Some(Stage::Typical),
            _ => Stage::ALL.into_iter().find(|s| s.name() == name),
        }
    }
}

/// The samplers that may run, in order, each at most once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Order(pub(super) Vec<Stage>);

impl Default for Order {
    fn default() -> Self {
        Self(Stage::ALL.to_vec())
    }
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.0.iter().map(|s| s.name()).collect();
        f.write_str(&names.join(";"))
    }
}

/// A type of setting: how it is read from text and within which range.
trait Setting: Sized {
    type Range;
    fn parse(text: &str, range: &Self::Range) -> Result<Self, String>;
    fn show(&self) -> String;
}

macro_rules! number_setting {
    ($($ty:ty, $what:literal;)*) => {$(
        impl Setting for $ty {
            type Range = RangeInclusive<$ty>;

            fn parse(text: &str, range: &Self::Range) -> Result<Self, String> {
                let value = text.parse().ok().filter(|x| range.contains(x));
                value.ok_or_else(|| format!("{} from {} to {}", $what, range.start(), range.end()))
            }

            fn show(&self) -> String {
                self.to_string()
            }
        }
    )*};
}

number_setting! {
    f32, "a number";
    i32, "a whole number";
    usize, "a whole number";
}

impl Setting for Option<u64> {
    type Range = ();

    fn parse(text: &str, (): &()) -> Result<Self, String> {
        match text {
            "random" | "-1" => Ok(None),
            _ => match text.parse() {
                Ok(seed) => Ok(Some(seed)),
                Err(_) => Err("a whole number from 0, or `random`".into()),
            },
        }
    }

    fn show(&self) -> String {
        self.map_or("random".into(), |seed| seed.to_string())
    }
}

impl Setting for Order {
    type Range = ();

    fn parse(text: &str, (): &()) -> Result<Self, String> {
        let names = text.split([';', ',']).map(str::trim);
        let stages = names.filter(|name| !name.is_empty()).map(Stage::from_name);
        let stages: Option<Vec<_>> = stages.collect();
        let twice = |stages: &[Stage]| (1..stages.len()).any(|i| stages[..i].contains(&stages[i]));
        match stages {
            Some(stages) if !twice(&stages) => Ok(Self(stages)),
            _ => Err(format!("each at most once, of {}", Self::default())),
        }
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// One value, for people.
#[derive(Clone, Debug)]
pub struct Row {
    /// The name of flag and `/set`: `top-k`.
    pub name: &'static str,
    /// The value as [`Settings::set`] takes it.
    pub value: String,
    /// Where it came from.
    pub source: Source,
    /// What it does.
    pub about: &'static str,
}

macro_rules! settings {
    ($($field:ident: $ty:ty = $default:expr, $range:expr, $name:literal, $key:expr, $about:literal;)*) => {
        /// The values of a chain.
        #[derive(Clone, PartialEq, Debug)]
        pub struct Settings {
            $(#[doc = $about] pub $field: Value<$ty>,)*
        }

        impl Default for Settings {
            fn default() -> Self {
                Self { $($field: Value { value: $default, source: Source::Default },)* }
            }
        }

        impl Settings {
            /// The names that [`Settings::set`] takes.
            pub const NAMES: &[&str] = &[$($name),*];

            /// Sets a value by its name (`top-k`, `top_k`) from text.
            ///
            /// # Errors
            /// If there is no such name, or the text is no value of its range.
            pub fn set(&mut self, name: &str, text: &str, source: Source) -> Result<()> {
                let plain = name.trim_start_matches('-').replace('_', "-");
                match plain.as_str() {
                    $($name => match Setting::parse(text.trim(), &$range) {
                        Ok(value) => self.$field = Value { value, source },
                        Err(expected) => {
                            let name = $name;
                            let what = format!("{name}: expected {expected}, found `{text}`");
                            return Err(Error::Invalid(what));
                        }
                    },)*
                    "temperature" => return self.set("temp", text, source),
                    "typ-p" | "typical-p" => return self.set("typical", text, source),
                    _ => {
                        let names = Self::NAMES.join(", ");
                        let what = format!("no setting `{name}`; there are {names}");
                        return Err(Error::Invalid(what));
                    }
                }
                Ok(())
            }

            /// Every value, in the order of the chain.
            pub fn rows(&self) -> Vec<Row> {
                vec![$(Row {
                    name: $name,
                    value: self.$field.value.show(),
                    source: self.$field.source,
                    about: $about,
                },)*]
            }

            /// Takes what a model file recommends. `value` gives the text of `general.sampling.` and a key. A value
            /// out of its range is passed over, as is a sampler that there is not.
            pub fn read_file(&mut self, value: impl Fn(&str) -> Option<String>) {
                $(if let Some(text) = Option::<&str>::and_then($key, |key| value(key)) {
                    let known = |name: &&str| Stage::from_name(name.trim()).is_some();
                    let text = match $name {
                        "samplers" => text.split([';', ',']).filter(known).collect::<Vec<_>>().join(";"),
                        _ => text,
                    };
                    // An error leaves the value as it was, which is what is wanted of a file.
                    let _ = self.set($name, &text, Source::File);
                })*
            }
        }
    };
}

settings! {
    repeat_penalty: f32 = 1.0, 0.01..=100.0, "repeat-penalty", Some("penalty_repeat"),
        "Factor against tokens that occurred; 1 is neutral.";
    frequency_penalty: f32 = 0.0, -100.0..=100.0, "frequency-penalty", None,
        "Taken from a logit for each occurrence; 0 is neutral.";
    presence_penalty: f32 = 0.0, -100.0..=100.0, "presence-penalty", None,
        "Taken from the logit of every token that occurred; 0 is neutral.";
    repeat_last_n: i32 = 64, -1..=i32::MAX, "repeat-last-n", Some("penalty_last_n"),
        "Tokens that the penalties look back; 0: none, -1: all.";
    top_k: usize = 40, 0..=usize::MAX, "top-k", Some("top_k"),
        "Keeps the k likeliest tokens; 0 keeps all.";
    typical: f32 = 1.0, 0.0..=1.0, "typical", None,
        "Keeps tokens of typical surprise, up to this probability; 1 keeps all.";
    top_p: f32 = 0.95, 0.0..=1.0, "top-p", Some("top_p"),
        "Keeps the likeliest tokens, up to this probability; 1 keeps all.";
    min_p: f32 = 0.05, 0.0..=1.0, "min-p", Some("min_p"),
        "Keeps tokens this likely relative to the likeliest; 0 keeps all.";
    temperature: f32 = 0.8, 0.0..=1000.0, "temp", Some("temp"),
        "Below 1 sharper, above 1 softer; 0 takes the likeliest token.";
    samplers: Order = Order::default(), (), "samplers", Some("sequence"),
        "The samplers that may run, in order.";
    seed: Option<u64> = None, (), "seed", None,
        "Of the generator: a number, or random.";
}

impl Settings {
    /// Everything neutral: the distribution of the model itself.
    pub fn neutral() -> Self {
        let mut settings = Self::default();
        settings.top_k.value = 0;
        settings.top_p.value = 1.0;
        settings.min_p.value = 0.0;
        settings.temperature.value = 1.0;
        settings
    }

    /// The defaults, and what is recommended for a model.
    pub fn for_model(preset: &Preset) -> Self {
        let mut settings = Self::default();
        settings.take(preset);
        settings
    }

    fn take(&mut self, preset: &Preset) {
        let source = Source::Model(preset.name);
        let set = |field: &mut Value<f32>, value: Option<f32>| {
            if let Some(value) = value {
                *field = Value { value, source };
            }
        };
        set(&mut self.temperature, preset.temperature);
        set(&mut self.top_p, preset.top_p);
        set(&mut self.min_p, preset.min_p);
        set(&mut self.repeat_penalty, preset.repeat_penalty);
        if let Some(value) = preset.top_k {
            self.top_k = Value { value, source };
        }
    }
}
