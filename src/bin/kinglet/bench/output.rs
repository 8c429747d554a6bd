//! Results as llama-bench prints them: a table for people, CSV, JSON, JSON lines.

use std::io::{self, Write};

use serde_json::{Map, Value, json};

use crate::args::Format;
use crate::failure::Outcome;
use crate::ui;

/// A column of a table.
#[derive(Clone, Copy)]
pub struct Column {
    name: &'static str,
    width: usize,
    text: bool,
}

impl Column {
    /// Words, to the left.
    pub const fn text(name: &'static str, width: usize) -> Self {
        let text = true;
        Self { name, width, text }
    }

    /// Numbers, to the right.
    pub const fn number(name: &'static str, width: usize) -> Self {
        let text = false;
        Self { name, width, text }
    }

    fn cell(&self, text: &str) -> String {
        let width = self.width;
        if self.text {
            format!(" {text:<width$} |")
        } else {
            format!(" {text:>width$} |")
        }
    }

    fn rule(&self) -> String {
        let end = if self.text { '-' } else { ':' };
        format!(" {}{end} |", "-".repeat(self.width - 1))
    }
}

/// Columns, and cells for each.
pub struct Table {
    title: &'static str,
    columns: Vec<Column>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(title: &'static str, columns: Vec<Column>) -> Self {
        Self {
            title,
            columns,
            rows: Vec::new(),
        }
    }

    /// Names of columns.
    pub fn head(&self) -> String {
        let names = self.columns.iter().map(|c| c.cell(c.name));
        let rules = self.columns.iter().map(Column::rule);
        format!(
            "|{}\n|{}\n",
            names.collect::<String>(),
            rules.collect::<String>()
        )
    }

    /// A line of cells.
    pub fn line(&self, cells: &[String]) -> String {
        let cells = self.columns.iter().zip(cells);
        let cells = cells.map(|(column, cell)| column.cell(&ui::one_line(cell)));
        format!("|{}\n", cells.collect::<String>())
    }
}

/// One result.
pub struct Record {
    /// Of the table.
    pub cells: Vec<String>,
    /// Scalars, for every output that machines read; the same names in each record.
    pub fields: Vec<(&'static str, Value)>,
    /// Lists, for JSON.
    pub lists: Vec<(&'static str, Value)>,
    /// Cells of each of the tables that follow.
    pub details: Vec<Vec<String>>,
    /// What is to be said once, below the tables.
    pub notes: Vec<String>,
}

/// Writes results as they come.
pub struct Printer {
    format: Format,
    table: Table,
    /// Tables below the first; none if nobody asked for them.
    details: Vec<Table>,
    notes: Vec<String>,
    cpu: Option<String>,
    n_rows: usize,
}

impl Printer {
    pub fn new(format: Format, columns: Vec<Column>, details: Vec<Table>) -> Self {
        Self {
            format,
            table: Table::new("", columns),
            details,
            notes: Vec::new(),
            cpu: kinglet::profile::machine::cpu_name(),
            n_rows: 0,
        }
    }

    /// One result.
    pub fn row(&mut self, record: Record) -> Outcome {
        let mut out = io::stdout().lock();
        let first = self.n_rows == 0;
        self.n_rows += 1;
        let build = [
            ("build_commit", json!(env!("KINGLET_COMMIT"))),
            ("build_version", json!(env!("CARGO_PKG_VERSION"))),
            ("cpu_info", json!(self.cpu)),
        ];
        let fields = build.into_iter().chain(record.fields);
        match self.format {
            Format::Md => {
                if first {
                    write!(out, "{}", self.table.head())?;
                }
                write!(out, "{}", self.table.line(&record.cells))?;
                for (table, cells) in self.details.iter_mut().zip(record.details) {
                    table.rows.push(cells);
                }
                for note in record.notes {
                    if !self.details.is_empty() && !self.notes.contains(&note) {
                        self.notes.push(note);
                    }
                }
            }
            Format::Csv => {
                let (names, values): (Vec<_>, Vec<_>) =
                    fields.map(|(name, value)| (name, csv(&value))).unzip();
                if first {
                    writeln!(out, "{}", names.join(","))?;
                }
                writeln!(out, "{}", values.join(","))?;
            }
            Format::Json | Format::Jsonl => {
                let named = fields.chain(record.lists);
                let object: Map<_, _> = named.map(|(name, value)| (name.into(), value)).collect();
                let object = Value::from(object);
                if self.format == Format::Jsonl {
                    writeln!(out, "{object}")?;
                } else {
                    write!(out, "{}\n{object:#}", if first { "[" } else { "," })?;
                }
            }
        }
        out.flush()?;
        Ok(())
    }

    /// What comes after the last result, if there was one.
    pub fn end(&self) -> Outcome {
        if self.n_rows == 0 {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        match self.format {
            Format::Md => {
                for table in &self.details {
                    write!(out, "\n{}\n\n{}", table.title, table.head())?;
                    for cells in &table.rows {
                        write!(out, "{}", table.line(cells))?;
                    }
                }
                writeln!(out)?;
                for note in &self.notes {
                    writeln!(out, "{}", ui::one_line(note))?;
                }
                let cpu = self.cpu.as_deref().unwrap_or("unknown CPU");
                let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("KINGLET_COMMIT"));
                writeln!(out, "build: {version} ({commit}) on {}", ui::one_line(cpu))?;
            }
            Format::Json => writeln!(out, "\n]")?,
            Format::Csv | Format::Jsonl => {}
        }
        out.flush()?;
        Ok(())
    }
}

/// A field in quotes, as llama-bench writes all of them.
fn csv(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        value => value.to_string(),
    };
    format!("\"{}\"", text.replace('"', "\"\""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn csv_quotes() {
        assert_eq!(csv(&json!("a \"b\", c")), "\"a \"\"b\"\", c\"");
        assert_eq!(csv(&json!(2)), "\"2\"");
        assert_eq!(csv(&json!(null)), "\"\"");
    }
}
