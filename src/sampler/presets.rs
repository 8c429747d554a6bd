//! What the makers of models recommend. Most files carry none of it, so it is kept by architecture and name.

/// The recommended values of a model; what is not said stays at its default.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Preset {
    /// The family, as [`Source::Model`](super::Source::Model) shows it.
    pub name: &'static str,
    /// Architectures of the file.
    architectures: &'static [&'static str],
    /// Words that must all occur in the name of the model, in lower case.
    words: &'static [&'static str],
    /// Temperature.
    pub temperature: Option<f32>,
    /// Tokens kept; 0: all.
    pub top_k: Option<usize>,
    /// Probability kept; 1: all.
    pub top_p: Option<f32>,
    /// Probability relative to the likeliest token; 0: all.
    pub min_p: Option<f32>,
    /// Penalty on repetition; 1: none.
    pub repeat_penalty: Option<f32>,
}

const LFM2: &[&str] = &["lfm2", "lfm2moe"];

/// Liquid's models keep no nucleus and no fixed number of tokens unless they say so.
const LIQUID: Preset = Preset {
    name: "LFM2",
    architectures: LFM2,
    words: &[],
    temperature: Some(0.3),
    top_k: Some(0),
    top_p: Some(1.0),
    min_p: Some(0.15),
    repeat_penalty: Some(1.05),
};

const LIQUID_2_5: Preset = Preset {
    name: "LFM2.5",
    words: &["lfm2.5"],
    temperature: Some(0.1),
    top_k: Some(50),
    min_p: Some(0.0),
    ..LIQUID
};

const OTHER: Preset = Preset {
    name: "",
    architectures: &[],
    words: &[],
    temperature: None,
    top_k: None,
    top_p: None,
    min_p: None,
    repeat_penalty: None,
};

/// The most special first.
const PRESETS: &[Preset] = &[
    Preset {
        // Small and trained by distillation: it loops on lists without a firm penalty.
        name: "LFM2 Smol",
        words: &["smol"],
        repeat_penalty: Some(1.15),
        ..LIQUID
    },
    Preset {
        name: "LFM2.5 2.6B",
        words: &["lfm2.5", "2.6b"],
        temperature: Some(0.2),
        top_k: Some(80),
        ..LIQUID_2_5
    },
    Preset {
        name: "LFM2.5 8B-A1B",
        words: &["lfm2.5", "8b"],
        temperature: Some(0.2),
        top_k: Some(80),
        ..LIQUID_2_5
    },
    Preset {
        name: "LFM2.5 1.2B Instruct",
        words: &["lfm2.5", "1.2b", "instruct"],
        top_p: Some(0.1),
        ..LIQUID_2_5
    },
    LIQUID_2_5,
    Preset {
        name: "LFM2 VL",
        words: &["vl"],
        temperature: Some(0.1),
        ..LIQUID
    },
    Preset {
        name: "LFM2 Extract",
        words: &["extract"],
        temperature: Some(0.0),
        ..LIQUID
    },
    Preset {
        name: "LFM2 RAG",
        words: &["rag"],
        temperature: Some(0.0),
        ..LIQUID
    },
    Preset {
        name: "LFM2 PII",
        words: &["pii"],
        temperature: Some(0.0),
        ..LIQUID
    },
    LIQUID,
    Preset {
        name: "SmolLM2",
        architectures: &["llama"],
        words: &["smollm2"],
        temperature: Some(0.2),
        top_k: Some(0),
        top_p: Some(0.9),
        min_p: Some(0.0),
        ..OTHER
    },
    Preset {
        name: "Llama 3",
        architectures: &["llama"],
        words: &["llama", "3"],
        temperature: Some(0.6),
        top_k: Some(0),
        top_p: Some(0.9),
        min_p: Some(0.0),
        ..OTHER
    },
    Preset {
        name: "Qwen2.5 Coder",
        architectures: &["qwen2"],
        words: &["coder"],
        temperature: Some(0.7),
        top_k: Some(20),
        top_p: Some(0.8),
        min_p: Some(0.0),
        repeat_penalty: Some(1.1),
    },
    Preset {
        name: "Qwen2.5",
        architectures: &["qwen2"],
        temperature: Some(0.7),
        top_k: Some(20),
        top_p: Some(0.8),
        min_p: Some(0.0),
        repeat_penalty: Some(1.05),
        ..OTHER
    },
    Preset {
        name: "Qwen3 Instruct",
        architectures: &["qwen3", "qwen3moe"],
        words: &["instruct"],
        temperature: Some(0.7),
        top_k: Some(20),
        top_p: Some(0.8),
        min_p: Some(0.0),
        ..OTHER
    },
    Preset {
        name: "Qwen3",
        architectures: &["qwen3", "qwen3moe"],
        temperature: Some(0.6),
        top_k: Some(20),
        top_p: Some(0.95),
        min_p: Some(0.0),
        ..OTHER
    },
    Preset {
        name: "Gemma 3",
        architectures: &["gemma3"],
        temperature: Some(1.0),
        top_k: Some(64),
        top_p: Some(0.95),
        min_p: Some(0.0),
        ..OTHER
    },
];

/// What is recommended for a model with this architecture and name.
pub fn preset(architecture: &str, name: &str) -> Option<&'static Preset> {
    let name = name.to_lowercase();
    // Whole words, which may have a version: `vl` is in `LFM2-VL-1.6B` and not in `Evlyn`, `3` is in `Llama 3.2`.
    let has = |word: &&str| {
        name.split(|c: char| !c.is_alphanumeric() && c != '.')
            .any(|part| {
                let rest = part.strip_prefix(*word);
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
            })
    };
    PRESETS
        .iter()
        .find(|p| p.architectures.contains(&architecture) && p.words.iter().all(has))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_find_their_rows() {
        let row = |architecture, name| preset(architecture, name).map(|p| p.name);
        assert_eq!(row("lfm2", "LFM2 Smol 89M"), Some("LFM2 Smol"));
        assert_eq!(row("lfm2", "LFM2 1.2B"), Some("LFM2"));
        assert_eq!(row("lfm2", "LFM2-VL-1.6B"), Some("LFM2 VL"));
        assert_eq!(
            row("lfm2", "LFM2.5 1.2B Instruct"),
            Some("LFM2.5 1.2B Instruct")
        );
        assert_eq!(row("lfm2", "LFM2.5-230M"), Some("LFM2.5"));
        assert_eq!(row("lfm2moe", "LFM2.5-8B-A1B"), Some("LFM2.5 8B-A1B"));
        assert_eq!(
            row("llama", "Smollm2 135M 8k Lc100K Mix1 Ep2"),
            Some("SmolLM2")
        );
        assert_eq!(
            row("qwen2", "Qwen2.5 Coder 0.5B Instruct"),
            Some("Qwen2.5 Coder")
        );
        assert_eq!(row("gemma3", "Gemma 3 270m"), Some("Gemma 3"));
        assert_eq!(row("llama", "Llama 3.2 1B Instruct"), Some("Llama 3"));
        assert_eq!(row("llama", "Llama 2 7B"), None);
        assert_eq!(row("llama", "TinyLlama"), None);
        assert_eq!(row("nonesuch", ""), None);
    }
}
