"""The lab's eleven steps: scripts, titles, questions, and which step builds on which."""

import re
from typing import NamedTuple

from patrec.errors import InputError


class LabStep(NamedTuple):
    """One step of the lab.

    script : name of the script and of its output folder, without .py
    questions : what the lab asks, in short, by item, in the lab's order
    builds_on : numbers of the steps whose checkpoints or scores it reads
    trains : whether it takes the flags of a training
    """

    script: str
    title: str
    questions: dict[str, str]
    builds_on: tuple[int, ...] = ()
    trains: bool = False


STEPS = {
    1: LabStep(
        "step01_spectrograms",
        "Mel spectrograms",
        {
            "0": "What does the data folder hold, and what does a GPU change?",
            "1a": "Which two clips of different genres were drawn?",
            "1b": "How are their mel spectrograms read, and what do the arrays hold?",
            "1c": "What do the two pictures show, and how do the two genres differ?",
        },
    ),
    2: LabStep(
        "step02_beat_sync",
        "Beat-synchronised spectrograms",
        {
            "2a": "How many time steps are there, is an LSTM efficient on them, and why?",
            "2b": "What changes when the frames of each beat are joined?",
        },
    ),
    3: LabStep(
        "step03_chroma",
        "Chromagrams",
        {"3": "Steps 1 and 2 with chromagrams: what do they show, what does the beat change?"},
    ),
    4: LabStep(
        "step04_dataset",
        "The data set and its classes",
        {
            "4a": "What does the PyTorch Dataset do, operation by operation, and what does it"
            " return?",
            "4b": "Which classes are merged, which are removed, and why?",
            "4c": "How many clips has each class before and after that?",
        },
    ),
    5: LabStep(
        "step05_lstm",
        "Genre recognition with LSTMs",
        {
            "5a": "How does the LSTM of the second lab read these spectrograms?",
            "5b": "Can the network overfit a few batches, and what does that prove?",
            "5c": "An LSTM on mel spectrograms",
            "5d": "An LSTM on beat-synchronised spectrograms",
            "5e": "An LSTM on chromagrams",
            "5f": "An LSTM on spectrograms and chromagrams together (extra credit)",
        },
        trains=True,
    ),
    6: LabStep(
        "step06_eval",
        "Evaluation",
        {
            "6a": "Accuracy of every model on the test sets",
            "6b": "Precision, recall and F1 of each class",
            "6c": "Macro-averaged precision, recall and F1",
            "6d": "Micro-averaged precision, recall and F1",
            "6": "What does each metric tell, when do they differ, and which one suits this task?",
        },
        builds_on=(5,),
    ),
    7: LabStep(
        "step07_cnn",
        "Genre recognition with a 2D CNN",
        {
            "7a": "What does each layer of a CNN respond to? (screenshots of ConvNetJS, digits)",
            "7b": "How well does a CNN of four layers recognise genres?",
            "7c": "What are convolution, batch normalisation, ReLU and max pooling for?",
            "7d": "Can the CNN overfit a few batches?",
            "7e": "How does the CNN compare with the LSTM of 5a?",
        },
        builds_on=(5,),
        trains=True,
    ),
    8: LabStep(
        "step08_regression",
        "Emotion by regression",
        {
            "8a": "How do the best LSTM and the CNN become regressors?",
            "8b": "Valence",
            "8c": "Energy",
            "8d": "Danceability",
            "8e": "Mean Spearman correlation over the three axes",
        },
        builds_on=(5,),
        trains=True,
    ),
    9: LabStep(
        "step09_transfer",
        "Transfer learning",
        {
            "9a": "What does the paper on transferable features conclude? (Yosinski et al., 2014)",
            "9b": "Which model was chosen for the transfer, and why?",
            "9c": "Which epoch was saved, by which metric on which set, and why?",
            "9d": "Fine-tuning on one axis of emotion",
            "9e": "How do the results compare with step 8?",
        },
        builds_on=(5, 7, 8),
        trains=True,
    ),
    10: LabStep(
        "step10_multitask",
        "Multitask learning",
        {
            "10a": "What does the paper on one model for many tasks conclude?"
            " (Kaiser et al., 2017)",
            "10b": "How does the loss join the three axes, and how are they weighted?",
            "10c": "Training one model for all three axes",
            "10d": "How do the results compare with step 8?",
        },
        builds_on=(7, 8, 9),
        trains=True,
    ),
    11: LabStep(
        "step11_latent",
        "Latent representations (optional)",
        {
            "11a": "Which vectors are taken from which models?",
            "11b": "How far does PCA separate the genres, and how do the models' spaces differ?",
            "11c": "What is different with the worst LSTM of step 5?",
            "11d": "Which other method of dimensionality reduction works best for these data?",
        },
        builds_on=(5, 7),
    ),
}


def find_step(text) -> int:
    """The number of the step that a user named: '5', '05', 'step05' or 'step05_lstm.py'."""
    stem = text.removesuffix(".py")
    match = re.fullmatch(r"(?:step)?(\d{1,2})", stem)
    for number, step in STEPS.items():
        if stem == step.script or (match and int(match[1]) == number):
            return number
    raise InputError(f"{text!r}: no such step; name one of 1 to {max(STEPS)}, or its script")
