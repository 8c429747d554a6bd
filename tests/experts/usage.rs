//! What was used is kept for the next start.

use std::path::PathBuf;

use kinglet::experts::{Class, Options, UsageFile};

use crate::common::{Shape, ones, pace, slots};

fn shape() -> Shape {
    Shape {
        n_layers: 4,
        n_experts: 8,
        n_used: 2,
        parts: vec![4096, 8192],
        residue: 0,
        step: 0,
    }
}

fn model(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("experts-usage-{name}"));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder.join("model.gguf")
}

fn options(model: &std::path::Path, hash: u64) -> Options {
    Options {
        usage: Some(UsageFile {
            model: model.to_owned(),
            model_hash: hash,
        }),
        ..slots(18)
    }
}

#[test]
fn the_next_start_reads_first_what_was_used_most() {
    let model = model("warm");
    let file = model.with_file_name("model.gguf.experts.json");
    let shape = shape();
    let store = shape.fake(pace(1, 4096), &options(&model, 7));
    assert_eq!(store.save_usage().expect("nothing to write"), None);
    for _ in 0..20 {
        for layer in 0..4 {
            let ids = [layer as u32, 7];
            let request = store.begin(layer, &ids, &ones(&ids), Class::Exact);
            shape.check(&shape.image(), &request.expect("room"));
        }
        store.next_token();
    }
    assert_eq!(store.save_usage().expect("writable"), Some(file.clone()));
    drop(store);
    let names = std::fs::read_dir(model.parent().expect("a folder")).expect("a folder");
    assert_eq!(names.count(), 1, "no temporary is left");

    let store = shape.fake(pace(1, 4096), &options(&model, 7));
    store.settle();
    let stats = store.stats();
    assert_eq!(stats.n_held, 8);
    assert_eq!(stats.total.bytes[Class::Warmup as usize], 8 * 12288);
    let request = store
        .begin(2, &[2, 7, 5], &[1.0; 3], Class::Exact)
        .expect("room");
    assert!(request.is_hit(0) && request.is_hit(1) && !request.is_hit(2));
    shape.check(&shape.image(), &request);
    drop(request);
    drop(store);

    // Another model, another layout, a damaged file: as if there were none.
    let cold = |shape: &Shape, hash: u64| {
        let store = shape.fake(pace(1, 4096), &options(&model, hash));
        store.settle();
        store.stats().n_held
    };
    assert_eq!(cold(&shape, 8), 0);
    let other = Shape {
        residue: 32,
        ..shape.clone()
    };
    assert_eq!(cold(&other, 7), 0);
    let text = std::fs::read_to_string(&file).expect("a file");
    for damaged in [
        text[..text.len() / 2].to_owned(),
        text.replace("\"used\":[", "\"used\":[-1,"),
        text.replacen("0.0", "1e30", 1),
        "[".repeat(100_000),
    ] {
        assert_ne!(damaged, text);
        std::fs::write(&file, damaged).expect("writable");
        assert_eq!(cold(&shape, 7), 0);
    }
    std::fs::write(&file, text).expect("writable");
    assert!(cold(&shape, 7) > 0);
}

#[test]
fn one_who_waits_goes_before_the_warm_up() {
    let model = model("overtake");
    let shape = shape();
    let store = shape.fake(pace(1, 4096), &options(&model, 7));
    for layer in 0..4 {
        let request = store.begin(layer, &[0, 1], &[1.0; 2], Class::Exact);
        shape.check(&shape.image(), &request.expect("room"));
    }
    drop(store);
    // A part of 4096 bytes takes 1 ms; eight experts of three wait to be read.
    let store = shape.fake(pace(1, 4096), &options(&model, 7));
    store.advance(std::time::Duration::from_micros(500));
    let request = store.begin(3, &[6], &[1.0], Class::Demand).expect("room");
    request.wait(0, 1).expect("no fault");
    let now = store.now().expect("imagined").as_secs_f64() * 1e3;
    assert!(
        (now - 4.0).abs() < 1e-6,
        "one part of another, then its own: {now}"
    );
}
