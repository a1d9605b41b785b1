//! The quantisers for x86-64. The only reductions are a maximum and integer sums: exact in
//! every order. Each field is stored where it belongs as soon as it is known: a block that
//! were put together first would be read back before its narrow stores have left the core.

use std::arch::x86_64::*;

use super::{BLOCK, GROUP, MOST, QuantBlock, scales};

/// Quantises blocks of a row into `out` and every [`GROUP`]th place after it.
///
/// # Safety
/// The places are there, and nobody else reads or writes them.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn blocks_avx512(x: &[[f32; BLOCK]], out: *mut QuantBlock) {
    for (i, x) in x.iter().enumerate() {
        // SAFETY: the contract of this function.
        block_avx512(x, unsafe { &mut *out.add(i * GROUP) });
    }
}

/// As [`blocks_avx512`].
///
/// # Safety
/// The same.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn blocks_avx2(x: &[[f32; BLOCK]], out: *mut QuantBlock) {
    for (i, x) in x.iter().enumerate() {
        // SAFETY: the contract of this function.
        block_avx2(x, unsafe { &mut *out.add(i * GROUP) });
    }
}

/// Quantises a block.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
#[inline]
fn block_avx512(x: &[f32; BLOCK], out: &mut QuantBlock) {
    // SAFETY: `x` holds two vectors.
    let v: [__m512; 2] = unsafe {
        [
            _mm512_loadu_ps(x.as_ptr()),
            _mm512_loadu_ps(x.as_ptr().add(16)),
        ]
    };
    let abs = |v| _mm512_castps_si512(_mm512_abs_ps(v));
    let magnitude = _mm512_reduce_max_epu32(_mm512_max_epu32(abs(v[0]), abs(v[1])));
    let (scale, inverse) = scales(magnitude, MOST);
    let (mut low, mut high) = (0, 0);
    if inverse == 0.0 {
        out.values = [0; BLOCK];
    } else {
        let inverse = _mm512_set1_ps(inverse);
        let q = v.map(|v| _mm512_cvtps_epi32(_mm512_mul_ps(v, inverse)));
        let bytes = q.map(|q| _mm512_cvtepi32_epi8(q));
        // SAFETY: `values` holds two vectors of sixteen bytes.
        unsafe {
            _mm_storeu_si128(out.values.as_mut_ptr().cast(), bytes[0]);
            _mm_storeu_si128(out.values.as_mut_ptr().add(16).cast(), bytes[1]);
        }
        (low, high) = (sum16(bytes[0]), sum16(bytes[1]));
    }
    out.scale = scale;
    out.scaled_sum = scale * (low + high) as f32;
    out.neg_sum = -(low + high);
    out.neg_low = -low;
}

/// Quantises a block.
#[target_feature(enable = "avx2,fma,f16c")]
#[inline]
fn block_avx2(x: &[f32; BLOCK], out: &mut QuantBlock) {
    // SAFETY: `x` holds four vectors.
    let v: [__m256; 4] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(x.as_ptr().add(8 * i)) });
    let mask = _mm256_castsi256_ps(_mm256_set1_epi32(i32::MAX));
    let abs = v.map(|v| _mm256_castps_si256(_mm256_and_ps(v, mask)));
    let max = _mm256_max_epu32(
        _mm256_max_epu32(abs[0], abs[1]),
        _mm256_max_epu32(abs[2], abs[3]),
    );
    let max = _mm_max_epu32(
        _mm256_castsi256_si128(max),
        _mm256_extracti128_si256(max, 1),
    );
    let max = _mm_max_epu32(max, _mm_shuffle_epi32(max, 0b01_00_11_10));
    let max = _mm_max_epu32(max, _mm_shuffle_epi32(max, 0b10_11_00_01));
    let (scale, inverse) = scales(_mm_cvtsi128_si32(max) as u32, MOST);
    let (mut low, mut high) = (0, 0);
    if inverse == 0.0 {
        out.values = [0; BLOCK];
    } else {
        let inverse = _mm256_set1_ps(inverse);
        let q = v.map(|v| _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)));
        // Packing works in 128-bit halves: it leaves dwords 0 4 1 5 2 6 3 7 out of order.
        let words = [
            _mm256_packs_epi32(q[0], q[1]),
            _mm256_packs_epi32(q[2], q[3]),
        ];
        let bytes = _mm256_permutevar8x32_epi32(
            _mm256_packs_epi16(words[0], words[1]),
            _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7),
        );
        // SAFETY: `values` holds 32 bytes.
        unsafe { _mm256_storeu_si256(out.values.as_mut_ptr().cast(), bytes) };
        low = sum16(_mm256_castsi256_si128(bytes));
        high = sum16(_mm256_extracti128_si256(bytes, 1));
    }
    out.scale = scale;
    out.scaled_sum = scale * (low + high) as f32;
    out.neg_sum = -(low + high);
    out.neg_low = -low;
}

/// The sum of sixteen signed bytes.
#[target_feature(enable = "avx2")]
#[inline]
fn sum16(v: __m128i) -> i32 {
    // Bytes offset by 128 are unsigned, which the sum of absolute differences adds.
    let offset = _mm_xor_si128(v, _mm_set1_epi8(-128));
    let sums = _mm_sad_epu8(offset, _mm_setzero_si128());
    let sum = _mm_add_epi64(sums, _mm_unpackhi_epi64(sums, sums));
    _mm_cvtsi128_si32(sum) - 16 * 128
}
