"""Do the steps give what they gave before a change that should not move a number?

    python tests/compare.py make FOLDER     # every step with --smoke, on a small made-up data set
    python tests/compare.py diff OLD NEW    # metrics.json and predictions.csv, but for times

For moves and renamings: `make` on the old commit, `make` on the new one, then `diff`. Run by
hand, not by pytest. Exit code 1 where anything differs.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMES = ("seconds", "environment", "root", "time_s")  # keys that may differ from run to run


def make(folder) -> None:
    """Run all steps, one after another, into FOLDER/outputs."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import write_data_set

    folder.mkdir(parents=True)
    write_data_set(folder / "data")
    where = ["--data-dir", str(folder / "data"), "--out-dir", str(folder / "outputs")]
    for script in sorted(ROOT.glob("step[01][0-9]_*.py")):
        log = (folder / f"{script.stem}.log").open("w")
        subprocess.run(
            [sys.executable, str(script), "--smoke", *where],
            check=True,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def without_times(value):
    """A JSON value without the entries that hold times or places."""
    if isinstance(value, dict):
        return {
            key: without_times(item)
            for key, item in value.items()
            if not any(word in key for word in TIMES)
        }
    return [without_times(item) for item in value] if isinstance(value, list) else value


def difference(old, new, place="") -> list[str]:
    """Where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        parts = [difference(old.get(key), new.get(key), f"{place}/{key}") for key in keys]
        return sum(parts, [])
    return [] if old == new else [f"{place}: {str(old)[:60]} -> {str(new)[:60]}"]


def diff(old, new) -> list[str]:
    faults = []
    for path in sorted((old / "outputs").glob("*/metrics.json")):
        step = path.parent.name
        pair = [
            without_times(json.loads((folder / "outputs" / step / path.name).read_text()))
            for folder in (old, new)
        ]
        faults += difference(*pair, step)
        table = f"outputs/{step}/predictions.csv"
        if (old / table).exists() and (old / table).read_bytes() != (new / table).read_bytes():
            faults.append(f"{table} differs")
    return faults


if __name__ == "__main__":
    folders = [Path(word) for word in sys.argv[2:]]
    if sys.argv[1:2] == ["make"] and len(folders) == 1:
        make(*folders)
    elif sys.argv[1:2] == ["diff"] and len(folders) == 2:
        found = diff(*folders)
        sys.exit("\n".join(found) or 0)
    else:
        sys.exit(__doc__)
