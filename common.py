"""The Dataset, the networks, the losses and the training loop that all steps share.

Read it from top to bottom. The way is the same for genre, one emotion and three emotions:

    label file -> entries -> arrays -> one tensor in memory -> Dataset -> Subset -> batch
    -> backbone -> head -> loss -> predictions (clip x target) -> scores -> files

1. Dataset     SpectrogramDataset, load_data, load_test
2. Networks    LSTMBackbone, CNNBackbone, Classifier, Regressor
3. Losses      RegressionLoss
4. Training    train (with overfit_batch), train_epoch, predict
5. The trainings of a step    train_all, networks that earlier steps have saved, checkpoints

Shapes are written with B clips in a batch, T frames, F feature bands, S steps,
C channels, H hidden units, K classes or emotions, N clips.
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from tqdm.auto import tqdm

from patrec.baselines import band_features, regression_baselines
from patrec.batches import cut_windows, shift_bands, to_resident
from patrec.clips import find_leak, load_clips
from patrec.errors import InputError, StepFailed
from patrec.features import BANDS, N_MELS
from patrec.files import earlier_folders, load_torch, make_folder, save_torch, write_text
from patrec.labels import EMOTIONS, fingerprint, read_entries
from patrec.machine import fast_dtype, half_precision, seed_everything, show_bars
from patrec.parallel import WorkerDied, parallel_map
from patrec.plots import plot_overfit
from patrec.recipes import GENRE_NETWORKS, OVERFIT_PASSES, Network, Recipe, make_recipe, window_size
from patrec.scores import average_predictions, macro_f1, spearman
from patrec.splits import encode_labels, split_ids, take_subset


class SpectrogramDataset(Dataset):
    """The lab's Dataset: item -> (spectrogram, target, length).

    Spectrograms are standardised per band and only then padded, so that padding is the
    band's mean. (Padding dB with zeros would pad with the loudest value there is.)

    Parameters
    ----------
    store : ClipStore
    targets : array-like [shape=(N,) or (N, 3)], class numbers or emotion values
    features : 'mel', 'chroma' or 'fused'
    stats : (mean, std), each torch.Tensor [shape=(F,)], `band_statistics` of the training part
    crop : int or None, fetch a random stretch of this many frames instead of the whole clip
    """

    def __init__(self, store, targets, features="mel", stats=None, crop=None):
        self.store, self.features, self.crop = store, features, crop
        targets = torch.as_tensor(np.asarray(targets))
        self.targets = targets.float() if targets.is_floating_point() else targets.long()
        self.stats = stats
        if len(self.targets) != len(store.entries):
            raise ValueError(f"{len(self.targets)} targets for {len(store.entries)} clips")

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        """Return (spectrogram (T, F) float32, target, length) of one clip."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """Fetch a whole batch by one index operation; DataLoader calls this by itself.

        Returns a list of (spectrogram (T, F), target, length), all padded to the longest
        clip of the batch, as the standard collate function wants them.
        """
        indices = torch.as_tensor(indices)
        starts, lengths = self.store.starts[indices], self.store.lengths[indices]
        if self.crop:
            spare = (lengths - self.crop).clamp(min=0)
            starts = starts + (torch.rand(len(indices)) * (spare + 1)).long()
            lengths = lengths.clamp(max=self.crop)
        frames = self.store.frames  # whole rows first (contiguous in memory), then the bands
        t = torch.arange(int(lengths.max()))
        # (B, T) rows of the store. Past a clip's end its last frame, which becomes 0 below.
        rows = starts[:, None] + torch.minimum(t, lengths[:, None] - 1)
        x = frames.index_select(0, rows.flatten().to(frames.device)).unflatten(0, rows.shape)
        x = x[..., BANDS[self.features]].float()  # (B, T, F)
        if self.stats:
            mean, std = (value.to(x.device) for value in self.stats)
            x = x.sub_(mean).div_(std)
        padding = t >= lengths[:, None]
        if padding.any():
            x.masked_fill_(padding[..., None].to(x.device), 0.0)
        return list(zip(x, self.targets[indices], lengths, strict=True))

    def variant(self, **changes):
        """Return the same data with other settings, e.g. ``variant(crop=None)``; no copy."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other


