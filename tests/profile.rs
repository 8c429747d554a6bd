//! The roofline: measured with little effort, kept, and measured again when what is kept is not whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use kinglet::backend::cpu::roofline::{self, Effort};
use kinglet::profile::Roofline;
use kinglet::profile::roofline::Resource;

/// An empty folder of this test run.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("profile")
        .join(name);
    let _ = fs::remove_dir_all(&folder);
    folder
}

/// Measured once for all tests, with next to no effort.
fn measured() -> Roofline {
    static MEASURED: OnceLock<Roofline> = OnceLock::new();
    let effort = Effort {
        buffer_bytes: 1 << 20,
        rounds: 64,
        time: Duration::ZERO,
    };
    let measure = || roofline::measure(2, &effort).expect("two threads");
    MEASURED.get_or_init(measure).clone()
}

#[test]
fn every_loop_has_a_rate() {
    let roofline = measured();
    assert_eq!(roofline.key, roofline::key(2));
    for resource in [
        Resource::Anonymous,
        Resource::Mapped,
        Resource::Int8,
        Resource::F32,
    ] {
        let best = roofline.best(resource, |_| true).expect("a loop");
        assert!(best.per_second > 0);
        assert!(
            roofline
                .rates
                .iter()
                .all(|r| r.resource != resource || r.per_second <= best.per_second)
        );
    }
    // Plain Rust multiplies everywhere, and a level is asked for by its name.
    for resource in [Resource::Int8, Resource::F32] {
        let scalar = roofline.best(resource, |level| level == "scalar");
        assert_eq!(scalar.map(|rate| rate.level.as_str()), Some("scalar"));
        assert_eq!(roofline.best(resource, |_| false), None);
    }
}

#[test]
fn what_is_kept_comes_back() {
    let folder = folder("round-trip");
    let roofline = measured();
    assert_eq!(Roofline::load(&folder, &roofline.key), None);
    let path = roofline.save(&folder).expect("a folder to write in");
    assert_eq!(
        Roofline::load(&folder, &roofline.key).as_ref(),
        Some(&roofline)
    );
    // No temporary is left.
    assert_eq!(fs::read_dir(&folder).expect("the folder").count(), 1);
    // Saved again, it takes the place of the first.
    let mut second = roofline.clone();
    second.rates[0].per_second *= 2;
    assert_eq!(second.save(&folder).expect("a folder to write in"), path);
    assert_eq!(Roofline::load(&folder, &roofline.key), Some(second));
}

#[test]
fn another_machine_version_or_thread_count_has_none() {
    let folder = folder("keys");
    let roofline = measured();
    roofline.save(&folder).expect("a folder to write in");
    let mut keys = vec![roofline.key.clone(); 4];
    keys[0].cpu += " II";
    keys[1].version += "1";
    keys[2].n_threads += 1;
    keys[3].levels.pop();
    for key in keys {
        assert_eq!(Roofline::load(&folder, &key), None, "{key:?}");
        // Not even if the file of one is put in the place of the other.
        let mut other = roofline.clone();
        other.key = key.clone();
        let place = other.save(&folder).expect("a folder to write in");
        let ours = roofline.save(&folder).expect("a folder to write in");
        fs::copy(ours, place).expect("a copy");
        assert_eq!(Roofline::load(&folder, &key), None, "{key:?}");
    }
}

#[test]
fn a_damaged_file_counts_as_missing() {
    let folder = folder("damage");
    let roofline = measured();
    let path = roofline.save(&folder).expect("a folder to write in");
    let whole = fs::read(&path).expect("the file");
    for cut in [0, 1, whole.len() / 2, whole.len() - 2] {
        fs::write(&path, &whole[..cut]).expect("a file to write");
        assert_eq!(Roofline::load(&folder, &roofline.key), None, "cut at {cut}");
    }
    for at in (0..whole.len() - 1).step_by(7) {
        let mut damaged = whole.clone();
        damaged[at] ^= 1;
        fs::write(&path, &damaged).expect("a file to write");
        assert_eq!(Roofline::load(&folder, &roofline.key), None, "byte {at}");
    }
    fs::write(&path, &whole).expect("a file to write");
    assert_eq!(Roofline::load(&folder, &roofline.key), Some(roofline));
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error() {
    let file = folder("file");
    fs::create_dir_all(file.parent().expect("a parent")).expect("a folder");
    fs::write(&file, "in the way").expect("a file");
    assert!(measured().save(&file.join("below")).is_err());
}
