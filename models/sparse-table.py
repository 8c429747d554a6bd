#!/usr/bin/env python3
"""What attention that leaves something out costs and saves: one `kinglet eval` or `kinglet bench` per cell.

Each cell is appended to a file of JSON lines as it is measured; what is there already is not measured again, so a run can be
stopped and gone on with. Long texts and retrieval come first, then divergence and recall, several cells side by side; times come
last, one after the other, and need a machine with nothing else to do. No cell is begun after `--hours`.

    models/sparse-table.py run -m NAME=FILE [-m NAME=FILE …] -f TEXT -o cells.jsonl [--jobs N] [--threads N] [--hours H]
    models/sparse-table.py show cells.jsonl                  # as a table in markdown

Of the first model 44 facts are asked for a cell, of the others 11.
"""

import argparse
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

SHARES = [8, 4, 2]
# Beyond, one budget must do.
LONG = 8192


def policies(ctx):
    """Name, share of keys, flags."""
    yield "dense", None, []
    for share in SHARES if ctx <= LONG else [4]:
        budget = str(ctx // share)
        # The last keys are a part of the budget: no more than a quarter of it.
        local = ["--local", str(min(128, ctx // share // 4))]
        yield "window", share, ["--window-sink", budget]
        yield "block top-k", share, ["--block-topk", budget, *local]
        yield "DHSA", share, ["--dhsa", "on", "--dhsa-budget", budget, *local]
    yield "DeltaLLM", None, ["--delta", "1"]


def commands(args, model, ctx, flags, is_first):
    """What is measured, and how."""
    common = [model, "-t", str(args.threads)]
    text = ["-f", args.text]
    trials = str(args.trials * (4 if is_first else 1))
    needle = [*text, "-l", str(ctx), "--needles", "11", "--trials", trials, "--json", *flags]
    yield "needle", ["eval", "needle", *common, *needle]
    if flags and is_first:
        yield "tail", ["eval", "needle", *common, "--dense-tail", *needle]
    yield "kl", ["eval", "kl", *common, *text, "-c", str(ctx), "--chunks", "1", "--json", *flags]
    yield "recall", ["eval", "recall", *common, "-l", str(ctx), "--trials", str(2 * args.trials), "--json", *flags]
    bench = ["bench", *common, "-r", str(args.rounds), "-o", "json", *flags]
    yield "time", [*bench, "-p", str(ctx), "-n", "0"]
    yield "time", [*bench, "-p", "0", "-n", "32", "-d", str(ctx)]


def cells(args):
    """Every cell: what tells it from others, what it is of, its command."""
    models = [pair.split("=", 1) for pair in args.model]
    for what in args.what:
        for ctx in args.ctx:
            for name, model in models:
                most = dict(pair.split("=", 1) for pair in args.most).get(name, LONG)
                if ctx > int(most):
                    continue
                for policy, share, flags in policies(ctx):
                    if policy == "DeltaLLM" and args.delta_file:
                        flags = [*flags, "--delta-file", args.delta_file.replace("NAME", name)]
                    for kind, command in commands(args, model, ctx, flags, name == models[0][0]):
                        if kind == what:
                            of = {"model": name, "policy": policy, "share": share, "ctx": ctx, "what": kind}
                            yield " ".join([name, *(word for word in command if word != model)]), of, command


def run(args):
    try:
        with open(args.out) as file:
            done = {json.loads(line)["key"] for line in file}
    except FileNotFoundError:
        done = set()
    todo = [cell for cell in cells(args) if cell[0] not in done]
    begin, lock, n_done = time.monotonic(), threading.Lock(), 0

    def measure(cell):
        nonlocal n_done
        key, of, command = cell
        if time.monotonic() - begin > args.hours * 3600:
            return
        started = time.monotonic()
        out = subprocess.run([*args.prefix, args.kinglet, *command], capture_output=True, text=True)
        # Not every policy does with every budget: that is a result too. That somebody stops the run is none.
        if out.returncode < 0 or out.returncode == 130:
            return
        result = {"result": json.loads(out.stdout)} if out.returncode == 0 else {"error": out.stderr.strip()}
        line = json.dumps({"key": key, **of, "seconds": round(time.monotonic() - started, 1), **result})
        with lock, open(args.out, "a") as file:
            print(line, file=file)
            n_done += 1
            print(f"{n_done} of {len(todo)}, {(time.monotonic() - begin) / 60:.0f} min: {key}", file=sys.stderr)

    # Times alone.
    for alone in False, True:
        with ThreadPoolExecutor(1 if alone else args.jobs) as pool:
            list(pool.map(measure, (cell for cell in todo if (cell[1]["what"] == "time") == alone)))
    print(f"{len(todo) - n_done} cells are left", file=sys.stderr)


def show(args):
    rows = {}
    for path in args.cells:
        with open(path) as file:
            for line in file:
                cell = json.loads(line)
                row = rows.setdefault((cell["model"], cell["ctx"], cell["policy"], cell["share"]), {})
                if "result" in cell:
                    read(cell, row)
    head = ["model", "tokens", "attention", "keys", "pairs", "KL", "PPL, dense", "needle gain, exact", "with a dense tail"]
    head += ["recall", "prefill", "decode"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for (model, ctx, policy, share), row in sorted(rows.items(), key=lambda r: (r[0][0], r[0][1], r[0][2], r[0][3] or 0)):
        dense = rows.get((model, ctx, "dense", None), {})
        ratio = lambda key: f"{row[key] / dense[key]:.2f}" if key in row and key in dense else ""
        cells = [model, str(ctx), policy, f"1/{share}" if share else "all"]
        cells += [row.get(key, "") for key in ("pairs", "kl", "ppl", "needle", "tail", "recall")]
        print("| " + " | ".join([*cells, ratio("prefill"), ratio("decode")]) + " |")


def read(cell, row):
    result = cell["result"]
    if cell["what"] == "kl":
        row["kl"] = f"{result['kl_mean']:.4f}"
        row["ppl"] = f"{result['ppl']:.2f}, {result['ppl_dense']:.2f}"
        row["pairs"] = f"{100 * result['saved']['pairs_read']:.0f} %" if "saved" in result else ""
    elif cell["what"] in ("needle", "tail"):
        length = result["lengths"][0]
        row[cell["what"]] = f"{length['gain']:.2f}, {length['exact']}/{length['cells']}"
    elif cell["what"] == "recall":
        length = result["lengths"][0]
        row["recall"] = f"{length['exact']}/{length['asked']}"
    else:
        for test in result:
            row["prefill" if test["n_gen"] == 0 else "decode"] = test["avg_ts"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run")
    verb.add_argument("-m", "--model", action="append", required=True, metavar="NAME=FILE")
    verb.add_argument("-f", "--text", required=True)
    verb.add_argument("-o", "--out", required=True)
    verb.add_argument("-c", "--ctx", type=int, nargs="+", default=[16384, 8192, 4096, 2048])
    verb.add_argument("--most", action="append", default=[], metavar="NAME=N", help=f"the longest for a model, if not {LONG}")
    verb.add_argument("--what", nargs="+", default=["needle", "kl", "recall", "tail", "time"])
    verb.add_argument("--trials", type=int, default=1, help="how many times as many facts and questions")
    verb.add_argument("--rounds", type=int, default=2, help="of each time")
    verb.add_argument("--threads", type=int, default=2, help="of each cell")
    verb.add_argument("--jobs", type=int, default=1, help="cells side by side, but for times")
    verb.add_argument("--hours", type=float, default=1e9, help="after which no cell is begun")
    verb.add_argument("--delta-file", help="thresholds; NAME is the model's")
    verb.add_argument("--kinglet", default="kinglet")
    verb.add_argument("--prefix", nargs="*", default=[], help="a command in front, such as nice")
    verb.set_defaults(run=run)
    verb = verbs.add_parser("show")
    verb.add_argument("cells", nargs="+")
    verb.set_defaults(run=show)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
