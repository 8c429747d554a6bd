#!/usr/bin/env python3
"""What attention that leaves something out costs and saves: one `kinglet eval` or `kinglet bench` per cell.

Each cell is appended to a file of JSON lines as it is measured; what is there already is not measured again, so a run can be
stopped and gone on with. What matters most comes first: all of the first model, its longest texts before shorter ones, then
the others. First what does not depend on the machine, some cells side by side, on GPUs where `--devices` names some, but for
DeltaLLM, which runs on processors alone; then times, on the processor, with dense attention and each policy in turns,
`--time-jobs` side by side: more than one only where there are cores for it. No cell is begun after `--minutes`, and one that
is not done by then is stopped.

    models/sparse-table.py run -m NAME=FILE [-m NAME=FILE …] -f TEXT -o cells.jsonl [--jobs N] [--threads N] [--minutes N]
    models/sparse-table.py show cells.jsonl                  # as a table in markdown

Of the first model 44 facts are asked for in a cell of 8,192 tokens and 22 in others, of the other models 11.
"""

import argparse
import json
import queue
import shlex
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

SHARES = [8, 4, 2]
# The longest text of a model, unless the caller says otherwise.
LONG = 8192
DHSA = ["--dhsa", "on", "--dhsa-heads", "best", "--dhsa-chunk"]


