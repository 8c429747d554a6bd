#!/usr/bin/env python3
"""Writes a GGUF file with the exact shapes of a published model and random weights: for speed, not for sense.

usage: models/synthetic.py MODEL OUT.gguf [--sticky]       (numpy is needed)

Matrices are Q4_0, a dense model's head Q6_K, as in published Q4_0 files; routers are floats. There is no vocabulary: programs run such
a file on token numbers, as `kinglet bench` does.

Routers of random weights choose experts almost evenly, which no trained model does. With --sticky, embeddings carry one of
16 topics, the same for 64 token numbers in a row, and the router of a layer prefers, for each topic, experts of its own, and
a few of its experts for all: a text of neighbouring token numbers then keeps to the same experts.
"""

import struct
import sys

import numpy as np

F32, Q4_0, Q6_K = 0, 2, 14
BLOCK = {F32: (1, 4), Q4_0: (32, 18), Q6_K: (256, 210)}
U32, FLOAT, STRING, ARRAY = 4, 6, 8, 9
ALIGNMENT = 32

# hidden, query heads, feed-forward width, layers, those with attention; 8 KV heads of 64.
LFM2 = {
    "lfm2-350m": (1024, 16, 4608, 16, (2, 5, 8, 10, 12, 14)),
    "lfm2-1.2b": (2048, 32, 8192, 16, (2, 5, 8, 10, 12, 14)),
    # The same with experts behind two dense layers: 32, of which 4 are used, 1792 wide.
    "lfm2-8b-a1b": (2048, 32, 7168, 24, (2, 6, 10, 14, 18, 21)),
}
EXPERTS = (32, 4, 1792)
N_DENSE = 2
N_VOCAB = 65536


def lfm2(name):
    hidden, n_heads, ffn, n_layers, attention = LFM2[name]
    kv = [8 if i in attention else 0 for i in range(n_layers)]
    moe = name.endswith("a1b")
    arch = "lfm2moe" if moe else "lfm2"
    n_experts, n_used, n_ffn = EXPERTS
    meta = [
        ("general.architecture", STRING, arch),
        ("general.name", STRING, f"{name} with random weights"),
        ("general.file_type", U32, 2),
        (f"{arch}.block_count", U32, n_layers),
        (f"{arch}.context_length", U32, 128000),
        (f"{arch}.embedding_length", U32, hidden),
        (f"{arch}.vocab_size", U32, N_VOCAB),
        (f"{arch}.feed_forward_length", U32, ffn),
        (f"{arch}.attention.head_count", U32, n_heads),
        (f"{arch}.attention.head_count_kv", ARRAY, kv),
        (f"{arch}.attention.layer_norm_rms_epsilon", FLOAT, 1e-5),
        (f"{arch}.rope.freq_base", FLOAT, 1e6),
        (f"{arch}.shortconv.l_cache", U32, 3),
        ("tokenizer.ggml.model", STRING, "none"),
    ]
    if moe:
        meta += [
            ("lfm2moe.expert_count", U32, n_experts),
            ("lfm2moe.expert_used_count", U32, n_used),
            ("lfm2moe.expert_feed_forward_length", U32, n_ffn),
            ("lfm2moe.leading_dense_block_count", U32, N_DENSE),
            ("lfm2moe.expert_gating_func", U32, 2),
        ]
    table = Q4_0 if moe else Q6_K
    tensors = [("token_embd.weight", table, (N_VOCAB, hidden)), ("token_embd_norm.weight", F32, (hidden,))]
    for i in range(n_layers):
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
        if moe and i >= N_DENSE:
            tensors += [(blk + "exp_probs_b.bias", F32, (n_experts,))] + experts(blk, n_experts, n_ffn, hidden)
            continue
        tensors += [
            (blk + "ffn_gate.weight", Q4_0, (ffn, hidden)),
            (blk + "ffn_up.weight", Q4_0, (ffn, hidden)),
            (blk + "ffn_down.weight", Q4_0, (hidden, ffn)),
        ]
    return meta, tensors


# layers, hidden, query heads, KV heads of 128, experts, of which used, their width, vocabulary.
SMALLTHINKER = {
    "smallthinker-4b": (32, 1536, 12, 2, 32, 4, 768, 151936),
    # The geometry of the 4b in fewer layers and tokens: experts alone, to stream.
    "smallthinker-stream": (8, 1536, 12, 2, 32, 4, 768, 1024),
}


def experts(blk, n_experts, n_ffn, hidden):
    return [
        (blk + "ffn_gate_inp.weight", F32, (n_experts, hidden)),
        (blk + "ffn_gate_exps.weight", Q4_0, (n_experts, n_ffn, hidden)),
        (blk + "ffn_up_exps.weight", Q4_0, (n_experts, n_ffn, hidden)),
        (blk + "ffn_down_exps.weight", Q4_0, (n_experts, hidden, n_ffn)),
    ]


