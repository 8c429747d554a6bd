//! The chain: the samplers that are not neutral, in the order of the settings, and the choice at the end.

use super::candidates::Candidates;
use super::constraint::is_allowed;
use super::penalties::Penalties;
use super::rng::Rng;
use super::settings::{Settings, Stage};
use super::{dist, greedy, min_p, temperature, top_k, top_p, typical};
use crate::error::{Error, Result};

/// Chooses tokens: settings, the generator and the tokens it has seen.
#[derive(Clone, Debug)]
pub struct Sampler {
    settings: Settings,
    stages: Vec<Stage>,
    greedy: bool,
    penalties: Penalties,
    forbidden: Vec<u32>,
    seed: u64,
    rng: Rng,
    candidates: Candidates,
}

impl Sampler {
    /// A sampler with a fresh generator; without a seed in the settings, a random one.
    pub fn new(settings: &Settings) -> Self {
        let seed = settings.seed.value.unwrap_or_else(Rng::random_seed);
        let mut sampler = Self {
            settings: settings.clone(),
            stages: Vec::new(),
            greedy: false,
            penalties: Penalties::default(),
            forbidden: Vec::new(),
            seed,
            rng: Rng::new(seed),
            candidates: Candidates::default(),
        };
        sampler.build();
        sampler
    }

    fn build(&mut self) {
        let s = &self.settings;
        let last_n = usize::try_from(s.repeat_last_n.value).unwrap_or(usize::MAX);
        self.penalties = Penalties::new(
            s.repeat_penalty.value,
            s.frequency_penalty.value,
            s.presence_penalty.value,
            last_n,
        );
        let penalized = !self.penalties.is_neutral();
        let order = &s.samplers.value.0;
        self.greedy = order.contains(&Stage::Temperature) && s.temperature.value == 0.0;
        let active = |stage: &Stage| match stage {
            Stage::Penalties => penalized,
            // The likeliest token is what they keep in any case.
            _ if self.greedy => false,
            Stage::TopK => s.top_k.value > 0,
            Stage::Typical => s.typical.value < 1.0,
            Stage::TopP => s.top_p.value < 1.0,
            Stage::MinP => s.min_p.value > 0.0,
            Stage::Temperature => s.temperature.value != 1.0,
        };
        self.stages = order.iter().copied().filter(active).collect();
    }

    /// What it was made from.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes other settings. The generator goes on, but for a seed that changed.
    pub fn set_settings(&mut self, settings: &Settings) {
        let seed = settings.seed.value;
        if seed != self.settings.seed.value {
            self.seed = seed.unwrap_or_else(Rng::random_seed);
            self.rng = Rng::new(self.seed);
        }
        self.settings = settings.clone();
        self.build();
    }

    /// The seed of the generator.
    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Seed and state of the generator: with the same settings and text, all that it takes to choose as this one would.
    pub fn generator(&self) -> [u64; 2] {
        [self.seed, self.rng.state()]
    }

    /// Goes on with the generator of another.
    pub fn set_generator(&mut self, [seed, state]: [u64; 2]) {
        self.seed = seed;
        self.rng = Rng::new(state);
    }

    /// The samplers that do something, in order.
    pub fn stages(&self) -> &[Stage] {
        &self.stages
    }

    /// Whether it takes the likeliest token, without the generator.
    pub fn is_greedy(&self) -> bool {
        self.greedy
    }

    /// Tokens that are never chosen, whatever their logits.
    pub fn forbid(&mut self, tokens: &[u32]) {
        self.forbidden = tokens.to_vec();
    }

    /// Tells it a token of the text.
    pub fn accept(&mut self, token: u32) {
        self.penalties.accept(token);
    }

    /// Forgets the text.
    pub fn reset(&mut self) {
        self.penalties.reset();
    }

    /// The candidates that the chain leaves, before the draw. At temperature 0 only the penalties have run.
    ///
    /// # Errors
    /// If a logit is not a number, or none is finite.
    pub fn candidates(&mut self, logits: &[f32]) -> Result<&Candidates> {
        self.candidates_among(logits, None)
    }

