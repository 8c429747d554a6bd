//! GGUF files: what a writer writes a reader reads, split models, typed getters, what is refused by name.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kinglet::Error;
use kinglet::gguf::{Advice, Array, Gguf, Metadata, StringArray, TensorSpec, TensorType, Value};
use kinglet::gguf::{Part, Writer};
use kinglet::quant::DType;

const TINY: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/data/lfm2-tiny-random.gguf"
);

/// A directory of its own for each test, removed at the end.
struct Dir(PathBuf);

impl Dir {
    fn new(test: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("kinglet-gguf-{}-{test}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn names(&self) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(&self.0)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The message of an error; every part of `with` must be in it.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: kinglet::Result<T>, with: &[&str]) {
    let message = result.expect_err("expected an error").to_string();
    for part in with {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
    assert!(!message.contains('\n'), "more than a line: {message}");
}

/// A value of each type.
fn every_type() -> Metadata {
    let mut m = Metadata::new();
    m.set("general.architecture", "lfm2");
    m.set("u8", 255u8);
    m.set("i8", -128i8);
    m.set("u16", 65535u16);
    m.set("i16", -32768i16);
    m.set("u32", u32::MAX);
    m.set("i32", i32::MIN);
    m.set("u64", u64::MAX);
    m.set("i64", i64::MIN);
    m.set("f32", 1.5f32);
    m.set("f64", -2.25f64);
    m.set("yes", true);
    m.set("no", false);
    m.set("empty", "");
    m.set("not utf-8", Value::String(vec![0xff, 0x00, 0xc3]));
    m.set("a.u8", vec![1u8, 2]);
    m.set("a.i8", vec![-1i8]);
    m.set("a.u16", vec![1u16, 2]);
    m.set("a.i16", vec![-1i16, 7]);
    m.set("a.u32", vec![1u32, 2, 3]);
    m.set("a.i32", vec![-1i32; 5000]); // more than one piece of the reader
    m.set("a.u64", vec![1u64, u64::MAX]);
    m.set("a.i64", vec![-1i64]);
    m.set("a.f32", vec![0.5f32, 1.0]);
    m.set("a.f64", vec![0.5f64]);
    m.set("a.bool", vec![true, false]);
    m.set("a.none", Vec::<u32>::new());
    let long = "x".repeat(20_000);
    let strings = StringArray::from_strings(["", "a", "žluťoučký", "", &long]).unwrap();
    m.set("a.strings", strings.clone());
    let inner = vec![
        Array::String(strings),
        Array::Array(vec![Array::U8(vec![3]), Array::F64(vec![])]),
    ];
    m.set("a.arrays", Value::Array(Array::Array(inner)));
    m
}

fn write(path: &Path, metadata: &Metadata, tensors: &[(TensorSpec, Vec<u8>)]) {
    let specs: Vec<_> = tensors.iter().map(|t| t.0.clone()).collect();
    let mut writer = Writer::create(path, metadata, &specs).unwrap();
    for (_, bytes) in tensors {
        writer.tensor(bytes).unwrap();
    }
    writer.finish().unwrap();
}

fn floats(name: &str, shape: &[usize]) -> (TensorSpec, Vec<u8>) {
    let n: usize = shape.iter().product();
    let bytes = (0..n).flat_map(|i| (i as f32).to_le_bytes()).collect();
    (TensorSpec::new(name, DType::F32, shape), bytes)
}

#[test]
fn what_is_written_is_read() {
    let dir = Dir::new("roundtrip");
    let path = dir.path("all.gguf");
    let metadata = every_type();
    let mut tensors = vec![floats("norm", &[5]), floats("conv", &[3, 7, 2, 2])];
    for (i, t) in DType::ALL.iter().enumerate() {
        let spec = TensorSpec::new(t.name(), *t, [t.block_len() * 2, 3]);
        let bytes = vec![i as u8 + 1; spec.bytes().unwrap()];
        tensors.push((spec, bytes));
    }
    let i32s = TensorType::from_id(26);
    tensors.push((TensorSpec::new("ids", i32s, [4]), vec![9; 16]));
    write(&path, &metadata, &tensors);
    assert_eq!(dir.names(), ["all.gguf"], "no temporary file stays");

    let gguf = Gguf::open(&path).unwrap();
    assert_eq!((gguf.version(), gguf.alignment()), (3, 32));
    assert_eq!(gguf.file_bytes(), fs::metadata(&path).unwrap().len());
    assert_eq!(gguf.metadata(), &metadata);
    assert_eq!(gguf.architecture().unwrap(), "lfm2");
    assert_eq!(gguf.tensors().len(), tensors.len());
    for ((spec, bytes), info) in tensors.iter().zip(gguf.tensors()) {
        assert_eq!(spec, &TensorSpec::from(info));
        assert_eq!(info.offset % gguf.alignment(), 0);
        assert_eq!(gguf.tensor(&spec.name), Some(info));
        assert_eq!(&*gguf.raw(&spec.name).unwrap(), bytes);
        if spec.name != "ids" {
            let tensor = gguf.load(&spec.name).unwrap();
            assert_eq!(Some(tensor.dtype), spec.dtype.dtype());
            assert_eq!(tensor.shape, info.shape);
            assert_eq!(&*tensor.data, bytes);
        }
    }
    assert_eq!(gguf.load("conv").unwrap().to_f32()[83], 83.0);
    refused(
        gguf.load("ids"),
        &["tensor type `I32 (tensor ids)`", "F32, F16, Q4_0"],
    );
    refused(gguf.load("none"), &["tensor `none`", "all.gguf"]);
    assert_eq!(
        gguf.problems(),
        [
            "metadata key `tokenizer.ggml.model` is missing",
            "metadata key `tokenizer.ggml.tokens` is missing: no vocabulary",
            "metadata key `not utf-8` is text that is not UTF-8",
            "1 of the tensors have the unsupported type I32",
        ]
    );

    // The same bytes in memory are the same model, aligned or not.
    let bytes = fs::read(&path).unwrap();
    let in_memory = Gguf::from_bytes(bytes.clone()).unwrap();
    assert!(in_memory.tensors().eq(gguf.tensors()));
    let shifted: &'static [u8] = [&[0][..], &bytes].concat().leak();
    let shifted = Gguf::from_bytes(&shifted[1..]).unwrap();
    let (a, b) = (shifted.load("conv").unwrap(), gguf.load("conv").unwrap());
    assert_eq!(a.to_f32(), b.to_f32());
}

#[test]
fn a_model_outlives_its_handle_and_is_shared_by_threads() {
    fn shareable<T: Send + Sync + 'static>(_: &T) {}
    let gguf = Arc::new(Gguf::open(Path::new(TINY)).unwrap());
    shareable(&gguf);
    let name = gguf.tensors().next().unwrap().name.clone();
    let tensor = gguf.load(&name).unwrap();
    let expected = tensor.to_f32();
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let (gguf, name) = (gguf.clone(), name.clone());
            std::thread::spawn(move || gguf.load(&name).unwrap().to_f32())
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().unwrap(), expected);
    }
    drop(gguf);
    assert_eq!(tensor.to_f32(), expected, "the tensor holds the map");
}

#[test]
fn advice_changes_no_contents() {
    for gguf in [
        Gguf::open(Path::new(TINY)).unwrap(),
        Gguf::from_bytes(fs::read(TINY).unwrap()).unwrap(),
    ] {
        let names: Vec<_> = gguf.tensors().map(|t| t.name.clone()).collect();
        for name in &names {
            let before = gguf.raw(name).unwrap().to_vec();
            for advice in [
                Advice::WillNeed,
                Advice::Sequential,
                Advice::Random,
                Advice::DontNeed,
                Advice::Normal,
            ] {
                gguf.advise(name, advice).unwrap();
                assert_eq!(&*gguf.raw(name).unwrap(), before);
            }
        }
        gguf.advise_all(Advice::DontNeed).unwrap();
        refused(gguf.advise("none", Advice::WillNeed), &["tensor `none`"]);
    }
}

#[test]
fn the_tiny_model_is_as_its_maker_wrote_it() {
    let gguf = Gguf::open(Path::new(TINY)).unwrap();
    assert_eq!(gguf.architecture().unwrap(), "lfm2");
    assert_eq!(gguf.problems(), Vec::<String>::new());
    let m = gguf.metadata();
    let tokens = m.strings("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.len(), 320);
    assert_eq!(m.i32s("tokenizer.ggml.token_type").unwrap().len(), 320);
    let embd = gguf.load("token_embd.weight").unwrap();
    let hidden = m.usize("lfm2.embedding_length").unwrap();
    assert_eq!((embd.n_in(), embd.n_out()), (hidden, 320));
    let n_layers = m.usize("lfm2.block_count").unwrap();
    let kv = m.per_layer_usize("lfm2.attention.head_count_kv", n_layers);
    assert_eq!(kv.unwrap().len(), n_layers);
}

/// Metadata and tensors of a real file, written again, are the file.
#[test]
fn a_copy_is_the_original() {
    let dir = Dir::new("copy");
    let path = dir.path("copy.gguf");
    let from = Gguf::open(Path::new(TINY)).unwrap();
    let specs: Vec<_> = from.tensors().map(TensorSpec::from).collect();
    let mut writer = Writer::create(&path, from.metadata(), &specs).unwrap();
    while let Some(spec) = writer.current() {
        let bytes = from.raw(&spec.name).unwrap();
        bytes.chunks(1000).for_each(|piece| {
            writer.append(piece).unwrap();
        });
    }
    writer.finish().unwrap();
    assert!(fs::read(&path).unwrap() == fs::read(TINY).unwrap());
}

#[test]
fn alignment_is_kept() {
    let dir = Dir::new("alignment");
    for alignment in [8u32, 16, 32, 4096, 1 << 20] {
        let path = dir.path(&format!("{alignment}.gguf"));
        let mut m = every_type();
        m.set("general.alignment", alignment);
        write(&path, &m, &[floats("a", &[3]), floats("b", &[1])]);
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.alignment(), u64::from(alignment));
        assert_eq!(gguf.file_bytes() % u64::from(alignment), 0);
        for t in gguf.tensors() {
            assert_eq!(t.offset % u64::from(alignment), 0);
        }
        assert_eq!(gguf.load("a").unwrap().to_f32(), [0.0, 1.0, 2.0]);
    }
    for wrong in [
        0u32.into(),
        4u32.into(),
        24u32.into(),
        (1u32 << 21).into(),
        Value::from("32"),
    ] {
        let mut m = Metadata::new();
        m.set("general.alignment", wrong);
        let writer = Writer::create(&dir.path("x"), &m, &[]).map(drop);
        refused(writer, &["general.alignment", "a power of two from 8"]);
    }
}

#[test]
fn metadata_can_be_changed() {
    let mut m = every_type();
    let n = m.len();
    m.set("u8", 3u32);
    assert_eq!(m.len(), n);
    assert_eq!(m.iter().nth(1).unwrap(), ("u8", &Value::U32(3)));
    assert_eq!(m.remove("i8"), Some(Value::I8(-128)));
    assert_eq!(m.remove("i8"), None);
    m.set("last", 1u8);
    assert_eq!(m.iter().last().unwrap().0, "last");
    assert_eq!(m.len(), n);
    for (key, value) in m.iter() {
        assert_eq!(m.get(key), Some(value), "{key}");
    }
}

#[test]
fn getters_take_what_fits_and_name_what_does_not() {
    let m = every_type();
    assert_eq!(m.u32("u8").unwrap(), 255);
    assert_eq!(m.u32("u32").unwrap(), u32::MAX);
    assert_eq!(m.i32("i8").unwrap(), -128);
    assert_eq!(m.u64("u64").unwrap(), u64::MAX);
    assert_eq!(m.usize("u16").unwrap(), 65535);
    assert_eq!(m.f32("f64").unwrap(), -2.25);
    assert!(m.bool("yes").unwrap() && !m.bool("no").unwrap());
    assert_eq!(m.str("empty").unwrap(), "");
    assert_eq!(m.bytes("not utf-8").unwrap(), [0xff, 0x00, 0xc3]);
    assert_eq!(&*m.f32s("a.f32").unwrap(), [0.5, 1.0]);
    assert_eq!(&*m.f32s("a.f64").unwrap(), [0.5]);
    assert_eq!(&*m.i32s("a.i16").unwrap(), [-1, 7]);
    assert_eq!(&*m.u32s("a.u32").unwrap(), [1, 2, 3]);
    assert_eq!(m.bools("a.bool").unwrap(), [true, false]);
    let strings = m.strings("a.strings").unwrap();
    assert_eq!(strings.get(0), Some(&b""[..]));
    assert_eq!(strings.get_str(2).unwrap(), "žluťoučký");
    assert_eq!((strings.len(), strings.get(5)), (5, None));
    refused(strings.get_str(5), &["string 5", "below 5"]);

    refused(m.u32("none"), &["metadata key `none`", "found nothing"]);
    refused(m.u32("i8"), &["`i8`", "32 bits", "found i8 -128"]);
    refused(m.u32("u64"), &["`u64`", "found u64 18446744073709551615"]);
    refused(m.u32("f32"), &["`f32`", "found f32 1.5"]);
    refused(m.f32("u8"), &["`u8`", "a float", "found u8 255"]);
    refused(m.bool("u8"), &["`u8`", "a bool", "found u8 255"]);
    refused(m.str("not utf-8"), &["a string in UTF-8", "found string"]);
    refused(m.str("a.u32"), &["`a.u32`", "found array of 3 u32s"]);
    refused(m.strings("a.u32"), &["an array of strings", "array of 3"]);
    refused(m.i32s("a.u64"), &["`a.u64`", "integers of 32 bits"]);
    refused(m.u32s("a.i8"), &["`a.i8`", "not negative"]);
    refused(m.bools("yes"), &["`yes`", "found bool true"]);

    assert_eq!(m.opt_u32("none").unwrap(), None);
    assert_eq!(m.opt_u32("u8").unwrap(), Some(255));
    refused(m.opt_u32("yes"), &["`yes`", "found bool true"]);
    assert!(m.opt_strings("none").unwrap().is_none());
}

#[test]
fn per_layer_values_are_one_or_all() {
    let m = every_type();
    assert_eq!(m.per_layer_usize("u8", 3).unwrap(), [255; 3]);
    assert_eq!(m.per_layer_usize("a.u32", 3).unwrap(), [1, 2, 3]);
    assert_eq!(m.opt_per_layer_usize("none", 3).unwrap(), None);
    assert_eq!(m.opt_per_layer_f32("f32", 2).unwrap(), Some(vec![1.5, 1.5]));
    assert_eq!(m.opt_per_layer_f32("a.f64", 1).unwrap(), Some(vec![0.5]));
    let bools = m.opt_per_layer_bool("a.bool", 2).unwrap();
    assert_eq!(bools, Some(vec![true, false]));
    refused(
        m.per_layer_usize("a.u32", 4),
        &["`a.u32`", "an array of 4", "found array of 3 u32s"],
    );
    refused(m.per_layer_usize("a.i8", 1), &["`a.i8`", "not negative"]);
    refused(m.per_layer_usize("none", 1), &["`none`", "found nothing"]);
    refused(
        m.per_layer_usize("u8", usize::MAX),
        &["number of layers", "at most 65536"],
    );
}

#[test]
fn the_writer_refuses_what_no_reader_could_read() {
    let dir = Dir::new("writer");
    let path = dir.path("x.gguf");
    let create = |specs: &[TensorSpec]| Writer::create(&path, &Metadata::new(), specs).map(drop);
    let f32s = |name: &str, shape: &[usize]| TensorSpec::new(name, DType::F32, shape);
    refused(create(&[f32s("a", &[])]), &["1 to 4 dimensions, found 0"]);
    refused(create(&[f32s("a", &[1; 5])]), &["4 dimensions, found 5"]);
    refused(create(&[f32s("a", &[2, 0])]), &["`a`", "at least 1"]);
    refused(create(&[f32s("a", &[usize::MAX, 2])]), &["elements"]);
    refused(create(&[f32s("", &[1])]), &["expected a name"]);
    refused(create(&[f32s(&"n".repeat(256), &[1])]), &["255, found 256"]);
    let many: Vec<_> = (0..65_537).map(|i| f32s(&i.to_string(), &[1])).collect();
    refused(create(&many), &["number of tensors", "at most 65536"]);
    let deep = (0..5).fold(Array::U8(vec![]), |inner, _| Array::Array(vec![inner]));
    let mut m = Metadata::new();
    m.set("deep", Value::Array(deep));
    refused(
        Writer::create(&path, &m, &[]).map(drop),
        &["`deep`", "at most 4 levels"],
    );
    refused(
        create(&[f32s("a", &[1]), f32s("a", &[1])]),
        &["`a`", "once, found twice"],
    );
    refused(
        create(&[TensorSpec::new("q", DType::Q4_K, [320])]),
        &["`q`", "blocks of 256 (Q4_K), found 320"],
    );
    refused(
        create(&[TensorSpec::new("q", TensorType::from_id(36), [32])]),
        &["`q`", "layout is known, found I2_S"],
    );

    let specs = [f32s("a", &[2]), f32s("b", &[1])];
    let mut writer = Writer::create(&path, &Metadata::new(), &specs).unwrap();
    refused(writer.tensor(&[0; 7]), &["`a`", "8 more bytes, found 7"]);
    refused(
        writer.append(&[0; 9]),
        &["`a`", "at most 8 more", "found 9"],
    );
    writer.append(&[0; 4]).unwrap();
    refused(writer.tensor(&[0; 8]), &["`a`", "4 more bytes, found 8"]);
    writer.append(&[0; 4]).unwrap();
    assert_eq!(writer.current().unwrap().name, "b");
    refused(writer.finish(), &["`b`", "found 0 bytes"]);
    assert_eq!(dir.names(), [""; 0], "nothing stays of an unfinished file");

    fs::write(&path, "precious").unwrap();
    let mut writer = Writer::create(&path, &Metadata::new(), &specs).unwrap();
    writer.tensor(&[0; 8]).unwrap();
    drop(writer);
    assert_eq!(fs::read(&path).unwrap(), b"precious");
    assert_eq!(dir.names(), ["x.gguf"]);

    let mut writer = Writer::create(&path, &Metadata::new(), &specs).unwrap();
    writer.tensor(&[0; 8]).unwrap();
    writer.tensor(&[0; 4]).unwrap();
    refused(writer.tensor(&[0; 4]), &["no tensor after the last of 2"]);
    writer.finish().unwrap();
    assert_eq!(Gguf::open(&path).unwrap().tensors().len(), 2);

    // A target that cannot be replaced: the error names it, the temporary file goes.
    fs::create_dir(dir.path("taken")).unwrap();
    let writer = Writer::create(&dir.path("taken"), &Metadata::new(), &[]).unwrap();
    refused(writer.finish(), &["taken"]);
    assert_eq!(dir.names(), ["taken", "x.gguf"]);
    let nowhere = dir.path("no/such/x.gguf");
    refused(
        Writer::create(&nowhere, &Metadata::new(), &[]).map(drop),
        &["no/such"],
    );
}

/// Writes part `no` (from 1) of `count` under the right name.
fn write_part(dir: &Dir, no: usize, count: usize, keys: [Option<u32>; 3], names: &[&str]) {
    let mut m = match no {
        1 => every_type(),
        _ => Metadata::new(),
    };
    let split = ["split.no", "split.count", "split.tensors.count"];
    for (key, value) in split.iter().zip(keys) {
        if let Some(value) = value {
            m.set(key, value as u16);
        }
    }
    let tensors: Vec<_> = names.iter().map(|n| floats(n, &[no])).collect();
    let path = dir.path(&format!("m-{no:05}-of-{count:05}.gguf"));
    write(&path, &m, &tensors);
}

fn parts_of(dir: &Dir) -> [PathBuf; 3] {
    [1, 2, 3].map(|no| dir.path(&format!("m-{no:05}-of-00003.gguf")))
}

fn write_split(dir: &Dir) {
    write_part(dir, 1, 3, [Some(0), Some(3), Some(3)], &["a"]);
    write_part(dir, 2, 3, [Some(1), Some(3), Some(3)], &["b", "c"]);
    write_part(dir, 3, 3, [Some(2), Some(3), Some(3)], &[]);
}

#[test]
fn a_split_model_opens_from_any_part() {
    let dir = Dir::new("split");
    write_split(&dir);
    let paths = parts_of(&dir);
    for path in &paths {
        let gguf = Gguf::open(path).unwrap();
        assert_eq!(gguf.path(), paths[0]);
        assert!(gguf.parts().iter().map(Part::path).eq(&paths));
        let sizes = paths.iter().map(|p| fs::metadata(p).unwrap().len());
        assert_eq!(gguf.file_bytes(), sizes.sum::<u64>());
        assert_eq!(gguf.metadata(), &every_type(), "without the split keys");
        let names: Vec<_> = gguf.tensors().map(|t| (&*t.name, t.part)).collect();
        assert_eq!(names, [("a", 0), ("b", 1), ("c", 1)]);
        assert_eq!(gguf.load("a").unwrap().to_f32(), [0.0]);
        assert_eq!(gguf.load("c").unwrap().to_f32(), [0.0, 1.0]);
    }
    let bytes = fs::read(&paths[1]).unwrap();
    refused(Gguf::from_bytes(bytes), &["<memory>", "found part 2 of 3"]);
}

#[test]
fn split_models_that_do_not_belong_together() {
    let dir = Dir::new("split-bad");
    let [first, second, third] = parts_of(&dir);
    let open = || Gguf::open(&first);

    write_split(&dir);
    fs::remove_file(&second).unwrap();
    refused(
        open(),
        &["m-00002-of-00003.gguf: expected part 2 of 3, found no file"],
    );
    refused(Gguf::open(&third), &["expected part 2 of 3, found no file"]);

    fs::copy(&third, &second).unwrap();
    refused(open(), &["00002-of", "`split.no`: expected 1, found 2"]);
    refused(
        Gguf::open(&second),
        &["name ending in `-00003-of-00003.gguf`"],
    );

    write_split(&dir);
    write_part(&dir, 2, 3, [Some(1), Some(4), Some(3)], &["b", "c"]);
    refused(open(), &["`split.count`: expected 3, found 4"]);
    write_part(&dir, 2, 3, [None, None, None], &["b", "c"]);
    refused(open(), &["part 2 of 3, found a file without `split.count`"]);
    write_part(&dir, 2, 3, [None, Some(3), Some(3)], &["b", "c"]);
    refused(open(), &["00002-of", "`split.no`", "found nothing"]);
    write_part(&dir, 2, 3, [Some(1), Some(3), Some(9)], &["b", "c"]);
    refused(open(), &["`split.tensors.count`: expected 3, found 9"]);
    write_part(&dir, 2, 3, [Some(1), Some(3), Some(3)], &["b"]);
    refused(open(), &["expected 3 tensors in all 3 parts, found 2"]);
    write_part(&dir, 2, 3, [Some(1), Some(3), Some(3)], &["b", "a"]);
    refused(open(), &["00002-of", "tensor `a`: expected once"]);
    write_part(&dir, 2, 3, [Some(1), Some(3), Some(3)], &["b", "c"]);
    assert!(open().is_ok());

    let whole = fs::read(&second).unwrap();
    fs::write(&second, &whole[..100]).unwrap();
    refused(open(), &["m-00002-of-00003.gguf: "]);

    let names: Vec<_> = (0..40_000).map(|i| i.to_string()).collect();
    let names: Vec<_> = names.iter().map(|n| &**n).collect();
    for no in [1, 2] {
        let keys = [Some(no - 1), Some(3), None];
        write_part(&dir, no as usize, 3, keys, &names);
    }
    refused(open(), &["00002-of", "at most 65536 tensors in all parts"]);

    write_part(&dir, 1, 3, [Some(0), Some(2000), None], &["a"]);
    refused(open(), &["`split.count`", "at most 1024, found 2000"]);
    write_part(&dir, 1, 3, [Some(7), Some(3), None], &["a"]);
    refused(open(), &["name ending in `-00008-of-00003.gguf`"]);
    fs::rename(&first, dir.path("renamed.gguf")).unwrap();
    refused(
        Gguf::open(&dir.path("renamed.gguf")),
        &["renamed.gguf", "name ending in"],
    );
    write_part(&dir, 1, 3, [None, None, None], &["a"]);
    let problems = open().unwrap().problems();
    assert!(problems.iter().any(|p| p.contains("named as a part")));
}

#[test]
fn what_is_no_model_gets_one_clear_line() {
    let dir = Dir::new("no-model");
    let is = |contents: &[u8], with: &[&str]| {
        let path = dir.path("x.gguf");
        fs::write(&path, contents).unwrap();
        let result = Gguf::open(&path);
        assert!(matches!(result, Err(Error::BadFile { .. })));
        refused(result, with);
    };
    is(b"", &["x.gguf: expected a GGUF file, found an empty file"]);
    is(
        b"Once upon a time\nthere was \x1b[31m",
        &["expected a GGUF file (magic `GGUF`), found the bytes 4f 6e 63 65"],
    );
    is(
        "Žluťoučký kůň příšerně úpěl ďábelské ódy, a to je celé".as_bytes(),
        &["found text beginning with `Žluťoučký kůň"],
    );
    is(b"hi", &["found text beginning with `hi`"]);
    is(b"GGU", &["found text beginning with `GGU`"]);
    is(b"GGUF", &["version: expected 4 bytes, found the end"]);
    is(
        b"version https://git-lfs.github.com/spec/v1\noid",
        &["Git LFS"],
    );
    is(b"<!DOCTYPE html><html>", &["found an HTML page"]);
    is(b"PK\x03\x04\x14\x00\x00\x00", &["found a zip archive"]);
    is(
        b"\x10\0\0\0\0\0\0\0{\"a\":1}",
        &["found a safetensors file"],
    );
    is(b"tjgg\x03\0\0\0", &["found a GGJT file"]);
    is(&[0; 100], &["found the bytes 00 00 00 00"]);
    is(b"GGUF\x01\0\0\0", &["version: expected 2 or 3, found 1"]);
    is(b"GGUF\x04\0\0\0", &["version: expected 2 or 3, found 4"]);
    is(b"GGUF\0\0\0\0", &["version: expected 2 or 3, found 0"]);
    for (bytes, version) in [
        (b"GGUF\0\0\0\x03", "version 3"),
        (b"GGUF\0\0\0\x02", "version 2"),
    ] {
        is(bytes, &["little-endian", "big-endian", version]);
    }
    is(b"FUGG\x03\0\0\0", &["big-endian"]);
    is(b"GGUF\x03\0\0\0", &["number of tensors", "end of the file"]);

    let result = Gguf::open(&dir.0);
    refused(result, &["expected a GGUF file, found a directory"]);
    let result = Gguf::open(&dir.path("none.gguf"));
    assert!(matches!(result, Err(Error::Io { .. })));
    refused(result, &["none.gguf: "]);
    #[cfg(unix)]
    {
        refused(Gguf::open(Path::new("/dev/null")), &["a pipe or device"]);
        let fifo = dir.path("fifo.gguf");
        let made = std::process::Command::new("mkfifo").arg(&fifo).status();
        assert!(made.unwrap().success());
        refused(Gguf::open(&fifo), &["fifo.gguf", "found a pipe or device"]);
    }
}