def policies(ctx, is_first, dense_layers):
    """Name, which keys, flags."""
    # The last keys are a part of the budget: no more than a quarter of it.
    local = lambda budget: ["--local", str(min(128, budget // 4))]
    yield "dense", "all", []
    for share in SHARES:
        budget, keys = ctx // share, f"1/{share}"
        yield "window", keys, ["--window-sink", str(budget)]
        yield "block top-k", keys, ["--block-topk", str(budget), *local(budget)]
        yield "DHSA of 8", keys, [*DHSA, "8", "--dhsa-budget", str(budget), *local(budget)]
        if is_first and share > 2:
            yield "DHSA of 4", keys, [*DHSA, "4", "--dhsa-budget", str(budget), *local(budget)]
    # Shares of what a token sees, so that the end of a text, where questions are, reads more.
    for share in [20] if is_first else []:
        floor = max(ctx // 16, 256)
        seen = ["--budget-share", str(share)]
        keys = f"{share} % of seen"
        dhsa = ["--dhsa-budget", str(floor), *seen, *local(floor)]
        yield "window", keys, ["--window-sink", str(floor), *seen]
        yield "DHSA of 8", keys, [*DHSA, "8", *dhsa]
        if dense_layers:
            yield f"DHSA of 8, layers {dense_layers} dense", keys, [*DHSA, "8", *dhsa, "--dense-layers", dense_layers]
            yield f"window, layers {dense_layers} dense", keys, ["--window-sink", str(floor), *seen, "--dense-layers", dense_layers]
    yield "DeltaLLM", "all", ["--delta", "1"]


def commands(args, model, ctx, keys, flags, is_first):
    """What is measured, and how."""
    common = [model, "-t", str(args.threads)]
    text = ["-f", args.text]
    trials = args.trials * ({LONG: 4}.get(ctx, 2) if is_first else 1)
    needle = [*text, "-l", str(ctx), "--needles", "11", "--trials", str(trials), "--json", *flags]
    yield "needle", ["eval", "needle", *common, *needle]
    yield "kl", ["eval", "kl", *common, *text, "-c", str(ctx), "--chunks", "1", "--json", *flags]
    yield "recall", ["eval", "recall", *common, "-l", str(ctx), "--trials", str(args.trials), "--json", *flags]
    if flags and is_first and keys in ("1/4", "20 % of seen"):
        yield "tail", ["eval", "needle", *common, "--dense-tail", *needle]
    # The prompt and 32 tokens after it fit what the model was made for.
    both = ["--pg", f"{ctx - 64},32", "-p", "0", "-n", "0"]
    yield "time", ["bench", *common, *both, "-r", "1", "--no-measure", "-o", "json", *flags]


def cells(args):
    """Every cell, the most useful first: what is found, and then the times."""
    models = [pair.split("=", 1) for pair in args.model]
    most, layers = (dict(pair.split("=", 1) for pair in given) for given in (args.most, args.dense_layers))

    def of(name, model, ctx, whats):
        is_first = name == models[0][0]
        for what in whats:
            for policy, keys, flags in policies(ctx, is_first, layers.get(name)):
                if policy == "DeltaLLM" and args.delta_file:
                    flags = [*flags, "--delta-file", args.delta_file.replace("NAME", name)]
                for kind, command in commands(args, model, ctx, keys, flags, is_first):
                    if kind == what and what in args.what:
                        id = {"model": name, "policy": policy, "keys": keys, "ctx": ctx, "what": kind}
                        words = [word for word in command if word != model]
                        if kind != "time":
                            # What is found does not depend on how many threads find it.
                            at = words.index("-t")
                            del words[at : at + 2]
                        yield " ".join([name, *words]), id, command

    lengths = [(*model, ctx) for model in models for ctx in args.ctx if ctx <= int(most.get(model[0], LONG))]
    found = [cell for length in lengths for cell in of(*length, ["needle", "kl", "recall", "tail"])]
    times = [list(of(*length, ["time"])) for length in lengths]
    return found, [(f"{key} #{turn}", *cell) for part in times for turn in range(args.rounds) for key, *cell in part]


def run(args):
    try:
        with open(args.out) as file:
            done = {json.loads(line)["key"] for line in file}
    except FileNotFoundError:
        done = set()
    found, times = ([cell for cell in part if cell[0] not in done] for part in cells(args))
    n_todo = len(found) + len(times)
    begin, lock, n_done = time.monotonic(), threading.Lock(), 0
    gpus = queue.SimpleQueue()
    for gpu in args.devices * args.gpu_jobs:
        gpus.put(gpu)

    def on_gpu(cell):
        key, id, command = cell
        gpu = gpus.get()
        try:
            measure((key, id, [*command, "--device", gpu]))
        finally:
            gpus.put(gpu)

    def measure(cell):
        nonlocal n_done
        key, id, command = cell
        left = begin + args.minutes * 60 - time.monotonic()
        if left <= 0:
            return
        started = time.monotonic()
        try:
            out = subprocess.run([*args.prefix, args.kinglet, *command], capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            return
        # Not every policy does with every budget: that is a result too. That somebody stops the run is none.
        if out.returncode < 0 or out.returncode == 130:
            return
        result = {"result": json.loads(out.stdout)} if out.returncode == 0 else {"error": out.stderr.strip()}
        line = json.dumps({"key": key, **id, "seconds": round(time.monotonic() - started, 1), **result})
        with lock, open(args.out, "a") as file:
            print(line, file=file, flush=True)
            n_done += 1
            print(f"{n_done} of {n_todo}, {time.monotonic() - begin:.0f} s: {key}", file=sys.stderr, flush=True)

    runs_on_gpu = lambda cell: args.devices and cell[1]["policy"] != "DeltaLLM"
    with ThreadPoolExecutor(max(gpus.qsize(), 1)) as first, ThreadPoolExecutor(args.jobs) as second:
        measured = [first.submit(on_gpu, cell) if runs_on_gpu(cell) else second.submit(measure, cell) for cell in found]
    for cell in measured:
        cell.result()
    with ThreadPoolExecutor(args.time_jobs) as pool:
        list(pool.map(measure, times))
    print(f"{n_todo - n_done} cells are left", file=sys.stderr)


def show(args):
    rows = {}
    for path in args.cells:
        with open(path) as file:
            for line in file:
                cell = json.loads(line)
                row = rows.setdefault((cell["model"], cell["ctx"], cell["policy"], cell["keys"]), {})
                if "result" in cell:
                    read(cell, row)
    head = ["model", "tokens", "attention", "keys", "read", "KL", "PPL, dense", "needle gain, exact", "with a dense tail"]
    head += ["recall", "prefill", "decode", "KiB of keys"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    # Models as they come, texts by their length, policies as the run has them, and more keys after fewer.
    models = list(dict.fromkeys(model for model, *_ in rows))
    names = ["dense", "window", "block top-k", "DHSA of 8", "DHSA of 4", "DeltaLLM"]
    rank = lambda policy: next((i for i, name in enumerate(names) if policy.startswith(name)), len(names))
    order = lambda id: (models.index(id[0]), id[1], rank(id[2]), "layers" in id[2], id[3][0] != "1", id[3][::-1])
    for (model, ctx, policy, keys), row in sorted(rows.items(), key=lambda item: order(item[0])):
        dense = rows.get((model, ctx, "dense", "all"), {})
        line = [model, str(ctx), policy, keys]
        line += [row.get(key, "") for key in ("read", "kl", "ppl", "needle", "tail", "recall")]
        for key in ("prefill", "decode"):
            ratio = ""
            if key in row and key in dense:
                ratio = f"{statistics.median(row[key]) / statistics.median(dense[key]):.2f}"
            line.append(ratio)
        # Half of what a dense cache takes is values, and so it is of others.
        if "bytes" in row and "bytes" in dense:
            line.append(f"{(row['bytes'] - dense['bytes'] / 2) / 1024:.0f}")
        else:
            line.append("")
        print("| " + " | ".join(line) + " |")


def read(cell, row):
    result = cell["result"]
    if cell["what"] == "kl":
        row["kl"] = f"{result['kl_mean']:.4f}"
        row["ppl"] = f"{result['ppl']:.2f}, {result['ppl_dense']:.2f}"
        # Of pairs of query and key; DeltaLLM reads all, but not all of each.
        delta = result["saved"].get("delta")
        read = 1 - delta["products"] if delta else result["saved"]["pairs_read"]
        row["read"] = f"{100 * read:.0f} %"
        row["bytes"] = result["saved"]["kv_bytes"]
    elif cell["what"] in ("needle", "tail"):
        length = result["lengths"][0]
        # JSON has no number for what none was found for.
        gain = "NaN" if length["gain"] is None else f"{length['gain']:.2f}"
        row[cell["what"]] = f"{gain}, {length['exact']}/{length['cells']}"
    elif cell["what"] == "recall":
        length = result["lengths"][0]
        row["recall"] = f"{length['exact']}/{length['asked']}"
    else:
        for test in result:
            row.setdefault("prefill", []).append(test["n_prompt"] / test["first_token_ms"])
            row.setdefault("decode", []).append(1 / test["token_ms_p50"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("-m", "--model", action="append", required=True, metavar="NAME=FILE")
    verb.add_argument("-f", "--text", required=True)
    verb.add_argument("-o", "--out", required=True)
    verb.add_argument("-c", "--ctx", type=int, nargs="+", default=[8192, 4096, 2048, 16384])
    verb.add_argument("--most", action="append", default=[], metavar="NAME=N", help=f"the longest for a model, if not {LONG}")
    verb.add_argument("--dense-layers", action="append", default=[], metavar="NAME=LAYERS", help="layers of a model that DHSA leaves dense")
    verb.add_argument("--what", nargs="+", default=["needle", "kl", "recall", "tail", "time"])
    verb.add_argument("--trials", type=int, default=1, help="how many times as many facts and questions")
    verb.add_argument("--rounds", type=int, default=3, help="of each time")
    verb.add_argument("--threads", type=int, default=2, help="of each cell")
    verb.add_argument("--jobs", type=int, default=1, help="cells side by side on the processor, but for times")
    verb.add_argument("--devices", nargs="+", default=[], help="GPUs by number, as `kinglet doctor` has them")
    verb.add_argument("--gpu-jobs", type=int, default=1, help="cells side by side on each GPU")
    verb.add_argument("--time-jobs", type=int, default=1, help="times side by side")
    verb.add_argument("--minutes", type=float, default=7 * 24 * 60, help="after which the run ends")
    verb.add_argument("--delta-file", help="thresholds; NAME is the model's")
    verb.add_argument("--kinglet", default="kinglet")
    verb.add_argument("--prefix", type=shlex.split, default=[], help="a command in front, such as 'nice -n 19'")
    verb.set_defaults(run=run)
    verb = verbs.add_parser("show")
    verb.add_argument("cells", nargs="+")
    verb.set_defaults(run=show)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
