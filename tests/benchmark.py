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
import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import patrec.batches
import patrec.clips
import patrec.flags
import patrec.labels
import patrec.machine
import patrec.recipes
import patrec.splits
import patrec.step


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
        layers, channels = [], [1, 16, 32, 64, 128]
        for c_in, c_out in zip(channels[:-1], channels[1:], strict=True):
            layers += [
                nn.Conv2d(c_in, c_out, 3, padding=1),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        size = 128 * (n_frames // 16) * 8
        self.net = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(size, 256), nn.ReLU(), nn.Linear(256, n_classes)
        )

    def forward(self, x, lengths):
        return self.net(x.unsqueeze(1))


def textbook_epoch(model, loader, optimizer, device, n_batches=None):
    model.train()
    shown = 0
    for number, (x, targets, lengths) in enumerate(loader):
        if number == n_batches:
            break
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
    work()
    rates = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        shown = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(shown / (time.perf_counter() - began))
    return float(np.median(rates))


def count_predicted(predict, model, clips, device, window) -> int:
    """Predict all clips; returns how many."""
    return len(predict(model, DataLoader(clips, 32), device, window)[0])


def measure(side, args) -> dict:
    """All measurements of one side, in this process."""
    device = patrec.machine.pick_device(args.device)
    entries = patrec.labels.read_entries(args.data_dir, "genre", "train", merge=True)[: args.clips]
    classes = sorted({entry.label for entry in entries})
    targets = patrec.splits.encode_labels(entries, classes)
    train_idx, val_idx = patrec.splits.split_indices(
        len(targets), patrec.splits.VAL_FRACTION, 0, targets
    )
    for entry in entries:  # both sides read from a warm page cache
        entry.path.read_bytes()
    patrec.machine.seed_everything(0)
    run = {
        "LSTM": patrec.recipes.GENRE_NETWORKS["mel"],
        "CNN": patrec.recipes.GENRE_NETWORKS["cnn_mel"],
    }
    numbers = {}
    began = time.perf_counter()
    if side == "ours":
        patrec.machine.keep_freed_memory()
        store = patrec.clips.load_clips(entries)
        numbers["seconds to load, first"] = time.perf_counter() - began
        began = time.perf_counter()
        store = patrec.clips.load_clips(entries)
        numbers["seconds to load, again"] = time.perf_counter() - began
        stats = common.band_statistics(store, train_idx)
        store.frames = patrec.batches.to_resident(store.frames, device)
        data = common.SpectrogramDataset(store, targets, stats=stats)
    else:
        data = TextbookDataset(entries, targets)
        numbers["seconds to load, first"] = numbers["seconds to load, again"] = (
            time.perf_counter() - began
        )
    if args.load_only:
        return numbers
    for name in ("LSTM", "CNN"):
        if side == "ours":
            window = patrec.recipes.window_size(run[name])
            model = common.Classifier(common.make_backbone(run[name]), len(classes)).to(device)
            fetch = torch.utils.data.Subset(data.variant(crop=window), train_idx.tolist())
            whole = torch.utils.data.Subset(data, val_idx.tolist())
            recipe = patrec.recipes.Recipe(
                epochs=99,
                lr=1e-3,
                augment=patrec.recipes.make_augment(run[name], len(classes)),
                window=window,
            )
            train = ours_epoch(model, fetch, recipe, device, 32)
        else:
            window = None
            # A batch takes seconds: a rate needs no whole epoch. Packed sequences of unlike
            # lengths take ten times as long as those of one length, and 32 of them minutes:
            # small batches, and enough that both kinds are among them.
            n_batches, batch_size = (6, 4) if name == "LSTM" else (1, 32)
            model = (
                TextbookLSTM(len(classes))
                if name == "LSTM"
                else TextbookCNN(len(classes), data.longest)
            ).to(device)
            fetch = torch.utils.data.Subset(data, train_idx.tolist())
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
            loader = DataLoader(fetch, batch_size, shuffle=True)
            train = functools.partial(textbook_epoch, model, loader, optimizer, device, n_batches)
            whole = torch.utils.data.Subset(data, val_idx[:32].tolist())
        predict = common.predict if side == "ours" else textbook_predict
        numbers[f"{name}: clips/s, training"] = clips_per_second(train, device)
        numbers[f"{name}: clips/s, inference"] = clips_per_second(
            functools.partial(count_predicted, predict, model, whole, device, window),
            device,
            repeats=2,
        )
        if side == "ours" and name == "CNN":
            flops = 3 * 2 * cnn_multiplications(model.backbone, window)
            numbers["CNN training, share of matmul peak"] = (
                flops * numbers["CNN: clips/s, training"] / matmul_peak(device)
            )
    with open("/proc/self/status") as status:
        peak = next(line for line in status if line.startswith("VmHWM"))
    numbers["peak memory, MiB"] = int(peak.split()[1]) / 1024
    return numbers


def ours_epoch(model, fetch, recipe, device, batch_size):
    """One epoch of common's own loop as a closure, so that the rate is that of the steps."""
    loader = DataLoader(fetch, batch_size, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, fused=True)
    recipe = dataclasses.replace(recipe, epochs=99)
    state = common.TrainingState(
        model, nn.CrossEntropyLoss(), optimizer, recipe, len(loader), device
    )

    def epoch():
        common.train_epoch(loader, state, recipe, device, 1)
        return len(fetch)

    return epoch


def cnn_multiplications(backbone, n_frames) -> int:
    """Multiplications of one forward pass over one example (convolutions only)."""
    height, width, total = n_frames // backbone.frames_per_step, backbone.config["n_bands"], 0
    for block in backbone.blocks:
        conv, pool = block[0], block[-1]
        total += conv.weight.numel() * height * width
        height, width = height // pool.kernel_size[0], width // pool.kernel_size[1]
    return total


def matmul_peak(device, n=2048) -> float:
    """Floating-point operations per second of a large matrix product in the fast format."""
    a = torch.randn(n, n, device=device, dtype=patrec.machine.fast_dtype(device.type))

    def work():
        for _ in range(10):
            a @ a
        return 10 * 2 * n**3

    return clips_per_second(work, device)


class Reached(Exception):
    """The textbook's score is reached."""


def seconds_to_score(args, epochs) -> tuple[float, float, float]:
    """Train the textbook CNN; then ours until it is as good on the same validation clips.

    Ours runs its whole schedule, planned as by default, and is stopped when it gets there.

    Returns
    -------
    best score of the textbook, seconds it took, seconds ours took (inf: not reached)
    """
    device = patrec.machine.pick_device(args.device)
    network = patrec.recipes.GENRE_NETWORKS["cnn_mel"]
    source = patrec.flags.Source(args.data_dir, seed=0, device=device)
    data = common.load_data(source, crop=patrec.recipes.window_size(network))
    n_classes = len(data.names)
    equal = data.settings | {"priors": [1 / n_classes] * n_classes}  # the largest logit as it is
    store = data.val.dataset.store
    textbook = TextbookDataset(store.entries, data.val.dataset.targets.numpy())
    train_idx, val_idx = data.train.indices, data.val.indices
    patrec.machine.seed_everything(0)
    model = TextbookCNN(n_classes, textbook.longest).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    loader = DataLoader(torch.utils.data.Subset(textbook, train_idx), 32, shuffle=True)
    val = DataLoader(torch.utils.data.Subset(textbook, val_idx), 32)
    best, reached, began = -1.0, 0.0, time.perf_counter()
    for epoch in range(epochs):
        textbook_epoch(model, loader, optimizer, device)
        value = common.validation_score(*textbook_predict(model, val, device), equal)
        if value > best:
            best, reached = value, time.perf_counter() - began
        print(
            f"textbook CNN, epoch {epoch + 1}: {value:.3f} after"
            f" {time.perf_counter() - began:.0f} s",
            flush=True,
        )
    patrec.machine.keep_freed_memory()  # from here on: the textbook does not do this either
    patrec.machine.seed_everything(0)
    ours = common.Classifier(common.make_backbone(network), n_classes).to(device)
    flags = argparse.Namespace(epochs=None, smoke=False, lr=2e-3, batch_size=32)
    recipe = patrec.recipes.make_recipe(network, data, flags)
    optimizer = torch.optim.AdamW(ours.parameters(), lr=recipe.lr, weight_decay=0.01, fused=True)
    loss_fn, score = nn.CrossEntropyLoss(label_smoothing=0.1), common.validation_score

    def stop_when_reached(*scored):
        value = score(*scored)
        if value >= best:
            raise Reached
        return value

    began = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(common, "validation_score", stop_when_reached),
        contextlib.suppress(Reached),
    ):
        cnn = Path(folder) / "cnn"
        common.train(ours, data, loss_fn, optimizer, recipe, cnn, device=device)
        return best, reached, float("inf")
    return best, reached, time.perf_counter() - began


