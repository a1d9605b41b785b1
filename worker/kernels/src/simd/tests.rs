use super::*;
use crate::testing::{isas, random};

/// Numbers that instruction sets may treat in their own ways.
const SPECIAL: [f32; 16] = [
    0.0,
    -0.0,
    f32::NAN,
    f32::INFINITY,
    f32::NEG_INFINITY,
    f32::MIN_POSITIVE,
    -1e-40,
    f32::MAX,
    0.5,
    -2.5,
    8_388_609.0,
    65_504.0,
    65_520.0,
    2.980_232_4e-8,
    -1e-6,
    1.000_488_3,
];

/// What the operations read: numbers, integers that are exponents, and pairs.
struct Input {
    numbers: [[f32; LANES]; 3],
    exponents: [f32; LANES],
    pairs: [u32; LANES],
}

impl Input {
    fn new(seed: u64) -> Self {
        let x = random(5 * LANES, seed);
        let vector = |i: usize| std::array::from_fn(|lane| x[i * LANES + lane]);
        let numbers = |i: usize| {
            let mut x: [f32; LANES] = vector(i);
            for (lane, x) in x.iter_mut().enumerate() {
                *x *= 2f32.powi((lane * 7 % 16) as i32 - 8);
                // Sums and maxima are to be of numbers too.
                if seed % 2 == 1 && (lane + i).is_multiple_of(2) {
                    *x = SPECIAL[(x.to_bits() >> 8) as usize % SPECIAL.len()];
                }
            }
            x
        };
        Self {
            numbers: [0, 1, 2].map(numbers),
            exponents: vector(3).map(|x| (x * 126.5).round()),
            pairs: vector(4).map(f32::to_bits),
        }
    }
}

/// The bits of every result; all NaNs are one.
#[inline(always)]
unsafe fn results<L: Lanes>(input: &Input, out: &mut Vec<u32>) {
    // SAFETY: the caller runs with the features of `L`; all are arrays of sixteen elements.
    unsafe {
        let [a, b, c] = &input.numbers;
        let (a, b) = (L::load(a.as_ptr()), L::load(b.as_ptr()));
        let c = L::load(c.as_ptr());
        let (low, high) = L::bf16_pairs(input.pairs.as_ptr());
        for lanes in [
            a.add(b),
            a.sub(b),
            a.mul(b),
            a.div(b),
            a.max(b),
            a.min(b),
            a.fma(b, c),
            a.round(),
            a.to_bf16(),
            L::load(input.exponents.as_ptr()).exp2i(),
            a.where_ge(b, c),
            a.first(0),
            a.first(5),
            a.first(16),
            a.first(17),
            L::splat(a.sum()),
            L::splat(a.maximum()),
            low,
            high,
        ] {
            let mut x = [0.0; LANES];
            lanes.store(x.as_mut_ptr());
            for x in x {
                out.push(if x.is_nan() { u32::MAX } else { x.to_bits() });
            }
        }
        let mut halves = [[0u16; LANES]; 2];
        a.store_f16(halves[0].as_mut_ptr());
        a.store_high(halves[1].as_mut_ptr());
        out.extend(halves.as_flattened().iter().map(|&x| u32::from(x)));
    }
}

#[test]
fn every_operation_has_the_same_bits_everywhere() {
    for seed in 0..500 {
        let input = &Input::new(seed);
        let mut first = Vec::new();
        // SAFETY: the scalar lanes need no features.
        unsafe { results::<Scalar>(input, &mut first) };
        for isa in isas() {
            let mut got = Vec::new();
            let out = &mut got;
            // SAFETY: as above; the features are those of `isa`.
            dispatch!(isa, results::<_>(input: &Input, out: &mut Vec<u32>));
            for (i, (got, first)) in got.chunks(LANES).zip(first.chunks(LANES)).enumerate() {
                assert_eq!(got, first, "{isa:?}, result {i}");
            }
        }
    }
}
