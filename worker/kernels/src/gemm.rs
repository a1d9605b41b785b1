//! The product of quantised activations and packed weights.
//!
//! Lanes are output rows and K is summed tile by tile in ascending order: the integer dot of
//! a tile is exact, and what follows is one fixed sequence of float operations,
//!
//! `acc = fma(dot, d * scale, acc)`, then `acc = fma(m, scale * sum, acc)` with a minimum,
//!
//! so a row has the same bits for every instruction set, batch and split.

use std::ops::Range;

use half::f16;

use crate::Isa;
use crate::pack::{Format, Layout, STRIP, TILE};
use crate::pool::{Pool, Scatter};
use crate::quant::{GROUP, QuantBlock, QuantRows};

/// A packed matrix.
#[derive(Clone, Copy)]
pub struct Matrix<'a> {
    layout: Layout,
    data: &'a [u8],
}

/// What becomes of the output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// It replaces what is there.
    Set,
    /// It is added to what is there.
    Add,
}

impl<'a> Matrix<'a> {
    /// `data` as [`Layout::pack`] filled it.
    ///
    /// # Panics
    /// When `data` is not of the layout's size.
    pub fn new(layout: Layout, data: &'a [u8]) -> Self {
        assert_eq!(data.len(), layout.bytes());
        Self { layout, data }
    }

    /// Its shape and format.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The first `rows` rows of `acts` times the matrix: `out[row * n + column]`.
    ///
    /// # Panics
    /// When the shapes do not fit or the machine lacks `isa`.
    pub fn multiply(
        &self,
        pool: &mut Pool,
        isa: Isa,
        acts: &QuantRows,
        rows: usize,
        out: &mut [f32],
        write: Write,
    ) {
        let n = self.layout.n;
        assert!(acts.k() == self.layout.k && rows <= acts.rows() && out.len() >= rows * n);
        let isa = isa.checked();
        // Chunks of about a microsecond of weights, and rows that stay in the second-level cache.
        let strips = n / STRIP;
        let chunk =
            (32 * 1024 / self.layout.strip_bytes()).clamp(1, strips.div_ceil(4 * pool.threads()));
        let row_block = 128;
        let chunks = strips.div_ceil(chunk);
        let out = Scatter::new(out);
        pool.phase(chunks * rows.div_ceil(row_block), |item| {
            let first = item % chunks * chunk;
            let start = item / chunks * row_block;
            let part = Part {
                matrix: self,
                strips: first..(first + chunk).min(strips),
                acts,
                rows: start..(start + row_block).min(rows),
                out: &out,
                write,
            };
            // SAFETY: items have disjoint strips or rows; shapes were checked above; the isa is there.
            unsafe { part.run(isa) }
        });
    }
}

/// Some strips for some rows.
struct Part<'a> {
    matrix: &'a Matrix<'a>,
    strips: Range<usize>,
    acts: &'a QuantRows,
    rows: Range<usize>,
    out: &'a Scatter<f32>,
    write: Write,
}

