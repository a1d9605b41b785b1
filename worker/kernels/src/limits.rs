//! What the machine can do at most: the rates that benchmarks are measured against.

use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::Isa;
use crate::pool::Pool;

/// Windows of which the best counts.
const WINDOWS: usize = 20;
/// Empty phases of a window.
const PHASES: u32 = 50;

/// The least seconds that `run` takes.
pub fn best(windows: usize, mut run: impl FnMut()) -> f64 {
    let times = (0..windows).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

/// Bytes per second that `pool` reads from `data`, one window of 4 MiB after the other.
pub fn read_rate(pool: &mut Pool, data: &[u8]) -> f64 {
    const CHUNK: usize = 64 * 1024;
    let windows = data.chunks_exact(64 * CHUNK);
    let mut least = vec![f64::INFINITY; windows.len()];
    for _ in 0..WINDOWS {
        for (least, data) in least.iter_mut().zip(windows.clone()) {
            let seconds = best(1, || {
                pool.phase(64, |item| {
                    let (lines, _) = data[item * CHUNK..][..CHUNK].as_chunks::<64>();
                    let mut sums = [0u64; 8];
                    for line in lines {
                        for (sum, bytes) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                            *sum ^= u64::from_ne_bytes(*bytes);
                        }
                    }
                    black_box(sums);
                });
            });
            *least = least.min(seconds);
        }
    }
    (windows.len() * 64 * CHUNK) as f64 / least.iter().sum::<f64>()
}

/// What a phase of `pool` costs that has nothing to do but in which every thread takes part: how far
/// they are from one another.
pub fn phase_cost(pool: &mut Pool) -> Duration {
    let threads = pool.threads();
    let phases = best(WINDOWS, || {
        for _ in 0..PHASES {
            let missing = AtomicUsize::new(threads);
            pool.phase(threads, |_| {
                missing.fetch_sub(1, Ordering::AcqRel);
                let mut spins = 0u32;
                while missing.load(Ordering::Acquire) > 0 {
                    std::hint::spin_loop();
                    spins += 1;
                    // Whoever is missing may wait for this core.
                    if spins.is_multiple_of(1 << 12) {
                        std::thread::yield_now();
                    }
                }
            });
        }
    });
    Duration::from_secs_f64(phases) / PHASES
}

/// Multiplications and additions of bytes per second, as the dots of `isa` do them; none where
/// it has no instructions for them.
pub fn dot_rate(pool: &mut Pool, isa: Isa) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    match isa.checked() {
        // SAFETY: `checked` found the features.
        Isa::Avx512 | Isa::Avx512Bf16 => {
            return Some(rate(pool, 2 * x86::DOT_OPS, || unsafe { x86::dots512() }));
        }
        // SAFETY: as above.
        Isa::Avx2 => return Some(rate(pool, x86::DOT_OPS, || unsafe { x86::dots256() })),
        _ => {}
    }
    #[cfg(target_arch = "aarch64")]
    if isa.checked() == Isa::Neon {
        // SAFETY: `checked` found the features.
        return Some(rate(pool, neon::DOT_OPS, || unsafe { neon::dots() }));
    }
    let _ = (pool, isa);
    None
}

/// Multiplications and additions of f32 per second, as fused multiply-adds of `isa`; none
/// where it has no instruction for them.
pub fn fma_rate(pool: &mut Pool, isa: Isa) -> Option<f64> {
    #[cfg(target_arch = "x86_64")]
    match isa.checked() {
        // SAFETY: `checked` found the features.
        Isa::Avx512 | Isa::Avx512Bf16 => {
            return Some(rate(pool, 2 * x86::FMA_OPS, || unsafe { x86::fmas512() }));
        }
        // SAFETY: as above.
        Isa::Avx2 => return Some(rate(pool, x86::FMA_OPS, || unsafe { x86::fmas256() })),
        _ => {}
    }
    #[cfg(target_arch = "aarch64")]
    if isa.checked() == Isa::Neon {
        // SAFETY: `checked` found the features.
        return Some(rate(pool, neon::FMA_OPS, || unsafe { neon::fmas() }));
    }
    let _ = (pool, isa);
    None
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn rate(pool: &mut Pool, ops: usize, run: impl Fn() + Sync) -> f64 {
    let items = pool.threads();
    let seconds = best(WINDOWS, || pool.phase(items, |_| run()));
    (items * ops) as f64 / seconds
}

/// Independent chains of one instruction, more than its latency.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    const CHAINS: usize = 12;
    const ROUNDS: usize = 4_000;
    /// Operations of [`dots256`], half of those of [`dots512`].
    pub(super) const DOT_OPS: usize = CHAINS * ROUNDS * 64;
    /// Operations of [`fmas256`], half of those of [`fmas512`].
    pub(super) const FMA_OPS: usize = CHAINS * ROUNDS * 16;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn dots512() {
        let (a, b) = (
            black_box(_mm512_set1_epi8(3)),
            black_box(_mm512_set1_epi8(5)),
        );
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        black_box(sums);
    }

    /// AVX2 takes two instructions: the products and their sums.
    #[target_feature(enable = "avx2")]
    pub(super) fn dots256() {
        let a = black_box(_mm256_set1_epi8(3));
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                // Of the sum itself, or the products would be one that is made once.
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(a, *sum));
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn fmas512() {
        let (a, b) = (
            black_box(_mm512_set1_ps(0.5)),
            black_box(_mm512_set1_ps(1.0)),
        );
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn fmas256() {
        let (a, b) = (
            black_box(_mm256_set1_ps(0.5)),
            black_box(_mm256_set1_ps(1.0)),
        );
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        black_box(sums);
    }
}

/// The same for 64-bit ARM, where a core has up to four units for them.
#[cfg(target_arch = "aarch64")]
mod neon {
    use std::arch::aarch64::*;
    use std::hint::black_box;

    use crate::simd::sdot;

    const CHAINS: usize = 16;
    const ROUNDS: usize = 4_000;
    /// Operations of [`dots`].
    pub(super) const DOT_OPS: usize = CHAINS * ROUNDS * 32;
    /// Operations of [`fmas`].
    pub(super) const FMA_OPS: usize = CHAINS * ROUNDS * 8;

    #[target_feature(enable = "neon,dotprod")]
    pub(super) fn dots() {
        let (a, b) = (black_box(vdupq_n_s8(3)), black_box(vdupq_n_s8(5)));
        let mut sums = [vdupq_n_s32(0); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = sdot::<0>(*sum, a, b);
            }
        }
        black_box(sums);
    }

    #[target_feature(enable = "neon")]
    pub(super) fn fmas() {
        let (a, b) = (black_box(vdupq_n_f32(0.5)), black_box(vdupq_n_f32(1.0)));
        let mut sums = [vdupq_n_f32(0.0); CHAINS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = vfmaq_f32(b, *sum, a);
            }
        }
        black_box(sums);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_instructions_that_there_are() {
        let mut pool = Pool::new(1).unwrap();
        assert!(read_rate(&mut pool, &vec![1; 4 << 20]) > 0.0);
        assert!(phase_cost(&mut Pool::new(2).unwrap()) > Duration::ZERO);
        for isa in Isa::available() {
            assert_eq!(fma_rate(&mut pool, isa).is_some(), isa != Isa::Scalar);
            assert_eq!(dot_rate(&mut pool, isa).is_some(), isa != Isa::Scalar);
        }
    }
}