def band_statistics(store, indices, features="mel") -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every band over the frames of some clips.

    Call it with the training part only: statistics of validation or test clips in the
    input would be a leak.

    Returns mean and std, torch.Tensor [shape=(F,)], in the rows' units (dB; chroma 0 to 1).
    """
    total, squares, n_frames = 0.0, 0.0, 0
    for index in indices:
        start, length = int(store.starts[index]), int(store.lengths[index])
        # About 256 frames of a clip are enough: neighbouring frames are nearly equal.
        x = store.frames[start : start + length : max(1, length // 256), BANDS[features]].float()
        total = total + x.sum(0, dtype=torch.float64)
        squares = squares + x.square().sum(0, dtype=torch.float64)
        n_frames += len(x)
    mean = total / n_frames
    std = (squares / n_frames - mean.square()).clamp(min=0).sqrt()
    return mean.float().cpu(), std.clamp(min=1e-3).float().cpu()  # a silent band stays finite


@dataclasses.dataclass
class Data:
    """The clips of one network: parts of one SpectrogramDataset with no clip in common."""

    train: Subset
    val: Subset
    held_out: Subset  # empty for genre, which has a test split of its own (`load_test`)
    names: list[str]  # (K,) the classes or the emotions that the columns stand for
    mean: np.ndarray | None  # (K,) of the training labels; emotion only
    std: np.ndarray | None
    settings: dict  # what a checkpoint needs to judge new clips and to know its own origin


def load_data(
    source, features="mel", beat=False, target="genre", *, crop=None, fold=0, n_folds=1, stats=None
) -> Data:
    """Load the training split of genre or emotion and divide it into parts.

    The split is the same for every kind of input (frames or beats, mel or chroma), because it
    is made on the clip ids, in the order of the label file of the full clips.

    Parameters
    ----------
    target : 'genre', 'emotion' (three values per clip), 'valence', 'energy', 'danceability'
    crop : int or None, train on random crops of this many frames; the other parts hold whole clips
    fold, n_folds : int, emotion: the held-out fold, and the number of folds (1: a fifth of clips)
    stats : (mean, std) of the network that is continued; None: those of the training part
    """
    part = "genre" if target == "genre" else "emotion"
    entries = read_entries(source.root, part, "train", beat, source.merge)
    store = load_clips(entries, source.skip_bad)
    labels = {entry.clip_id: entry.label for entry in entries}
    parts = split_ids(source, part, labels, fold, n_folds)
    row = {entry.clip_id: index for index, entry in enumerate(store.entries)}
    train, val, held_out = ([row[i] for i in ids if i in row] for ids in parts)
    if not (train and val and (held_out or part == "genre")):
        fault = "no readable clip is left in one of the parts; replace the files left out"
        raise InputError(f"{entries[0].path.parent}: {fault}")
    mean = std = None
    if part == "genre":
        names = sorted(set(labels.values()))
        targets = encode_labels(store.entries, names)
        train = take_subset(train, targets, source.subset)
    else:
        names = list(EMOTIONS) if target == "emotion" else [target]
        columns = [EMOTIONS.index(name) for name in names]
        targets = np.array([entry.label for entry in store.entries], dtype=np.float32)[:, columns]
        train = train[: source.subset]
        mean, std = targets[train].mean(0), targets[train].std(0).clip(min=1e-3)
    stats = stats or band_statistics(store, train, features)
    store.frames = to_resident(store.frames, source.device)
    whole = SpectrogramDataset(store, targets, features, stats)
    settings = {"part": part, "features": features, "beat": beat, "names": names, "stats": stats}
    settings |= {name: getattr(source, name) for name in ("merge", "seed", "subset", "smoke")}
    settings["fingerprint"] = fingerprint(source.root, part, beat)
    if part == "emotion":
        settings |= {"fold": fold, "n_folds": n_folds}
    crops = Subset(whole.variant(crop=crop), train)
    return Data(crops, Subset(whole, val), Subset(whole, held_out), names, mean, std, settings)


def load_test(source, settings, *, beat=None) -> SpectrogramDataset:
    """Load the test split, prepared as a trained network expects it. Only call it after training.

    Genre clips have classes; the lab publishes no labels for the emotion clips, whose
    targets are NaN. Rows are sorted by id.

    Raises
    ------
    InputError
        A genre test clip is in the training split too (same id or same array).
    """
    part, beat = settings["part"], settings["beat"] if beat is None else beat
    merge, names = settings["merge"], settings["names"]
    entries = sorted(read_entries(source.root, part, "test", beat, merge), key=lambda e: e.clip_id)
    store = load_clips(entries, source.skip_bad)
    if part == "genre":
        leaked = []
        for form in {beat, settings["beat"]}:  # what the network was trained on, in either form
            known = read_entries(source.root, part, "train", form, merge)
            leaked += find_leak(load_clips(known, source.skip_bad), store)
        if leaked and not source.allow_leak:
            fault = f"{len(leaked)} test clips are in the training split too, e.g. {leaked[0]}"
            cure = "remove them from one, or pass --allow-leak"
            raise InputError(f"{store.entries[0].path.parent}: {fault}; {cure}")
        targets = encode_labels(store.entries, names)
    else:
        targets = np.full((len(store.entries), len(names)), math.nan, dtype=np.float32)
    store.frames = to_resident(store.frames, source.device)
    return SpectrogramDataset(store, targets, settings["features"], settings["stats"])


def clip_ids(dataset) -> list[str]:
    """Ids of a SpectrogramDataset's clips, or of a Subset of it, row by row."""
    if isinstance(dataset, Subset):
        ids = clip_ids(dataset.dataset)
        return [ids[index] for index in dataset.indices]
    return [entry.clip_id for entry in dataset.store.entries]


def time_mask(lengths, n_steps, device) -> torch.Tensor:
    """(B, S, 1) float mask: 1 within each clip, 0 in its padding."""
    return (torch.arange(n_steps) < lengths[:, None]).unsqueeze(2).to(device, torch.float32)


class Backbone(nn.Module):
    """What both backbones share: `blocks`, of which the first ones can be frozen.

    `stem` is what comes before the first block and is frozen with it. `config` holds the
    arguments of __init__, from which a checkpoint builds the network again.
    """

    n_frozen = 0

    def __init__(self, arguments):
        super().__init__()
        private = ("self", "__class__")
        self.config = {name: value for name, value in arguments.items() if name not in private}

    def freeze(self, n) -> None:
        """Keep the first n blocks as they are, batch normalisation included (step 9)."""
        self.n_frozen = n
        for module in self.frozen():
            module.requires_grad_(False)
        self.train()

    def frozen(self) -> list:
        return [self.stem, *self.blocks[: self.n_frozen]] if self.n_frozen else []

    def train(self, mode=True):
        super().train(mode)
        for module in self.frozen():
            module.eval()  # a frozen block must not follow the new batches' statistics
        return self


class LSTMBackbone(Backbone):
    """LSTM over a spectrogram -> one vector per clip.

    Parameters
    ----------
    n_bands : int, F, bands of a frame
    hidden_size : int, H, units of one direction
    frames_per_step : int
        Number of frames that one time step describes (`frame_statistics`); 8 frames are 0.19 s.
        Over all 1,292 frames of a clip the LSTM is slow and the gradient vanishes (step 2
        measures both). With 1 the frames are used as they are.
    projection : int, units of a dense layer with layer normalisation before the LSTM; 0: none
    readout : 'pool' or 'last'
        Mean and maximum over the clip's steps, or the last step of the clip. The padding
        after a clip is never used.
    """

    def __init__(
        self, n_bands, hidden_size=128, n_layers=1, bidirectional=True, dropout=0.3,
        frames_per_step=1, projection=0, readout="pool",
    ):  # fmt: skip
        super().__init__(locals())  # a checkpoint keeps these arguments
        self.frames_per_step, self.readout = frames_per_step, readout
        n_inputs = n_bands if frames_per_step == 1 else 3 * n_bands
        stem = []
        if frames_per_step > 1:  # deviations and changes are not standardised yet
            stem.append(StepNorm(n_inputs, affine=False))
        if projection:
            stem += [nn.Linear(n_inputs, projection), nn.LayerNorm(projection), nn.ReLU()]
        self.stem = nn.Sequential(*stem)
        directions = ("forwards", "backwards") if bidirectional else ("forwards",)
        # One nn.LSTM per layer and direction: the backward ones read the reversed clip, so
        # that they start at its end and not in the padding. (Packed sequences do the same
        # and are four times slower on a CPU.)
        sizes = [projection or n_inputs] + [hidden_size * len(directions)] * (n_layers - 1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({way: nn.LSTM(size, hidden_size, batch_first=True) for way in directions})
            for size in sizes
        )
        self.dropout = nn.Dropout(dropout)
        self.feature_size = hidden_size * len(directions) * (2 if readout == "pool" else 1)

    def forward(self, x, lengths):
        """x (B, T, F), lengths (B,) on the CPU -> (B, feature_size)."""
        # Step 6 gives beats to an LSTM of frames: a beat is then one time step, and `StepNorm`
        # sets the features that it lacks to their training means.
        n = min(self.frames_per_step, self.config["frames_per_step"])
        describe = frame_statistics if n > 1 else average_frames
        x, lengths = describe(x, lengths, self.frames_per_step)  # (B, S, 3 F) or (B, S, F)
        x = self.stem(x)
        for index, layer in enumerate(self.blocks):
            x = self.dropout(x) if index else x
            outputs = [layer["forwards"](x)[0]]
            if "backwards" in layer:
                outputs.append(reverse(layer["backwards"](reverse(x, lengths))[0], lengths))
            x = torch.cat(outputs, dim=2)  # (B, S, H * directions)
        if self.readout == "last":
            # Forwards, the output at the clip's last step; backwards, at step 0, where it ends.
            forward_h, *backward_h = x.chunk(len(self.blocks[0]), dim=2)
            last = forward_h[torch.arange(len(x), device=x.device), (lengths - 1).to(x.device)]
            return torch.cat([last] + [h[:, 0] for h in backward_h], dim=1)  # (B, H * directions)
        mask = time_mask(lengths, x.shape[1], x.device)
        return masked_mean_max(x, mask)  # (B, 2 * H * directions)