impl Part<'_> {
    /// # Safety
    /// The machine has `isa`, the shapes fit, and no other thread writes this part's outputs.
    unsafe fn run(&self, isa: Isa) {
        // SAFETY: the contract of this function.
        unsafe {
            match self.matrix.layout.format {
                Format::U4Zero(_) => self.groups::<4, false, false>(isa),
                Format::U4Min => self.groups::<4, true, false>(isa),
                Format::U8Zero(_) => self.groups::<8, false, false>(isa),
                Format::U8Min => self.groups::<8, true, false>(isa),
                Format::U8Halves(_) => self.groups::<8, false, true>(isa),
            }
        }
    }

    unsafe fn groups<const V: usize, const MIN: bool, const HALVES: bool>(&self, isa: Isa) {
        // SAFETY: the contract of `run`.
        unsafe {
            match isa {
                #[cfg(target_arch = "x86_64")]
                Isa::Avx512 => self.avx512::<V, MIN, HALVES>(),
                _ => self.portable::<V, MIN, HALVES>(),
            }
        }
    }

    fn strip(&self, strip: usize) -> &[u8] {
        let bytes = self.matrix.layout.strip_bytes();
        &self.matrix.data[strip * bytes..][..bytes]
    }

    /// # Safety
    /// See `run`.
    unsafe fn put(&self, row: usize, strip: usize, acc: &[f32; STRIP]) {
        // SAFETY: inside `out` (asserted there), and this part's own.
        let out = unsafe {
            self.out
                .part(row * self.matrix.layout.n + strip * STRIP, STRIP)
        };
        match self.write {
            Write::Set => out.copy_from_slice(acc),
            Write::Add => out.iter_mut().zip(acc).for_each(|(o, a)| *o += a),
        }
    }

    unsafe fn portable<const V: usize, const MIN: bool, const HALVES: bool>(&self) {
        let format = self.matrix.layout.format;
        let zero = i32::from(format.zero());
        for strip in self.strips.clone() {
            let data = self.strip(strip);
            for row in self.rows.clone() {
                let mut acc = [0f32; STRIP];
                for (index, tile) in data.chunks_exact(format.tile_bytes()).enumerate() {
                    // SAFETY: inside the rows; nothing writes them now.
                    let act = unsafe { &*self.acts.at(row, index) };
                    portable_tile::<V, MIN, HALVES>(tile, act, zero, &mut acc);
                }
                // SAFETY: the contract of this function.
                unsafe { self.put(row, strip, &acc) };
            }
        }
    }
}

