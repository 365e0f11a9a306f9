"""How much faster than the textbook way? One table, each side in a process of its own.

    python tests/benchmark.py --data-dir DIR                # loading, training, inference
    python tests/benchmark.py --data-dir DIR --to-score 10  # also: time to the textbook's best
                                                            # score in 10 epochs (ten minutes)

Textbook: float64 arrays read one after the other and zero-padded per item; a two-layer
bidirectional LSTM over packed sequences of all frames; a four-block CNN over the whole
clip in single precision, flattened into a dense layer. Ours: what the steps run. Both see
the same clips; training counts the clips shown per second. Run by hand, not by pytest.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
from patrec import batches, clips, flags, labels, machine, recipes, splits

NETWORKS = {"LSTM": recipes.GENRE_NETWORKS["mel"], "CNN": recipes.GENRE_NETWORKS["cnn_mel"]}


class TextbookDataset(Dataset):
    """float64 in memory, padded with zeros when an item is asked for."""

    def __init__(self, entries, targets):
        self.feats = [np.load(entry.path)[:128].T for entry in entries]
        self.targets, self.longest = targets, max(len(feat) for feat in self.feats)

    def __len__(self):
        return len(self.feats)

    def __getitem__(self, index):
        feat = self.feats[index]
        padded = np.vstack([feat, np.zeros((self.longest - len(feat), 128))])
        return padded.astype(np.float32), self.targets[index], len(feat)


class TextbookLSTM(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.lstm = nn.LSTM(128, 128, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(256, n_classes)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden = self.lstm(packed)[1][0]
        return self.head(torch.cat([hidden[-2], hidden[-1]], dim=1))


class TextbookCNN(nn.Module):
    def __init__(self, n_classes, n_frames):
        super().__init__()
        layers = []
        for c_in, c_out in itertools.pairwise([1, 16, 32, 64, 128]):
            conv = nn.Conv2d(c_in, c_out, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Flatten(), nn.Linear(128 * (n_frames // 16) * 8, 256), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(256, n_classes))

    def forward(self, x, lengths):
        return self.net(x.unsqueeze(1))


def textbook_epoch(model, loader, optimizer, device, n_batches=None):
    model.train()
    shown = 0
    for x, targets, lengths in itertools.islice(loader, n_batches):
        loss = nn.functional.cross_entropy(model(x.to(device), lengths), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shown += len(x)
    return shown


def textbook_predict(model, loader, device, window=None):
    """common.predict in single precision, whatever the machine is fast in."""
    with mock.patch.object(common, "fast_dtype", lambda device_type: torch.float32):
        return common.predict(model, loader, device, window)


def clips_per_second(work, device, repeats=3) -> float:
    """Median rate of `work() -> clips`, after one turn to warm up."""
    rates = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        shown = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(shown / (time.perf_counter() - began))
    return float(np.median(rates[1:]))


def rates(name, train, predict, model, to_predict, device, window=None) -> dict:
    """Clips per second of `train() -> clips` and of a prediction."""

    def predict_all():
        return len(predict(model, DataLoader(to_predict, 32), device, window)[0])

    return {
        f"{name}: clips/s, training": clips_per_second(train, device),
        f"{name}: clips/s, inference": clips_per_second(predict_all, device, repeats=2),
    }


def loading_times(load, repeats=7) -> tuple:
    """What the last load gives, and the median seconds of a first and of a second one."""
    seconds = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            os.environ["PATREC_CACHE"] = cache
            times = [time.perf_counter()]
            for _ in ("first", "again"):
                loaded = None  # no two at a time: the peak memory is measured too
                loaded = load()
                times.append(time.perf_counter())
        seconds.append(np.diff(times))
    first, again = np.median(seconds, axis=0).tolist()
    return loaded, {"seconds to load, first": first, "seconds to load, again": again}


def measure_textbook(entries, targets, train_idx, val_idx, device) -> dict:
    n_classes = int(targets.max()) + 1
    data, numbers = loading_times(lambda: TextbookDataset(entries, targets))

    def measure(name, model, n_batches, batch_size):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        loader = DataLoader(Subset(data, train_idx.tolist()), batch_size, shuffle=True)
        some = Subset(data, val_idx[:32].tolist())

        def train():
            return textbook_epoch(model, loader, optimizer, device, n_batches)

        return rates(name, train, textbook_predict, model, some, device)

    # A batch takes seconds: a rate needs no whole epoch. Packed sequences of unlike lengths
    # take ten times as long as those of one length, and 32 of them minutes: small batches,
    # and enough that both kinds are among them.
    numbers |= measure("LSTM", TextbookLSTM(n_classes).to(device), 6, 4)
    return numbers | measure("CNN", TextbookCNN(n_classes, data.longest).to(device), 1, 32)


def measure_ours(entries, targets, train_idx, val_idx, device) -> dict:
    machine.keep_freed_memory()
    n_classes = int(targets.max()) + 1
    store, numbers = loading_times(lambda: clips.load_clips(entries))
    stats = common.band_statistics(store, train_idx)
    store.frames = batches.to_resident(store.frames, device)
    data = common.SpectrogramDataset(store, targets, stats=stats)

    def measure(name, network):
        window = recipes.window_size(network)
        model = common.Classifier(common.make_backbone(network), n_classes).to(device)
        recipe = recipes.Recipe(epochs=99, lr=1e-3, window=window)
        loader = DataLoader(Subset(data.variant(crop=window), train_idx.tolist()), 32, shuffle=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
        loss_fn = nn.CrossEntropyLoss()
        state = common.TrainingState(model, loss_fn, optimizer, recipe, len(loader), device)

        def train():
            common.train_epoch(loader, state, recipe, device, 1)
            return len(loader.dataset)

        whole = Subset(data, val_idx.tolist())
        return rates(name, train, common.predict, model, whole, device, window)

    for name, network in NETWORKS.items():
        numbers |= measure(name, network)
    return numbers


def measure(side, args) -> dict:
    """All measurements of one side, in this process."""
    entries = labels.read_entries(args.data_dir, "genre", "train", merge=True)[: args.clips]
    targets = splits.encode_labels(entries, sorted({entry.label for entry in entries}))
    parts = splits.split_indices(len(targets), splits.VAL_FRACTION, 0, targets)
    for entry in entries:  # both sides read from a warm page cache
        entry.path.read_bytes()
    machine.seed_everything(0)
    work = measure_ours if side == "ours" else measure_textbook
    numbers = work(entries, targets, *parts, machine.pick_device(args.device))
    peak_kib = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]
    return numbers | {"peak memory, MiB": int(peak_kib) / 1024}


def seconds_to_score(args, epochs) -> tuple[float, float, float]:
    """Train the textbook CNN, then ours, as step 7 does it, on the same clips, as long at most.

    Returns
    -------
    best validation score of the textbook, seconds until then, seconds until ours was as good
    (inf: it was not)
    """
    device, network = machine.pick_device(args.device), NETWORKS["CNN"]
    source = flags.Source(args.data_dir, seed=0, device=device)
    data = common.load_data(source, crop=recipes.window_size(network))
    n_classes = len(data.names)
    entries, targets = data.val.dataset.store.entries, data.val.dataset.targets
    textbook = TextbookDataset(entries, targets.numpy())
    machine.seed_everything(0)
    model = TextbookCNN(n_classes, textbook.longest).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loader = DataLoader(Subset(textbook, data.train.indices), 32, shuffle=True)
    val = DataLoader(Subset(textbook, data.val.indices), 32)
    best, reached, began = -1.0, 0.0, time.perf_counter()
    for epoch in range(epochs):
        textbook_epoch(model, loader, optimizer, device)
        value = common.validation_score(*textbook_predict(model, val, device), data.settings)
        seconds = time.perf_counter() - began
        best, reached = max((best, reached), (value, seconds), key=lambda pair: pair[0])
        print(f"textbook CNN, epoch {epoch + 1}: {value:.3f} after {seconds:.0f} s", flush=True)
    machine.keep_freed_memory()  # from here on: the textbook does not do this either
    with tempfile.TemporaryDirectory() as folder:
        limit = {"deadline": time.time() + seconds}
        options = flags.TrainingOptions(source, Path(folder), Path(folder), **limit)
        common.train_all(options, [common.genre_experiment("cnn_mel")])
        history = pd.read_csv(Path(folder, "cnn_mel", "history.csv"))
    as_good = history["seconds"].cumsum()[history["val_score"] >= best]
    return best, reached, as_good.min() if len(as_good) else float("inf")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--data-dir", type=Path, required=True)
    add("--clips", type=int, default=10_000, help="use this many training clips at most")
    add("--device", default="auto")
    race = "also train the textbook CNN this long and race to its best score"
    add("--to-score", type=int, metavar="EPOCHS", help=race)
    add("--side", choices=["textbook", "ours"], help=argparse.SUPPRESS)  # for the child processes
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    sides = []
    for side in ("textbook", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        sides.append(json.loads(output.splitlines()[-1]))
    if args.to_score:
        best, *seconds = seconds_to_score(args, args.to_score)
        for side, value in zip(sides, seconds, strict=True):
            side[f"CNN: seconds to macro-F1 {best:.3f}"] = value
    device = machine.pick_device(args.device)
    print(f"{machine.environment(device)}, ours in {machine.fast_dtype(device.type)}\n")
    print(f"| {'':36} | textbook | ours | ratio |\n| {'-' * 36} | --- | --- | --- |")
    for name, textbook in sides[0].items():
        ours = sides[1][name]
        ratio = ours / textbook if "clips/s" in name else textbook / ours
        print(f"| {name:36} | {textbook:.3g} | {ours:.3g} | {ratio:.1f}x |")


if __name__ == "__main__":
    main()