    /// The same of the tokens whose bits are set in `allowed`, see [`Follow::allowed`](super::Follow::allowed).
    ///
    /// # Errors
    /// If a logit is not a number, or none that is allowed is finite.
    pub fn candidates_among(
        &mut self,
        logits: &[f32],
        allowed: Option<&[u32]>,
    ) -> Result<&Candidates> {
        self.candidates.fill(logits)?;
        if let Some(all) = self.candidates.all_mut() {
            if let Some(allowed) = allowed {
                for (token, logit) in all.iter_mut().enumerate() {
                    if !is_allowed(allowed, token) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
            for &token in &self.forbidden {
                if let Some(logit) = all.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        self.run_stages()?;
        Ok(&self.candidates)
    }

    fn run_stages(&mut self) -> Result<()> {
        let s = &self.settings;
        for stage in &self.stages {
            let candidates = &mut self.candidates;
            match stage {
                Stage::Penalties => self.penalties.apply(candidates),
                Stage::TopK => top_k::apply(candidates, s.top_k.value),
                Stage::Typical => typical::apply(candidates, s.typical.value)?,
                Stage::TopP => top_p::apply(candidates, s.top_p.value)?,
                Stage::MinP => min_p::apply(candidates, s.min_p.value)?,
                Stage::Temperature => temperature::apply(candidates, s.temperature.value)?,
            }
        }
        Ok(())
    }

    /// How many of the likeliest tokens decide which is chosen, as the text is now; `None`: there may be no such number.
    pub fn reach(&self) -> Option<usize> {
        let mut stages = self.stages.iter();
        let mut next = stages.next();
        // What they lower makes room for as many others.
        let mut lowered = 0;
        if next == Some(&Stage::Penalties) {
            lowered = self.penalties.lowers()?;
            next = stages.next();
        }
        let kept = match next {
            None if self.greedy => 1,
            // One more, so that it is the sampler that keeps and sorts them.
            Some(Stage::TopK) => self.settings.top_k.value.checked_add(1)?,
            _ => return None,
        };
        kept.checked_add(lowered)?.checked_add(self.forbidden.len())
    }

    /// Chooses as [`Sampler::sample`] would of all `n_vocab`, from the [`Sampler::reach`] likeliest and their logits, in
    /// their order.
    ///
    /// # Errors
    /// As [`Sampler::sample`].
    pub fn sample_top(&mut self, top: &[(u32, f32)], n_vocab: usize) -> Result<u32> {
        self.candidates.fill_top(top, n_vocab)?;
        let Self {
            candidates,
            forbidden,
            ..
        } = self;
        candidates.list().retain(|c| !forbidden.contains(&c.id));
        self.run_stages()?;
        self.choose()
    }

    fn choose(&mut self) -> Result<u32> {
        if self.greedy {
            greedy::choose(&self.candidates)
        } else {
            dist::choose(&mut self.candidates, &mut self.rng)
        }
    }

    /// Chooses the next token. The caller [accepts](Sampler::accept) it if it becomes part of the text.
    ///
    /// # Errors
    /// If a logit is not a number, or none is finite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        self.sample_among(logits, None)
    }

    /// The same of the tokens whose bits are set in `allowed`, see [`Follow::allowed`](super::Follow::allowed).
    ///
    /// # Errors
    /// If a logit is not a number, or none that is allowed is finite.
    pub fn sample_among(&mut self, logits: &[f32], allowed: Option<&[u32]>) -> Result<u32> {
        if u32::try_from(logits.len()).is_err() {
            return Err(Error::Invalid(format!("{} logits", logits.len())));
        }
        if self.greedy && self.stages.is_empty() && self.forbidden.is_empty() && allowed.is_none() {
            return greedy::argmax(logits);
        }
        self.candidates_among(logits, allowed)?;
        self.choose()
    }

    /// Bytes held; constant after the first token.
    pub fn bytes(&self) -> usize {
        self.candidates.bytes() + self.penalties.bytes()
    }
}
