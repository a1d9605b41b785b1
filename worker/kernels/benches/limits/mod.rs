//! What the machine can do at most: the rates that benchmarks are measured against.

use std::hint::black_box;
use std::time::Instant;

use shoal_kernels::Isa;
use shoal_kernels::pool::Pool;

/// Windows of which the best counts.
const WINDOWS: usize = 500;

/// The least seconds that `run` takes.
pub(crate) fn best(windows: usize, mut run: impl FnMut()) -> f64 {
    let times = (0..windows).map(|_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    });
    times.fold(f64::INFINITY, f64::min)
}

/// Bytes per second that `pool` reads from `data`.
pub(crate) fn read_limit(pool: &mut Pool, data: &[u8]) -> f64 {
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

/// Multiplications and additions per second of independent VNNI dots, none without AVX-512.
#[cfg(target_arch = "x86_64")]
pub(crate) fn vnni_limit(pool: &mut Pool) -> Option<f64> {
    use std::arch::x86_64::*;

    const DOTS: usize = 16;
    const ROUNDS: usize = 2_000;

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn dots() -> [i32; DOTS] {
        let (a, b) = (
            black_box(_mm512_set1_epi8(3)),
            black_box(_mm512_set1_epi8(5)),
        );
        let mut sums = [_mm512_setzero_si512(); DOTS];
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        sums.map(|sum| _mm512_reduce_add_epi32(sum))
    }

    if !Isa::Avx512.is_available() {
        return None;
    }
    let items = pool.threads();
    let seconds = best(WINDOWS, || {
        pool.phase(items, |_| {
            // SAFETY: the features were found above.
            black_box(unsafe { dots() });
        });
    });
    Some((items * DOTS * ROUNDS * 128) as f64 / seconds)
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn vnni_limit(_: &mut Pool) -> Option<f64> {
    None
}
