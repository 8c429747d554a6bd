//! What the system counts of this process and of the machine: faults, bytes read, waiting for a disk, energy, clock and
//! temperature. Linux tells; elsewhere, and where it keeps something to itself, that is unknown.
//!
//! Each function reads below a root, `/` but in tests.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Of this process, since it began.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Pages that were in memory but not yet this process's.
    pub minor_faults: u64,
    /// Pages that had to be read.
    pub major_faults: u64,
    /// Bytes read from disks.
    pub read_bytes: Option<u64>,
    /// Nanoseconds that threads waited for disks, if the kernel keeps account of that, in steps of 10 ms.
    pub io_wait: Option<u64>,
}

impl Counters {
    /// As they are now.
    pub fn now() -> Option<Self> {
        Self::read(Path::new("/"))
    }

    fn read(root: &Path) -> Option<Self> {
        let own = fs::read_to_string(root.join("proc/self/stat")).ok()?;
        let io = fs::read_to_string(root.join("proc/self/io")).ok();
        let read_bytes = io.and_then(|io| {
            let line = io.lines().find_map(|l| l.strip_prefix("read_bytes:"))?;
            line.trim().parse().ok()
        });
        Some(Self {
            minor_faults: stat_field(&own, 10)?,
            major_faults: stat_field(&own, 12)?,
            read_bytes,
            io_wait: io_wait(root),
        })
    }

    /// What was added since `before`.
    pub fn since(&self, before: &Counters) -> Counters {
        let of = |now: Option<u64>, before: Option<u64>| Some(now?.saturating_sub(before?));
        Counters {
            minor_faults: self.minor_faults.saturating_sub(before.minor_faults),
            major_faults: self.major_faults.saturating_sub(before.major_faults),
            read_bytes: of(self.read_bytes, before.read_bytes),
            io_wait: of(self.io_wait, before.io_wait),
        }
    }
}

/// Field `n` of a `stat` file, as its manual counts them. The second is a name in parentheses that may hold anything.
fn stat_field(stat: &str, n: usize) -> Option<u64> {
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(n - 3)?.parse().ok()
}

/// The kernel counts this for each thread, in hundredths of a second, and only if it was told to.
fn io_wait(root: &Path) -> Option<u64> {
    let on = fs::read_to_string(root.join("proc/sys/kernel/task_delayacct")).ok()?;
    if on.trim() != "1" {
        return None;
    }
    let tasks = fs::read_dir(root.join("proc/self/task")).ok()?;
    let ticks = tasks.filter_map(|task| {
        let stat = fs::read_to_string(task.ok()?.path().join("stat")).ok()?;
        stat_field(&stat, 42)
    });
    Some(ticks.sum::<u64>() * 10_000_000)
}

/// Energy that was used, as something in the machine counts it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Energy {
    /// What counts: the processor packages, or the battery.
    pub source: &'static str,
    /// Each counter: microjoules, and where it begins again.
    counters: Vec<(u64, u64)>,
    /// Whether the counters go down.
    falls: bool,
}

impl Energy {
    /// As it is now; `None` where nothing counts or reading is not allowed.
    pub fn now() -> Option<Self> {
        Self::read(Path::new("/"))
    }

    fn read(root: &Path) -> Option<Self> {
        Self::of_packages(root).or_else(|| Self::of_battery(root))
    }

    /// RAPL, through powercap: memory has counters of its own below, which belong to its package.
    fn of_packages(root: &Path) -> Option<Self> {
        let zones = folders(&root.join("sys/class/powercap"));
        let packages = zones.iter().filter(|zone| {
            fs::read_to_string(zone.join("name")).is_ok_and(|name| name.starts_with("package"))
        });
        let counters: Option<Vec<_>> = packages
            .map(|zone| {
                let range = number(&zone.join("max_energy_range_uj")).unwrap_or(u64::MAX);
                Some((number(&zone.join("energy_uj"))?, range))
            })
            .collect();
        let counters = counters.filter(|counters| !counters.is_empty())?;
        Some(Self {
            source: "processor packages",
            counters,
            falls: false,
        })
    }

