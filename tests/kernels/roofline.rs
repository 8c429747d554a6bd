//! The loops that measure the machine: each must do all the work that it is counted for, so all rows agree.

use kinglet::backend::cpu::table::{
    Line, PRODUCTS_BF16, PRODUCTS_F32, PRODUCTS_I8, Products, READ, Ready,
};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn reads_miss_no_word(words in prop::collection::vec(any::<u64>(), 8..8 * 40), offset in 0usize..64) {
        let mut bytes = vec![0u8; offset];
        words.iter().for_each(|word| bytes.extend(word.to_ne_bytes()));
        let lines: &[Line] = bytes[offset..].as_chunks().0;
        let expected = words[..8 * lines.len()].iter().fold(7, |sum, word| sum ^ word);
        for kernel in READ.iter().filter_map(Ready::new) {
            let mut sum = 7;
            kernel.run(lines, &mut sum);
            prop_assert_eq!(sum, expected, "{}", kernel.name());
        }
    }

    #[test]
    fn products_are_all_there(
        w in prop::collection::vec(0u8..16, 256),
        x in prop::collection::vec(-127i8..=127, 256),
        rounds in 0usize..300,
    ) {
        let (w, x): (&[[u8; 64]; 4], &[[i8; 64]; 4]) =
            (w.as_chunks().0.try_into().unwrap(), x.as_chunks().0.try_into().unwrap());
        let pairs = w.iter().flat_map(|w| x.iter().map(move |x| (w, x)));
        let sum: i64 = pairs.map(|(w, x)| w.iter().zip(x).map(|(w, x)| i64::from(*w) * i64::from(*x)).sum::<i64>()).sum();
        for kernel in PRODUCTS_I8.iter().filter_map(Ready::new) {
            let mut products = Products { w, x, rounds, sum: 1.0 };
            kernel.run(&mut products);
            prop_assert_eq!(products.sum, 1.0 + rounds as f64 * sum as f64, "{}", kernel.name());
        }
        let wf: [[f32; 16]; 4] = std::array::from_fn(|i| std::array::from_fn(|k| w[i][k].into()));
        let xf: [[f32; 16]; 4] = std::array::from_fn(|i| std::array::from_fn(|k| (x[i][k] / 16).into()));
        let pairs = wf.iter().flat_map(|w| xf.iter().map(move |x| (w, x)));
        let sum: f32 = pairs.map(|(w, x)| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>()).sum();
        for kernel in PRODUCTS_F32.iter().filter_map(Ready::new) {
            let mut products = Products { w: &wf, x: &xf, rounds, sum: 1.0 };
            kernel.run(&mut products);
            prop_assert_eq!(products.sum, 1.0 + rounds as f64 * f64::from(sum), "{}", kernel.name());
        }
        let half = |x: f32| (x.to_bits() >> 16) as u16;
        let wh: [[u16; 32]; 4] = std::array::from_fn(|i| std::array::from_fn(|k| half(w[i][k].into())));
        let xh: [[u16; 32]; 4] = std::array::from_fn(|i| std::array::from_fn(|k| half(x[i][k].into())));
        let pairs = w.iter().flat_map(|w| x.iter().map(move |x| (w, x)));
        let products = pairs.flat_map(|(w, x)| w.iter().zip(x).take(32));
        let sum: i64 = products.map(|(w, x)| i64::from(*w) * i64::from(*x)).sum();
        for kernel in PRODUCTS_BF16.iter().filter_map(Ready::new) {
            let mut products = Products { w: &wh, x: &xh, rounds, sum: 1.0 };
            kernel.run(&mut products);
            prop_assert_eq!(products.sum, 1.0 + rounds as f64 * sum as f64, "{}", kernel.name());
        }
    }
}

#[test]
fn the_most_rounds_do_not_overflow() {
    let rounds = Products::<u8, i8, 64>::MAX_ROUNDS;
    let (w, x) = ([[15; 64]; 4], [[-127; 64]; 4]);
    for kernel in PRODUCTS_I8.iter().filter_map(Ready::new) {
        let mut products = Products {
            w: &w,
            x: &x,
            rounds,
            sum: 0.0,
        };
        kernel.run(&mut products);
        let expected = -15.0 * 127.0 * (rounds * Products::<u8, i8, 64>::PER_ROUND) as f64;
        assert_eq!(products.sum, expected, "{}", kernel.name());
    }
    let (w, x) = ([[15.0; 16]; 4], [[-15.0; 16]; 4]);
    for kernel in PRODUCTS_F32.iter().filter_map(Ready::new) {
        let mut products = Products {
            w: &w,
            x: &x,
            rounds,
            sum: 0.0,
        };
        kernel.run(&mut products);
        let expected = -225.0 * (rounds * Products::<f32, f32, 16>::PER_ROUND) as f64;
        assert_eq!(products.sum, expected, "{}", kernel.name());
    }
}
