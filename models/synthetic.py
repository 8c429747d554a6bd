#!/usr/bin/env python3
"""Writes a GGUF file with the exact shapes of a published model and random weights: for speed, not for sense.

usage: models/synthetic.py MODEL OUT.gguf        (numpy is needed)

Matrices are Q4_0, the embedding, which is the head too, Q6_K, as in the published Q4_0 files of the family. There is no
vocabulary: programs run such a file on token numbers, as `kinglet bench` does.
"""

import struct
import sys

import numpy as np

F32, Q4_0, Q6_K = 0, 2, 14
BLOCK = {F32: (1, 4), Q4_0: (32, 18), Q6_K: (256, 210)}
U32, FLOAT, STRING, ARRAY = 4, 6, 8, 9
ALIGNMENT = 32

# hidden, layers with attention, query heads, feed-forward width; 16 layers, 8 KV heads of 64.
LFM2 = {
    "lfm2-350m": (1024, 16, 4608),
    "lfm2-1.2b": (2048, 32, 8192),
}
ATTENTION = (2, 5, 8, 10, 12, 14)
N_VOCAB = 65536


def lfm2(name):
    hidden, n_heads, ffn = LFM2[name]
    kv = [8 if i in ATTENTION else 0 for i in range(16)]
    meta = [
        ("general.architecture", STRING, "lfm2"),
        ("general.name", STRING, f"{name} with random weights"),
        ("general.file_type", U32, 2),
        ("lfm2.block_count", U32, 16),
        ("lfm2.context_length", U32, 128000),
        ("lfm2.embedding_length", U32, hidden),
        ("lfm2.vocab_size", U32, N_VOCAB),
        ("lfm2.feed_forward_length", U32, ffn),
        ("lfm2.attention.head_count", U32, n_heads),
        ("lfm2.attention.head_count_kv", ARRAY, kv),
        ("lfm2.attention.layer_norm_rms_epsilon", FLOAT, 1e-5),
        ("lfm2.rope.freq_base", FLOAT, 1e6),
        ("lfm2.shortconv.l_cache", U32, 3),
        ("tokenizer.ggml.model", STRING, "none"),
    ]
    tensors = [("token_embd.weight", Q6_K, (N_VOCAB, hidden)), ("token_embd_norm.weight", F32, (hidden,))]
    for i in range(16):
        blk = f"blk.{i}."
        tensors += [(blk + "attn_norm.weight", F32, (hidden,)), (blk + "ffn_norm.weight", F32, (hidden,))]
        if kv[i]:
            tensors += [
                (blk + "attn_q.weight", Q4_0, (hidden, hidden)),
                (blk + "attn_k.weight", Q4_0, (512, hidden)),
                (blk + "attn_v.weight", Q4_0, (512, hidden)),
                (blk + "attn_output.weight", Q4_0, (hidden, hidden)),
                (blk + "attn_q_norm.weight", F32, (64,)),
                (blk + "attn_k_norm.weight", F32, (64,)),
            ]
        else:
            tensors += [
                (blk + "shortconv.in_proj.weight", Q4_0, (3 * hidden, hidden)),
                (blk + "shortconv.conv.weight", F32, (hidden, 3)),
                (blk + "shortconv.out_proj.weight", Q4_0, (hidden, hidden)),
            ]
        tensors += [
            (blk + "ffn_gate.weight", Q4_0, (ffn, hidden)),
            (blk + "ffn_up.weight", Q4_0, (ffn, hidden)),
            (blk + "ffn_down.weight", Q4_0, (hidden, ffn)),
        ]
    return meta, tensors


def string(text):
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def value(kind, x):
    if kind == STRING:
        return string(x)
    if kind == ARRAY:
        return struct.pack("<IQ", U32, len(x)) + struct.pack(f"<{len(x)}I", *x)
    return struct.pack("<f" if kind == FLOAT else "<I", x)


def n_bytes(kind, shape):
    per_block, size = BLOCK[kind]
    return int(np.prod(shape)) // per_block * size


def weights(rng, kind, shape):
    """Blocks whose products keep the size of what they multiply."""
    n = int(np.prod(shape))
    if kind == F32:
        return (np.ones(n) if len(shape) == 1 else rng.normal(0, 0.5, n)).astype("<f4").tobytes()
    per_block, size = BLOCK[kind]
    blocks = rng.integers(0, 256, (n // per_block, size), dtype=np.uint8)
    # Nibbles and six bits are uniform: their deviations are 4.6 and 18.5; scales of 16 weights here are all 64.
    unit = {Q4_0: 4.6, Q6_K: 18.5 * 64}[kind]
    scale = np.array([1 / (unit * shape[-1] ** 0.5)], "<f2").view(np.uint8)
    if kind == Q4_0:
        blocks[:, :2] = scale
    else:
        blocks[:, 192:208] = 64
        blocks[:, 208:] = scale
    return blocks.tobytes()


def write(path, meta, tensors):
    rng = np.random.default_rng(1)
    padding = lambda n: -n % ALIGNMENT
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(meta))
    for key, kind, x in meta:
        head += string(key) + struct.pack("<I", kind) + value(kind, x)
    offset = 0
    for name, kind, shape in tensors:
        head += string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape)) + struct.pack("<IQ", kind, offset)
        offset += n_bytes(kind, shape)
        offset += padding(offset)
    with open(path, "wb") as out:
        out.write(head + bytes(padding(len(head))))
        for _, kind, shape in tensors:
            data = weights(rng, kind, shape)
            out.write(data + bytes(padding(len(data))))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in LFM2:
        sys.exit(f"usage: synthetic.py {'|'.join(LFM2)} OUT.gguf")
    write(sys.argv[2], *lfm2(sys.argv[1]))
