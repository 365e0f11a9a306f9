"""Do the steps give what they gave before a change that should not move a number?

    python tests/compare.py make FOLDER     # every step with --smoke, on a small made-up data set
    python tests/compare.py diff OLD NEW    # metrics.json and predictions.csv, but for times

For moves and renamings: `make` on the old commit, `make` on the new one, then `diff`. Run by
hand, not by pytest. Exit code 1 where anything differs.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
from conftest import ROOT, write_data_set

VARYING = re.compile("seconds|environment|root|time_s")  # keys that may differ from run to run


def make(folder) -> None:
    """Run all steps, one after another, into FOLDER/outputs."""
    folder.mkdir(parents=True)
    write_data_set(folder / "data")
    flags = ["--smoke", "--data-dir", folder / "data", "--out-dir", folder / "outputs"]
    for script in sorted(ROOT.glob("step[01][0-9]_*.py")):
        with (folder / f"{script.stem}.log").open("w") as log:
            command = [sys.executable, script, *flags]
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)


def read(folder) -> dict:
    """{step and place: value} of all that must stay: metrics but for times, predictions."""
    found = {}
    for path in sorted(folder.glob("outputs/*/metrics.json")):
        flat = pd.json_normalize(json.loads(path.read_text()), sep="/").iloc[0]
        found |= {f"{path.parent.name}/{key}": str(flat[key]) for key in flat.index}
    for path in sorted(folder.glob("outputs/*/predictions.csv")):
        found[f"{path.parent.name}/{path.name}"] = path.read_text()
    return {key: value for key, value in found.items() if not VARYING.search(key)}


def diff(old, new) -> None:
    old, new = read(old), read(new)
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    lines = [f"{key}: {str(old.get(key))[:60]} -> {str(new.get(key))[:60]}" for key in keys]
    sys.exit("\n".join(lines) or 0)


if __name__ == "__main__":
    work, *folders = sys.argv[1:] or [""]
    if (work, len(folders)) not in (("make", 1), ("diff", 2)):
        sys.exit(__doc__)
    {"make": make, "diff": diff}[work](*map(Path, folders))
