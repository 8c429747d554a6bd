//! What is to be measured: every combination of the lists that were given, in llama-bench's order, so that each model
//! is loaded once for each number of threads.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use kinglet::backend::delta::Delta;
use kinglet::backend::predictor::Predictor;
use kinglet::profile::topology::Topology;
use kinglet::{BackendKind, KvType, KvTypes, SessionOptions, Sparsity};

use crate::args::BenchArgs;
use crate::failure::{Failure, Outcome};
use crate::locate;

/// Who runs the tests, side by side: repetitions take turns, so that all meet the same machine.
pub fn engines(args: &BenchArgs) -> Outcome<Vec<BackendKind>> {
    let chosen = args.device.chosen()?;
    let mut engines = vec![chosen.map_or(BackendKind::Cpu, |(engine, _)| engine)];
    for other in &args.vs {
        if !engines.contains(other) {
            engines.push(*other);
        }
    }
    Ok(engines)
}

/// Tokens read at once, then tokens decoded one by one, after a past of some depth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Test {
    pub n_prompt: usize,
    pub n_gen: usize,
    pub n_depth: usize,
}

impl Test {
    /// Tokens that are timed.
    pub fn n_tokens(&self) -> usize {
        self.n_prompt + self.n_gen
    }
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut name = match (self.n_prompt, self.n_gen) {
            (p, 0) => format!("pp{p}"),
            (0, n) => format!("tg{n}"),
            (p, n) => format!("pp{p}+tg{n}"),
        };
        if self.n_depth > 0 {
            name += &format!(" @ d{}", self.n_depth);
        }
        f.pad(&name)
    }
}

/// Tests that share a model as it is loaded.
#[derive(Clone, PartialEq, Debug)]
pub struct Group {
    pub model: PathBuf,
    /// Tokens of a prompt that are given to the engine at once.
    pub n_batch: usize,
    /// Tokens of a step of that.
    pub n_ubatch: usize,
    pub kv: KvTypes,
    pub sparsity: Sparsity,
    pub predictor: Option<Arc<Predictor>>,
    pub delta: Option<Arc<Delta>>,
    pub n_threads: usize,
    /// Of a prompt.
    pub n_threads_batch: usize,
    pub tests: Vec<Test>,
}

impl Group {
    /// How attention is not dense and exact, or `dense`.
    pub fn attention(&self) -> String {
        let options = SessionOptions {
            sparsity: self.sparsity,
            predictor: self.predictor.clone(),
            delta: self.delta.clone(),
            ..SessionOptions::default()
        };
        options.attention()
    }
}

/// Everything, in order.
pub fn groups(args: &BenchArgs) -> Outcome<Vec<Group>> {
    let or = |given: Option<Vec<usize>>, default: usize| given.unwrap_or_else(|| vec![default]);
    let n_threads = or(args.threads(), Topology::of_this_machine().threads());
    let tests = tests(args, &or(args.n_depth(), 0));
    let (n_batch, n_ubatch) = (or(args.batch_size(), 2048), or(args.ubatch_size(), 512));
    for (flag, numbers, max) in [
        ("-t", &n_threads, 1024),
        ("-b", &n_batch, 1 << 20),
        ("-ub", &n_ubatch, 1 << 20),
    ] {
        if let Some(n) = numbers.iter().find(|n| !(1..=max).contains(*n)) {
            return Err(Failure::usage(format!(
                "{flag}: expected 1 to {max}, found {n}"
            )));
        }
    }
    if tests.is_empty() {
        return Err(Failure::usage(
            "nothing to measure: expected a -p, -n or --pg above 0",
        ));
    }
    let kinds = kv_types(args);
    let mut groups = Vec::new();
    for model in models(args)? {
        for &n_batch in &n_batch {
            for &n_ubatch in &n_ubatch {
                for &kv in &kinds {
                    for &n_threads in &n_threads {
                        groups.push(Group {
                            model: model.clone(),
                            n_batch,
                            n_ubatch: n_ubatch.min(n_batch),
                            kv,
                            sparsity: args.attention.sparsity,
                            predictor: args.attention.predictor.clone(),
                            delta: args.attention.delta.clone(),
                            n_threads,
                            n_threads_batch: args.n_threads_batch().unwrap_or(n_threads),
                            tests: tests.clone(),
                        });
                    }
                }
            }
        }
    }
    Ok(groups)
}

fn models(args: &BenchArgs) -> Outcome<Vec<PathBuf>> {
    let names = args.models();
    if names.is_empty() {
        return Ok(vec![locate::locate(None)?]);
    }
    names
        .iter()
        .map(|name| locate::locate(Some(name)))
        .collect()
}

fn tests(args: &BenchArgs, depths: &[usize]) -> Vec<Test> {
    let prompts = args.n_prompt().unwrap_or_else(|| vec![512]);
    let gens = args.n_gen().unwrap_or_else(|| vec![128]);
    let mut tests = Vec::new();
    for &n_depth in depths {
        let prompts = prompts.iter().map(|p| (*p, 0));
        let gens = gens.iter().map(|n| (0, *n));
        let both = args.pg.iter().map(|pair| (pair.0, pair.1));
        tests.extend(
            prompts
                .chain(gens)
                .chain(both)
                .map(|(n_prompt, n_gen)| Test {
                    n_prompt,
                    n_gen,
                    n_depth,
                }),
        );
    }
    tests.retain(|test| test.n_tokens() > 0);
    tests
}

/// Every type of keys with every type of values.
pub fn kv_types(args: &BenchArgs) -> Vec<KvTypes> {
    let given = |kinds: &[KvType]| match kinds {
        [] => vec![KvType::default()],
        kinds => kinds.to_vec(),
    };
    let (keys, values) = (given(&args.cache_type_k), given(&args.cache_type_v));
    let with = |keys: KvType| values.iter().map(move |&values| KvTypes { keys, values });
    keys.iter().flat_map(|&keys| with(keys)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_have_llama_benchs_names() {
        for (n_prompt, n_gen, n_depth, name) in [
            (512, 0, 0, "pp512"),
            (0, 128, 0, "tg128"),
            (512, 0, 4096, "pp512 @ d4096"),
            (64, 32, 0, "pp64+tg32"),
            (64, 32, 8, "pp64+tg32 @ d8"),
        ] {
            let test = Test {
                n_prompt,
                n_gen,
                n_depth,
            };
            assert_eq!(test.to_string(), name);
        }
    }
}
