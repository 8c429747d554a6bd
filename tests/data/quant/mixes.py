#!/usr/bin/env python3
"""Writes mixes.txt: which formats llama.cpp's quantizing tool gives to the tensors of small models.

    mixes.py LLAMA_QUANTIZE [FOLDER]

Needs numpy, the package `gguf` and the tool. The models are architecture `llama` with zeros for weights: only names and
shapes matter. A model's line gives them, the lines below a mixture's tensors by name without layer, their formats as
FORMAT*n in the order of layers; names whose tensors all have the mixture's first format are left out.
"""

import itertools
import pathlib
import re
import subprocess
import sys
import tempfile

import gguf
import numpy as np

MIXES = """F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K TQ2_0
MXFP4_MOE""".split()
FIELDS = "hidden ffn layers heads kv_heads experts tied"
MODELS = {
    "dense": (256, 512, 20, 8, 4, 0, 0),
    "tied": (256, 256, 9, 8, 2, 0, 1),
    "rows-of-32s": (288, 416, 8, 4, 4, 0, 1),
    "rows-of-8s": (72, 104, 8, 4, 4, 0, 0),
    "experts-8": (256, 256, 10, 4, 1, 8, 0),
    "experts-12": (256, 256, 17, 4, 2, 12, 1),
    "layers-80": (256, 256, 80, 4, 2, 0, 1),
}


def write(path, hidden, ffn, layers, heads, kv_heads, experts, tied):
    w = gguf.GGUFWriter(path, "llama")
    w.add_block_count(layers)
    w.add_context_length(64)
    w.add_embedding_length(hidden)
    w.add_feed_forward_length(ffn)
    w.add_head_count(heads)
    w.add_head_count_kv(kv_heads)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(32)
    w.add_tokenizer_model("none")
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(2)
    add = lambda name, *shape: w.add_tensor(name + ".weight", np.zeros(shape, np.float32))
    kv = hidden // heads * kv_heads
    stack = [experts] if experts else []
    exps = "_exps" if experts else ""
    add("token_embd", 32, hidden)
    add("output_norm", hidden)
    if not tied:
        add("output", 32, hidden)
    for i in range(layers):
        blk = lambda name, *shape: add(f"blk.{i}.{name}", *shape)
        blk("attn_norm", hidden)
        blk("attn_q", hidden, hidden)
        blk("attn_k", kv, hidden)
        blk("attn_v", kv, hidden)
        blk("attn_output", hidden, hidden)
        blk("ffn_norm", hidden)
        if experts:
            blk("ffn_gate_inp", experts, hidden)
        blk("ffn_gate" + exps, *stack, ffn, hidden)
        blk("ffn_up" + exps, *stack, ffn, hidden)
        blk("ffn_down" + exps, *stack, hidden, ffn)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def layer(name):
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def main():
    tool = sys.argv[1]
    folder = pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else pathlib.Path(__file__).parent)
    out = []
    with tempfile.TemporaryDirectory() as tmp:
        source, target = f"{tmp}/in.gguf", f"{tmp}/out.gguf"
        for model, sizes in MODELS.items():
            write(source, *sizes)
            out.append("model " + model + "".join(f" {k}={v}" for k, v in zip(FIELDS.split(), sizes)))
            for mix in MIXES:
                subprocess.run([tool, source, target, mix, "2"], check=True, capture_output=True)
                tensors = {t.name: t.tensor_type.name for t in gguf.GGUFReader(target).tensors}
                stems = {}
                for name in sorted(tensors, key=layer):
                    stems.setdefault(re.sub(r"^blk\.\d+\.", "", name), []).append(tensors[name])
                base = stems["attn_q.weight"][0]
                out.append(f"mix {mix} {base}")
                for stem, types in stems.items():
                    runs = [(k, len(list(g))) for k, g in itertools.groupby(types)]
                    if [k for k, _ in runs] != [base] and not (stem.endswith("norm.weight") and runs[0][0] == "F32"):
                        out.append(f"{stem} " + " ".join(f"{k}*{n}" for k, n in runs))
    (folder / "mixes.txt").write_text("\n".join(out) + "\n")


main()
