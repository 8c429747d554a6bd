//! Shaders put together from their files.
//!
//! A shader is some constants, the fragment of a weight format, what its target has, and the file of the operation. Sizes
//! that shape loops and arrays are constants in front of the text, not `override`s: WGSL has no arrays of overridable
//! length in functions, and the text that is tested for every target is the text that runs.

use std::fmt::Write;

use super::pipeline::{Experts, GEMV_LANES, Reads, Shader, Target, Then, is_float};
use crate::backend::select::By;
use crate::backend::{Activation, KvType, RopePairs};
use crate::quant::{DType, KVALUES_IQ4NL, KVALUES_MXFP4};

macro_rules! file {
    ($name:literal) => {
        include_str!(concat!("../../../shaders/", $name))
    };
}

/// The files that read a format: those that are shared, and its own.
fn format(dtype: DType) -> (&'static [&'static str], &'static str) {
    const HALVES: &str = file!("quant/halves.wgsl");
    const NIBBLES: &str = file!("quant/nibbles.wgsl");
    const PAIRS: &str = file!("quant/pairs.wgsl");
    const BITS: &str = file!("quant/bits.wgsl");
    const TABLE: &str = file!("quant/table.wgsl");
    match dtype {
        DType::F32 => (&[], file!("quant/f32.wgsl")),
        DType::F16 => (&[HALVES], file!("quant/f16.wgsl")),
        DType::BF16 => (&[HALVES], file!("quant/bf16.wgsl")),
        DType::Q8_0 => (&[], file!("quant/q8_0.wgsl")),
        DType::Q4_0 => (&[NIBBLES], file!("quant/q4_0.wgsl")),
        DType::Q4_1 => (&[NIBBLES], file!("quant/q4_1.wgsl")),
        DType::Q5_0 => (&[NIBBLES, BITS], file!("quant/q5_0.wgsl")),
        DType::Q5_1 => (&[NIBBLES, BITS], file!("quant/q5_1.wgsl")),
        DType::Q4_K => (&[NIBBLES], file!("quant/q4_k.wgsl")),
        DType::Q5_K => (&[NIBBLES, BITS], file!("quant/q5_k.wgsl")),
        DType::Q6_K => (&[NIBBLES, PAIRS], file!("quant/q6_k.wgsl")),
        DType::Q2_K => (&[PAIRS], file!("quant/q2_k.wgsl")),
        DType::Q3_K => (&[PAIRS, BITS], file!("quant/q3_k.wgsl")),
        DType::IQ4_NL => (&[TABLE], file!("quant/iq4_nl.wgsl")),
        DType::IQ4_XS => (&[TABLE], file!("quant/iq4_xs.wgsl")),
        DType::MXFP4 => (&[TABLE], file!("quant/mxfp4.wgsl")),
        DType::TQ1_0 | DType::TQ2_0 => (&[PAIRS], file!("quant/tq2_0.wgsl")),
    }
}

/// What is written before a text.
struct Text(String);

impl Text {
    fn constant(&mut self, name: &str, kind: &str, value: impl std::fmt::Display) {
        writeln!(self.0, "const {name}: {kind} = {value};").expect("a string has room");
    }

    fn uint(&mut self, name: &str, value: u32) {
        self.constant(name, "u32", format_args!("{value}u"));
    }

    fn flag(&mut self, name: &str, value: bool) {
        self.constant(name, "bool", value);
    }

    fn file(&mut self, text: &str) {
        self.0.push('\n');
        self.0.push_str(text);
    }

    fn activation(&mut self, activation: Option<Activation>) {
        let number = match activation {
            None | Some(Activation::Silu) => 0,
            Some(Activation::GeluTanh) => 1,
            Some(Activation::Relu) => 2,
        };
        self.uint("ACTIVATION", number);
        self.file(file!("activation.wgsl"));
    }

    /// How units of a format are read; `load_0` for the first matrix.
    fn format(&mut self, dtype: DType) {
        let (shared, own) = format(dtype);
        let table = match dtype {
            DType::IQ4_NL | DType::IQ4_XS => Some(KVALUES_IQ4NL),
            DType::MXFP4 => Some(KVALUES_MXFP4),
            _ => None,
        };
        if let Some(table) = table {
            let words: [u32; 4] = bytemuck::cast(table.map(|x| x as u8));
            let [a, b, c, d] = words.map(u32::to_le);
            let value = format_args!("vec4<u32>({a}u, {b}u, {c}u, {d}u)").to_string();
            self.constant("TABLE", "vec4<u32>", value);
        }
        shared.iter().for_each(|text| self.file(text));
        self.file(own);
        if !is_float(dtype) {
            self.file(file!("quant/affine.wgsl"));
        }
    }

