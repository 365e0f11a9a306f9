"""The score tables of docs/results.md: steps 5, 6, 7 and 10 with several seeds, mean and spread.

    python tests/scores.py --data-dir DIR --out-dir scores               # seeds 42, 43, 44
    python tests/scores.py --data-dir DIR --out-dir scores --seeds 1 2 3

Runs each step as a user would, once per seed, in OUT/seed_N (step 7 with --ensemble for the
first seed only; what is finished is not run again), and prints Markdown tables: mean over
the seeds, their standard deviation and the mean of the 95% bootstrap intervals. Run by
hand, not by pytest.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"step05_lstm": "", "step06_eval": "", "step07_cnn": "--ensemble"}
FLAGS |= {"step10_multitask": "--folds 5"}
TABLES = ["accuracy", "macro_f1"], ["valence", "energy", "danceability", "mean_spearman"]


def run_step(args, step, flags, seed) -> dict:
    """Run a step unless its metrics are there already; returns its runs."""
    folder = args.out_dir / f"seed_{seed}"
    metrics = folder / step / "metrics.json"
    if not metrics.exists():
        where = ["--data-dir", args.data_dir, "--out-dir", folder, "--seed", str(seed)]
        command = [sys.executable, ROOT / f"{step}.py", *where, *flags.split()]
        with open(args.out_dir / f"seed_{seed}_{step}.log", "w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
    return json.loads(metrics.read_text())["runs"]


def collect(args) -> dict:
    """{(row, step that prints it): test scores of every seed}"""
    rows = {}
    for seed in args.seeds:
        for step, flags in FLAGS.items():
            if step == "step07_cnn" and seed != args.seeds[0]:
                flags = ""
            for name, run in run_step(args, step, flags, seed).items():
                # Step 6 scores step 5's models again, step 7's ensemble trains the next seeds'.
                again = step != "step05_lstm" and (name, "step05_lstm") in rows
                if not again and "_seed" not in name:
                    rows.setdefault((name, step), []).append(run["test"])
    return rows


def cell(scores, key) -> str:
    """Mean and standard deviation over the seeds, and the mean interval."""
    values = [score[key] for score in scores]
    low, high = np.mean([score[f"{key}_ci95"] for score in scores], axis=0)
    spread = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{spread} [{low:.3f}, {high:.3f}]"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out-dir", type=Path, default=Path("scores"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    args = parser.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    rows, seeds = collect(args), ", ".join(map(str, args.seeds))
    print(f"Seeds {seeds}: mean ± standard deviation over seeds [mean 95% interval]")
    for keys in TABLES:
        some = {row: scores for row, scores in rows.items() if keys[0] in scores[0]}
        print(f"\n{next(iter(some.values()))[0]['n_clips']} clips\n")
        print("|".join(["", "row", *keys, "printed by", ""]))
        print("| --- " * (len(keys) + 2) + "|")
        for (name, step), scores in some.items():
            print("|".join(["", name, *(cell(scores, key) for key in keys), f"`{step}.py`", ""]))


if __name__ == "__main__":
    main()
