//! The tensors of a file, checked against the shape of the model.

use std::collections::HashSet;

use shoal_gguf::{GgmlType, Gguf};

use super::parse::ROPE_DIVISORS;
use super::{ModelSpec, SpecError};
use crate::weights::Weight;

/// Every tensor of the model is there, has its shape and a type that fits its rank; and
/// there is no tensor that the model would silently run without.
pub(super) fn validate_tensors(gguf: &Gguf, spec: &ModelSpec) -> Result<(), SpecError> {
    let mut known = HashSet::from([ROPE_DIVISORS.to_owned()]);
    for weight in Weight::all(spec) {
        let tensor = weight.to_string();
        check(gguf, spec, weight, &tensor).map_err(|reason| SpecError::Tensor {
            tensor: tensor.clone(),
            reason,
        })?;
        known.insert(tensor);
    }
    match gguf.tensors().find(|tensor| !known.contains(tensor.name)) {
        None => Ok(()),
        Some(stranger) => Err(SpecError::Tensor {
            tensor: stranger.name.to_owned(),
            reason: format!("has no place in {}", spec.architecture.name()),
        }),
    }
}

fn check(gguf: &Gguf, spec: &ModelSpec, weight: Weight, name: &str) -> Result<(), String> {
    let tensor = gguf.tensor(name).ok_or("is missing")?;
    let shape = weight.shape(spec);
    if tensor.shape[..] != shape[..] {
        return Err(format!(
            "has shape {:?}, the model needs {shape:?}",
            tensor.shape
        ));
    }
    let plain = matches!(tensor.ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
    if shape.len() == 1 && !plain {
        return Err(format!("is a vector of the block type {}", tensor.ty));
    }
    Ok(())
}

/// The type that most weights in matrices have.
pub(super) fn most_common_matrix_type(gguf: &Gguf) -> Option<GgmlType> {
    let mut counts: Vec<(GgmlType, usize)> = Vec::new();
    for tensor in gguf.tensors().filter(|tensor| tensor.shape.len() == 2) {
        let weights = tensor.shape.iter().product::<usize>();
        match counts.iter_mut().find(|(ty, _)| *ty == tensor.ty) {
            Some((_, count)) => *count += weights,
            None => counts.push((tensor.ty, weights)),
        }
    }
    counts
        .into_iter()
        .max_by_key(|(_, count)| *count)
        .map(|(ty, _)| ty)
}
