#!/usr/bin/env python3
"""What attention that leaves something out costs and saves: one `kinglet eval` or `kinglet bench` per cell.

Each cell is appended to a file of JSON lines as it is measured; what is there already is not measured again, so a run can be
stopped and gone on with. Cells in the order of what they tell: long texts and retrieval first.

    models/sparse-table.py run -m NAME=FILE [-m NAME=FILE …] -f TEXT -o cells.jsonl [--what kl needle recall time] [-c N …]
    models/sparse-table.py show cells.jsonl                  # as a table in markdown
"""

import argparse
import json
import subprocess

SHARES = [8, 4, 2]


def policies(ctx):
    """Name, share of keys, flags."""
    yield "dense", None, []
    for share in SHARES:
        budget = str(ctx // share)
        yield "window", share, ["--window-sink", budget]
        yield "block top-k", share, ["--block-topk", budget]
        yield "DHSA", share, ["--dhsa", "on", "--dhsa-budget", budget]
        yield "DHSA, votes", share, ["--dhsa", "on", "--dhsa-budget", budget, "--dhsa-heads", "vote"]
    yield "DeltaLLM", None, ["--delta", "1"]


def commands(args, model, ctx, flags):
    """What is measured, and how."""
    text = ["-f", args.text]
    if ctx <= args.text_tokens // 2:
        yield "kl", ["eval", "kl", model, *text, "-c", str(ctx), "--chunks", "1", "--json", *flags]
    needle = ["eval", "needle", model, *text, "-l", str(ctx), "--needles", "11", "--trials", "4", "--json", *flags]
    yield "needle", needle
    yield "recall", ["eval", "recall", model, "-l", str(ctx), "--trials", "4", "--json", *flags]
    time = ["bench", model, "-p", str(ctx), "-n", "0", "-r", "3", "-o", "json", *flags]
    yield "time", time
    yield "time", [*time[:2], "-p", "0", "-n", "32", "-d", str(ctx), *time[6:]]


def run(args):
    try:
        with open(args.out) as file:
            done = {json.loads(line)["key"] for line in file}
    except FileNotFoundError:
        done = set()
    for what in args.what:
        for ctx in args.ctx:
            for name, model in (pair.split("=", 1) for pair in args.model):
                for policy, share, flags in policies(ctx):
                    if policy == "DeltaLLM" and args.delta_file:
                        flags = [*flags, "--delta-file", args.delta_file.replace("NAME", name)]
                    for kind, command in commands(args, model, ctx, flags):
                        key = " ".join([name, *(word for word in command if word != model)])
                        if kind != what or key in done:
                            continue
                        out = subprocess.run([*args.prefix, args.kinglet, *command], capture_output=True, text=True)
                        cell = {"key": key, "model": name, "policy": policy, "share": share, "ctx": ctx, "what": kind}
                        # Not every policy does with every budget: that is a result too.
                        cell["result" if out.returncode == 0 else "error"] = (
                            json.loads(out.stdout) if out.returncode == 0 else out.stderr.strip()
                        )
                        with open(args.out, "a") as file:
                            print(json.dumps(cell), file=file)


def show(args):
    rows = {}
    for path in args.cells:
        with open(path) as file:
            for line in file:
                cell = json.loads(line)
                row = rows.setdefault((cell["model"], cell["ctx"], cell["policy"], cell["share"]), {})
                if "result" in cell:
                    read(cell, row)
    head = ["model", "tokens", "attention", "keys", "KL", "PPL, dense", "needle gain, exact", "recall", "prefill", "decode"]
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for (model, ctx, policy, share), row in sorted(rows.items(), key=lambda r: (r[0][0], r[0][1], r[0][2], r[0][3] or 0)):
        dense = rows.get((model, ctx, "dense", None), {})
        ratio = lambda key: f"{row[key] / dense[key]:.2f}" if key in row and key in dense else ""
        cells = [model, str(ctx), policy, f"1/{share}" if share else "all"]
        cells += [row.get(key, "") for key in ("kl", "ppl", "needle", "recall")]
        print("| " + " | ".join([*cells, ratio("prefill"), ratio("decode")]) + " |")


def read(cell, row):
    result = cell["result"]
    if cell["what"] == "kl":
        row["kl"] = f"{result['kl_mean']:.4f}"
        row["ppl"] = f"{result['ppl']:.2f}, {result['ppl_dense']:.2f}"
    elif cell["what"] == "needle":
        length = result["lengths"][0]
        row["needle"] = f"{length['gain']:.2f}, {length['exact']}/{length['cells']}"
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
    verb.add_argument("-c", "--ctx", type=int, nargs="+", default=[8192, 4096, 2048])
    verb.add_argument("--what", nargs="+", default=["kl", "needle", "recall", "time"])
    verb.add_argument("--text-tokens", type=int, default=90000, help="of the text, about")
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