class StepNorm(nn.BatchNorm1d):
    """Batch normalisation of (B, S, F): every feature over all steps of the batch.

    A beat has no deviation and no change within the step. Where an LSTM of frames gets beats
    (step 6), these features are set to their training mean, which is 0 after standardising.
    """

    def forward(self, x):
        if x.shape[2] < self.num_features:
            absent = self.running_mean[x.shape[2] :].to(x)
            x = torch.cat([x, absent.expand(*x.shape[:2], -1)], dim=2)
        return super().forward(x.flatten(0, 1)).view_as(x)


def average_frames(x, lengths, n) -> tuple[torch.Tensor, torch.Tensor]:
    """Average every n frames: (B, T, F) -> (B, ceil(T / n), F); padding does not count."""
    if n == 1:
        return x, lengths
    n_steps = math.ceil(x.shape[1] / n)
    if missing := n_steps * n - x.shape[1]:
        # Zeros after the end, as in all padding here, so sums are of a step's real frames.
        x = nn.functional.pad(x, (0, 0, 0, missing))
    x = x.unflatten(1, (n_steps, n))
    counts = (lengths[:, None] - n * torch.arange(n_steps)).clamp(1, n)  # (B, S) real frames
    n_steps = torch.div(lengths + n - 1, n, rounding_mode="floor")
    return x.sum(2) / counts.unsqueeze(2).to(x), n_steps


def frame_statistics(x, lengths, n) -> tuple[torch.Tensor, torch.Tensor]:
    """Describe every n frames: (B, T, F) -> (B, ceil(T / n), 3 F).

    Mean, standard deviation and mean absolute change from frame to frame of each band. The
    SVM baseline uses the same measures, there over a whole clip (`band_features`).
    """
    mean, n_steps = average_frames(x, lengths, n)
    square, _ = average_frames(x.square(), lengths, n)
    change = nn.functional.pad(x.diff(dim=1), (0, 0, 1, 0)).abs_()
    if (lengths < x.shape[1]).any():
        change = change * time_mask(lengths, x.shape[1], x.device)  # none into the padding
    change, _ = average_frames(change, lengths, n)
    return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt(), change], dim=2), n_steps


def reverse(x, lengths):
    """Turn each clip of (B, S, F) around within its own length; padding stays behind it."""
    t = torch.arange(x.shape[1])
    if (lengths == len(t)).all():  # crops, mostly; needs no index
        return x.flip(1)
    order = torch.where(t < lengths[:, None], lengths[:, None] - 1 - t, t).to(x.device)  # (B, S)
    return x.gather(1, order.unsqueeze(2).expand_as(x))


def masked_mean_max(x, mask):
    """Mean and maximum over the clip's own steps: (B, S, D), (B, S, 1) -> (B, 2 D)."""
    mean = (x * mask).sum(1) / mask.sum(1)
    highest = x.masked_fill(mask == 0, -torch.inf).amax(1)
    return torch.cat([mean, highest], dim=1)


