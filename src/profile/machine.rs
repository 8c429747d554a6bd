//! The machine, and this process on it, as Linux tells: elsewhere most of it is unknown.

use std::fs;
use std::time::Duration;

/// The model of the CPU.
pub fn cpu_name() -> Option<String> {
    let info = fs::read_to_string("/proc/cpuinfo").ok()?;
    // The first line with the name.
    let value = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name))?;
        let value = line.split_once(':')?.1.trim();
        (!value.is_empty()).then(|| value.to_owned())
    };
    value("model name")
        .or_else(|| value("Hardware"))
        .or_else(|| {
            let part = value("CPU part")?;
            Some(format!(
                "Arm implementer {}, part {part}",
                value("CPU implementer")?
            ))
        })
}

/// Bytes of the largest cache that the first core sees.
pub fn last_level_cache() -> Option<u64> {
    let caches = fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let size = |entry: std::io::Result<fs::DirEntry>| {
        let text = fs::read_to_string(entry.ok()?.path().join("size")).ok()?;
        parse_size(text.trim())
    };
    caches.filter_map(size).max()
}

/// `480M`, `491520K`, `512`.
fn parse_size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(['K', 'M', 'G']);
    let unit = match &text[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

/// Bytes of main memory.
pub fn memory_total() -> Option<u64> {
    kib_line("/proc/meminfo", "MemTotal:")
}

/// Bytes of main memory that programs could have.
pub fn memory_available() -> Option<u64> {
    kib_line("/proc/meminfo", "MemAvailable:")
}

/// Bytes in a line of a file that counts in KiB.
fn kib_line(path: &str, name: &str) -> Option<u64> {
    kib(&fs::read_to_string(path).ok()?, name)
}

fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Bytes of a page: the entry of type AT_PAGESZ (6) in the auxiliary vector, which is pairs of words.
pub fn page_bytes() -> Option<u64> {
    let vector = fs::read("/proc/self/auxv").ok()?;
    let words: Vec<usize> = vector
        .chunks_exact(size_of::<usize>())
        .map(|word| usize::from_ne_bytes(word.try_into().expect("chunks of that size")))
        .collect();
    let pair = words.chunks_exact(2).find(|pair| pair[0] == 6)?;
    Some(pair[1] as u64)
}

/// When anonymous memory gets huge pages: `always`, `madvise`, `never`.
pub fn huge_pages() -> Option<String> {
    let modes = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").ok()?;
    let mode = modes.split_once('[')?.1.split_once(']')?.0;
    Some(mode.to_owned())
}

/// How long the threads of this process have waited for a core since they began.
pub fn waited_for_cores() -> Option<Duration> {
    let tasks = fs::read_dir("/proc/self/task").ok()?;
    let waited = |task: fs::DirEntry| {
        let text = fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().nth(1)?.parse().ok()
    };
    let nanos: Vec<u64> = tasks.filter_map(|task| waited(task.ok()?)).collect();
    (!nanos.is_empty()).then(|| Duration::from_nanos(nanos.iter().sum()))
}

/// Memory of this process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Resident {
    /// Bytes that only this process has: heap and stacks.
    pub anonymous: u64,
    /// Bytes of mapped files in memory, which the system can drop and read again.
    pub file: u64,
    /// The most that both were together since the start or the last [`Resident::reset_peak`].
    pub peak: u64,
}

impl Resident {
    /// As it is now.
    pub fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/self/status").ok()?)
    }

    /// The larger of each.
    pub fn most(self, other: Self) -> Self {
        Self {
            anonymous: self.anonymous.max(other.anonymous),
            file: self.file.max(other.file),
            peak: self.peak.max(other.peak),
        }
    }

    fn parse(status: &str) -> Option<Self> {
        Some(Self {
            anonymous: kib(status, "RssAnon:")?,
            file: kib(status, "RssFile:")? + kib(status, "RssShmem:").unwrap_or(0),
            peak: kib(status, "VmHWM:")?,
        })
    }

    /// Lets the peak begin again from what is held now; whether the system could.
    pub fn reset_peak() -> bool {
        fs::write("/proc/self/clear_refs", "5").is_ok()
    }
}

/// Memory of this process as the cheapest of the kernel's counters tells; `peak` is what is held.
pub fn statm() -> Option<Resident> {
    static PAGE: std::sync::OnceLock<Option<u64>> = std::sync::OnceLock::new();
    let page = (*PAGE.get_or_init(page_bytes))?;
    let text = fs::read_to_string("/proc/self/statm").ok()?;
    let mut fields = text.split_whitespace().map(str::parse::<u64>);
    let resident = fields.nth(1)?.ok()? * page;
    let file = fields.next()?.ok()? * page;
    Some(Resident {
        anonymous: resident.checked_sub(file)?,
        file,
        peak: resident,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_with_units() {
        assert_eq!(parse_size("491520K"), Some(480 << 20));
        assert_eq!(parse_size("32M"), Some(32 << 20));
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("12Q"), None);
        assert_eq!(parse_size(""), None);
    }

    #[test]
    fn status_lines() {
        let status = "Name:\tx\nVmHWM:\t    5120 kB\nRssAnon:\t  1024 kB\nRssFile:\t   2048 kB\nRssShmem:\t 4 kB\n";
        let resident = Resident::parse(status).expect("all lines are there");
        assert_eq!(resident.peak, 5 << 20);
        assert_eq!(resident.anonymous, 1 << 20);
        assert_eq!(resident.file, (2 << 20) + (4 << 10));
        assert_eq!(Resident::parse("VmHWM: 1 kB"), None);
    }
}
