//! Speed over minutes: tokens are decoded without a pause, and each stretch of time has its own rate. A machine that gets
//! too warm, or whose energy is budgeted, is slower in the later ones.

use std::time::{Duration, Instant};

use kinglet::profile::counters::Condition;
use serde_json::json;

use crate::bench::output::{Column, Record};
use crate::bench::plan::{Group, Test};
use crate::bench::report::{ModelCard, backend};
use crate::bench::stats::percentile;
use crate::bench::timeline::Runner;
use crate::failure::Outcome;
use crate::ui;

use kinglet::BackendKind;

/// Stretches of a run, if it is long enough that each has a second.
const STRETCHES: u64 = 20;

/// A stretch of time.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stretch {
    /// The tokens that ended in it.
    pub tokens: Vec<Duration>,
    /// The machine, when the last of them came.
    pub condition: Condition,
}

/// Columns of the table.
pub fn columns() -> Vec<Column> {
    vec![
        Column::text("model", 24),
        Column::number("threads", 7),
        Column::number("test", 10),
        Column::number("until s", 8),
        Column::number("t/s", 9),
        Column::number("% first", 7),
        Column::number("ms p50", 8),
        Column::number("ms p99", 8),
        Column::number("GHz", 5),
        Column::number("C", 4),
    ]
}

/// How long each stretch of a run is.
pub fn stretch(total: Duration) -> Duration {
    let n = total.as_secs().clamp(1, STRETCHES);
    total / n as u32
}

/// Decodes for `total`, over and over what `test` says.
pub fn run(runner: &mut Runner, test: &Test, total: Duration) -> Outcome<Vec<Stretch>> {
    let bar = ui::progress("decoding", total.as_secs(), "{pos}/{len} s {prefix}");
    bar.set_prefix(test.to_string());
    let mut stretches = Vec::new();
    let start = Instant::now();
    let measured = loop {
        let began = start.elapsed();
        if began >= total {
            break Ok(());
        }
        bar.set_position(began.as_secs());
        match runner.repeat(test) {
            Ok(sample) => spread(&mut stretches, stretch(total), began, &sample.tokens, total),
            Err(error) => break Err(error),
        }
        if let Some(last) = stretches.last_mut() {
            last.condition = Condition::now();
        }
    };
    bar.finish_and_clear();
    measured.map(|()| stretches)
}

/// Gives tokens that began at `began` and followed each other to the stretches in which they ended; those after the end
/// belong to none.
fn spread(
    stretches: &mut Vec<Stretch>,
    length: Duration,
    began: Duration,
    tokens: &[Duration],
    total: Duration,
) {
    let mut at = began;
    for token in tokens {
        at += *token;
        if at > total {
            return;
        }
        let i = (at.as_nanos().saturating_sub(1) / length.as_nanos().max(1)) as usize;
        if stretches.len() <= i {
            stretches.resize(i + 1, Stretch::default());
        }
        stretches[i].tokens.push(*token);
    }
}

impl Stretch {
    /// Tokens per second.
    fn rate(&self) -> Option<f64> {
        let time: Duration = self.tokens.iter().sum();
        (!self.tokens.is_empty()).then(|| self.tokens.len() as f64 / time.as_secs_f64())
    }
}

/// A stretch, the `i`th of those of a test.
pub fn record(
    group: &Group,
    model: &ModelCard,
    test: &Test,
    test_time: &str,
    total: Duration,
    stretches: &[Stretch],
    i: usize,
) -> Record {
    let Stretch { tokens, condition } = &stretches[i];
    let until = stretch(total) * (i as u32 + 1);
    let rate = stretches[i].rate();
    let first = stretches.iter().find_map(Stretch::rate);
    let of_first = rate.zip(first).map(|(rate, first)| 100.0 * rate / first);
    let ms = |share| percentile(tokens, share).map(|time| time.as_secs_f64() * 1e3);
    let cell = |value: Option<f64>, digits: usize| {
        value.map_or_else(|| "-".into(), |value| format!("{value:.digits$}"))
    };
    let engine = backend(BackendKind::Cpu);
    Record {
        cells: vec![
            model.kind.clone(),
            group.n_threads.to_string(),
            test.to_string(),
            format!("{:.1}", until.as_secs_f64()),
            cell(rate, 2),
            cell(of_first, 1),
            cell(ms(0.5), 3),
            cell(ms(0.99), 3),
            cell(condition.mhz.map(|mhz| mhz / 1e3), 2),
            cell(condition.celsius, 0),
        ],
        fields: vec![
            ("backends", json!(engine)),
            ("model_filename", json!(group.model.display().to_string())),
            ("model_type", json!(model.kind)),
            ("model_size", json!(model.bytes)),
            ("model_n_params", json!(model.n_params)),
            ("n_threads", json!(group.n_threads)),
            ("n_prompt", json!(0)),
            ("n_gen", json!(test.n_gen)),
            ("n_depth", json!(test.n_depth)),
            ("test_time", json!(test_time)),
            ("test", json!(test.to_string())),
            ("until_s", json!(until.as_secs_f64())),
            ("n_tokens", json!(tokens.len())),
            ("avg_ts", json!(rate)),
            ("percent_of_first", json!(of_first)),
            ("token_ms_p50", json!(ms(0.5))),
            ("token_ms_p95", json!(ms(0.95))),
            ("token_ms_p99", json!(ms(0.99))),
            ("clock_mhz", json!(condition.mhz)),
            ("temperature_c", json!(condition.celsius)),
            ("throttled", json!(condition.throttled)),
        ],
        lists: Vec::new(),
        details: Vec::new(),
        notes: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_go_to_the_stretch_in_which_they_end() {
        let seconds = Duration::from_secs;
        let mut stretches = Vec::new();
        let [two, ten] = [2, 10].map(seconds);
        let tokens = [1, 1, 3, 1].map(seconds);
        // End at 1, 2 | 5, 6 |.
        spread(&mut stretches, two, Duration::ZERO, &tokens, ten);
        // Ends at 9, 10; the last after the end.
        spread(
            &mut stretches,
            two,
            seconds(8),
            &[1, 1, 1].map(seconds),
            ten,
        );
        let counts: Vec<usize> = stretches.iter().map(|s| s.tokens.len()).collect();
        assert_eq!(counts, [2, 0, 2, 0, 2]);
        assert_eq!(stretches[0].rate(), Some(1.0));
        assert_eq!(stretches[1].rate(), None);
        assert_eq!(stretches[2].rate(), Some(0.5));
    }

    #[test]
    fn stretches_have_a_second_at_least() {
        assert_eq!(stretch(Duration::from_secs(600)), Duration::from_secs(30));
        assert_eq!(stretch(Duration::from_secs(3)), Duration::from_secs(1));
        assert_eq!(
            stretch(Duration::from_millis(500)),
            Duration::from_millis(500)
        );
    }
}
