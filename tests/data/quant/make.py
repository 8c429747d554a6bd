#!/usr/bin/env python3
"""Writes the golden files of this folder: what ggml makes of seeded weights and blocks.

    make.py LIBGGML_BASE_SO [FOLDER]

Needs numpy, the package `gguf` and a shared `libggml-base`. ggml's answers are written; where the package `gguf` can do
the same, its answer is compared first, so that a golden file has two witnesses.
"""

import ctypes
import pathlib
import sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Q

SEED = 20261123
QUANTIZE = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ2_0", "MXFP4"]
READ_ONLY = ["IQ4_NL", "IQ4_XS", "TQ1_0"]
# Where the half floats lie in a block.
HALVES = {
    "Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "TQ1_0": [52], "TQ2_0": [64],
}


def weights(rng):
    """Rows of 256: the ordinary, then one for each way in which a row can be peculiar."""
    normal = lambda sd: rng.normal(0, sd, 256)
    outlier = normal(0.02)
    outlier[[3, 77, 200]] = [1.5, -0.9, 0.6]
    mixed = normal(1.0) * np.repeat(10.0 ** rng.uniform(-4, 1, 16), 16)
    sparse = np.zeros(256)
    sparse[[0, 40, 255]] = [0.5, -0.25, 1e-3]
    half_zero = normal(0.1)
    half_zero[:128] = 0
    steps = np.arange(256) % 32 - 15.5
    rows = [normal(0.02), normal(0.02), normal(1.0), rng.laplace(0, 0.05, 256), rng.uniform(-1, 1, 256), outlier, mixed]
    rows += [np.zeros(256), -np.zeros(256), np.full(256, 0.125), np.full(256, -0.3), sparse, half_zero]
    rows += [rng.uniform(0.5, 1, 256), -rng.uniform(0.5, 1, 256), rng.uniform(0, 1, 256) ** 8]
    rows += [steps, steps / 16, np.tile([1.0, -1.0], 128), rng.integers(-1, 2, 256) * 0.07, 2.0 ** rng.integers(-8, 3, 256)]
    # Scales that are subnormal half floats, half floats' zero, and near their limit.
    rows += [normal(1e-5), normal(1e-7), normal(1e-12), normal(1e-17), rng.uniform(-6e4, 6e4, 256)]
    return np.array(rows, dtype=np.float32)


def blocks(rng, name, n_bytes):
    """Random blocks: every code and packed scale; half floats of both signs, some zero or subnormal, all finite."""
    size = gguf.GGML_QUANT_SIZES[Q[name]][1]
    raw = rng.integers(0, 256, (n_bytes // size, size), dtype=np.uint8)
    if name == "F16":
        raw[:, 1] = np.where(raw[:, 1] & 0x7C == 0x7C, raw[:, 1] & 0x83, raw[:, 1])
    if name == "BF16":
        raw[:, 1] = np.where(raw[:, 1] & 0x7F == 0x7F, raw[:, 1] & 0x80, raw[:, 1])
    for at in HALVES.get(name, []):
        half = (rng.choice([-1, 1], len(raw)) * 10.0 ** rng.uniform(-7, 2, len(raw))).astype(np.float16)
        half[:: max(1, len(raw) // 3)] = 0
        raw[:, at : at + 2] = half.view(np.uint8).reshape(-1, 2)
    return raw.reshape(-1)


class Traits(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p), ("block_len", ctypes.c_int64), ("interleave", ctypes.c_int64), ("bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool), ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    ]  # fmt: skip


def main():
    ggml = ctypes.CDLL(sys.argv[1])
    folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else pathlib.Path(__file__).parent)
    ggml.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]

    x = weights(np.random.default_rng(SEED))
    x.tofile(folder / "weights.f32")
    for name in QUANTIZE + READ_ONLY:
        kind, rng = Q[name], np.random.default_rng([SEED, Q[name]])
        traits = ggml.ggml_get_type_traits(kind).contents
        block_len, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        assert (traits.name.decode().upper(), traits.block_len, traits.bytes) == (name, block_len, block_bytes)

        raw = blocks(rng, name, 768 // block_len * block_bytes)
        out = np.empty(768, np.float32)
        traits.to_float(raw.ctypes.data, out.ctypes.data, 768)
        assert np.isfinite(out).all()
        assert np.array_equal(gguf.dequantize(raw, kind).view(np.uint32), out.view(np.uint32)), name

        made = np.empty(0, np.uint8)
        if name in QUANTIZE:
            made = np.empty(x.size // block_len * block_bytes, np.uint8)
            n = ggml.ggml_quantize_chunk(kind, x.ctypes.data, made.ctypes.data, 0, len(x), 256, None)
            assert n == made.size
            try:
                other = np.ascontiguousarray(gguf.quantize(x, kind)).view(np.uint8).reshape(-1)
                print(f"{name}: {np.count_nonzero(other != made)} of {made.size} bytes differ from the package's")
            except NotImplementedError:
                print(f"{name}: the package has no quantizer")
        np.concatenate([raw, out.view(np.uint8), made]).tofile(folder / f"{name.lower()}.bin")


main()