    /// `part` for each of some matrices, which have a function each that loads their units.
    fn matrices(&mut self, dtype: DType, n: u32, part: &str) {
        let (shared, own) = format(dtype);
        let loads = |text: &&str| text.contains("fn load_0");
        let own = [own].into_iter().chain(shared.iter().copied()).find(loads);
        let own = own.expect("every format loads units");
        let load = own.find("fn load_0").expect("it was found");
        let load_end = load + own[load..].find("\n}\n").expect("a function ends") + 3;
        for m in 0..n {
            let mut part = part.to_owned();
            for i in 0..4 {
                let binding = (5 + 4 * m + i).to_string();
                part = part.replace(&format!("BINDING_{i})"), &format!("{binding})"));
            }
            part = part.replace("M_0", &format!("{m}u"));
            if m > 0 {
                part.push_str(&own[load..load_end]);
            }
            self.file(&part.replace("_0", &format!("_{m}")));
        }
    }

    /// A function that does `what` for the matrix `m`, whose number stands for `#`.
    fn choice(&mut self, head: &str, what: &str, n: u32) {
        write!(self.0, "\nfn {head} {{\n    switch m {{\n").expect("a string has room");
        for m in (0..n).rev() {
            let case = match m {
                0 => "default".to_owned(),
                m => format!("case {m}u"),
            };
            let what = what.replace('#', &m.to_string());
            writeln!(self.0, "        {case}: {{ {what} }}").expect("a string has room");
        }
        self.0.push_str("    }\n}\n");
    }

    /// A text that packs what it makes, if it is told to, of so many heads.
    fn packing(&mut self, text: &str, pack: bool, group: u32) {
        if pack {
            self.file(file!("pack.wgsl"));
        }
        let counts = [("PACK", u32::from(pack)), ("GROUP", group)];
        self.file(&unrolled(text, &counts));
    }

    fn team(&mut self, target: &Target) {
        self.file(match target.subgroup {
            Some(_) => file!("team_subgroup.wgsl"),
            None => file!("team_plain.wgsl"),
        });
    }

    fn keys(&mut self, keys: KvType) {
        self.file(match keys {
            KvType::F32 => file!("kv/keys_f32.wgsl"),
            KvType::Q8_0 => file!("kv/keys_q8_0.wgsl"),
            _ => file!("kv/keys_f16.wgsl"),
        });
    }

    fn cache(&mut self, keys: KvType, values: KvType) {
        self.keys(keys);
        self.file(match values {
            KvType::F32 => file!("kv/values_f32.wgsl"),
            KvType::Q8_0 => file!("kv/values_q8_0.wgsl"),
            _ => file!("kv/values_f16.wgsl"),
        });
    }
}

/// A text whose parts from `// unroll i N` to `// end` stand there N times, each with its number for `#i`.
fn unrolled(text: &str, counts: &[(&str, u32)]) -> String {
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some(head) = line.trim_start().strip_prefix("// unroll ") else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let (name, count) = head.split_once(' ').expect("a name and a count");
        let (_, count) = counts
            .iter()
            .find(|(known, _)| *known == count)
            .expect("a count that is known");
        let mut depth = 1;
        let mut body = String::new();
        for line in lines.by_ref() {
            let start = line.trim_start();
            depth += usize::from(start.starts_with("// unroll "));
            depth -= usize::from(start == "// end");
            if depth == 0 {
                break;
            }
            body.push_str(line);
            body.push('\n');
        }
        for i in 0..*count {
            let body = body.replace(&format!("#{name}"), &i.to_string());
            out.push_str(&unrolled(&body, counts));
        }
    }
    out
}

