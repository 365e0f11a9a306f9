"""The whole lab by one command: steps 1 to 11, then a draft of the report.

    python -m tools.lab                             # what is not done yet
    python -m tools.lab --again                     # all of it anew
    python -m tools.lab --data-dir DIR --seed 43    # flags go to every step that knows them

The steps run one after another, and each has all cores. A step that fails does not stop the
others; it is named at the end, with exit code 1. A step is done when its outputs are there and
were made with the same flags and the same data folder, and no step that it builds on is run
anew.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

from common import UNFINISHED  # a file in the folder of what has not ended, or has failed
from patrec.errors import StepFailed, end_in_one_line
from patrec.files import PROJECT, find_data, make_folder, output_folder
from patrec.flags import make_parser
from patrec.labels import fingerprints
from tools.steps import STEPS

# These flags change how a step runs, but not what it makes.
NO_EFFECT = {"resume", "max_minutes", "workers", "out_dir", "device"}


def flags_of(args, parser, known) -> list[str]:
    """The flags of a parsed command line that another parser knows, as words again."""
    words = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in known and value != action.default:
            words += [action.option_strings[0], *([] if value is True else [str(value)])]
    return words


def is_done(folder, args, known) -> bool:
    """Whether a step's outputs are there, made with these arguments from these labels."""
    if (folder / UNFINISHED).exists():
        return False
    try:
        made = json.loads((folder / "args.json").read_text())
        data = json.loads((folder / "metrics.json").read_text())["data"]
        root, labels = Path(data["root"]), data["fingerprint"]
    except (OSError, ValueError, KeyError):
        return False
    wanted = {name: getattr(args, name) for name in known - NO_EFFECT - {"data_dir"}}
    same_flags = {name: made.get(name) for name in wanted} == wanted
    same_data = root == find_data(args.data_dir, parts=()) and labels == fingerprints(root)
    return same_flags and same_data


def run(command, folder) -> float | None:
    """Run a step that writes into this folder; return its seconds, or None if it failed."""
    began = time.monotonic()
    make_folder(folder)
    (folder / UNFINISHED).touch()
    if subprocess.run(command).returncode:
        return None
    (folder / UNFINISHED).unlink()
    return time.monotonic() - began


def main(argv=None):
    parser = make_parser(__doc__, training=True)
    parser.add_argument("--again", action="store_true", help="also run the steps that are done")
    args = parser.parse_args(argv)
    out = output_folder(args.out_dir)
    shared, training = (set(vars(make_parser("", t).parse_args([]))) for t in (False, True))
    find_data(args.data_dir)  # before any step: a mistake is one line, and a demo set is made
    make_folder(out)

    seconds, began = {}, time.monotonic()
    for number, step in STEPS.items():
        known = training if step.trains else shared
        again = args.again or any(STEPS[n].script in seconds for n in step.builds_on)
        if not again and is_done(out / step.script, args, known):
            print(f"{step.script}: done already (--again runs it too)", flush=True)
            continue
        print(f"\n=== step {number}: {step.title}", flush=True)
        command = [sys.executable, PROJECT / f"{step.script}.py", *flags_of(args, parser, known)]
        seconds[step.script] = run(command, out / step.script)
    print("\n=== report", flush=True)
    draft = [sys.executable, "-m", "tools.handin", "draft", "--out-dir", out]
    drafted = subprocess.run(draft).returncode == 0
    failed = [name for name, spent in seconds.items() if spent is None]
    failed += [] if drafted else ["the draft of the report"]

    print(f"\n{'step':22}seconds")
    for name, spent in seconds.items():
        print(f"{name:22}{'failed' if spent is None else f'{spent:.0f}'}")
    print(f"{'all, with the draft':22}{time.monotonic() - began:.0f}", flush=True)
    if failed:
        raise StepFailed(f"{', '.join(failed)}; the same command tries again")


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
