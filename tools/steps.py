"""The lab's eleven steps: scripts, titles, and which step builds on which."""

import re
from typing import NamedTuple

from patrec.errors import InputError


class LabStep(NamedTuple):
    """One step of the lab.

    script : name of the script and of its output folder, without .py
    builds_on : numbers of the steps whose checkpoints or scores it reads
    trains : whether it takes the flags of a training
    """

    script: str
    title: str
    builds_on: tuple[int, ...] = ()
    trains: bool = False


STEPS = {
    1: LabStep("step01_spectrograms", "Mel spectrograms"),
    2: LabStep("step02_beat_sync", "Beat-synchronised spectrograms"),
    3: LabStep("step03_chroma", "Chromagrams"),
    4: LabStep("step04_dataset", "The data set and its classes"),
    5: LabStep("step05_lstm", "Genre recognition with LSTMs", trains=True),
    6: LabStep("step06_eval", "Evaluation", builds_on=(5,)),
    7: LabStep("step07_cnn", "Genre recognition with a 2D CNN", builds_on=(5,), trains=True),
    8: LabStep("step08_regression", "Emotion by regression", builds_on=(5,), trains=True),
    9: LabStep("step09_transfer", "Transfer learning", builds_on=(5, 7, 8), trains=True),
    10: LabStep("step10_multitask", "Multitask learning", builds_on=(7, 8, 9), trains=True),
    11: LabStep("step11_latent", "Latent representations (optional)", builds_on=(5, 7)),
}


def find_step(text) -> int:
    """The number of the step that a user named: '5', '05', 'step05' or 'step05_lstm.py'."""
    stem = text.removesuffix(".py")
    match = re.fullmatch(r"(?:step)?(\d{1,2})", stem)
    for number, step in STEPS.items():
        if stem == step.script or (match and int(match[1]) == number):
            return number
    raise InputError(f"{text!r}: no such step; name one of 1 to {max(STEPS)}, or its script")
