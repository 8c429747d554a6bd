//! Time to the first token for a person: from the start of a new process, which loads the model and reads a prompt, to
//! the first byte that it prints.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kinglet::tokenizer::Special;
use kinglet::{BackendKind, Model};
use serde_json::json;

use crate::bench::output::{Column, Record};
use crate::bench::plan::Group;
use crate::bench::report::{ModelCard, backend, params, size};
use crate::bench::stats::{deviation, mean, percentile};
use crate::failure::{Failure, Outcome};

/// Columns of the table.
pub fn columns() -> Vec<Column> {
    vec![
        Column::text("model", 24),
        Column::number("size", 10),
        Column::number("params", 10),
        Column::text("backend", 10),
        Column::number("threads", 7),
        Column::number("test", 15),
        Column::number("ms", 20),
    ]
}

/// The result of starts that took `times`.
pub fn record(
    group: &Group,
    model: &ModelCard,
    n_prompt: usize,
    n_busy: usize,
    test_time: String,
    times: &[Duration],
) -> Record {
    let ms: Vec<f64> = times.iter().map(|time| time.as_secs_f64() * 1e3).collect();
    let share = |share| percentile(times, share).map(|time| time.as_secs_f64() * 1e3);
    let test = format!("first{n_prompt}");
    let engine = backend(BackendKind::Cpu);
    Record {
        cells: vec![
            model.kind.clone(),
            size(model.bytes),
            params(model.n_params),
            engine.clone(),
            group.n_threads.to_string(),
            test.clone(),
            format!("{:.2} ± {:.2}", mean(&ms), deviation(&ms)),
        ],
        fields: vec![
            ("backends", json!(engine)),
            ("model_filename", json!(group.model.display().to_string())),
            ("model_type", json!(model.kind)),
            ("model_size", json!(model.bytes)),
            ("model_n_params", json!(model.n_params)),
            ("n_threads", json!(group.n_threads)),
            ("n_threads_batch", json!(group.n_threads_batch)),
            ("n_prompt", json!(n_prompt)),
            ("n_gen", json!(1)),
            ("test_time", json!(test_time)),
            ("test", json!(test)),
            ("n_busy", json!(n_busy)),
            ("first_token_ms_avg", json!(mean(&ms))),
            ("first_token_ms_stddev", json!(deviation(&ms))),
            ("first_token_ms_p50", json!(share(0.5))),
            ("first_token_ms_p95", json!(share(0.95))),
        ],
        lists: vec![("samples_ms", json!(ms))],
        details: Vec::new(),
        notes: Vec::new(),
    }
}

/// What prompts are cut from.
const TEXT: &str = "In the evening the two of them walked along the river, and she told him about the \
    mill, the bridge, and the people who had lived there when she was a child.";

/// A text of `n` tokens for a model, BOS included where it wants one.
pub fn prompt(model: &Model, n: usize) -> Outcome<String> {
    let tokenizer = model.tokenizer()?;
    let count = |text: &str| tokenizer.encode_with_bos(text, Special::Text).len();
    let mut text = String::new();
    // Words of the text as long as they fit; the last places are filled with the shortest word there is.
    for word in TEXT.split(' ').cycle().take(n).chain(vec!["a"; n]) {
        let longer = match text.as_str() {
            "" => word.to_owned(),
            text => format!("{text} {word}"),
        };
        if count(&longer) <= n {
            text = longer;
        }
    }
    let used = count(&text);
    if used != n {
        return Err(Failure::usage(format!(
            "--first-token: expected a prompt of {n} tokens, found one of {used} at most"
        )));
    }
    Ok(text)
}

/// One start.
pub fn first_token(group: &Group, prompt: &str) -> Outcome<Duration> {
    let model = &group.model;
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("run")
        .arg(model)
        .args(["--raw", "--quiet", "--ignore-eos", "--temp", "0", "-n", "1"])
        .args(["-t", &group.n_threads.to_string()])
        .args(["--threads-batch", &group.n_threads_batch.to_string()])
        .args(["-p", prompt])
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn()?;
    let mut first = [0];
    let mut stdout = child.stdout.take().expect("a pipe was asked for");
    // A token without text ends the output without a byte.
    let _ = stdout.read(&mut first)?;
    let time = start.elapsed();
    let mut rest = Vec::new();
    stdout.read_to_end(&mut rest)?;
    if child.wait()?.success() {
        Ok(time)
    } else {
        Err(Failure::usage(format!(
            "{}: the process that was started for the first token failed",
            model.display()
        )))
    }
}