/// Adds one tile times one block to the sums of sixteen rows.
#[inline]
fn portable_tile<const V: usize, const MIN: bool, const HALVES: bool>(
    tile: &[u8],
    act: &QuantBlock,
    zero: i32,
    acc: &mut [f32; STRIP],
) {
    let heads = if MIN || HALVES { 2 } else { 1 };
    let (head, quants) = tile.split_at(heads * 2 * STRIP);
    let half = |i: usize| f16::from_le_bytes([head[2 * i], head[2 * i + 1]]).to_f32();
    for (lane, acc) in acc.iter_mut().enumerate() {
        let mut dots = [0i32; 2];
        for column in 0..TILE {
            let step = TILE / V;
            let byte = quants[column / step * 64 + 4 * lane + column % 4];
            let q = match (V, column % step / 4) {
                (8, _) => byte,
                (_, 0) => byte & 0xf,
                _ => byte >> 4,
            };
            dots[column / (TILE / 2)] += i32::from(q) * i32::from(act.values[column]);
        }
        if HALVES {
            let low = dots[0] + zero * act.neg_low;
            let high = dots[1] + zero * (act.neg_sum - act.neg_low);
            *acc = (low as f32).mul_add(half(lane) * act.scale, *acc);
            *acc = (high as f32).mul_add(half(STRIP + lane) * act.scale, *acc);
        } else {
            let dot = dots[0] + dots[1] + zero * act.neg_sum;
            *acc = (dot as f32).mul_add(half(lane) * act.scale, *acc);
            if MIN {
                *acc = half(STRIP + lane).mul_add(act.scaled_sum, *acc);
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::*;
    use std::arch::x86_64::*;

    impl Part<'_> {
        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
        pub(super) unsafe fn avx512<const V: usize, const MIN: bool, const HALVES: bool>(&self) {
            for strip in self.strips.clone() {
                let mut row = self.rows.start;
                while row < self.rows.end {
                    // Groups of rows lie together: a chunk never crosses one.
                    let count = (GROUP - row % GROUP).min(self.rows.end - row);
                    // SAFETY: the contract of `run`.
                    unsafe {
                        match count {
                            8 => self.rows_avx512::<V, MIN, HALVES, 8>(strip, row),
                            7 => self.rows_avx512::<V, MIN, HALVES, 7>(strip, row),
                            6 => self.rows_avx512::<V, MIN, HALVES, 6>(strip, row),
                            5 => self.rows_avx512::<V, MIN, HALVES, 5>(strip, row),
                            4 => self.rows_avx512::<V, MIN, HALVES, 4>(strip, row),
                            3 => self.rows_avx512::<V, MIN, HALVES, 3>(strip, row),
                            2 => self.rows_avx512::<V, MIN, HALVES, 2>(strip, row),
                            _ => self.rows_avx512::<V, MIN, HALVES, 1>(strip, row),
                        }
                    }
                    row += count;
                }
            }
        }

        #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
        #[inline]
        unsafe fn rows_avx512<
            const V: usize,
            const MIN: bool,
            const HALVES: bool,
            const M: usize,
        >(
            &self,
            strip: usize,
            row: usize,
        ) {
            let format = self.matrix.layout.format;
            let zero = i32::from(format.zero());
            let data = self.strip(strip);
            let mut acc = [_mm512_setzero_ps(); M];
            // SAFETY: a tile has its head and V vectors; the blocks of a group of rows lie
            // together, GROUP to the next tile.
            unsafe {
                let mut tile = data.as_ptr();
                let mut acts = self.acts.at(row, 0).cast_const();
                for _ in 0..data.len() / format.tile_bytes() {
                    let half = |i: usize| {
                        _mm512_cvtph_ps(_mm256_loadu_si256(tile.add(i * 2 * STRIP).cast()))
                    };
                    let d = half(0);
                    let second = if MIN || HALVES { half(1) } else { d };
                    let quants = tile.add(format.head_bytes());
                    let mut w = [_mm512_setzero_si512(); 8];
                    let mask = _mm512_set1_epi8(0xf);
                    for v in 0..V {
                        let x = _mm512_loadu_si512(quants.add(64 * v).cast());
                        if V == 4 {
                            w[2 * v] = _mm512_and_si512(x, mask);
                            w[2 * v + 1] = _mm512_and_si512(_mm512_srli_epi16::<4>(x), mask);
                        } else {
                            w[v] = x;
                        }
                    }
                    for r in 0..M {
                        let act = &*acts.add(r);
                        let values = act.values.as_ptr().cast::<i32>();
                        let bcast = |g: usize| _mm512_set1_epi32(values.add(g).read_unaligned());
                        if HALVES {
                            let mut low = _mm512_set1_epi32(zero * act.neg_low);
                            let mut high = _mm512_set1_epi32(zero * (act.neg_sum - act.neg_low));
                            for g in 0..4 {
                                low = _mm512_dpbusd_epi32(low, w[g], bcast(g));
                                high = _mm512_dpbusd_epi32(high, w[4 + g], bcast(4 + g));
                            }
                            let scale = _mm512_set1_ps(act.scale);
                            let (low, high) = (_mm512_cvtepi32_ps(low), _mm512_cvtepi32_ps(high));
                            acc[r] = _mm512_fmadd_ps(low, _mm512_mul_ps(d, scale), acc[r]);
                            acc[r] = _mm512_fmadd_ps(high, _mm512_mul_ps(second, scale), acc[r]);
                        } else {
                            let mut dot = if MIN {
                                _mm512_setzero_si512()
                            } else {
                                _mm512_set1_epi32(zero * act.neg_sum)
                            };
                            for g in 0..8 {
                                dot = _mm512_dpbusd_epi32(dot, w[g], bcast(g));
                            }
                            let scale = _mm512_mul_ps(d, _mm512_set1_ps(act.scale));
                            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, acc[r]);
                            if MIN {
                                let sum = _mm512_set1_ps(act.scaled_sum);
                                acc[r] = _mm512_fmadd_ps(second, sum, acc[r]);
                            }
                        }
                    }
                    tile = tile.add(format.tile_bytes());
                    acts = acts.add(GROUP);
                }
                for (r, acc) in acc.iter().enumerate() {
                    let mut out = [0f32; STRIP];
                    _mm512_storeu_ps(out.as_mut_ptr(), *acc);
                    self.put(row + r, strip, &out);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;
    use crate::pack::{Block, RowSource};
    use crate::testing::{isas, random};

    struct Random {
        k: usize,
        bits: u32,
        min: bool,
        halves: bool,
        seed: u64,
    }

    impl RowSource for Random {
        fn blocks(&self, row: usize, each: &mut dyn FnMut(usize, &Block)) {
            let x = random(self.k * 2, self.seed + row as u64);
            for (i, x) in x.chunks_exact(2 * TILE).enumerate() {
                let top = ((1u32 << self.bits) - 1) as f32;
                let scale = |v: f32| f16::from_f32(v * 0.02).to_f32();
                let first = scale(x[40]);
                each(
                    i,
                    &Block {
                        quants: std::array::from_fn(|j| ((x[j] + 1.0) / 2.0 * top).round() as u8),
                        scales: [first, if self.halves { scale(x[41]) } else { first }],
                        min: if self.min { scale(x[42]) } else { 0.0 },
                    },
                );
            }
        }
    }

    fn formats() -> [(Format, u32); 6] {
        [
            (Format::U4Zero(8), 4),
            (Format::U4Min, 4),
            (Format::U8Zero(128), 8),
            (Format::U8Min, 5),
            (Format::U8Zero(16), 5),
            (Format::U8Halves(32), 6),
        ]
    }

    #[test]
    fn products_follow_the_definition_with_the_same_bits_for_every_batch_isa_and_thread_count() {
        let (n, k, most) = (48, 160, 21);
        for (format, bits) in formats() {
            let layout = Layout::new(n, k, format).unwrap();
            let source = Random {
                k,
                bits,
                min: matches!(format, Format::U4Min | Format::U8Min),
                halves: matches!(format, Format::U8Halves(_)),
                seed: 7,
            };
            let mut pool = Pool::new(2).unwrap();
            let mut arena = Arena::new(layout.bytes()).unwrap();
            layout.pack(
                &mut pool,
                &source,
                &mut arena.as_mut_slice()[..layout.bytes()],
            );
            let data = &arena.as_slice()[..layout.bytes()];
            let mut weights = vec![0.0; n * k];
            for (row, out) in weights.chunks_exact_mut(k).enumerate() {
                layout.unpack_row(data, row, out);
                let mut expected = vec![0.0; k];
                source.blocks(row, &mut |i, b| {
                    for (j, &q) in b.quants.iter().enumerate() {
                        let q = f32::from(q) - f32::from(format.zero());
                        expected[i * TILE + j] = q * b.scales[j / 16] + b.min;
                    }
                });
                assert_eq!(out, expected);
            }
            let matrix = Matrix::new(layout, data);
            let x = random(most * k, 9);
            let mut first: Option<Vec<f32>> = None;
            for isa in isas() {
                for rows in 1..=most {
                    let mut acts = QuantRows::new(most, k);
                    for (row, x) in x.chunks_exact(k).enumerate() {
                        acts.quantize(isa, row, 0, x);
                    }
                    let mut out = vec![1.0; rows * n];
                    matrix.multiply(&mut pool, isa, &acts, rows, &mut out, Write::Set);
                    let longest = first.get_or_insert_with(|| {
                        let mut all = vec![0.0; most * n];
                        matrix.multiply(&mut pool, isa, &acts, most, &mut all, Write::Set);
                        all
                    });
                    assert_eq!(out, longest[..rows * n], "{format:?} {isa:?} {rows}");
                    let mut twice = out.clone();
                    matrix.multiply(&mut pool, isa, &acts, rows, &mut twice, Write::Add);
                    assert!(twice.iter().zip(&out).all(|(t, o)| *t == o + o));
                }
            }
            let out = first.unwrap();
            for row in 0..most {
                for column in 0..n {
                    let exact: f64 = (0..k)
                        .map(|i| f64::from(x[row * k + i]) * f64::from(weights[column * k + i]))
                        .sum();
                    let size: f64 = (0..k)
                        .map(|i| f64::from(weights[column * k + i]).abs())
                        .sum();
                    let got = f64::from(out[row * n + column]);
                    assert!(
                        (got - exact).abs() < size / 127.0,
                        "{format:?} {got} {exact}"
                    );
                }
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_errors() {
        for (n, k) in [(8, 32), (16, 16), (0, 32), (16, 0)] {
            assert!(Layout::new(n, k, Format::U4Min).is_err());
        }
    }
}