    /// The fuel gauge: energy in microwatt-hours, or charge in microampere-hours and the voltage.
    fn of_battery(root: &Path) -> Option<Self> {
        let supplies = folders(&root.join("sys/class/power_supply"));
        let is = |supply: &Path, file: &str, value: &str| {
            fs::read_to_string(supply.join(file)).is_ok_and(|text| text.trim() == value)
        };
        let battery = supplies
            .iter()
            .find(|supply| is(supply, "type", "Battery") && is(supply, "status", "Discharging"))?;
        let value = |file: &str| number(&battery.join(file));
        let microwatt_hours = value("energy_now").or_else(|| {
            Some(
                (u128::from(value("charge_now")?) * u128::from(value("voltage_now")?) / 1_000_000)
                    as u64,
            )
        })?;
        Some(Self {
            source: "battery",
            counters: vec![(microwatt_hours.saturating_mul(3600), u64::MAX)],
            falls: true,
        })
    }

    /// Microjoules since `before`; `None` if something else counted then, or if the counter is too coarse to have moved.
    pub fn since(&self, before: &Energy) -> Option<u64> {
        if self.source != before.source || self.counters.len() != before.counters.len() {
            return None;
        }
        let pairs = self.counters.iter().zip(&before.counters);
        let used = pairs.map(|((now, range), (before, _))| match self.falls {
            true => before.saturating_sub(*now),
            false if now >= before => now - before,
            false => (range - before).saturating_add(*now),
        });
        Some(used.sum()).filter(|used| *used > 0)
    }
}

/// How fast the cores run, and how warm they are.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Condition {
    /// The mean clock of the cores.
    pub mhz: Option<f64>,
    /// The warmest sensor.
    pub celsius: Option<f64>,
    /// How often a core was slowed down by its temperature, since the system began.
    pub throttled: Option<u64>,
}

impl Condition {
    /// As it is now.
    pub fn now() -> Self {
        Self::read(Path::new("/"))
    }

    fn read(root: &Path) -> Self {
        let cores: Vec<PathBuf> = folders(&root.join("sys/devices/system/cpu"))
            .into_iter()
            .filter(|path| {
                let name = path.file_name().and_then(|name| name.to_str());
                let number = name.and_then(|name| name.strip_prefix("cpu"));
                number.is_some_and(|n| n.parse::<u32>().is_ok())
            })
            .collect();
        let of_cores = |file: &str| -> Vec<u64> {
            cores
                .iter()
                .filter_map(|core| number(&core.join(file)))
                .collect()
        };
        let khz = of_cores("cpufreq/scaling_cur_freq");
        let mhz: Vec<f64> = if khz.is_empty() {
            let info = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
            info.lines()
                .filter(|line| line.starts_with("cpu MHz"))
                .filter_map(|line| line.split_once(':')?.1.trim().parse().ok())
                .collect()
        } else {
            khz.iter().map(|khz| *khz as f64 / 1e3).collect()
        };
        let zones = folders(&root.join("sys/class/thermal"));
        let warmest = zones
            .iter()
            .filter_map(|zone| number(&zone.join("temp")))
            .max();
        let throttled = of_cores("thermal_throttle/core_throttle_count");
        Self {
            mhz: (!mhz.is_empty()).then(|| mhz.iter().sum::<f64>() / mhz.len() as f64),
            celsius: warmest.map(|milli| milli as f64 / 1e3),
            throttled: (!throttled.is_empty()).then(|| throttled.iter().sum()),
        }
    }
}

