//! Layouts from hostile files.

use kinglet::Error;
use kinglet::experts::{LayerExperts, Layout, Part};

fn layer(n_experts: usize, n_used: usize, parts: &[(usize, u64, u64)]) -> LayerExperts {
    let part = |&(file, offset, expert_bytes): &(usize, u64, u64)| Part {
        file,
        offset,
        expert_bytes,
    };
    LayerExperts {
        n_experts,
        n_used,
        parts: parts.iter().map(part).collect(),
    }
}

#[test]
fn what_does_not_lie_in_its_file_is_refused() {
    let cases: &[(&str, Vec<LayerExperts>)] = &[
        ("at least one layer", vec![]),
        ("used of 8, found 0", vec![layer(8, 0, &[(0, 0, 10)])]),
        ("used of 8, found 9", vec![layer(8, 9, &[(0, 0, 10)])]),
        ("used of 0, found 0", vec![layer(0, 0, &[(0, 0, 10)])]),
        ("parts, found 0", vec![layer(8, 2, &[])]),
        ("parts, found 4", vec![layer(8, 2, &[(0, 0, 1); 4])]),
        ("found 0 bytes each", vec![layer(8, 2, &[(0, 0, 0)])]),
        ("a file below 1, found 1", vec![layer(8, 2, &[(1, 0, 10)])]),
        ("from byte 921", vec![layer(8, 2, &[(0, 921, 10)])]),
        ("found 126 bytes", vec![layer(8, 2, &[(0, 0, 126)])]),
        (
            "from byte 18446744073709551615",
            vec![layer(8, 2, &[(0, u64::MAX, 10)])],
        ),
        (
            "found 18446744073709551615 bytes",
            vec![layer(8, 2, &[(0, 0, u64::MAX)])],
        ),
        (
            "found 2305843009213693952 bytes", // times 8 is 0
            vec![layer(8, 2, &[(0, 0, 1 << 61)])],
        ),
        ("at most 1048576", vec![layer(usize::MAX, 2, &[(0, 0, 1)])]),
        (
            "layer 1, part 0",
            vec![layer(8, 2, &[(0, 0, 1)]), layer(8, 2, &[(0, 1000, 1)])],
        ),
    ];
    for (expected, layers) in cases {
        let error = Layout::new(vec![1000], layers.clone()).expect_err(expected);
        assert!(matches!(error, Error::BadModel(_)));
        assert!(error.to_string().contains(expected), "{error}");
    }
    // The same sizes in a file that would hold them: no slot can.
    let error = Layout::new(
        vec![u64::MAX],
        vec![layer(1, 1, &[(0, 0, u64::MAX / 2), (0, 0, u64::MAX / 2)])],
    );
    let error = error.expect_err("too large").to_string();
    assert!(error.contains("address space"), "{error}");
}

#[test]
fn numbers_of_slots_follow_from_the_layers() {
    let layout = Layout::new(
        vec![1 << 20],
        vec![
            layer(8, 2, &[(0, 5, 5000), (0, 50_000, 4096)]),
            layer(16, 3, &[(0, 0, 100)]),
        ],
    );
    let layout = layout.expect("sound");
    assert_eq!(layout.n_experts(), 24);
    assert_eq!(layout.cycle(), 5);
    assert_eq!(layout.min_slots(), 9);
    assert_eq!(layout.cycle_slots(), 11);
    assert_eq!(layout.slot_bytes(), 3 * 4096 + 2 * 4096);
    assert_eq!(layout.expert_bytes(0), 9096);
}
