//! MODEL: a path, or nothing, which means the small model.

use std::path::{Path, PathBuf};

#[cfg(feature = "gpu")]
use kinglet::BackendKind;
use kinglet::{LoadOptions, Model, SessionOptions};

use crate::args::{BudgetArgs, ModelArgs, SessionArgs};
use crate::failure::{Failure, Outcome};
#[cfg(feature = "gpu")]
use crate::ui;

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
pub fn load_within(args: &ModelArgs, budget: &BudgetArgs, session: &SessionArgs) -> Outcome<Model> {
    let path = locate(args.name())?;
    let mut load = options_within(args, budget)?;
    fit_gpu(&path, &mut load, &session.options())?;
    Ok(Model::load(&path, &load)?)
}

/// How it is loaded within a budget.
pub fn options_within(args: &ModelArgs, budget: &BudgetArgs) -> Outcome<LoadOptions> {
    Ok(LoadOptions {
        memory: budget.memory(),
        on_exceed: budget.on_exceed(),
        experts: budget.experts(),
        repack: budget.repack(),
        ..options(args)?
    })
}

/// How it is loaded.
pub fn options(args: &ModelArgs) -> Outcome<LoadOptions> {
    let chosen = args.device.chosen()?;
    let (backend, device) = chosen.unwrap_or((args.backend(), None));
    let mut load = LoadOptions {
        threads: args.n_threads(),
        threads_batch: args.n_threads_batch(),
        backend,
        device,
        ..LoadOptions::default()
    };
    args.device.share(&mut load);
    Ok(load)
}

/// Where a GPU may use so much memory and no more: gives it as many layers as that has room for, with a session as asked
/// for.
#[cfg(feature = "gpu")]
pub fn fit_gpu(path: &Path, load: &mut LoadOptions, session: &SessionOptions) -> Outcome {
    use kinglet::session::{GpuPlan, Plan};
    if load.backend != BackendKind::Gpu || load.gpu_memory.is_none() || load.gpu_layers.is_some() {
        return Ok(());
    }
    let model = Model::outline(path, load)?;
    let plan = GpuPlan::new(&model, &Plan::new(&model, session, 1)?, load)?;
    load.gpu_layers = Some(plan.layers);
    if plan.layers < plan.n_layers {
        let (n, all) = (plan.layers, plan.n_layers);
        ui::note(&format!(
            "note: to stay within --gpu-memory, {n} of {all} layers are on the GPU"
        ));
    }
    Ok(())
}

/// The same in a build without a GPU.
#[cfg(not(feature = "gpu"))]
pub fn fit_gpu(_: &Path, _: &mut LoadOptions, _: &SessionOptions) -> Outcome {
    Ok(())
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
