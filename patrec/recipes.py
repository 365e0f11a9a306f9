"""Which networks the lab has, and how much each of them is shown."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from patrec.batches import Augment
from patrec.features import BANDS


class Network(NamedTuple):
    """One kind of network of the lab and its input."""

    kind: str  # 'lstm' or 'cnn'
    features: str  # 'mel', 'chroma' or 'fused' (both)
    beat: bool = False
    plain: bool = False  # the textbook LSTM: every frame, one direction, last step

    @property
    def n_bands(self) -> int:
        return BANDS[self.features].stop - BANDS[self.features].start


GENRE_NETWORKS = {  # the runs of steps 5 and 7, which steps 6, 8, 9, 10 and 11 go on from
    "mel": Network("lstm", "mel"),
    "beat_mel": Network("lstm", "mel", beat=True),
    "chroma": Network("lstm", "chroma"),
    "beat_chroma": Network("lstm", "chroma", beat=True),
    "fused": Network("lstm", "fused"),
    "beat_fused": Network("lstm", "fused", beat=True),
    "cnn_mel": Network("cnn", "mel"),
    "plain_mel": Network("lstm", "mel", plain=True),
}

LSTM_NAMES = [name for name, net in GENRE_NETWORKS.items() if net.kind == "lstm" and not net.plain]


class Budget(NamedTuple):
    """How much a kind of network is shown.

    The CNN's numbers and the LSTM's for genre were set near what cross-validation tried
    (docs/experiments.md), the others by judgement.
    """

    crop: int  # frames of a training example, and of a window when scoring
    genre: int  # training examples in all: the epochs follow from the number of clips
    emotion: int
    most_passes: int  # over a very small set


BUDGETS = {
    "lstm": Budget(crop=640, genre=30_000, emotion=10_000, most_passes=80),  # 15 s
    "cnn": Budget(crop=256, genre=100_000, emotion=20_000, most_passes=275),  # 6 s
}
DEMO_EXAMPLES = 2_700  # in all: enough to learn the made-up demo set, so that a first run ends soon


@dataclasses.dataclass
class Recipe:
    """How to train: the numbers of one training run."""

    epochs: int
    lr: float = 2e-3  # highest rate of the one-cycle schedule
    batch_size: int = 32
    crops: int = 1  # of a clip per epoch
    window: int | None = None  # frames of a window when scoring; None: the whole clip
    augment: Augment | None = None
    ema: float = 0.99  # decay per step of the averaged weights; 0: none
    warm_up: float = 0.1  # share of the steps in which the rate rises
    settled: float = 0.2  # the last share of the epochs, of which the best one is kept


def make_recipe(network, data, training, share=1.0) -> Recipe:
    """Plan a training: --epochs, --batch-size and --lr where given, else the network's budget.

    A small data set gets more passes, up to the budget's limit, so that as many examples are
    shown in all; a large one at least 20. Where that takes more than 60, an epoch shows each
    clip several times (another random crop each, where the input is crops): validation
    comes after each epoch, and takes about a twentieth of a CNN's training where an epoch shows
    each clip five times.

    share : of the budget, e.g. of a fine-tuning
    """
    budget, n_clips = BUDGETS[network.kind], len(data.train)
    genre = data.settings["part"] == "genre"
    epochs, crops = training.epochs or (2 if training.smoke else None), 1
    if epochs:
        epochs = max(round(epochs * share), 1)
    else:
        examples = budget.genre if genre else budget.emotion
        examples = (min(examples, DEMO_EXAMPLES) if training.demo else examples) * share
        passes = min(max(examples / n_clips, 20 * share), budget.most_passes * share)
        crops = math.ceil(passes / 60)
        epochs = max(round(passes / crops), 1)
    return Recipe(
        epochs,
        training.lr,
        training.batch_size,
        crops,
        window=window_size(network),
        augment=make_augment(network, len(data.names) if genre else 0),
        ema=0.0 if network.plain else 0.99,
    )


def window_size(network) -> int | None:
    """Frames of a crop or window; None: whole clips, of beats or for the textbook LSTM."""
    return None if network.beat or network.plain else BUDGETS[network.kind].crop


def make_augment(network, n_classes=0) -> Augment | None:
    """Random changes of batches. An LSTM masks by itself.

    Mixup was a tie for both in cross-validation; the CNN keeps it, the LSTM does without.
    """
    if network.plain:
        return None
    if network.kind == "cnn":
        return Augment(n_classes=n_classes)
    return Augment(mixup=0.0, mask_bands=0, mask_frames=0, n_classes=n_classes)


OVERFIT_PASSES = 300  # over the four batches of the overfit check, at most
