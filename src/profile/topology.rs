//! The cores of a machine, and how many threads the token loop gets: one on each fast physical core that this process
//! may use, and no more than its quota of processor time.
//!
//! Decode waits for the slowest thread of a region and for memory: two threads on one core share its ports and its
//! reads, and a slow core adds more waiting than work.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A core that is slower than this part of the fastest is a slow one, by the system's own measure of capacity: the
/// little cores of phones reach a quarter to two fifths, the big ones beside a prime core two thirds and more.
const FAST_CAPACITY: f64 = 0.5;

/// The same by highest frequency, where that is all that is known: little and efficiency cores reach 0.5 to 0.8.
const FAST_FREQUENCY: f64 = 0.81;

/// One processor that the system schedules on: a core, or one of its hardware threads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Processor {
    /// The system's number.
    pub id: usize,
    /// The lowest number of those that share its core.
    pub core: usize,
    /// Speed by the system's own measure, at most 1024.
    pub capacity: Option<u64>,
    /// Highest frequency in kHz.
    pub max_khz: Option<u64>,
    /// Whether the system calls it a performance core (`true`) or an efficiency core, if it tells them apart by name.
    pub performance: Option<bool>,
}

/// The processors that this process may use.
#[derive(Clone, PartialEq, Debug)]
pub struct Topology {
    /// All that its affinity mask allows; empty if the system does not tell.
    pub processors: Vec<Processor>,
    /// Processors' worth of time that affinity and quota leave, rounded down but to no less than one.
    pub limit: usize,
}

impl Topology {
    /// As the system describes it: on Linux and Android from `/sys`, elsewhere as a limit alone.
    pub fn of_this_machine() -> Self {
        let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = status
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))
            .and_then(list)
            .unwrap_or_default();
        Self {
            processors: read(Path::new("/sys/devices"), &allowed),
            limit: std::thread::available_parallelism().map_or(1, usize::from),
        }
    }

    /// Processors on the fast cores.
    fn fast(&self) -> impl Iterator<Item = &Processor> {
        let all = &self.processors;
        let max = |speed: fn(&Processor) -> Option<u64>| {
            let speeds: Option<Vec<u64>> = all.iter().map(speed).collect();
            speeds.and_then(|speeds| speeds.into_iter().max())
        };
        let named = all.iter().any(|p| p.performance == Some(true));
        let (capacity, khz) = (max(|p| p.capacity), max(|p| p.max_khz));
        // Where all have the same capacity, the system may just not know better.
        let differ = all.iter().any(|p| p.capacity != capacity);
        all.iter().filter(move |p| {
            let at_least = |part: f64, speed: Option<u64>, max: u64| {
                speed.is_some_and(|speed| speed as f64 >= part * max as f64)
            };
            match (capacity, khz) {
                _ if named => p.performance == Some(true),
                (Some(max), _) if differ => at_least(FAST_CAPACITY, p.capacity, max),
                (_, Some(max)) => at_least(FAST_FREQUENCY, p.max_khz, max),
                _ => true,
            }
        })
    }

    /// Fast physical cores, of those allowed.
    pub fn fast_cores(&self) -> usize {
        let cores: BTreeSet<usize> = self.fast().map(|p| p.core).collect();
        cores.len()
    }

    /// Physical cores, of those allowed.
    pub fn cores(&self) -> usize {
        let cores: BTreeSet<usize> = self.processors.iter().map(|p| p.core).collect();
        cores.len()
    }

    /// Threads that the token loop gets unless somebody says otherwise.
    pub fn threads(&self) -> usize {
        match self.fast_cores() {
            0 => self.limit,
            n => n.min(self.limit),
        }
        .max(1)
    }
}

/// The processors `allowed`, as the folder `devices` (`/sys/devices`) describes them.
fn read(devices: &Path, allowed: &BTreeSet<usize>) -> Vec<Processor> {
    let text = |path: &Path| fs::read_to_string(path).ok();
    // Intel's hybrids, by the names of their performance counters.
    let named = |kind: &str| list(&text(&devices.join(kind).join("cpus"))?);
    let (performance, efficiency) = (named("cpu_core"), named("cpu_atom"));
    let processor = |id: usize| {
        let folder = devices.join(format!("system/cpu/cpu{id}"));
        let number = |name: &str| text(&folder.join(name))?.trim().parse().ok();
        let siblings = text(&folder.join("topology/core_cpus_list"))
            .or_else(|| text(&folder.join("topology/thread_siblings_list")));
        let first = siblings.and_then(|siblings| list(&siblings)?.first().copied());
        Processor {
            id,
            core: first.unwrap_or(id),
            capacity: number("cpu_capacity"),
            max_khz: number("cpufreq/cpuinfo_max_freq"),
            performance: efficiency
                .as_ref()
                .and_then(|_| Some(performance.as_ref()?.contains(&id))),
        }
    };
    allowed.iter().map(|id| processor(*id)).collect()
}