class CNNBackbone(Backbone):
    """Four blocks of convolution, batch normalisation, ReLU, max pooling (lab, step 7b).

    The spectrogram is an image of one channel. The output of the last block is pooled over
    time, but not over frequency: the time of an event says little about the genre, its
    frequency says much. So the 8 remaining rows of the frequency axis stay in the vector.
    Padding is set to zero after every block, so that the vector of a clip does not depend on
    how far the clip is padded.

    Parameters
    ----------
    n_bands : int, F, at least 16 (four poolings by 2)
    channels : sequence of 4 ints
    kernel_size : int, odd
    frames_per_step : int
        Frames averaged into one column of the image. Two frames are 46 ms, half the length
        of the lab's FFT window, so little detail is lost.
    first_pool : int
        The first block pools over this many columns in time. All other poolings, in time and
        in frequency, are by 2. So the later blocks, which cost more, have fewer columns.
    """

    def __init__(
        self, n_bands=N_MELS, channels=(16, 32, 64, 128), kernel_size=3, frames_per_step=2,
        first_pool=4,
    ):  # fmt: skip
        super().__init__(locals() | {"channels": list(channels)})  # for the checkpoint
        self.frames_per_step, self.stem = frames_per_step, nn.Identity()

        def block(c_in, c_out, pool):
            padding = kernel_size // 2
            return nn.Sequential(
                nn.Conv2d(c_in, c_out, kernel_size, padding=padding, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(),
                nn.MaxPool2d((pool, 2)),  # time, bands
            )

        self.pools = [first_pool, 2, 2, 2]  # in time
        sizes = zip([1, *channels[:-1]], channels, self.pools, strict=True)
        self.blocks = nn.ModuleList(itertools.starmap(block, sizes))
        self.feature_size = 2 * channels[-1] * (n_bands // 2 ** len(channels))
        self.to(memory_format=torch.channels_last)  # convolutions are fastest in this layout

    def forward(self, x, lengths):
        """x (B, T, F), lengths (B,) on the CPU -> (B, feature_size)."""
        x, lengths = average_frames(x, lengths, self.frames_per_step)
        if (missing := math.prod(self.pools) - x.shape[1]) > 0:  # the blocks need one column left
            x = nn.functional.pad(x, (0, 0, 0, missing))
        x = x.unsqueeze(1)  # (B, 1, T, F)
        for block, pool in zip(self.blocks, self.pools, strict=True):
            x = block(x)
            lengths = torch.div(lengths, pool, rounding_mode="floor").clamp(min=1)
            mask = time_mask(lengths, x.shape[2], x.device)  # (B, T, 1)
            if (lengths < x.shape[2]).any():
                x = x * mask.unsqueeze(1)
        x = x.transpose(1, 2).flatten(2).float()  # (B, T, C * F)
        return masked_mean_max(x, mask)


class Classifier(nn.Module):
    """Backbone -> logits, one per class."""

    def __init__(self, backbone, n_classes, dropout=0.4):
        super().__init__()
        self.backbone, self.config = backbone, {"n_classes": n_classes, "dropout": dropout}
        self.head = nn.Sequential(nn.Dropout(dropout), nn.Linear(backbone.feature_size, n_classes))

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> logits (B, K)."""
        return self.head(self.backbone(x, lengths))


class Regressor(nn.Module):
    """Backbone -> one or several emotion values per clip, in the labels' own units.

    The output layers, one per emotion of `names`, predict standardised values. `mean` and `std`
    of the training labels, (K,) each, turn these into the labels' units.
    """

    def __init__(self, backbone, names, mean, std, dropout=0.4):
        super().__init__()
        mean, std = (np.asarray(value, dtype=float).tolist() for value in (mean, std))
        self.backbone = backbone
        self.config = {"names": list(names), "mean": mean, "std": std, "dropout": dropout}
        self.dropout = nn.Dropout(dropout)
        self.heads, n_inputs = nn.ModuleDict(), backbone.feature_size
        for name in names:  # each output starts close to 0, that is, at the mean of the labels
            head = self.heads[name] = nn.Linear(n_inputs, 1)
            nn.init.normal_(head.weight, std=0.1 / math.sqrt(n_inputs))
            nn.init.zeros_(head.bias)
        for name, value in (("mean", mean), ("std", std)):  # buffers go along to the device
            self.register_buffer(name, torch.tensor(value, dtype=torch.float32), persistent=False)

    def forward(self, x, lengths):
        """(B, T, F), (B,) -> (B, K)."""
        vector = self.dropout(self.backbone(x, lengths))
        z = torch.cat([head(vector) for head in self.heads.values()], dim=1)  # (B, K)
        return self.mean + self.std * z


MODELS = {model.__name__: model for model in (LSTMBackbone, CNNBackbone, Classifier, Regressor)}


def model_spec(model) -> dict:
    """What is needed to build the model again, in plain values."""
    backbone = model.backbone
    head = {"head": type(model).__name__, "head_args": model.config}
    return head | {"backbone": type(backbone).__name__, "backbone_args": backbone.config}


def build_model(spec) -> nn.Module:
    """Build an untrained model from `model_spec`."""
    backbone = MODELS[spec["backbone"]](**spec["backbone_args"])
    return MODELS[spec["head"]](backbone, **spec["head_args"])


def count_weights(model) -> int:
    return sum(weights.numel() for weights in model.parameters())


def layer_table(model, data) -> tuple[pd.DataFrame, str]:
    """A network's layers as a table with its caption: output shape for a batch, and weights."""
    x, _, lengths = default_collate(data.train.dataset.__getitems__(data.train.indices[:2]))
    rows = []

    def note(name, module, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        shape = " x ".join(map(str, output.shape))
        rows.append([name, type(module).__name__, shape, count_weights(module)])

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hook = module.register_forward_hook(functools.partial(note, name))
                hooks.enter_context(hook)
        model.eval()(x.to(next(model.parameters()).device), lengths)
    table = pd.DataFrame(rows, columns=["layer", "operation", "output", "weights"])
    batch = f"Layer by layer, for a batch of {tuple(x.shape)} (clips, frames, bands)"
    return table.set_index("layer"), f"{batch}; {count_weights(model):,} weights"


def regression_loss(outputs, targets, std) -> torch.Tensor:
    """Squared error in units of the labels' spread, plus half of 1 - Pearson's r.

    The first term makes the predicted values fit. The second is small if the predictions rise
    linearly with the labels. It replaces Spearman's correlation, which has no useful gradient.
    (In speech, where emotions are scored by the correlation coefficient CCC, Atmaja & Akagi
    (2020) found that CCC is a better loss than the squared error. The sum here is our own.)

    outputs, targets : torch.Tensor [shape=(B,)]
    std : float, of the training labels of this emotion
    """
    refuse_unlike(outputs, targets)
    error = ((outputs - targets) / std).square().mean()
    if len(outputs) < 3:  # a correlation of two points is always 1 or -1
        return error
    a, b = outputs - outputs.mean(), targets - targets.mean()
    pearson = (a * b).sum() / (a.square().sum() * b.square().sum()).clamp(min=1e-12).sqrt()
    return error + 0.5 * (1 - pearson)


def refuse_unlike(outputs, targets) -> None:
    """(B, 1) against (B,) would give a B x B matrix of differences, without a word."""
    if outputs.shape != targets.shape:
        shapes = f"outputs {tuple(outputs.shape)} against targets {tuple(targets.shape)}"
        raise ValueError(f"{shapes} would broadcast")


class RegressionLoss(nn.Module):
    """Sum of the regression losses of K emotions (lab, step 8a for one, step 10b for three).

    Each squared error is divided by the variance of that emotion's training labels, which
    brings the losses into one order of magnitude.
    """

    def __init__(self, std):
        super().__init__()
        self.std = [float(value) for value in std]

    def terms(self, outputs, targets):
        """outputs, targets (B, K) -> (K,) losses, one per emotion, before they are summed."""
        refuse_unlike(outputs, targets)
        columns = zip(outputs.T, targets.T, self.std, strict=True)
        return torch.stack([regression_loss(*column) for column in columns])

    def forward(self, outputs, targets):
        """outputs, targets (B, K) -> scalar."""
        return self.terms(outputs, targets).sum()


def make_backbone(network) -> nn.Module:
    """The untrained backbone of a network of the lab."""
    n_bands = network.n_bands
    if network.kind == "cnn":
        return CNNBackbone(n_bands)
    if network.kind != "lstm":
        raise ValueError(f"no backbone of kind {network.kind!r} here")
    if network.plain:
        return LSTMBackbone(n_bands, bidirectional=False, n_layers=2, readout="last")
    frames_per_step = 1 if network.beat else 8
    return LSTMBackbone(n_bands, frames_per_step=frames_per_step, projection=128)


def make_classifier(network, data) -> nn.Module:
    """The backbone of a network of the lab, with random weights and an output per class."""
    return Classifier(make_backbone(network), len(data.names))


def make_regressor(network, data) -> nn.Module:
    """The backbone of a network of the lab, with random weights and one head per emotion."""
    return Regressor(make_backbone(network), data.names, data.mean, data.std)


@dataclasses.dataclass
class TrainedModel:
    """A trained network and the facts of its training."""

    model: nn.Module  # with the weights of the epoch that was kept
    settings: dict  # from its checkpoint: how to prepare new clips
    facts: dict  # for metrics.json: epochs, best_epoch, weights, n_train, val ...
    history: pd.DataFrame  # a row per epoch
    path: Path  # of the checkpoint


@dataclasses.dataclass
class OverfitCheck:
    """The result of `train` with overfit_batch."""

    learned: bool  # whether the loss came under the goal with every clip right
    facts: dict  # batches, clips, passes, loss, accuracy (None for regression)
    history: pd.DataFrame  # the loss of every pass


class TrainingState:
    """All that changes while a network is trained; saved after each epoch, for --resume.

    `average` is a running average of the weights (and of batch normalisation's statistics). At a
    constant rate the weights keep moving around a minimum; their average lies closer to it.
    """

    def __init__(self, model, loss_fn, optimizer, recipe, n_batches, device):
        self.model, self.loss_fn, self.optimizer = model, loss_fn, optimizer
        self.history, self.best = [], (-math.inf, -math.inf)
        n_steps, swa = recipe.epochs * n_batches, torch.optim.swa_utils
        decay = max(0.0, min(recipe.ema, 1 - 10 / n_steps))  # a short run must forget its start too
        mean = swa.get_ema_multi_avg_fn(decay)
        self.average = swa.AveragedModel(model, multi_avg_fn=mean, use_buffers=True)
        kind = torch.device(device).type
        self.scaler = torch.amp.GradScaler(kind, enabled=fast_dtype(kind) == torch.float16)
        self.plan = f"--epochs {recipe.epochs} --lr {recipe.lr:g}, {n_steps} batches"

    def parts(self) -> dict:
        names = ("model", "average", "optimizer", "scaler")
        return {name: getattr(self, name) for name in names}

    def save(self, path, settings) -> None:
        """Write all that an uninterrupted training would hold after this epoch."""
        state = {name: part.state_dict() for name, part in self.parts().items()}
        state["rng"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            state["rng"]["cuda"] = torch.cuda.get_rng_state()
        state |= {"plan": self.plan, "settings": settings}
        save_torch(path, state | {"history": self.history, "best": list(self.best)})

    def load(self, path, settings) -> None:
        """Go on from what `save` has written; InputError if it belongs to another training."""
        state = load_torch(path)
        try:
            plan, known = state["plan"], state["settings"]
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            self.history, self.best = state["history"], tuple(state["best"])
            torch.set_rng_state(state["rng"]["cpu"])
            if "cuda" in state["rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state(state["rng"]["cuda"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            fault = "not the state of this model's training"
            raise InputError(f"{path}: {fault}; leave out --resume") from error
        if plan != self.plan:
            fault = f"begun with {plan}, now {self.plan}"
            raise InputError(f"{path}: {fault}; use the same, or leave out --resume")
        # Other clips, or the same ones split by another seed: what was validated would now be
        # trained on.
        odd = [name for name in settings if not np.array_equal(settings[name], known.get(name))]
        if odd:
            fault = f"begun with other clips or another --seed ({' and '.join(odd)} differ)"
            raise InputError(f"{path}: {fault}; use the same, or leave out --resume")


UNFINISHED = "unfinished"  # a file in the folder of a network that is being trained


def train(
    model, data, loss_fn, optimizer, recipe, folder=None, *,
    device="cpu", resume=False, max_seconds=math.inf, overfit_batch=False,
) -> TrainedModel | OverfitCheck:  # fmt: skip
    """Train a network, for genre or emotion; or only check that it can learn (lab, step 5b).

    With `overfit_batch` the same loop learns four fixed batches by heart, see `overfit`. Without
    it, the averaged weights are scored on the validation clips after each epoch. The best epoch
    among the last fifth is saved in ``folder/best.pt`` (the best so far, if the training is cut
    short), the state for `resume` in ``folder/last.pt``, the curve in ``folder/history.csv``.

    Parameters
    ----------
    model : nn.Module, called as ``model(x, lengths)``; frozen weights need no gradient
    data : Data, see `load_data`
    loss_fn : nn.Module, (outputs, targets) -> scalar tensor
    optimizer : torch.optim.Optimizer, of the model's weights
    resume : bool, go on from ``last.pt`` if it exists
    max_seconds : float, stop before an epoch that would end later; at least one epoch is run

    Raises
    ------
    StepFailed
        The loss became NaN or infinite (epoch and batch are named), or memory ran out.
    """
    if overfit_batch:
        return overfit(model, data, loss_fn, optimizer, recipe, device)
    make_folder(folder)
    crops = Subset(data.train.dataset, data.train.indices * recipe.crops)
    loader = DataLoader(crops, recipe.batch_size, shuffle=True)
    val = DataLoader(data.val, recipe.batch_size)
    settings = data.settings | {"window": recipe.window, "run": folder.name}
    facts = training_facts(model, data, recipe, len(crops))
    state = TrainingState(model, loss_fn, optimizer, recipe, len(loader), device)
    if resume and (folder / "last.pt").exists():
        state.load(folder / "last.pt", settings)
        print(f"{folder.name}: continuing after epoch {len(state.history)} of {recipe.epochs}")
    elif not resume:  # if it stops in its first epoch, --resume must not find the old run's state
        (folder / "last.pt").unlink(missing_ok=True)
    write_text(folder / UNFINISHED, "")  # so that no step takes the network for a finished one
    began = time.monotonic()
    for epoch in range(len(state.history) + 1, recipe.epochs + 1):
        epoch_began = time.monotonic()
        with advice_on_memory(device, recipe.batch_size):
            train_loss = train_epoch(loader, state, recipe, device, epoch)
            outputs, targets = predict(state.average, val, device, recipe.window)
            val_loss = loss_fn(outputs.to(device), targets.to(device)).item()
        score = validation_score(outputs, targets, settings)
        # The best epoch is chosen among the last ones: the highest score of all is often an early
        # epoch's, by chance (docs/experiments.md). The loss decides between equal scores.
        settled = epoch > recipe.epochs - max(1, round(recipe.settled * recipe.epochs))
        first = settled and not (state.history and state.history[-1]["settled"])
        kept = first or (score, -val_loss) > state.best
        if kept:
            state.best = (score, -val_loss)
            save_checkpoint(folder / "best.pt", state.average.module, settings,
                            epoch=epoch, val_score=score, facts=facts)  # fmt: skip
        seconds = time.monotonic() - epoch_began
        row = {"epoch": epoch, "train_loss": train_loss, "val_loss": val_loss}
        row |= {"val_score": score, "settled": int(settled), "kept": int(kept), "seconds": seconds}
        record_epoch(folder, state, settings, row, recipe.epochs)
        if epoch < recipe.epochs and time.monotonic() - began + seconds > max_seconds:
            print(f"{folder.name}: time is up after {epoch} of {recipe.epochs} epochs")
            break
    (folder / UNFINISHED).unlink()
    checkpoint = load_checkpoint(folder / "best.pt")
    model.load_state_dict(checkpoint["state"])
    return trained_model(model, checkpoint, folder / "best.pt")


def record_epoch(folder, state, settings, row, n_epochs) -> None:
    """Add an epoch to history.csv and last.pt, and print a line about it."""
    state.history.append(row)
    write_text(folder / "history.csv", pd.DataFrame(state.history).to_csv(index=False))
    # This file comes last: whenever the process is killed, the other files hold every epoch
    # that this one counts as done.
    state.save(folder / "last.pt", settings)
    losses = f"train loss {row['train_loss']:.4f}  val loss {row['val_loss']:.4f}"
    scores = f"{losses}  val score {row['val_score']:.4f}  {row['seconds']:.1f} s"
    print(f"{folder.name} epoch {row['epoch']:3d}/{n_epochs}  {scores}", flush=True)


def overfit(model, data, loss_fn, optimizer, recipe, device, n_batches=4, goal=0.01):
    """Learn a few fixed batches by heart, without regularisation; returns an OverfitCheck.

    If a network cannot bring the loss close to 0 on four batches, most likely the gradients, the
    loss or the learning rate are wrong (Karpathy, 2019, A Recipe for Training Neural Networks).
    The check does not find wrong labels, which can be learned by heart too. Each pass is
    `train_epoch`, as in every training.
    """
    loader = DataLoader(data.train, recipe.batch_size, shuffle=True)
    batches = list(itertools.islice(loader, n_batches))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    recipe = dataclasses.replace(recipe, shift=0)
    state = TrainingState(model, loss_fn, optimizer, recipe, len(batches), device)
    learned = False
    while not learned and len(state.history) < recipe.epochs:
        number = len(state.history) + 1
        with advice_on_memory(device, recipe.batch_size):
            loss = train_epoch(batches, state, recipe, device, number)
            state.history.append({"pass": number, "loss": loss})
            # Accuracy takes a pass of its own, so it is not computed after each one.
            if number % 10 == 1 or loss < goal or number == recipe.epochs:
                right = batch_accuracy(model, batches, device)
                learned = loss < goal and right in (None, 1.0)
                accuracy = "" if right is None else f"  accuracy {right:.3f}"
                print(f"overfit pass {number:3d}  loss {loss:.4f}{accuracy}", flush=True)
    facts = {"batches": len(batches), "clips": sum(len(x) for x, *_ in batches)}
    facts |= {"passes": len(state.history), "loss": loss, "accuracy": right}
    return OverfitCheck(learned, facts, pd.DataFrame(state.history))


@torch.no_grad()
def batch_accuracy(model, batches, device) -> float | None:
    """Accuracy over some batches, in training mode; None for regression."""
    if batches[0][1].is_floating_point():
        return None
    with half_precision(device):
        right = [model(x.to(device), n).argmax(1).cpu() == y.cpu() for x, y, n in batches]
    return float(torch.cat(right).float().mean())


def training_facts(model, data, recipe, examples_per_epoch) -> dict:
    """The facts of a training that are known before it begins, for metrics.json."""
    return {
        "planned_epochs": recipe.epochs,
        "lr": recipe.lr,
        "batch_size": recipe.batch_size,
        "examples_per_epoch": examples_per_epoch,
        "n_train": len(data.train),
        "n_val": len(data.val),
        "weights": count_weights(model),
        "trained_weights": sum(w.numel() for w in model.parameters() if w.requires_grad),
    }


def trained_model(model, checkpoint, path) -> TrainedModel:
    """The TrainedModel of a network and its checkpoint, with the facts of its training."""
    settings, curve = checkpoint["settings"], path.with_name("history.csv")
    history = pd.read_csv(curve) if curve.exists() else pd.DataFrame({"seconds": []})
    facts = checkpoint["facts"] | {
        "epochs": len(history) or checkpoint["epoch"],
        "best_epoch": checkpoint["epoch"],
        "train_seconds": float(history["seconds"].sum()),
        "val": {score_name(settings): checkpoint["val_score"]},
    }
    return TrainedModel(model, settings, facts, history, path)


def load_trained(path, device="cpu") -> TrainedModel:
    """Load what `train` has saved in a folder: the kept network and the facts of its training."""
    return trained_model(*load_model(path, device), path)


@contextlib.contextmanager
def advice_on_memory(device, batch_size):
    """Turn running out of memory into one line that says what to try."""
    try:
        yield
    except torch.OutOfMemoryError:
        fault = f"{device} ran out of memory with batches of {batch_size} clips"
        raise StepFailed(f"{fault}; try --batch-size {max(batch_size // 2, 2)}") from None


def train_epoch(loader, state, recipe, device, epoch) -> float:
    """One pass over the training crops; returns the mean loss."""
    model, optimizer, scaler = state.model, state.optimizer, state.scaler
    model.train()  # the caller may have left the network in evaluation mode
    losses = []
    bar = tqdm(loader, desc=f"epoch {epoch}", disable=not show_bars(), leave=False)
    for x, targets, lengths in bar:  # x (B, T, F)
        x, targets = x.to(device), targets.to(device)
        if recipe.shift:
            x = shift_bands(x, recipe.shift)
        with half_precision(device):
            outputs = model(x, lengths)
        loss = state.loss_fn(outputs.float(), targets)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        state.average.update_parameters(model)
        losses.append(loss.detach())
    losses = torch.stack(losses).cpu()  # one wait for the GPU per epoch, not one per batch
    if not losses.isfinite().all():
        batch = int((~losses.isfinite()).nonzero()[0])
        fault = f"loss is {losses[batch]:.3g} at epoch {epoch}, batch {batch + 1}"
        raise StepFailed(f"{fault}; the best epoch so far is kept, try a smaller --lr")
    return float(losses.mean())


@torch.inference_mode()
def predict(model, loader, device="cpu", window=None):
    """Run a model over a loader's clips, in evaluation mode.

    Parameters
    ----------
    window : int or None
        Cut each clip into windows of this many frames, as few as cover it, and average the
        outputs. None: whole clips.

    Returns outputs [shape=(N, ...)], float32, and targets [shape=(N,) or (N, K)], on the CPU.
    """
    model.eval()
    outputs, targets, fast = [], [], half_precision(device)
    for x, y, lengths in loader:
        x = x.to(device)
        counts = [1] * len(x)
        if window and x.shape[1] > window:
            x, lengths, counts = cut_windows(x, lengths, window)
        # At most 128 at once: the activations of 700 windows need gigabytes, and on a CPU they
        # take four times as long.
        batches = zip(x.split(128), lengths.split(128), strict=True)
        with fast:
            out = torch.cat([model(part, n).float() for part, n in batches])
        outputs.append(torch.stack([part.mean(0) for part in out.split(counts)]).cpu())
        targets.append(y.cpu())
    return torch.cat(outputs), torch.cat(targets)


def score_name(settings) -> str:
    """Name of the score that chooses among epochs, as metrics.json has it."""
    if settings["part"] == "genre":
        return "macro_f1"
    return settings["names"][0] if len(settings["names"]) == 1 else "mean_spearman"


def validation_score(outputs, targets, settings) -> float:
    """Macro-F1, in which small classes count fully, or Spearman's correlation (their mean)."""
    if settings["part"] == "genre":
        return macro_f1(targets.numpy(), outputs.argmax(1).numpy(), outputs.shape[1])
    return float(np.mean([spearman(t, o) for t, o in zip(targets.T, outputs.T, strict=True)]))


def predict_clips(model, dataset, settings, device="cpu") -> pd.DataFrame:
    """A network's predictions: a row per clip id, a column per class or emotion.

    For genre log-probabilities, for emotion values.
    """
    outputs, _ = predict(model, DataLoader(dataset, 64), device, settings["window"])
    if settings["part"] == "genre":
        outputs = outputs.log_softmax(1)
    return pd.DataFrame(outputs.numpy(), clip_ids(dataset), settings["names"])


def true_labels(dataset, settings) -> pd.Series | pd.DataFrame:
    """True class names, or true emotion values (a column each), by clip id."""
    rows = dataset.indices if isinstance(dataset, Subset) else slice(None)
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    targets = whole.targets[rows].numpy()
    if settings["part"] == "genre":
        return pd.Series(np.array(settings["names"])[targets], clip_ids(dataset))
    return pd.DataFrame(targets, clip_ids(dataset), settings["names"])


@dataclasses.dataclass
class Experiment:
    """One network to train, on every fold."""

    name: str  # of the run and its folder
    network: Network  # its kind and its input
    make_model: Callable  # (network, data) -> nn.Module, called after seeding
    make_loss: Callable  # data -> nn.Module
    optimizer: type  # e.g. torch.optim.Adam
    target: str = "genre"  # or 'emotion' (all three) or the name of one emotion
    seed: int | None = None  # instead of the step's: other weights, batches, validation clips
    n_folds: int = 1  # emotion: 1 holds out a fifth of the clips; more: cross-validation
    stats: tuple | None = None  # (mean, std) of the network that is continued
    epochs: int | None = None  # at most this many, for fine-tuning


@dataclasses.dataclass
class Result:
    """A finished run: one TrainedModel per fold.

    With several folds, `facts` (for metrics.json) has the sums of epochs and seconds and the
    mean of val; everything else is from the first fold.
    """

    members: list[TrainedModel]
    facts: dict
    # Emotion only: each held-out clip, predicted by the fold that was not trained on it.
    predictions: pd.DataFrame | None = None
    truth: pd.DataFrame | None = None
    folds: pd.Series | None = None  # which fold that was, from 1 on

    model = property(lambda self: self.members[0].model)
    settings = property(lambda self: self.members[0].settings)
    history = property(lambda self: self.members[0].history)


def train_all(training, runs, to_come=0) -> dict[str, Result]:
    """Train the networks of a step, genre or emotion, side by side; returns them by name.

    Each training is a process with its share of the processor's cores, or with a graphics
    card of its own. A single training runs in this process, with all cores. The result of a
    training does not depend on the others. If one fails, it stops the others, whose finished
    epochs are kept.

    to_come : trainings still to come in this step, which share what is left of --max-minutes
    """
    runs = list(runs)
    jobs = [(run, fold) for run in runs for fold in range(run.n_folds)]
    workers = count_workers(training, len(jobs))
    if workers > 1:
        # Here first: bad input is one line before anything is begun, and files are read once.
        for genre, beat in {(run.target == "genre", run.network.beat) for run in runs}:
            load_data(training.source, beat=beat, target="genre" if genre else "emotion")
    rounds = [math.ceil((to_come + len(jobs) - place) / workers) for place in range(len(jobs))]
    tasks = [(training, run, fold, left) for (run, fold), left in zip(jobs, rounds, strict=True)]
    try:
        results = iter(list(parallel_map(train_fold, tasks, workers)))
    except WorkerDied as error:
        cure = "fewer --workers need less memory; --resume continues after the finished epochs"
        raise StepFailed(f"{error}; {cure}") from None
    return {
        run.name: join_folds(list(itertools.islice(results, run.n_folds)), training.source.device)
        for run in runs
    }


def count_workers(training, n_jobs) -> int:
    """How many trainings run at once: --workers, else one per core or graphics card."""
    if training.workers:
        most = training.workers
    elif training.smoke:
        most = 1  # two epochs are over before a process has begun
    else:
        kind = torch.device(training.source.device).type
        most = {"cpu": joblib.cpu_count(), "cuda": torch.cuda.device_count()}.get(kind, 1)
    return max(min(most, n_jobs), 1)


def train_fold(training, run, fold, rounds_left):
    """Train a run on one fold, with its share of what is left of --max-minutes.

    rounds_left : trainings one after another that share it, this one included

    Returns the checkpoint's path, and predictions and truth of held-out clips (None for genre).
    """
    # A worker process does not run `prepare_process`. The threads of large products take this
    # setting from the thread that starts them, so it comes first.
    torch.set_flush_denormal(True)
    network, source = run.network, training.source
    if run.seed is not None:
        source = dataclasses.replace(source, seed=run.seed)
    cut = {"crop": window_size(network), "fold": fold, "n_folds": run.n_folds, "stats": run.stats}
    data = load_data(source, network.features, network.beat, run.target, **cut)
    data.settings["recipe"] = training.recipe
    recipe = make_recipe(network, data, training)
    recipe.epochs = min(run.epochs or recipe.epochs, recipe.epochs)
    seed_everything(source.seed)
    device = source.device
    model, loss_fn = run.make_model(network, data).to(device), run.make_loss(data).to(device)
    learned = [weights for weights in model.parameters() if weights.requires_grad]
    optimizer = run.optimizer(learned, lr=recipe.lr, fused=True)
    name = run.name if run.n_folds == 1 else f"{run.name}_fold{fold + 1}of{run.n_folds}"
    seconds = max(0.0, training.deadline - time.time()) / rounds_left
    fitted = train(
        model, data, loss_fn, optimizer, recipe, training.folder / name,
        device=device, resume=training.resume, max_seconds=seconds,
    )  # fmt: skip
    if run.target == "genre":
        return fitted.path, None, None
    predictions = predict_clips(fitted.model, data.held_out, fitted.settings, device)
    return fitted.path, predictions, true_labels(data.held_out, fitted.settings)


def join_folds(folds, device) -> Result:
    """One Result of what `train_fold` returned for every fold of a run."""
    paths, predictions, truths = zip(*folds, strict=True)
    members = [load_trained(path, device) for path in paths]
    every = [member.facts for member in members]
    facts = every[0] | {key: sum(f[key] for f in every) for key in ("epochs", "train_seconds")}
    facts["val"] = pd.DataFrame([f["val"] for f in every]).mean().to_dict()
    if predictions[0] is None:
        return Result(members, facts)
    numbers = np.repeat(np.arange(1, len(folds) + 1), [len(table) for table in predictions])
    predictions = pd.concat(predictions)
    folds = pd.Series(numbers, predictions.index)
    return Result(members, facts, predictions, pd.concat(truths), folds)


def genre_experiment(name) -> Experiment:
    """One of GENRE_NETWORKS as steps 5 and 7 train it, for a step that finds none to go on from."""
    return Experiment(
        name,
        GENRE_NETWORKS[name],
        make_model=make_classifier,
        make_loss=lambda data: nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam,
    )


def find_genre_checkpoint(training, name) -> Path | None:
    """Find the checkpoint of a genre run that its step has saved for these clips.

    A checkpoint of other clips or labels, of another seed, recipe, window or network is passed
    over with a message. Checkpoints of smoke runs are for smoke runs only, and those of a
    --subset run only for runs with the same N.
    """
    network, source = GENRE_NETWORKS[name], training.source
    owner = "step07_cnn" if network.kind == "cnn" else "step05_lstm"
    wanted = {
        "fingerprint": fingerprint(source.root, "genre", network.beat),
        "merge": source.merge,
        "seed": source.seed,
        "window": window_size(network),
        "recipe": training.recipe,
        "run": name,
    }
    if wanted["fingerprint"] is None:
        return None  # there are emotion clips only, which is enough for step 8
    if not source.smoke:
        wanted |= {"smoke": False, "subset": source.subset}
    own = [training.folder, training.out / "step09_transfer"]
    for folder in [*earlier_folders(training, owner), *own]:
        path = folder / name / "best.pt"
        if not path.exists() or path.with_name(UNFINISHED).exists():
            continue
        checkpoint = load_checkpoint(path)
        settings = checkpoint["settings"]
        odd = [key for key, value in wanted.items() if settings.get(key) != value]
        if checkpoint["spec"]["backbone_args"] != make_backbone(network).config:
            odd.append("network")
        if not odd:
            return path
        print(f"{name}: passing over {path}: made with another {' and '.join(odd)}")
    return None


def genre_models(training, names) -> dict[str, TrainedModel]:
    """Find the trained networks of genre runs; missing ones are trained here, with a message."""
    found, device = {}, training.source.device
    for name in names:
        if path := find_genre_checkpoint(training, name):
            found[name] = load_trained(path, device)
            facts = found[name].facts
            print(f"{name}: using {path}, {facts['epochs']} of {facts['planned_epochs']} epochs")
        else:
            print(f"{name}: no checkpoint of these clips in {training.out}; training it here")
    trained = train_all(training, [genre_experiment(name) for name in names if name not in found])
    return {name: found[name] if name in found else trained[name].members[0] for name in names}


def genre_val_scores(training) -> pd.DataFrame:
    """The genre networks that earlier runs have saved, by validation macro-F1, best first.

    Columns: val macro-F1, val clips, epochs (of planned).
    """
    rows = {}
    for name, network in GENRE_NETWORKS.items():
        if not network.plain and (path := find_genre_checkpoint(training, name)):
            facts = load_trained(path).facts
            epochs = f"{facts['epochs']} of {facts['planned_epochs']}"
            rows[name] = [facts["val"]["macro_f1"], facts["n_val"], epochs]
    table = pd.DataFrame(rows, ["val macro-F1", "val clips", "epochs"]).T.infer_objects()
    return table.sort_values("val macro-F1", ascending=False).rename_axis("genre network")


def predict_unlabelled(source, run) -> pd.DataFrame:
    """A result's predictions for the emotion clips without labels, averaged over its folds."""
    return average_predictions(
        predict_clips(fit.model, load_test(source, fit.settings), fit.settings, source.device)
        for fit in run.members
    )


def emotion_baselines(source, n_folds=1) -> dict[str, pd.DataFrame]:
    """`regression_baselines` for the held-out emotion clips: {baseline: clip x emotion}."""
    parts = [load_data(source, target="emotion", fold=i, n_folds=n_folds) for i in range(n_folds)]
    whole = parts[0].train.dataset
    folds = [(part.train.indices + part.val.indices, part.held_out.indices) for part in parts]
    features, targets = band_features(whole.store), whole.targets.numpy()
    found = regression_baselines(features, targets, folds, source.seed)
    ids = [clip_id for part in parts for clip_id in clip_ids(part.held_out)]
    return {name: pd.DataFrame(np.concatenate(one), ids, EMOTIONS) for name, one in found.items()}


def save_checkpoint(path, model, settings, **facts) -> None:
    """Save weights with all that is needed to rebuild the model and prepare its input."""
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    save_torch(path, {"spec": model_spec(model), "state": state, "settings": settings, **facts})


def load_checkpoint(path) -> dict:
    """Read a checkpoint: keys spec, state, settings (checked), epoch, val_score, facts."""
    checkpoint = load_torch(path)
    if not isinstance(checkpoint, dict) or not {"spec", "state", "settings"} <= set(checkpoint):
        raise InputError(f"{path}: no checkpoint of this project; delete it and train again")
    return {"facts": {}} | checkpoint


def load_model(path, device="cpu") -> tuple[nn.Module, dict]:
    """Rebuild a trained model; returns it, in evaluation mode, and its checkpoint."""
    checkpoint = load_checkpoint(path)
    try:
        model = build_model(checkpoint["spec"])
        model.load_state_dict(checkpoint["state"])
    except (KeyError, TypeError, RuntimeError) as error:
        fault = "its weights do not fit the model it describes; delete it and train again"
        raise InputError(f"{path}: {fault}") from error
    return model.to(device).eval(), checkpoint


def load_backbone(path, frozen=0) -> nn.Module:
    """The trained backbone alone, without its head, its first blocks frozen (step 9)."""
    model, _ = load_model(path)
    backbone = model.backbone.train()
    backbone.freeze(frozen)
    return backbone


def overfit_emotions(step, runs) -> None:
    """The --overfit-batch of a regressor: learn four batches by heart, show it, end the step.

    runs : {name: (Network, target)}, see `load_data` for the target
    """
    args, device, checks, facts = step.args, step.device, {}, {}
    for name, (network, target) in runs.items():
        crop = window_size(network)
        data = load_data(step.source, network.features, network.beat, target, crop=crop)
        seed_everything(args.seed)
        model = make_regressor(network, data).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
        recipe, loss = Recipe(OVERFIT_PASSES, args.lr, args.batch_size), RegressionLoss(data.std)
        check = train(model, data, loss, optimizer, recipe, device=device, overfit_batch=True)
        checks[name], facts[name] = check, {key: check.facts[key] for key in ("passes", "loss")}
    step.heading("Overfitting a few batches")
    step.table(pd.DataFrame(facts).T.astype({"passes": int}).rename_axis("run"))
    caption = "Regression loss on up to four fixed training batches, without regularisation"
    step.figure(plot_overfit(checks), "overfit", caption)
    learned = all(check.learned for check in checks.values())
    step.require(learned, f"four batches were not learned by heart: {facts}")
    step.finish(overfit=facts)