fn folders(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten();
    let mut paths: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    paths.sort();
    paths
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files.
    fn root(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let root =
            std::env::temp_dir().join(format!("kinglet-counters-{}-{name}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().expect("below the root")).expect("a folder");
            fs::write(path, text).expect("a file");
        }
        root
    }

    #[test]
    fn faults_and_reads() {
        let numbers: Vec<String> = (4..=52).map(|n| n.to_string()).collect();
        let stat = format!("7 (a ) name) S {}", numbers.join(" "));
        let files = [
            ("proc/self/stat", stat.as_str()),
            (
                "proc/self/io",
                "rchar: 1\nread_bytes: 4096\nwrite_bytes: 5\n",
            ),
            ("proc/self/task/7/stat", &stat),
            ("proc/self/task/8/stat", &stat),
            ("proc/sys/kernel/task_delayacct", "1\n"),
        ];
        let root = root("faults", &files);
        let counters = Counters::read(&root).expect("all files are there");
        assert_eq!((counters.minor_faults, counters.major_faults), (10, 12));
        assert_eq!(counters.read_bytes, Some(4096));
        assert_eq!(counters.io_wait, Some(2 * 420_000_000));
        fs::write(root.join("proc/sys/kernel/task_delayacct"), "0").expect("a file");
        assert_eq!(Counters::read(&root).expect("still there").io_wait, None);
        fs::remove_dir_all(root).expect("the folder");
    }

    #[test]
    fn energy_of_packages_wraps() {
        let files = [
            ("sys/class/powercap/intel-rapl:0/name", "package-0\n"),
            ("sys/class/powercap/intel-rapl:0/energy_uj", "900\n"),
            (
                "sys/class/powercap/intel-rapl:0/max_energy_range_uj",
                "1000\n",
            ),
            ("sys/class/powercap/intel-rapl:0:0/name", "dram\n"),
            ("sys/class/powercap/intel-rapl:0:0/energy_uj", "77\n"),
        ];
        let root = root("rapl", &files);
        let before = Energy::read(&root).expect("a package");
        let energy = root.join("sys/class/powercap/intel-rapl:0/energy_uj");
        fs::write(&energy, "150").expect("a file");
        let now = Energy::read(&root).expect("a package");
        assert_eq!(now.since(&before), Some(250));
        assert_eq!(now.since(&now), None);
        fs::remove_file(energy).expect("the file"); // as where it may not be read
        assert_eq!(Energy::read(&root), None);
        fs::remove_dir_all(root).expect("the folder");
    }

    #[test]
    fn energy_of_a_battery_in_use() {
        let files = [
            ("sys/class/power_supply/BAT0/type", "Battery\n"),
            ("sys/class/power_supply/BAT0/status", "Discharging\n"),
            ("sys/class/power_supply/BAT0/charge_now", "2000000\n"),
            ("sys/class/power_supply/BAT0/voltage_now", "4000000\n"),
        ];
        let root = root("battery", &files);
        let before = Energy::read(&root).expect("a battery");
        fs::write(
            root.join("sys/class/power_supply/BAT0/charge_now"),
            "1999000",
        )
        .expect("a file");
        let now = Energy::read(&root).expect("a battery");
        // 1 mAh at 4 V.
        assert_eq!(now.since(&before), Some(14_400_000));
        fs::write(root.join("sys/class/power_supply/BAT0/status"), "Charging").expect("a file");
        assert_eq!(Energy::read(&root), None);
        fs::remove_dir_all(root).expect("the folder");
    }

    #[test]
    fn clock_and_temperature() {
        let files = [
            (
                "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",
                "2000000\n",
            ),
            (
                "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq",
                "3000000\n",
            ),
            (
                "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count",
                "3\n",
            ),
            ("sys/devices/system/cpu/cpuidle/x", "1\n"),
            ("sys/class/thermal/thermal_zone0/temp", "41500\n"),
            ("sys/class/thermal/thermal_zone1/temp", "39000\n"),
            ("sys/class/thermal/cooling_device0/type", "fan\n"),
        ];
        let at = root("condition", &files);
        let expected = Condition {
            mhz: Some(2500.0),
            celsius: Some(41.5),
            throttled: Some(3),
        };
        assert_eq!(Condition::read(&at), expected);
        fs::remove_dir_all(at).expect("the folder");
        let files = [(
            "proc/cpuinfo",
            "cpu MHz\t\t: 2100.5\n\ncpu MHz\t\t: 2099.5\n",
        )];
        let at = root("cpuinfo", &files);
        assert_eq!(Condition::read(&at).mhz, Some(2100.0));
        assert_eq!(Condition::read(&at).celsius, None);
        fs::remove_dir_all(at).expect("the folder");
    }
}
