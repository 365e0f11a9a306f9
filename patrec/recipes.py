"""The networks of the lab and how long each of them is trained."""

import dataclasses
import math
from typing import NamedTuple

from patrec.features import BANDS


class Network(NamedTuple):
    """A kind of network and its input."""

    kind: str  # 'lstm' or 'cnn'
    features: str  # 'mel', 'chroma' or 'fused' (both)
    beat: bool = False
    plain: bool = False  # the textbook LSTM: every frame, one direction, last step

    n_bands = property(lambda self: BANDS[self.features].stop - BANDS[self.features].start)


GENRE_NETWORKS = {  # trained in steps 5 and 7, used again in steps 6 and 8 to 11
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
# Over all epochs: enough to learn the made-up demo set in a short time.
DEMO_EXAMPLES = {"genre": 2_700, "emotion": 1_500}
BEAT_CROP = 32  # beats of a crop, in most music about 15 s
OVERFIT_PASSES = 300  # at most, over the four batches of the overfit check


class Budget(NamedTuple):
    """How many examples a kind of network is trained on; docs/experiments.md says why."""

    crop: int  # frames of a training example, and of a window in validation and test
    genre: int  # training examples over all epochs
    emotion: int  # the same for emotion; the LSTM's number was not tuned
    most_passes: int  # over the clips of a very small data set


BUDGETS = {
    "lstm": Budget(crop=640, genre=30_000, emotion=10_000, most_passes=80),  # 15 s
    "cnn": Budget(crop=256, genre=30_000, emotion=20_000, most_passes=100),  # 6 s
}


@dataclasses.dataclass
class Recipe:
    """The hyperparameters of one training."""

    epochs: int
    lr: float = 1e-3  # constant
    batch_size: int = 32
    crops: int = 1  # crops per clip and epoch
    window: int | None = None  # frames or beats of a window in scoring; None: the whole clip
    shift: int = 2  # mel bands, furthest random shift of a training clip up or down
    ema: float = 0.99  # decay per update of the averaged weights; 0: no average
    settled: float = 0.2  # the best epoch of this last share of the epochs is kept


# Besides optimiser and loss: what it does, and the change of log loss and macro-F1 without it, in
# cross-validation (docs/experiments.md), of the LSTM and of the CNN on mel.
PARTS = {
    "averaged weights": (
        "A running average of the weights is scored and saved, because they keep moving around a "
        "minimum. "
        "In the first epochs the average still holds early weights, so its scores lag behind.",
        {"lstm": ("+.06 ± .03", "+.02 ± .03"), "cnn": ("+.25 ± .06", "-.03 ± .02")},
    ),
    "shifted bands": (
        "Mel bands are moved up or down by up to 2, as if the music were a little higher or lower. "
        "Chroma is not moved.",
        {"lstm": ("+.12 ± .06", "+.02 ± .03"), "cnn": ("-.00 ± .03", "-.01 ± .02")},
    ),
}


def make_recipe(network, data, training) -> Recipe:
    """The recipe of a training: the flags of the step, or else the network's budget.

    The budget gives at least 20 and at most `most_passes` passes over the clips. If they are more
    than 60, an epoch takes several crops of each clip, because validation takes time too.
    """
    budget, n_clips, part = BUDGETS[network.kind], len(data.train), data.settings["part"]
    if epochs := training.epochs or (2 if training.smoke else 0):
        passes, crops = epochs, 1
    else:
        examples = getattr(budget, part)
        examples = min(examples, DEMO_EXAMPLES[part]) if training.demo else examples
        passes = min(max(examples / n_clips, 20), budget.most_passes)
        crops = math.ceil(passes / 60)
    epochs, lab = max(round(passes / crops), 1), training.recipe == "lab"
    sizes = {"batch_size": training.batch_size, "crops": crops, "window": window_size(network)}
    extras = {"shift": 0, "ema": 0.0} if lab or network.plain else {}
    return Recipe(epochs, training.lr, **sizes, **extras, settled=1.0 if lab else Recipe.settled)


def window_size(network) -> int | None:
    """Frames or beats of a crop or window; None: whole clips, for the textbook LSTM."""
    if network.plain:
        return None
    return BEAT_CROP if network.beat else BUDGETS[network.kind].crop
