//! `kinglet doctor`: this machine as Kinglet sees it: CPU, the kernel chosen for each format and operation, memory.

use std::io::{self, Write};

use kinglet::BackendKind;
use kinglet::backend::cpu::isa::Isa;
use kinglet::backend::cpu::table::{self, Operations};
#[cfg(feature = "gpu")]
use kinglet::backend::gpu::{AdapterInfo, adapters};
use kinglet::profile::topology::Topology;
use kinglet::profile::{Roofline, machine};
use kinglet::quant::DType;
use serde_json::json;

use crate::args::DoctorArgs;
use crate::failure::Outcome;
use crate::limits::{self, Measure};
use crate::ui;

pub fn run(args: &DoctorArgs) -> Outcome {
    let report = Report::new(args)?;
    let mut out = io::BufWriter::new(io::stdout().lock());
    if args.json {
        writeln!(out, "{}", report.json())?;
    } else {
        report.text(&mut out)?;
    }
    out.flush()?;
    Ok(())
}

struct Report {
    cpu: Option<String>,
    cores: usize,
    topology: Topology,
    levels: Vec<(&'static str, bool)>,
    /// Backends that are built for some instruction sets, and which.
    backends: Vec<(&'static str, Vec<&'static str>)>,
    /// Format, kernel for few tokens, kernel for many.
    formats: Vec<(&'static str, Option<&'static str>, Option<&'static str>)>,
    operations: Vec<(&'static str, &'static str)>,
    memory_total: Option<u64>,
    memory_available: Option<u64>,
    page_size: Option<u64>,
    huge_pages: Option<String>,
    cache: Option<u64>,
    /// With one thread, and with all cores.
    rooflines: Vec<Roofline>,
    environment: Vec<(&'static str, String)>,
    #[cfg(feature = "gpu")]
    gpus: Vec<AdapterInfo>,
}

impl Report {
    fn new(args: &DoctorArgs) -> Outcome<Self> {
        let ops = Operations::best();
        let formats = DType::ALL.iter().map(|t| {
            let few = table::gemv(*t).map(|k| k.name());
            let many = table::gemm(*t).map(|k| k.name());
            (t.name(), few, many)
        });
        let native = |isa: &Isa| match isa {
            Isa::Scalar => true,
            Isa::Avx2 | Isa::Avx512Vnni | Isa::Avx512Vbmi | Isa::Amx => {
                cfg!(target_arch = "x86_64")
            }
            Isa::Neon | Isa::NeonDotprod => cfg!(target_arch = "aarch64"),
        };
        let levels = Isa::ALL.iter().copied().filter(native);
        let variables = ["KINGLET_ISA", "KINGLET_KERNEL", "KINGLET_MODEL"];
        let set = |name| std::env::var(name).ok().map(|value| (name, value));
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut threads = vec![1, cores];
        threads.dedup();
        let measure = match (args.measure, args.no_measure) {
            (true, _) => Measure::Always,
            (_, true) => Measure::Never,
            _ => Measure::Missing,
        };
        let rooflines = threads.into_iter().map(|n| limits::roofline(n, measure));
        let rooflines = rooflines.collect::<Outcome<Vec<_>>>()?;
        Ok(Self {
            cpu: machine::cpu_name(),
            cores,
            topology: Topology::of_this_machine(),
            backends: BackendKind::ALL
                .iter()
                .map(|kind| (kind.name(), kind.built_for()))
                .filter(|(_, sets)| !sets.is_empty())
                .collect(),
            levels: levels.map(|isa| (isa.name(), isa.detected())).collect(),
            formats: formats.collect(),
            operations: vec![
                ("quantize activations", ops.quantize.name()),
                ("RMS norm", ops.rms_norm.name()),
                ("RoPE, halves", ops.rope_halves.name()),
                ("RoPE, neighbours", ops.rope_neighbours.name()),
                ("gated unit", ops.glu.name()),
                ("residual", ops.add.name()),
                ("to half floats", ops.to_f16.name()),
                ("short convolution", ops.short_conv.name()),
                ("attention", ops.attend.name()),
            ],
            memory_total: machine::memory_total(),
            memory_available: machine::memory_available(),
            page_size: machine::page_bytes(),
            huge_pages: machine::huge_pages(),
            cache: machine::last_level_cache(),
            rooflines: rooflines.into_iter().flatten().collect(),
            environment: variables.into_iter().filter_map(set).collect(),
            #[cfg(feature = "gpu")]
            gpus: adapters(),
        })
    }

    fn text(&self, out: &mut impl Write) -> Outcome {
        let unknown = || "unknown".to_owned();
        let bytes = |n: Option<u64>| n.map_or_else(unknown, ui::bytes);
        writeln!(out, "CPU")?;
        writeln!(
            out,
            "  model           {}",
            self.cpu.clone().unwrap_or_else(unknown)
        )?;
        writeln!(out, "  cores allowed   {}", self.cores)?;
        match (self.topology.cores(), self.topology.fast_cores()) {
            (0, _) => writeln!(out, "  physical cores  unknown")?,
            (all, fast) => writeln!(out, "  physical cores  {all}, {fast} of them fast")?,
        }
        writeln!(out, "  threads         {}", self.topology.threads())?;
        for (name, has) in &self.levels {
            writeln!(out, "  {name:<15} {}", if *has { "yes" } else { "no" })?;
        }
        for (name, sets) in &self.backends {
            writeln!(out, "  {name:<15} {}", sets.join(", "))?;
        }
        #[cfg(feature = "gpu")]
        self.gpus(out)?;
        writeln!(out, "\nKernels by weight format: few tokens, many tokens")?;
        for (format, few, many) in &self.formats {
            let name = |kernel: &Option<&'static str>| kernel.unwrap_or("none");
            writeln!(out, "  {format:<8} {:<32} {}", name(few), name(many))?;
        }
        writeln!(out, "\nOther kernels")?;
        for (operation, kernel) in &self.operations {
            writeln!(out, "  {operation:<21} {kernel}")?;
        }
        writeln!(out, "\nMemory")?;
        writeln!(out, "  total           {}", bytes(self.memory_total))?;
        writeln!(out, "  available       {}", bytes(self.memory_available))?;
        writeln!(out, "  page            {}", bytes(self.page_size))?;
        writeln!(
            out,
            "  huge pages      {}",
            self.huge_pages.clone().unwrap_or_else(unknown)
        )?;
        writeln!(out, "  largest cache   {}", bytes(self.cache))?;
        if let Some(roofline) = self.rooflines.first() {
            let size = ui::bytes(roofline.buffer_bytes);
            writeln!(
                out,
                "\nRoofline: the most this machine does, memory of {size} read"
            )?;
            write!(out, "{}", limits::table(&self.rooflines))?;
        }
        if !self.environment.is_empty() {
            writeln!(out, "\nEnvironment")?;
            for (name, value) in &self.environment {
                writeln!(out, "  {name}={}", ui::one_line(value))?;
            }
        }
        Ok(())
    }

    /// The adapters, by their number in `--device`.
    #[cfg(feature = "gpu")]
    fn gpus(&self, out: &mut impl Write) -> Outcome {
        writeln!(out, "\nGPU")?;
        if self.gpus.is_empty() {
            writeln!(out, "  none, or no driver for Vulkan, Metal or DX12")?;
        }
        for gpu in &self.gpus {
            writeln!(
                out,
                "  --device {}      {}: {}, {}",
                gpu.index, gpu.name, gpu.kind, gpu.api
            )?;
            writeln!(out, "    driver        {}", gpu.driver)?;
            let subgroup = match gpu.subgroup {
                Some(n) => format!("{n} lanes"),
                None => "not of one size".to_owned(),
            };
            writeln!(out, "    subgroups     {subgroup}")?;
            let half = if gpu.f16 { "yes" } else { "no" };
            writeln!(out, "    half floats   {half}")?;
            let matrices = if gpu.matrices { "yes" } else { "no" };
            writeln!(out, "    matrix units  {matrices}")?;
            let binding = ui::bytes(gpu.max_binding);
            let memory = ui::bytes(gpu.workgroup_memory.into());
            writeln!(
                out,
                "    at most       {binding} a binding, {memory} a workgroup"
            )?;
        }
        Ok(())
    }

    #[cfg(not(feature = "gpu"))]
    fn gpus_json(&self) -> Vec<serde_json::Value> {
        Vec::new()
    }

    #[cfg(feature = "gpu")]
    fn gpus_json(&self) -> Vec<serde_json::Value> {
        let gpu = |gpu: &AdapterInfo| {
            json!({
                "index": gpu.index,
                "name": gpu.name,
                "kind": gpu.kind,
                "api": gpu.api,
                "driver": gpu.driver,
                "subgroup": gpu.subgroup,
                "f16": gpu.f16,
                "matrix_units": gpu.matrices,
                "max_binding_bytes": gpu.max_binding,
                "workgroup_bytes": gpu.workgroup_memory,
            })
        };
        self.gpus.iter().map(gpu).collect()
    }

    fn json(&self) -> serde_json::Value {
        let object = |pairs: &[(&'static str, &'static str)]| -> serde_json::Map<_, _> {
            pairs
                .iter()
                .map(|(a, b)| (a.to_string(), json!(b)))
                .collect()
        };
        let levels = self
            .levels
            .iter()
            .map(|(name, has)| (name.to_string(), json!(has)));
        let formats = self
            .formats
            .iter()
            .map(|(format, few, many)| (format.to_string(), json!({ "gemv": few, "gemm": many })));
        let backends = self
            .backends
            .iter()
            .map(|(name, sets)| (name.to_string(), json!(sets)));
        json!({
            "cpu": self.cpu,
            "cores": self.cores,
            "physical_cores": self.topology.cores(),
            "fast_cores": self.topology.fast_cores(),
            "threads": self.topology.threads(),
            "backends": backends.collect::<serde_json::Map<_, _>>(),
            "gpus": self.gpus_json(),
            "levels": levels.collect::<serde_json::Map<_, _>>(),
            "formats": formats.collect::<serde_json::Map<_, _>>(),
            "operations": object(&self.operations),
            "memory": {
                "total_bytes": self.memory_total,
                "available_bytes": self.memory_available,
                "page_bytes": self.page_size,
                "huge_pages": self.huge_pages,
                "largest_cache_bytes": self.cache,
            },
            "rooflines": self.rooflines,
            "version": env!("CARGO_PKG_VERSION"),
        })
    }
}
