//! The rows and columns of tensors that are a rank's, packed one after the other.

use std::ops::Range;

use shoal_gguf::{GgmlType, Gguf, TensorView, codec};
use shoal_kernels::gemm::Placed;
use shoal_kernels::pack::{
    Block, BlockRows, FloatRows, Format, Layout, Packing, Source, TILE, pack,
};
use shoal_kernels::quant::Precision;
use shoal_kernels::team::Team;

use super::weights::Linear;
use crate::backend::BackendError;
use crate::weights::Weight;

/// Some rows of a matrix.
#[derive(Clone)]
struct Piece<'a> {
    tensor: TensorView<'a>,
    rows: Range<usize>,
}

/// The same columns of pieces stacked by rows.
struct Stack<'a> {
    pieces: Vec<Piece<'a>>,
    columns: Range<usize>,
}

impl<'a> Stack<'a> {
    /// The type and the whole blocks that hold the columns of a row, and how many weights of
    /// them come before.
    fn row(&self, row: usize) -> (GgmlType, &'a [u8], usize) {
        let mut row = row;
        for Piece { tensor, rows } in &self.pieces {
            if row < rows.len() {
                let (ty, block) = (tensor.ty, tensor.ty.block_len());
                let first = self.columns.start / block * block;
                let end = self.columns.end.next_multiple_of(block);
                let start = (rows.start + row) * ty.bytes_of(tensor.shape[1]);
                let data = &tensor.data[start + ty.bytes_of(first)..start + ty.bytes_of(end)];
                return (ty, data, self.columns.start - first);
            }
            row -= rows.len();
        }
        unreachable!("a layout has the rows of its pieces")
    }

    fn source(&self, precision: Precision) -> Source<'_> {
        match precision {
            Precision::Int8 => Source::Blocks(self),
            Precision::F32 => Source::Floats(self),
        }
    }

    fn error(&self, error: impl std::fmt::Display) -> BackendError {
        let names: Vec<&str> = self.pieces.iter().map(|piece| piece.tensor.name).collect();
        BackendError::Weights {
            tensor: names.join(", "),
            reason: error.to_string(),
        }
    }
}

impl BlockRows for Stack<'_> {
    fn blocks(&self, row: usize, out: &mut [Block]) {
        let (ty, data, before) = self.row(row);
        codec::unpack(ty, data, |index, group| {
            let at = index.checked_sub(before / TILE);
            if let Some(out) = at.and_then(|at| out.get_mut(at)) {
                *out = Block {
                    quants: group.quants,
                    scales: group.scales,
                    min: group.min,
                };
            }
        });
    }
}

impl FloatRows for Stack<'_> {
    fn floats(&self, row: usize, out: &mut [f32]) {
        // A block of floats is one.
        let (ty, data, _) = self.row(row);
        shoal_gguf::dequantize(ty, data, out);
    }
}

fn format(ty: GgmlType) -> Format {
    match ty {
        GgmlType::Q4_0 => Format::U4Zero,
        GgmlType::Q4_1 | GgmlType::Q4_K => Format::U4Min,
        GgmlType::Q5_0 => Format::U8Zero(16),
        GgmlType::Q5_1 | GgmlType::Q5_K => Format::U8Min,
        GgmlType::Q6_K => Format::U8Halves(32),
        GgmlType::Q8_0 => Format::U8Zero(128),
        GgmlType::F32 => Format::F32,
        GgmlType::F16 => Format::F16,
        GgmlType::BF16 => Format::Bf16,
    }
}

/// Places matrices one after the other before the arena exists, then packs them.
pub(super) struct Packer<'a> {
    gguf: &'a Gguf,
    sources: Vec<(Layout, usize, Stack<'a>)>,
    bytes: usize,
}

impl<'a> Packer<'a> {
    pub(super) fn new(gguf: &'a Gguf) -> Self {
        Self {
            gguf,
            sources: Vec::new(),
            bytes: 0,
        }
    }

    /// Bytes of what was placed.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    fn tensor(&self, weight: Weight) -> Result<TensorView<'a>, BackendError> {
        let name = weight.to_string();
        self.gguf
            .tensor(&name)
            .ok_or_else(|| BackendError::Weights {
                tensor: name,
                reason: "is missing".to_owned(),
            })
    }

    /// Places rows of matrices, all of their columns.
    pub(super) fn rows(
        &mut self,
        pieces: &[(Weight, Range<usize>)],
    ) -> Result<Linear, BackendError> {
        let mut linear = Linear::default();
        let mut stack: Vec<Piece<'a>> = Vec::new();
        let mut columns = 0..0;
        for (weight, rows) in pieces {
            let tensor = self.tensor(*weight)?;
            columns = 0..tensor.shape[1];
            if stack
                .last()
                .is_some_and(|last| format(last.tensor.ty) != format(tensor.ty))
            {
                self.place(std::mem::take(&mut stack), columns.clone(), &mut linear)?;
            }
            let rows = rows.clone();
            stack.push(Piece { tensor, rows });
        }
        self.place(stack, columns, &mut linear)?;
        Ok(linear)
    }

    /// Places columns of a matrix, all of its rows.
    pub(super) fn columns(
        &mut self,
        weight: Weight,
        columns: Range<usize>,
    ) -> Result<Linear, BackendError> {
        let tensor = self.tensor(weight)?;
        let rows = 0..tensor.shape[0];
        let mut linear = Linear::default();
        self.place(vec![Piece { tensor, rows }], columns, &mut linear)?;
        Ok(linear)
    }

    fn place(
        &mut self,
        pieces: Vec<Piece<'a>>,
        columns: Range<usize>,
        linear: &mut Linear,
    ) -> Result<(), BackendError> {
        let Some(first) = pieces.first() else {
            return Ok(());
        };
        let format = format(first.tensor.ty);
        let n = pieces.iter().map(|piece| piece.rows.len()).sum();
        let stack = Stack { pieces, columns };
        let layout = Layout::new(n, stack.columns.len(), format);
        let layout = layout.map_err(|error| stack.error(error))?;
        linear.parts.push(Placed {
            layout,
            offset: self.bytes,
        });
        self.sources.push((layout, self.bytes, stack));
        self.bytes += layout.bytes().next_multiple_of(64);
        Ok(())
    }

    /// Packs what was placed, in that order, into `arena`.
    pub(super) fn pack(&self, team: &mut Team, arena: &mut [u8]) -> Result<(), BackendError> {
        let (mut rest, mut start) = (arena, 0);
        let mut matrices = Vec::with_capacity(self.sources.len());
        for (layout, offset, stack) in &self.sources {
            let (_, tail) = rest.split_at_mut(offset - start);
            let (out, tail) = tail.split_at_mut(layout.bytes());
            matrices.push(Packing {
                layout: *layout,
                source: stack.source(layout.format().precision()),
                out,
            });
            (rest, start) = (tail, offset + layout.bytes());
        }
        pack(team, &mut matrices).map_err(|error| self.sources[error.matrix].2.error(error))
    }

    /// A vector, or `range` of it.
    pub(super) fn vector(
        &self,
        weight: Weight,
        range: Option<Range<usize>>,
    ) -> Result<Vec<f32>, BackendError> {
        let tensor = self.tensor(weight)?;
        let mut out = vec![0.0; tensor.shape.iter().product()];
        shoal_gguf::dequantize(tensor.ty, tensor.data, &mut out);
        Ok(match range {
            Some(range) => out[range].to_vec(),
            None => out,
        })
    }
}
