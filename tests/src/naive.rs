//! The transformer in plain loops and double precision: no candle, no pages, no batches.
//! Slow, and easy to check against the papers.

use shoal_core::TokenId;
use shoal_engine::spec::{ModelSpec, RopeKind};
use shoal_engine::weights::{LayerWeight, Weight};
use shoal_gguf::{Gguf, dequantize};

/// A tensor `[rows, columns]`; a vector has one row.
struct Matrix {
    columns: usize,
    values: Vec<f64>,
}

impl Matrix {
    fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..][..self.columns]
    }

    fn times(&self, x: &[f64]) -> Vec<f64> {
        self.values
            .chunks(self.columns)
            .map(|row| dot(row, x))
            .collect()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// A model with dequantised weights.
pub struct Naive<'a> {
    gguf: &'a Gguf,
    spec: &'a ModelSpec,
}

impl<'a> Naive<'a> {
    /// Runs the model of this file.
    pub fn new(gguf: &'a Gguf, spec: &'a ModelSpec) -> Self {
        Self { gguf, spec }
    }

    /// The logits after every token of one sequence, `[tokens, vocab]`.
    pub fn logits(&self, tokens: &[TokenId]) -> Vec<f32> {
        let embedding = self.load(Weight::Embedding);
        let mut rows: Vec<Vec<f64>> = tokens
            .iter()
            .map(|&token| embedding.row(token as usize).to_vec())
            .collect();
        for layer in 0..self.spec.n_layer {
            self.attention(layer, &mut rows);
            self.feed_forward(layer, &mut rows);
        }
        let norm = self.load(Weight::OutputNorm);
        let head = if self.spec.tied_head {
            embedding
        } else {
            self.load(Weight::Head)
        };
        rows.iter()
            .flat_map(|row| head.times(&self.rms_norm(row, &norm)))
            .map(|logit| logit as f32)
            .collect()
    }

    fn load(&self, weight: Weight) -> Matrix {
        let tensor = self
            .gguf
            .tensor(&weight.to_string())
            .expect("the tensor is there");
        let mut values = vec![0.0; tensor.shape.iter().product()];
        dequantize(tensor.ty, tensor.data, &mut values);
        Matrix {
            columns: tensor.shape[tensor.shape.len() - 1],
            values: values.into_iter().map(f64::from).collect(),
        }
    }

    fn rms_norm(&self, x: &[f64], weight: &Matrix) -> Vec<f64> {
        let mean_square = dot(x, x) / x.len() as f64;
        let scale = (mean_square + f64::from(self.spec.rms_eps)).sqrt().recip();
        x.iter()
            .zip(&weight.values)
            .map(|(x, w)| x * scale * w)
            .collect()
    }

    fn attention(&self, layer: usize, rows: &mut [Vec<f64>]) {
        let spec = self.spec;
        let load = |weight| self.load(Weight::Layer(layer, weight));
        let norm = load(LayerWeight::AttnNorm);
        let inputs: Vec<_> = rows.iter().map(|row| self.rms_norm(row, &norm)).collect();

        // All heads of all rows: [row][head][element].
        let heads = |matrix, bias, head_norm: Option<LayerWeight>, rotates: bool| {
            let matrix = load(matrix);
            let bias = spec.qkv_bias.then(|| load(bias));
            let head_norm = head_norm.filter(|_| spec.qk_norm).map(load);
            let of_row = |(position, input): (usize, &Vec<f64>)| {
                let mut y = matrix.times(input);
                if let Some(bias) = &bias {
                    y.iter_mut().zip(&bias.values).for_each(|(y, b)| *y += b);
                }
                let split = y.chunks(spec.head_dim).map(|head| {
                    let mut head = match &head_norm {
                        Some(norm) => self.rms_norm(head, norm),
                        None => head.to_vec(),
                    };
                    if rotates {
                        self.rotate(&mut head, position);
                    }
                    head
                });
                split.collect::<Vec<_>>()
            };
            inputs.iter().enumerate().map(of_row).collect::<Vec<_>>()
        };
        let q = heads(
            LayerWeight::Q,
            LayerWeight::QBias,
            Some(LayerWeight::QNorm),
            true,
        );
        let k = heads(
            LayerWeight::K,
            LayerWeight::KBias,
            Some(LayerWeight::KNorm),
            true,
        );
        let v = heads(LayerWeight::V, LayerWeight::VBias, None, false);

        let output = load(LayerWeight::AttnOutput);
        let group = spec.n_head / spec.n_kv_head;
        for (i, row) in rows.iter_mut().enumerate() {
            let mut attended = Vec::new();
            for head in 0..spec.n_head {
                let kv = head / group;
                let scale = (spec.head_dim as f64).sqrt();
                let scores = (0..=i).map(|j| dot(&q[i][head], &k[j][kv]) / scale);
                let weights: Vec<f64> = scores.map(f64::exp).collect();
                let sum: f64 = weights.iter().sum();
                attended.extend((0..spec.head_dim).map(|e| {
                    let weighted = weights.iter().enumerate().map(|(j, w)| w * v[j][kv][e]);
                    weighted.sum::<f64>() / sum
                }));
            }
            add(row, &output.times(&attended));
        }
    }

    fn rotate(&self, head: &mut [f64], position: usize) {
        let rope = &self.spec.rope;
        let pairs = rope.inv_freq.len();
        for (pair, &freq) in rope.inv_freq.iter().enumerate() {
            let (a, b) = match rope.kind {
                RopeKind::Interleaved => (2 * pair, 2 * pair + 1),
                RopeKind::Halves => (pair, pair + pairs),
            };
            let (sin, cos) = (position as f64 * f64::from(freq)).sin_cos();
            let magnitude = f64::from(rope.magnitude);
            let (x, y) = (head[a] * magnitude, head[b] * magnitude);
            head[a] = x * cos - y * sin;
            head[b] = x * sin + y * cos;
        }
    }

    fn feed_forward(&self, layer: usize, rows: &mut [Vec<f64>]) {
        let load = |weight| self.load(Weight::Layer(layer, weight));
        let (norm, gate) = (load(LayerWeight::FfnNorm), load(LayerWeight::Gate));
        let (up, down) = (load(LayerWeight::Up), load(LayerWeight::Down));
        for row in rows {
            let x = self.rms_norm(row, &norm);
            let gated = gate.times(&x).into_iter().zip(up.times(&x));
            let hidden: Vec<f64> = gated.map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect();
            add(row, &down.times(&hidden));
        }
    }
}

fn add(row: &mut [f64], more: &[f64]) {
    row.iter_mut().zip(more).for_each(|(x, y)| *x += y);
}