/// Numbers as the kernel lists them: `0-3,8`.
fn list(text: &str) -> Option<BTreeSet<usize>> {
    /// More than any kernel is built for.
    const MAX: usize = 1 << 16;
    let mut numbers = BTreeSet::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if first > last || last >= MAX {
            return None;
        }
        numbers.extend(first..=last);
    }
    Some(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `n` processors from number `id` on, `smt` of them to a core.
    fn some(id: usize, n: usize, smt: usize, khz: u64, capacity: Option<u64>) -> Vec<Processor> {
        let processor = |i: usize| Processor {
            id: id + i,
            core: id + i / smt * smt,
            capacity,
            max_khz: (khz > 0).then_some(khz),
            performance: None,
        };
        (0..n).map(processor).collect()
    }

    fn threads(processors: &[Vec<Processor>], limit: usize) -> usize {
        let processors = processors.concat();
        Topology { processors, limit }.threads()
    }

    #[test]
    fn phones_use_their_big_cores() {
        // Four little, three big, one prime: Snapdragon 888, Dimensity 9000.
        let phone = |capacities: [Option<u64>; 3]| {
            [
                some(0, 4, 1, 1_804_800, capacities[0]),
                some(4, 3, 1, 2_419_200, capacities[1]),
                some(7, 1, 1, 2_841_600, capacities[2]),
            ]
        };
        assert_eq!(threads(&phone([Some(261), Some(871), Some(1024)]), 8), 4);
        assert_eq!(threads(&phone([None; 3]), 8), 4, "by frequency alone");
        // Two big, two middle, four little: Tensor G1.
        let tensor = [
            some(0, 4, 1, 1_803_000, Some(160)),
            some(4, 2, 1, 2_253_000, Some(567)),
            some(6, 2, 1, 2_802_000, Some(1024)),
        ];
        assert_eq!(threads(&tensor, 8), 4);
        // An app in the background is allowed the little cores alone: the fastest of these it is.
        assert_eq!(threads(&tensor[..1], 4), 4);
        // All alike.
        assert_eq!(threads(&[some(0, 4, 1, 1_500_000, Some(1024))], 4), 4);
    }

    #[test]
    fn hybrids_use_a_thread_on_each_performance_core() {
        // Core i7-1260P: four cores of two threads, eight efficiency cores of one.
        let mut hybrid = [
            some(0, 8, 2, 4_700_000, None),
            some(8, 8, 1, 3_400_000, None),
        ];
        assert_eq!(threads(&hybrid, 16), 4, "by frequency");
        // Frequencies that are closer together, but the kernel knows the kinds by name.
        for (i, kind) in hybrid.iter_mut().enumerate() {
            for p in kind {
                p.performance = Some(i == 0);
                p.max_khz = Some(5_000_000 - 500_000 * i as u64);
            }
        }
        assert_eq!(threads(&hybrid, 16), 4, "by name");
        assert_eq!(threads(&hybrid[1..], 8), 8, "efficiency cores alone");
        // Favoured cores that may go a little higher are no kind of their own.
        let favoured = [
            some(0, 4, 2, 5_500_000, None),
            some(4, 12, 2, 5_300_000, None),
        ];
        assert_eq!(threads(&favoured, 16), 8);
    }

    #[test]
    fn servers_use_a_thread_on_each_core_within_their_quota() {
        let server = [some(0, 128, 2, 3_700_000, None)];
        assert_eq!(threads(&server, 128), 64);
        assert_eq!(threads(&server, 6), 6, "a container's quota");
        assert_eq!(threads(&server, 1), 1);
        // Siblings far apart, as most systems number them; one of each core allowed.
        let mut apart = some(0, 16, 1, 0, None);
        apart.iter_mut().for_each(|p| p.core = p.id % 8);
        assert_eq!(threads(&[apart.clone()], 16), 8);
        assert_eq!(threads(&[apart[..3].to_vec()], 3), 3);
        assert_eq!(threads(&[apart[7..9].to_vec()], 2), 2);
        // A virtual machine tells neither frequency nor kind.
        assert_eq!(threads(&[some(0, 2, 1, 0, Some(1024))], 2), 2);
        // Another system, or no /sys.
        assert_eq!(threads(&[], 10), 10);
    }

    #[test]
    fn lists_of_the_kernel() {
        let numbers = |text| list(text).map(|set| set.into_iter().collect::<Vec<_>>());
        assert_eq!(numbers("0-3,8\n"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(numbers("5"), Some(vec![5]));
        for bad in ["", "3-1", "a", "0-99999999999", "1,,2"] {
            assert_eq!(numbers(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_described_machine_is_read() {
        let root = std::env::temp_dir().join(format!("kinglet-topology-{}", std::process::id()));
        let put = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("in the root")).expect("a folder");
            fs::write(path, text).expect("a file");
        };
        for id in 0..3 {
            let cpu = format!("system/cpu/cpu{id}");
            let siblings = if id < 2 { "0-1\n" } else { "2\n" };
            put(&format!("{cpu}/topology/core_cpus_list"), siblings);
            put(&format!("{cpu}/cpufreq/cpuinfo_max_freq"), "4700000\n");
        }
        put("cpu_core/cpus", "0-1\n");
        put("cpu_atom/cpus", "2\n");
        let processors = read(&root, &BTreeSet::from([1, 2]));
        fs::remove_dir_all(&root).expect("made above");
        let like = |id, core, performance| Processor {
            id,
            core,
            capacity: None,
            max_khz: Some(4_700_000),
            performance: Some(performance),
        };
        assert_eq!(processors, [like(1, 0, true), like(2, 2, false)]);
    }
}
