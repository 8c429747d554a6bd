//! MODEL: a path, or nothing, which means the small model.

use std::path::{Path, PathBuf};

use kinglet::{LoadOptions, Model};

use crate::args::{BudgetArgs, ModelArgs};
use crate::failure::{Failure, Outcome};

/// The file of the small model.
const SMALL_MODEL: &str = "models/lfm2-smol-Q4_0.gguf";
/// Names the model to use when no argument does.
const VARIABLE: &str = "KINGLET_MODEL";

/// Loads what the arguments name.
pub fn load(args: &ModelArgs) -> Outcome<Model> {
    let path = locate(args.name())?;
    Ok(Model::load(&path, &options(args)?)?)
}

/// The same within a budget.
pub fn load_within(args: &ModelArgs, budget: &BudgetArgs) -> Outcome<Model> {
    let path = locate(args.name())?;
    Ok(Model::load(&path, &options_within(args, budget)?)?)
}

/// How it is loaded within a budget.
pub fn options_within(args: &ModelArgs, budget: &BudgetArgs) -> Outcome<LoadOptions> {
    Ok(LoadOptions {
        memory: budget.memory(),
        on_exceed: budget.on_exceed(),
        experts: budget.experts(),
        ..options(args)?
    })
}

/// How it is loaded.
pub fn options(args: &ModelArgs) -> Outcome<LoadOptions> {
    let chosen = args.device.chosen()?;
    let (backend, device) = chosen.unwrap_or((args.backend(), None));
    Ok(LoadOptions {
        threads: args.n_threads(),
        threads_batch: args.n_threads_batch(),
        backend,
        device,
        ..LoadOptions::default()
    })
}

/// The file that MODEL means.
pub fn locate(name: Option<&str>) -> Outcome<PathBuf> {
    let Some(name) = name else {
        return small_model();
    };
    let path = PathBuf::from(name);
    if !path.exists()
        && let Some((repository, quant)) = repository(name)
    {
        let quant = quant.map_or(String::new(), |quant| format!(" ({quant})"));
        return Err(Failure::usage(format!(
            "no file `{name}`, and models cannot be pulled yet: get the .gguf file{quant} from \
             https://huggingface.co/{repository} and give its path"
        )));
    }
    Ok(path)
}

fn small_model() -> Outcome<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    // The directory of the project, or where the program was built inside it: target/release/kinglet.
    let here = std::env::current_dir().ok();
    let program = std::env::current_exe().ok();
    let places = here.iter().take(1).map(PathBuf::as_path);
    let places = places.chain(program.iter().flat_map(|p| p.ancestors().skip(1)));
    let found = places
        .map(|place| place.join(SMALL_MODEL))
        .find(|p| p.is_file());
    found.ok_or_else(|| {
        Failure::usage(format!(
            "no MODEL given, and {SMALL_MODEL} is neither here nor beside the program: give the path of a .gguf file, \
             or set {VARIABLE}"
        ))
    })
}

/// `user/repo[:quant]`, apart.
fn repository(name: &str) -> Option<(&str, Option<&str>)> {
    let (repository, quant) = match name.split_once(':') {
        Some((repository, quant)) => (repository, Some(quant)),
        None => (name, None),
    };
    let (user, repo) = repository.split_once('/')?;
    let is_word = |word: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !word.is_empty() && !word.starts_with('.') && word.chars().all(plain)
    };
    let is_file = Path::new(repo).extension().is_some_and(|e| e == "gguf");
    (is_word(user) && is_word(repo) && quant.is_none_or(is_word) && !is_file)
        .then_some((repository, quant))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_and_paths() {
        assert_eq!(
            repository("LiquidAI/LFM2-350M-GGUF:Q4_0"),
            Some(("LiquidAI/LFM2-350M-GGUF", Some("Q4_0")))
        );
        assert_eq!(repository("a/b"), Some(("a/b", None)));
        for path in [
            "b",
            "models/x.gguf",
            "./a/b",
            "../b",
            "/a/b",
            "a/b/c",
            "a/",
            "a/b:",
            "a b/c",
        ] {
            assert_eq!(repository(path), None, "{path}");
        }
    }
}
