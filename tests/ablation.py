"""What each part of the training is worth: leave it out, in cross-validation on the training clips.

    python tests/ablation.py --data-dir DIR --folds 3

The training clips of the genre set are cut into five stratified folds. A fold is held out, a tenth
of the others validates, the rest is trained on; the test split is never read. Differences are over
all held-out clips: of macro-F1 with a 95% interval, of the log loss ± its standard error.
"""

import argparse
import itertools
import math
import sys
import tempfile
from pathlib import Path

import pandas as pd
import torch
from sklearn.model_selection import StratifiedKFold
from torch import nn
from torch.utils.data import Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common
from patrec.clips import load_clips
from patrec.flags import prepare_process
from patrec.labels import read_entries
from patrec.machine import seed_everything
from patrec.recipes import GENRE_NETWORKS, Recipe, window_size
from patrec.scores import genre_scores, paired_difference
from patrec.splits import VAL_FRACTION, encode_labels, split_indices

EXAMPLES = {"mel": 12_000, "cnn_mel": 20_000}  # fewer than the steps train on: enough to rank
VARIANTS = {  # what differs from the recipe of the steps
    "as in the steps": {},
    "no averaged weights": {"ema": 0.0},
    "no shifted bands": {"shift": 0},
    "no standardised steps": {},  # LSTM only
    "best of all epochs": {"settled": 1.0},
    "recipe lab": {"ema": 0.0, "shift": 0, "settled": 1.0},
}


def train_fold(name, variant, fold, store, targets, names, seed=42):
    """Train a network without one fold; returns the logits and classes of that fold's clips."""
    network = GENRE_NETWORKS[name]
    folds = StratifiedKFold(5, shuffle=True, random_state=seed).split(targets, targets)
    known, held_out = next(itertools.islice(folds, fold, None))
    train, val = (known[p] for p in split_indices(len(known), VAL_FRACTION, seed, targets[known]))
    stats, window = common.band_statistics(store, train, network.features), window_size(network)
    whole = common.SpectrogramDataset(store, targets, network.features, stats)
    parts = (whole.variant(crop=window), train), (whole, val), (whole, held_out)
    train, val, held_out = (Subset(clips, rows.tolist()) for clips, rows in parts)
    settings = {"part": "genre", "names": names}
    data = common.Data(train, val, held_out, names, None, None, settings)
    seed_everything(seed)
    model = common.make_classifier(network, data)
    if variant == "no standardised steps" and network.kind == "lstm":
        model.backbone.stem[0] = nn.Identity()
    crops = math.ceil((passes := EXAMPLES[name] / len(train)) / 60)
    recipe = Recipe(round(passes / crops), crops=crops, window=window, **VARIANTS[variant])
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        options = nn.CrossEntropyLoss(), optimizer, recipe, Path(folder, name)
        model = common.train(model, data, *options).model
    return common.predict(model, common.DataLoader(held_out, 64), window=window)


def compare(found, base):
    """The scores of (logits, classes), and their differences to those of `base`, as table cells."""
    true = pd.Series(base[1].numpy().astype(str))
    tables = [pd.DataFrame(logits.numpy()).rename(columns=str) for logits, _ in (found, base)]
    scores, gain = genre_scores(true, tables[0]), paired_difference(true, *tables)
    losses = [nn.functional.cross_entropy(*pair, reduction="none") for pair in (found, base)]
    change, (low, high) = losses[0] - losses[1], gain["macro_f1_ci95"]
    first = f"{scores['accuracy']:.3f}/{scores['macro_f1']:.3f}"
    f1_change = f"{gain['macro_f1']:+.3f} [{low:+.3f}, {high:+.3f}]"
    loss_change = f"{change.mean():+.3f} ± {change.std() / len(change) ** 0.5:.3f}"
    return f"{first} | {f1_change} | {losses[0].mean():.3f} | {loss_change} |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(EXAMPLES), help="of: mel, cnn_mel")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--folds", type=int, default=5)
    args = parser.parse_args()
    prepare_process(42)
    store = load_clips(read_entries(args.data_dir, "genre", "train", merge=True))
    names = sorted({entry.label for entry in store.entries})
    targets = encode_labels(store.entries, names)
    for name in args.networks:
        lines, base = ["| variant | accuracy/macro-F1 | change | log loss | change |"], None
        for variant in VARIANTS:
            parts = [train_fold(name, variant, i, store, targets, names) for i in range(args.folds)]
            found = [torch.cat(part) for part in zip(*parts, strict=True)]
            base = base or found
            lines.append(f"| {variant} | {compare(found, base)}")
        print(f"\n{name}\n" + "\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
