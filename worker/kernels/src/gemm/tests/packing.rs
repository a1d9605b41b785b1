//! Matrices become what products read.

use super::*;
use crate::pack::ShapeError;

#[test]
fn packing_loses_nothing() {
    for format in QUANTS {
        let source = Quants::random(format, 37, 96, 3, 0.02);
        for threads in [1, 2] {
            let packed = Packed::quants(format, &source, threads);
            let exact = packed.exact.iter().map(|[quant, min]| (quant + min) as f32);
            assert!(packed.weights().into_iter().eq(exact), "{format:?}");
        }
    }
    let weights: Vec<f32> = random(37 * 50, 4)
        .iter()
        .map(|x| (x * 64.0).round())
        .collect();
    for format in FLOATS {
        assert_eq!(Packed::floats(format, &weights, 50).weights(), weights);
    }
}

#[test]
fn what_cannot_be_packed_is_an_error() {
    for (n, k, format) in [
        (16, 16, Format::U4Min),
        (0, 32, Format::U4Min),
        (16, 0, Format::F32),
        (usize::MAX / 64, 1 << 40, Format::F32),
    ] {
        let error = Layout::new(n, k, format).unwrap_err();
        assert_eq!(error, ShapeError { n, k, format });
    }
    let format = Format::U8Min;
    let layout = Layout::new(40, 64, format).unwrap();
    let good = Quants::random(format, 40, 64, 1, 0.1);
    for bad in [f32::INFINITY, f32::NAN, 70000.0] {
        let mut source = good.clone();
        source.0[21][1].min = bad;
        source.0[33][0].scales[0] = bad;
        let mut outs = vec![vec![0; layout.bytes()]; 3];
        let mut matrices: Vec<Packing<'_>> = outs
            .iter_mut()
            .zip([&good, &source, &source])
            .map(|(out, source)| Packing {
                layout,
                source: Source::Blocks(source),
                out,
            })
            .collect();
        let error = pack(&mut team(2), &mut matrices);
        let (matrix, row) = (1, 21);
        assert_eq!(
            error,
            Err(NotFinite {
                matrix,
                row,
                format
            })
        );
    }
    for bad in [f32::INFINITY, f32::NAN, 65520.0] {
        let layout = Layout::new(2, 2, Format::F16).unwrap();
        assert!(
            packed(
                layout,
                Source::Floats(&Floats(&[0.0, 65519.0, -1.0, bad])),
                1
            )
            .is_err()
        );
    }
}

#[test]
fn matrices_packed_together_are_those_packed_alone() {
    let k = 64;
    let (formats, rows) = ([Format::U4Min, Format::U8Halves(32)], [37, 16]);
    let sources = [0, 1].map(|i| Quants::random(formats[i], rows[i], k, i as u64, 0.1));
    let floats = random(20 * 7, 3);
    let all = [
        (
            Layout::new(37, k, formats[0]).unwrap(),
            Source::Blocks(&sources[0]),
        ),
        (
            Layout::new(20, 7, Format::Bf16).unwrap(),
            Source::Floats(&Floats(&floats)),
        ),
        (
            Layout::new(16, k, formats[1]).unwrap(),
            Source::Blocks(&sources[1]),
        ),
    ];
    let mut outs = all.map(|(layout, _)| vec![0xaa; layout.bytes()]);
    let mut matrices: Vec<Packing<'_>> = outs
        .iter_mut()
        .zip(all)
        .map(|(out, (layout, source))| Packing {
            layout,
            source,
            out,
        })
        .collect();
    pack(&mut team(3), &mut matrices).unwrap();
    for (out, (layout, source)) in outs.into_iter().zip(all) {
        assert!(out == packed(layout, source, 1).unwrap());
    }
}