def smallthinker(name):
    n_layers, hidden, n_heads, n_kv_heads, n_experts, n_used, n_ffn, n_vocab = SMALLTHINKER[name]
    key = lambda name: f"smallthinker.{name}"
    meta = [
        ("general.architecture", STRING, "smallthinker"),
        ("general.name", STRING, f"{name} with random weights"),
        ("general.file_type", U32, 2),
        (key("block_count"), U32, n_layers),
        (key("context_length"), U32, 32768),
        (key("embedding_length"), U32, hidden),
        (key("vocab_size"), U32, n_vocab),
        (key("feed_forward_length"), U32, n_ffn),
        (key("expert_feed_forward_length"), U32, n_ffn),
        (key("expert_count"), U32, n_experts),
        (key("expert_used_count"), U32, n_used),
        (key("expert_gating_func"), U32, 2),
        (key("attention.head_count"), U32, n_heads),
        (key("attention.head_count_kv"), U32, n_kv_heads),
        (key("attention.key_length"), U32, 128),
        (key("attention.value_length"), U32, 128),
        (key("attention.layer_norm_rms_epsilon"), FLOAT, 1e-6),
        (key("rope.freq_base"), FLOAT, 1.5e6),
        ("tokenizer.ggml.model", STRING, "none"),
    ]
    tensors = [
        ("token_embd.weight", Q4_0, (n_vocab, hidden)),
        ("output_norm.weight", F32, (hidden,)),
        ("output.weight", Q6_K, (n_vocab, hidden)),
    ]
    for i in range(n_layers):
        blk = f"blk.{i}."
        tensors += [
            (blk + "attn_norm.weight", F32, (hidden,)),
            (blk + "ffn_norm.weight", F32, (hidden,)),
            (blk + "attn_q.weight", Q4_0, (128 * n_heads, hidden)),
            (blk + "attn_k.weight", Q4_0, (128 * n_kv_heads, hidden)),
            (blk + "attn_v.weight", Q4_0, (128 * n_kv_heads, hidden)),
            (blk + "attn_output.weight", Q4_0, (hidden, 128 * n_heads)),
        ] + experts(blk, n_experts, n_ffn, hidden)
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
    shape_of_blocks = (n // per_block, size)
    if kind == Q4_0:
        # From -7 to 7: with a mean that is not 0 the matrices of a deep model agree on one direction.
        low, high = (rng.integers(1, 16, shape_of_blocks, dtype=np.uint8) for _ in range(2))
        blocks = low | high << 4
    else:
        blocks = rng.integers(0, 256, shape_of_blocks, dtype=np.uint8)
    # Uniform: the deviations are 4.3 and 18.5; scales of 16 weights here are all 64.
    unit = {Q4_0: 4.3, Q6_K: 18.5 * 64}[kind]
    scale = np.array([1 / (unit * shape[-1] ** 0.5)], "<f2").view(np.uint8)
    if kind == Q4_0:
        blocks[:, :2] = scale
    else:
        blocks[:, 192:208] = 64
        blocks[:, 208:] = scale
    return blocks.tobytes()


class Sticky:
    """Embeddings with topics, and routers that listen to them.

    An embedding is a direction that all share, one of its topic, and noise of its own, at 2 : 4 : 1. They outlast what the
    layers add, so a router row that is a sum of these directions gives a token the logits that it wants for its topic.
    """

    SHARED, TOPIC = 2.0, 4.0
    N_TOPICS, RUN = 16, 64

    def __init__(self, rng, hidden):
        directions, _ = np.linalg.qr(rng.normal(size=(hidden, 1 + self.N_TOPICS)))
        self.directions = directions.T.astype("<f4")
        self.size = hidden**0.5

    def embedding(self, rng, shape):
        n_vocab, hidden = shape
        for first in range(0, n_vocab, 8192):
            ids = np.arange(first, min(first + 8192, n_vocab))
            x = rng.normal(size=(len(ids), hidden)).astype("<f4")
            x += self.SHARED * self.size * self.directions[0]
            x += self.TOPIC * self.size * self.directions[1 + ids // self.RUN % self.N_TOPICS]
            yield q4_0(x)

    def router(self, rng, shape):
        n_experts, hidden = shape
        shared = rng.normal(size=(n_experts, 1)) / (self.SHARED * self.size)
        topics = 1.5 * rng.normal(size=(n_experts, self.N_TOPICS)) / (self.TOPIC * self.size)
        wanted = np.concatenate([shared, topics], axis=1) @ self.directions
        return (wanted + rng.normal(0, 0.3 / self.size, shape)).astype("<f4").tobytes()


def q4_0(x):
    """Blocks of 32 as ggml has them: the largest magnitude is -8."""
    x = x.reshape(-1, 32)
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    d = (largest / -8).astype("<f2")
    scale = d.astype("<f4")
    q = np.clip(np.rint(np.divide(x, scale, out=np.zeros_like(x), where=scale != 0)) + 8, 0, 15).astype(np.uint8)
    return np.concatenate([d.view(np.uint8), q[:, :16] | q[:, 16:] << 4], axis=1).tobytes()


def write(path, meta, tensors, sticky):
    rng = np.random.default_rng(1)
    sticky = Sticky(rng, tensors[0][2][1]) if sticky else None
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
        for name, kind, shape in tensors:
            if sticky and name == "token_embd.weight":
                parts = sticky.embedding(rng, shape)
            elif sticky and name.endswith("ffn_gate_inp.weight"):
                parts = [sticky.router(rng, shape)]
            else:
                parts = [weights(rng, kind, shape)]
            for data in parts:
                out.write(data)
            out.write(bytes(padding(out.tell())))


if __name__ == "__main__":
    args = [arg for arg in sys.argv[1:] if arg != "--sticky"]
    if len(args) != 2 or args[0] not in {**LFM2, **SMALLTHINKER}:
        sys.exit(f"usage: synthetic.py {'|'.join([*LFM2, *SMALLTHINKER])} OUT.gguf [--sticky]")
    meta, tensors = (lfm2 if args[0] in LFM2 else smallthinker)(args[0])
    write(args[1], meta, tensors, "--sticky" in sys.argv)
