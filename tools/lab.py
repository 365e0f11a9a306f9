"""The whole lab by one command: steps 1 to 11, then a draft of the report.

    python lab.py                             # what is not done yet
    python lab.py --again                     # all of it anew
    python lab.py --data-dir DIR --seed 43    # flags go to every step that knows them

A step that fails does not stop the others; it is named at the end, with exit code 1. A step
is done when its outputs are there and were made with the same flags and the same data folder,
and no step that it builds on is run anew. A step begins when those that it builds on have
ended. Two run side by side, with half of the cores each; 5 and 10 train with all cores, and of
these no other beside them. Steps that no other waits for (1 to 4, 6, 11) run beside all of them,
two at a time, where the system has priorities at the lowest: they take what is left idle. What a
step prints goes into OUT/<step>.log, but for 5 and 10.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import joblib

from common import UNFINISHED
from patrec.errors import end_in_one_line
from patrec.files import find_data, make_folder, output_folder
from patrec.flags import make_parser
from tools.kaggle import EARLIER

HERE = Path(__file__).resolve().parent
# These train networks side by side. None but FILL is due beside them, by EARLIER and as `main` runs
# anew what builds on a step that is run.
ALL_CORES = {"05", "10"}
# No step waits for these, and none trains.
FILL = {f"{n:02}" for n in range(1, 12)} - ALL_CORES - set().union(*EARLIER.values())
LANES = 2  # steps at once, of FILL and of the others
# Flags that change how a step runs and not what it makes.
HOW = {"resume", "max_minutes", "workers", "out_dir", "device"}


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


def run(command, folder, log=None, fill=False) -> float | None:
    """Run a step; its seconds, None if it failed.

    folder : of its outputs; while it runs, and when it has failed, they are marked
    log : file for what it prints, of a step that shares the cores: with all of them for each,
        two get in each other's way (step 2 took more than twice as long). The lines of its epochs
        are shown, too.
    fill : at the lowest priority, where the system has priorities
    """
    began = time.monotonic()
    make_folder(folder)
    (folder / UNFINISHED).touch()
    if log is None:
        code = subprocess.run(command).returncode
    else:
        cores = str(max(joblib.cpu_count() // LANES, 1))  # for products, and for trainings at once
        env = {"OMP_NUM_THREADS": cores, "LOKY_MAX_CPU_COUNT": cores, "PYTHONUNBUFFERED": "1"}
        pipes = {"env": os.environ | env, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        pipes |= {"encoding": "utf-8", "errors": "replace"}  # a line never ends the lab
        with (
            open(log, "w", buffering=1, encoding="utf-8") as file,
            subprocess.Popen(command, **pipes) as process,
        ):
            if fill and hasattr(os, "setpriority"):  # what the process begins has the same
                os.setpriority(os.PRIO_PROCESS, process.pid, 19)
            for line in process.stdout:
                file.write(line)
                if " epoch " in line:
                    print(line, end="", flush=True)
        code = process.returncode
    if code:
        return None
    (folder / UNFINISHED).unlink()
    return time.monotonic() - began


def run_all(jobs, out) -> dict[str, float | None]:
    """Run the steps {name: command}, each as soon as it may; {name: `run`'s seconds}."""
    waiting, running, seconds = dict(jobs), {}, {}
    with ThreadPoolExecutor(2 * LANES) as pool:
        while waiting or running:
            for name in list(waiting):
                number, busy = name[4:6], {other[4:6] for other in running.values()}
                alike = busy & FILL if number in FILL else busy - FILL
                to_come = busy | {other[4:6] for other in waiting}
                if len(alike) == LANES or to_come & set(EARLIER.get(number, ())):
                    continue
                log = None if number in ALL_CORES else out / f"{name}.log"
                print(f"{name}: begun, see {log}" if log else f"\n=== {name}", flush=True)
                job = pool.submit(run, waiting.pop(name), out / name, log, number in FILL)
                running[job] = name
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name = running.pop(future)
                seconds[name], log = future.result(), out / f"{name}.log"
                if seconds[name] is None and name[4:6] not in ALL_CORES:
                    print(f"{name}: failed\n{log.read_text()[-2000:]}", file=sys.stderr)
    return seconds


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

    began = time.monotonic()
    seconds = run_all(jobs, out)
    draft = [sys.executable, str(HERE / "handin.py"), "draft", "--out-dir", str(out)]
    print("\n=== report", flush=True)
    if subprocess.run(draft).returncode:
        seconds["handin draft"] = None
    print(f"\n{'step':22}seconds")
    for name, spent in sorted(seconds.items()):
        print(f"{name:22}{'failed' if spent is None else f'{spent:.0f}'}")
    print(f"{'all, and the draft':22}{time.monotonic() - began:.0f}")
    failed = [name for name, spent in seconds.items() if spent is None]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