def in_child(side, *flags) -> dict:
    """`measure` in a process of its own, with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side, *flags]
        output = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"PATREC_CACHE": cache},
        ).stdout
    return json.loads(output.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument(
        "--clips", type=int, default=10_000, help="use this many training clips at most"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--to-score",
        type=int,
        metavar="EPOCHS",
        help="also train the textbook CNN this long and race to its best score",
    )
    parser.add_argument(
        "--side", choices=["textbook", "ours"], help=argparse.SUPPRESS
    )  # this and the next: for the child processes only
    parser.add_argument("--load-only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    sides = {side: in_child(side) for side in ("textbook", "ours")}
    # A load is over in a moment, and the machine has good and bad ones: seven more of each
    # side, in turn.
    loads = [{side: in_child(side, "--load-only") for side in sides} for _ in range(7)]
    for side, numbers in sides.items():
        numbers |= {
            name: float(np.median([turn[side][name] for turn in loads])) for name in loads[0][side]
        }
    device = patrec.machine.pick_device(args.device)
    print(
        f"{patrec.machine.environment(device)}, ours in {patrec.machine.fast_dtype(device.type)}\n"
    )
    print(f"| {'':36} | textbook | ours | ratio |\n| {'-' * 36} | --- | --- | --- |")
    for name, value in sides["ours"].items():
        other = sides["textbook"].get(name)
        ratio = (
            ""
            if other is None
            else f"{(value / other if 'clips/s' in name else other / value):.1f}x"
        )
        print(f"| {name:36} | {'' if other is None else f'{other:.3g}'} | {value:.3g} | {ratio} |")
    if args.to_score:
        best, reached, seconds = seconds_to_score(args, args.to_score)
        print(
            f"| {f'CNN: seconds to macro-F1 {best:.3f}':36} | {reached:.3g} | {seconds:.3g} |"
            f" {reached / seconds:.1f}x |"
        )


if __name__ == "__main__":
    main()
