//! What must hold of every file that parses.

use shoal_gguf::{Array, Gguf, GgufWriter, Value, dequantize};

/// Reads everything there is; panics where the file contradicts itself.
pub(crate) fn walk(gguf: &Gguf) {
    let mut data = 0;
    for tensor in gguf.tensors() {
        let weights = tensor.shape.iter().product();
        assert_eq!(tensor.data.len(), tensor.ty.bytes_of(weights));
        data += tensor.data.len();
        let mut block = vec![0.0; tensor.ty.block_len()];
        let bytes = &tensor.data[..tensor.ty.block_bytes()];
        dequantize(tensor.ty, bytes, &mut block);
        assert!(gguf.tensor(tensor.name).is_some());
    }
    assert!(data <= gguf.bytes().len());

    let mut copy = GgufWriter::new();
    for (key, value) in gguf.entries() {
        if let Value::Array(Array::Str(strings)) = value {
            assert!((0..strings.len()).all(|index| strings.get(index).is_some()));
        }
        copy.metadata(key, value.clone()).expect("keys are unique");
    }
    // Padding to a hostile alignment could take gigabytes.
    if gguf
        .get("general.alignment")
        .is_ok_and(|a| a <= Some(4096u32))
    {
        let copy = Gguf::parse(copy.to_bytes()).expect("what the writer writes");
        assert!(
            copy.entries()
                .map(|(key, _)| key)
                .eq(gguf.entries().map(|(key, _)| key))
        );
    }
}