impl Shader {
    /// The text for a target.
    pub fn source(&self, target: &Target) -> String {
        let mut text = Text(String::new());
        match *self {
            Shader::Gemv {
                dtype,
                matrices,
                rows,
                units,
                norm,
                bias,
                residual,
                glu,
                experts,
            } => {
                text.uint("WG", GEMV_LANES);
                text.uint("TEAM", target.team());
                text.uint("TEAMS", GEMV_LANES / target.team());
                text.uint("ROWS", rows);
                let (seg, depth) = units.loops(target.team(), is_float(dtype));
                text.uint("SEG", seg);
                text.uint("DEPTH", depth);
                text.uint("MATRICES", matrices);
                text.flag("NORM", norm);
                text.flag("BIAS", bias);
                text.flag("RESIDUAL", residual);
                text.flag("GLU", glu.is_some());
                text.uint("EXPERTS", experts as u32);
                text.activation(glu);
                text.format(dtype);
                text.matrices(dtype, matrices, file!("gemv_matrix.wgsl"));
                text.choice(
                    "tile(m: u32, before: u32, row: u32, unit: u32) -> array<Unit, ROWS>",
                    "return tile_#(before, row, unit);",
                    matrices,
                );
                text.choice(
                    "put(m: u32, at: u32, token: u32, row: u32, y: f32)",
                    "put_#(at, token, row, y);",
                    matrices,
                );
                text.file(match is_float(dtype) {
                    true => file!("x_float.wgsl"),
                    false => file!("x_packed.wgsl"),
                });
                text.file(file!("gemv.wgsl"));
                text.team(target);
            }
            Shader::GemvPacked {
                dtype,
                matrices,
                shape,
                norm,
                bias,
                residual,
                glu,
                taps,
                then,
                experts,
            } => {
                let (teams, rows, split) = (shape.teams(), shape.rows(), shape.split());
                text.uint("WG", teams * shape.team);
                text.uint("TEAM", shape.team);
                text.uint("TEAMS", teams);
                text.uint("ROWS", rows);
                text.uint("SPLIT", split);
                text.uint("DEPTH", shape.depth());
                text.uint("MATRICES", matrices);
                text.flag("NORM", norm);
                text.flag("GLU", glu.is_some());
                text.uint("TAPS", taps);
                text.flag("CONV", taps > 0);
                text.flag("SQUARES", then == Then::Norm);
                text.activation(glu);
                text.format(dtype);
                let flag = u32::from;
                let counts = [
                    ("ROWS", rows),
                    ("DEPTH", shape.depth()),
                    ("GLU", flag(glu.is_some())),
                    ("CONV", flag(taps > 0)),
                    ("TAPS", taps),
                    ("PAIRS", flag(glu.is_some() || taps > 0)),
                    ("RESIDUAL", flag(residual)),
                    ("BIAS", flag(bias)),
                    ("GAIN", flag(then == Then::Norm)),
                    ("PACK", flag(then != Then::Nothing)),
                    ("OUT", flag(then != Then::Product)),
                    ("ROUTES", flag(experts != Experts::None)),
                    ("EACH", flag(experts == Experts::Each)),
                    ("SUM", flag(experts == Experts::Sum)),
                    ("EIGHT", 8),
                ];
                let part = file!("gemv_packed_matrix.wgsl");
                text.matrices(dtype, matrices, &unrolled(part, &counts));
                let head = "load(m: u32, at: u32) -> Unit";
                text.choice(head, "return load_#(at);", matrices);
                if bias {
                    let head = "bias(m: u32, at: u32) -> vec4<f32>";
                    text.choice(head, "return bias_#[at];", matrices);
                }
                if then != Then::Product {
                    let head = "put(m: u32, at: u32, y: vec4<f32>)";
                    text.choice(head, "out_#[at] = y;", matrices);
                }
                if then != Then::Nothing {
                    text.file(file!("pack.wgsl"));
                }
                text.file(&unrolled(file!("gemv_packed.wgsl"), &counts));
                text.team(target);
            }
            Shader::Gemm {
                dtype,
                tm,
                tn,
                bias,
                residual,
                experts,
            } => {
                // Weights that are floats already lose nothing.
                let half = target.f16 && dtype != DType::F32;
                if half {
                    text.0.push_str("enable f16;\n");
                }
                text.uint("TM", tm);
                text.uint("TN", tn);
                text.flag("BIAS", bias);
                text.flag("RESIDUAL", residual);
                text.uint("EXPERTS", experts as u32);
                text.file(match half {
                    true => file!("tile_f16.wgsl"),
                    false => file!("tile_f32.wgsl"),
                });
                text.format(dtype);
                text.file(file!("gemm_params.wgsl"));
                text.file(file!("gemm.wgsl"));
            }
            Shader::GemmMatrix {
                dtype,
                tile,
                bias,
                residual,
                experts,
            } => {
                text.0
                    .push_str("enable f16;\nenable wgpu_cooperative_matrix;\n");
                let ((rows, columns), (sm, sn)) = (tile.squares, tile.subgroups);
                text.uint("FM", rows);
                text.uint("FN", columns);
                text.uint("SM", sm);
                text.uint("SN", sn);
                text.flag("BIAS", bias);
                text.flag("RESIDUAL", residual);
                text.uint("EXPERTS", experts as u32);
                text.file(file!("tile_f16.wgsl"));
                text.format(dtype);
                text.file(file!("gemm_params.wgsl"));
                // Vectors of activations that a lane fetches.
                let xs = 8 * tile.tokens() as u32 / (32 * sm * sn);
                let counts = [("FM", rows), ("FN", columns), ("XS", xs), ("2", 2)];
                text.file(&unrolled(file!("gemm_matrix.wgsl"), &counts));
            }
            Shader::Embed(dtype) => {
                text.format(dtype);
                text.file(file!("embed.wgsl"));
            }
            Shader::RmsNorm { residual } => {
                text.flag("RESIDUAL", residual);
                text.file(file!("rms_norm.wgsl"));
            }
            Shader::Heads {
                norm,
                rope,
                max_head,
                keys,
                values,
            } => {
                text.uint("MAX_HEAD", max_head);
                text.flag("NORM", norm);
                text.uint(
                    "ROPE",
                    match rope {
                        None => 0,
                        Some(RopePairs::Halves) => 1,
                        Some(RopePairs::Neighbours) => 2,
                    },
                );
                let kind = |kind| match kind {
                    KvType::F32 => 0,
                    KvType::Q8_0 => 2,
                    _ => 1,
                };
                text.uint("KEYS", kind(keys));
                text.uint("VALUES", kind(values));
                let is_coded = [keys, values].contains(&KvType::Q8_0);
                text.uint("CODED", if is_coded { max_head } else { 32 });
                text.file(file!("heads.wgsl"));
            }
            Shader::AttentionOne {
                head_dim,
                group,
                few,
                pack,
                keys,
                values,
                reads,
            } => {
                text.uint("D", head_dim);
                text.uint("GROUP", group);
                text.cache(keys, values);
                text.file(match reads {
                    Reads::All => file!("kv/all.wgsl"),
                    Reads::Ends => file!("kv/ends.wgsl"),
                    Reads::List => file!("kv/list.wgsl"),
                });
                let params = file!("attention_params.wgsl");
                let main = match few {
                    true => file!("attention_few.wgsl"),
                    false => file!("attention_one.wgsl"),
                };
                text.packing(&[params, main].concat(), pack, group);
            }
            Shader::AttentionMerge { pack } => {
                text.packing(file!("attention_merge.wgsl"), pack, 1);
            }
            Shader::AttentionMany {
                head_dim,
                bq,
                bk,
                keys,
                values,
                ends,
            } => {
                text.uint("D", head_dim);
                text.uint("BQ", bq);
                text.uint("BK", bk);
                text.flag("ENDS", ends);
                text.cache(keys, values);
                text.file(file!("attention_many.wgsl"));
            }
            Shader::SumKeys { chunk, keys } => {
                text.uint("CHUNK", chunk);
                text.keys(keys);
                text.file(file!("sum_keys.wgsl"));
            }
            Shader::ChunkScores {
                head_dim,
                rows,
                chunk,
                summed,
            } => {
                text.uint("D", head_dim);
                text.uint("ROWS", rows);
                text.uint("CHUNK", chunk);
                text.flag("SUMMED", summed);
                text.file(file!("chunk_scores.wgsl"));
            }
            Shader::Choose {
                by,
                chunk,
                item,
                group,
            } => {
                let by = match by {
                    By::Place | By::Sum => 0,
                    By::Shared => 1,
                    By::Vote => 2,
                    By::Best => 3,
                    By::Blocks => 4,
                };
                text.uint("BY", by);
                text.uint("CHUNK", chunk);
                text.uint("ITEM", item);
                text.uint("GROUP", group);
                text.file(file!("choose.wgsl"));
            }
            Shader::ShortConv { store, push, pack } => {
                text.flag("STORE", store);
                text.flag("PUSH", push);
                text.packing(file!("short_conv.wgsl"), pack, 1);
            }
            Shader::Glu(activation) => {
                text.activation(Some(activation));
                text.file(file!("glu.wgsl"));
            }
            Shader::Add => text.file(file!("add.wgsl")),
            Shader::Top { k, pairs } => {
                text.flag("PAIRS", pairs);
                if k == 1 {
                    text.file(file!("argmax.wgsl"));
                } else {
                    text.uint("K", k);
                    text.file(file!("top_k.wgsl"));
                }
            }
            Shader::Route { bias, sigmoid } => {
                text.flag("BIAS", bias);
                text.flag("SIGMOID", sigmoid);
                text.file(file!("route.wgsl"));
            }
            Shader::Group { n_experts } => {
                text.uint("N_EXPERTS", n_experts);
                text.file(file!("group.wgsl"));
            }
            Shader::Slots => text.file(file!("slots.wgsl")),
        }
        text.0
    }
}
