"""The whole lab by one command: steps 1 to 11, then a draft of the report.

    python lab.py                             # what is not done yet
    python lab.py --again                     # all of it anew
    python lab.py --data-dir DIR --seed 43    # flags go to every step that knows them

A step that fails does not stop the others; it is named at the end, with exit code 1. A step
is done when its outputs are there and were made with the same flags and the same data folder,
and no step that it builds on is run anew. Steps 1 to 4 train nothing and run side by side,
what they print goes into OUT/<step>.log.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib

from common import (
    UNFINISHED,
    end_in_one_line,
    find_data,
    make_folder,
    make_parser,
    output_folder,
)
from kaggle_kernel import EARLIER

HERE = Path(__file__).resolve().parent
TOGETHER = ("01", "02", "03", "04")
# Flags that change how a step runs and not what it makes.
HOW = {"resume", "max_minutes", "workers", "dask", "out_dir", "device"}


def flags_of(args, parser, known) -> list[str]:
    """The flags of a parsed command line that another parser knows, as words again."""
    words = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in known and value != action.default:
            words += [action.option_strings[0], *([] if value is True else [str(value)])]
    return words


def is_done(folder, args, known) -> bool:
    """Whether a step's outputs are there and were made with these arguments."""
    if (folder / UNFINISHED).exists():
        return False
    try:
        made = json.loads((folder / "args.json").read_text())
        root = json.loads((folder / "metrics.json").read_text())["data"]["root"]
    except (OSError, ValueError, KeyError):
        return False
    wanted = {name: getattr(args, name) for name in known - HOW - {"data_dir"}}
    same = {name: made.get(name) for name in wanted} == wanted
    return same and Path(root) == find_data(args.data_dir, parts=())


def run(command, folder, log=None) -> float | None:
    """Run a step; its seconds, None if it failed.

    folder : of its outputs; while it runs, and when it has failed, they are marked
    log : file for what it prints, of a step that runs beside others: with one thread, for two
        that have all cores each get in each other's way (103 s instead of 42 for step 2)
    """
    began = time.monotonic()
    make_folder(folder)
    (folder / UNFINISHED).touch()
    if log is None:
        code = subprocess.run(command).returncode
    else:
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(log, "w") as file:
            done = subprocess.run(command, env=env, stdout=file, stderr=subprocess.STDOUT)
        code = done.returncode
    if code:
        return None
    (folder / UNFINISHED).unlink()
    return time.monotonic() - began


def main():
    parser = make_parser(__doc__, training=True)
    parser.add_argument("--again", action="store_true", help="run steps that are done already, too")
    args = parser.parse_args()
    out = output_folder(args.out_dir)
    shared, training = (set(vars(make_parser("", t).parse_args([]))) for t in (False, True))
    find_data(args.data_dir)  # bad input is one line, and a demo set is made, before any step
    make_folder(out)

    jobs, done = {}, []
    for script in sorted(HERE.glob("step[01][0-9]_*.py")):
        known = training if "training=True" in script.read_text(encoding="utf-8") else shared
        builds_on = EARLIER.get(script.name[4:6], ())
        again = args.again or any(name[4:6] in builds_on for name in jobs)
        if not again and is_done(out / script.stem, args, known):
            done.append(script.stem)
        else:
            jobs[script.stem] = [sys.executable, str(script), *flags_of(args, parser, known)]
    if done:
        print(f"done already: {', '.join(done)} (--again runs them too)", flush=True)

    seconds = {}
    first = {name: command for name, command in jobs.items() if name[4:6] in TOGETHER}
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:
        logs = {name: out / f"{name}.log" for name in first}
        for name, log in logs.items():
            print(f"{name}: begun, see {log}", flush=True)
        futures = {name: pool.submit(run, first[name], out / name, logs[name]) for name in first}
        for name, future in futures.items():
            seconds[name] = future.result()
            if seconds[name] is None:
                print(f"{name}: failed\n{logs[name].read_text()[-2000:]}", file=sys.stderr)
    for name, command in jobs.items():
        if name not in first:
            print(f"\n=== {name}", flush=True)
            seconds[name] = run(command, out / name)

    draft = [sys.executable, str(HERE / "handin.py"), "draft", "--out-dir", str(out)]
    print("\n=== report", flush=True)
    if subprocess.run(draft).returncode:
        seconds["handin draft"] = None
    print(f"\n{'step':22}seconds")
    for name, spent in seconds.items():
        print(f"{name:22}{'failed' if spent is None else f'{spent:.0f}'}")
    failed = [name for name, spent in seconds.items() if spent is None]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
