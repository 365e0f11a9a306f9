"""Functions against answers that were worked out by hand, in closed form, or by another library.

What extract_features computes is compared with librosa's own functions in test_features.py,
as is the percussive part.
"""

import math
import types

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import patch_everywhere
from scipy.stats import spearmanr
from sklearn.metrics import f1_score
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import common
import patrec.baselines
import patrec.batches
import patrec.clips
import patrec.labels
import patrec.recipes
import patrec.scores
import patrec.tables

# --- the lab's merge --------------------------------------------------------------------

# As the lab gives it: what each of the 20 classes becomes, None: left out.
LABS_MERGE = [
    ("Rock", "Rock"), ("Psych-Rock", "Rock"), ("Post-Rock", "Rock"), ("Psych-Folk", "Folk"),
    ("Folk", "Folk"), ("Metal", "Metal"), ("Punk", "Metal"), ("Electronic", "Electronic"),
    ("Chiptune", "Electronic"), ("Trip-Hop", "Trip-Hop"), ("Pop", "Pop"), ("Hip-Hop", "Hip-Hop"),
    ("Classical", "Classical"), ("Blues", "Blues"), ("Jazz", "Jazz"), ("Indie-Rock", None),
    ("Post-Punk", None), ("Soundtrack", None), ("International", None), ("Old-Time", None),
]  # fmt: skip


@pytest.mark.parametrize("genre, merged", LABS_MERGE)
def test_the_merge_is_the_labs(tmp_path, genre, merged):
    folder = tmp_path / "fma_genre_spectrograms"
    folder.mkdir()
    (folder / "train_labels.txt").write_text(
        f"Id\tGenre\n1.fused.full.npy.gz\t{genre}\n2.fused.full.npy.gz\tRock\n"
    )
    entries = patrec.labels.read_entries(tmp_path, "genre", "train", merge=True)
    assert [entry.label for entry in entries] == ([merged] if merged else []) + ["Rock"]
    as_it_is = patrec.labels.read_entries(tmp_path, "genre", "train", merge=False)
    assert [entry.label for entry in as_it_is] == [genre, "Rock"]


# --- classifier outputs -----------------------------------------------------------------


def test_logit_adjustment_by_hand():
    """Half the log of each share is taken off: log(1/4) / 2 = -log 2, log(1/16) / 2 = -2 log 2."""
    log2 = math.log(2)
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5]])
    adjusted = common.adjust_logits(logits, [11 / 16, 1 / 4, 1 / 16])
    by_hand = logits + torch.tensor([-0.5 * math.log(11 / 16), log2, 2 * log2])
    torch.testing.assert_close(adjusted, by_hand)
    assert adjusted.argmax(1).tolist() == [2, 2]  # unadjusted: 0, 0


# --- augmentation -----------------------------------------------------------------------


def fixed(monkeypatch, weights, partners):
    """Let mixup draw these weights and partners."""
    monkeypatch.setattr(
        torch.distributions.Beta, "sample", lambda self, shape: torch.tensor(weights)
    )
    monkeypatch.setattr(torch, "randperm", lambda n, **options: torch.tensor(partners))


def mixup(n_classes=0, alpha=0.3):
    return patrec.batches.Augment(
        mixup=alpha, shift_bands=0, mask_bands=0, mask_frames=0, n_classes=n_classes
    )


def test_mixup_by_hand(monkeypatch):
    """A weight of .25 means .75: the clip keeps the larger share, in input and target."""
    fixed(monkeypatch, [0.25, 0.6, 1.0], [1, 2, 0])
    x = torch.tensor([1.0, 2.0, 4.0])[:, None, None].repeat(1, 5, 6)
    before = x.clone()
    mixed, targets = mixup(n_classes=3)(x, torch.tensor([0, 1, 2]))
    expected = torch.tensor([0.75 * 1 + 0.25 * 2, 0.6 * 2 + 0.4 * 4, 4.0])
    torch.testing.assert_close(mixed, expected[:, None, None].expand(3, 5, 6))
    assert torch.equal(x, before)  # the caller's batch stays
    torch.testing.assert_close(
        targets, torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]])
    )


def test_mixup_of_one_and_of_three_emotions_by_hand(monkeypatch):
    fixed(monkeypatch, [0.9, 0.8], [1, 0])
    x = torch.tensor([0.0, 10.0])[:, None, None].expand(2, 4, 3)
    mixed, targets = mixup()(x, torch.tensor([0.2, 0.6]))
    torch.testing.assert_close(mixed[:, 0, 0], torch.tensor([1.0, 8.0]))
    torch.testing.assert_close(targets, torch.tensor([0.24, 0.52]))
    _, targets = mixup()(x, torch.tensor([[0.2, 0.0, 1.0], [0.6, 1.0, 1.0]]))
    torch.testing.assert_close(targets, torch.tensor([[0.24, 0.1, 1.0], [0.52, 0.8, 1.0]]))


def test_mixup_gives_inputs_and_targets_the_same_weight_and_partner():
    """Clip i is 2^i everywhere, its target the i-th unit vector: both tell who was mixed how."""
    torch.manual_seed(0)
    n = 12
    x = (2.0 ** torch.arange(n))[:, None, None].expand(n, 3, 4)
    seen = []
    for _ in range(200):
        mixed, targets = mixup(n_classes=n)(x, torch.arange(n))
        torch.testing.assert_close(mixed[:, 0, 0], targets @ (2.0 ** torch.arange(n)))
        torch.testing.assert_close(targets.sum(1), torch.ones(n))
        own = targets.diagonal()
        assert (own >= 0.5).all()
        seen.append(own)
    # The larger of w and 1 - w where w is drawn from Beta(.3, .3); one clip in n is its own
    # partner.
    draws = np.random.default_rng(0).beta(0.3, 0.3, 200_000)
    share = np.maximum(draws, 1 - draws).mean()
    assert torch.cat(seen).mean().item() == pytest.approx(share + (1 - share) / n, abs=0.01)
    # A weight of its own for each clip, not one for the batch.
    assert (torch.stack(seen).std(1) > 0.02).all()


def runs_of_zeros(row):
    """Lengths of the stretches of zeros in a 1-D tensor."""
    text = "".join("0" if value == 0 else "1" for value in row.tolist())
    return [len(part) for part in text.split("1") if part]


@pytest.mark.parametrize(
    "dim, size, widest, allowed",
    [(2, 128, 16, 16), (1, 200, 38, 38), (2, 12, 16, 3), (1, 40, 38, 10)],
)
def test_spectrogram_masks_are_single_stripes_of_every_width_up_to_the_widest(
    dim, size, widest, allowed
):
    """Never wider than a quarter of the 12 notes of a chromagram, the 40 frames of a beat clip."""
    torch.manual_seed(0)
    masks = {"mask_bands": widest if dim == 2 else 0, "mask_frames": widest if dim == 1 else 0}
    augment = patrec.batches.Augment(mixup=0, shift_bands=0, **masks)
    n = 3000
    x = torch.ones((n, size, 4) if dim == 1 else (n, 4, size))
    out, _ = augment(x, torch.zeros(n))
    rows = out[:, :, 0] if dim == 1 else out[:, 0]
    assert torch.equal(out, (rows[:, :, None] if dim == 1 else rows[:, None]).expand_as(x)), (
        "the stripe goes right through"
    )
    stripes = [runs_of_zeros(row) for row in rows]
    assert all(len(stripe) <= 1 for stripe in stripes)
    widths = np.array([sum(stripe) for stripe in stripes])
    assert widths.max() == allowed and set(widths) >= set(range(1, allowed + 1))
    assert widths.mean() == pytest.approx(allowed / 2, rel=0.07)  # uniform between 0 and the widest
    blanked = (rows == 0).float().mean(0)
    # Every place is hit (but today the very first one), and no part of the middle more
    # often than another.
    assert (blanked[1:] > 0).all() and blanked[size // 4 : -size // 4].std() < 0.2 * blanked.mean()


@pytest.mark.parametrize("n_bands", [12, 128, 140])
def test_bands_are_shifted_by_up_to_two_and_notes_are_not(n_bands):
    """The edges repeat the outermost band; chroma stays: a shift would be another key."""
    torch.manual_seed(0)
    n, n_mel = 500, 128 if n_bands >= 128 else 0
    x = torch.arange(float(n_bands)).expand(n, 3, n_bands)
    augment = patrec.batches.Augment(mixup=0, shift_bands=2, mask_bands=0, mask_frames=0)
    out, targets = augment(x, torch.arange(float(n)))
    assert torch.equal(out[..., n_mel:], x[..., n_mel:])
    assert torch.equal(targets, torch.arange(float(n)))
    if n_mel:
        shifts = out[:, 0, 64] - 64
        assert sorted(set(shifts.tolist())) == [-2, -1, 0, 1, 2]
        bands = (torch.arange(128)[None] + shifts[:, None]).clamp(0, 127)
        assert torch.equal(out[..., :128], bands[:, None].expand(n, 3, 128))
        assert torch.bincount((shifts + 2).long()).min() > 60  # of 100 each


# --- losses -----------------------------------------------------------------------------


def test_regression_loss_by_hand():
    """Errors 1, -1, 0, 2, a spread of 2: (1 + 1 + 0 + 4) / 4 / 4 = 3 / 8; r = 7 / sqrt(70)."""
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0])
    outputs = targets + torch.tensor([1.0, -1.0, 0.0, 2.0])  # 2, 1, 3, 6: centred -1, -2, 0, 3
    # Targets centred: -1.5, -.5, .5, 1.5. Products 1.5 + 1 + 0 + 4.5 = 7; squares 14 and 5.
    expected = 3 / 8 + 0.5 * (1 - 7 / math.sqrt(14 * 5))
    assert common.regression_loss(outputs, targets, 2.0).item() == pytest.approx(expected, rel=1e-6)
    loss = common.RegressionLoss([2.0])(outputs[:, None], targets[:, None])
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("outputs, targets, expected", [
    ([0.9], [0.4], (0.5 / 0.25) ** 2),  # of one clip there is no correlation
    # Of two it would always be 1 or -1.
    ([0.9, 0.1], [0.4, 0.6], ((0.5 / 0.25) ** 2 + (0.5 / 0.25) ** 2) / 2),
    # A constant answer correlates with nothing.
    ([0.5, 0.5, 0.5], [0.0, 0.5, 1.0], (4 + 0 + 4) / 3 + 0.5),
    ([0.0, 0.5, 1.0], [0.0, 0.5, 1.0], 0.0),
    ([1.0, 0.5, 0.0], [0.0, 0.5, 1.0], (16 + 0 + 16) / 3 + 1.0),
])  # fmt: skip
def test_regression_loss_of_small_batches_and_constants(outputs, targets, expected):
    outputs = torch.tensor(outputs, requires_grad=True)
    loss = common.regression_loss(outputs, torch.tensor(targets), 0.25)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert outputs.grad.isfinite().all()


MULTITASK_STD = (0.5, 0.25, 0.125)
MULTITASK_LOSSES = (1.0, 0.0, 50 / 3 + 0.5)  # of `multitask_batch`


def multitask_batch():
    """Three clips of which every loss is known.

    Valence is one spread off everywhere and perfectly ordered: 1. Energy is right: 0. Danceability
    is 5, 4 and 3 spreads off: 50 / 3, and its answers are all alike, so + 1/2.
    """
    targets = torch.tensor([[0.0, 0.2, 0.25], [0.5, 0.4, 0.375], [1.0, 0.9, 0.5]])
    errors = torch.tensor([[0.5, 0.0, 0.625], [0.5, 0.0, 0.5], [0.5, 0.0, 0.375]])
    return targets + errors, targets


def test_multitask_loss_by_hand():
    loss = common.RegressionLoss(MULTITASK_STD)
    assert loss.terms(*multitask_batch()).tolist() == pytest.approx(MULTITASK_LOSSES, rel=1e-5)
    assert loss(*multitask_batch()).item() == pytest.approx(sum(MULTITASK_LOSSES), rel=1e-5)


def learned_value(losses, log_var):
    """What the loss with learned weights is by its documentation: s is log_var of a task."""
    return sum(math.exp(-s) * loss / 2 + s / 2 for loss, s in zip(losses, log_var, strict=True))


def test_learned_weights_by_hand():
    loss = common.RegressionLoss(MULTITASK_STD, learned=True)
    for log_var in ([0, 0, 0], [0.5, -1.0, 2.0]):
        with torch.no_grad():
            loss.log_var.copy_(torch.tensor(log_var))
        expected = learned_value(MULTITASK_LOSSES, log_var)
        assert loss(*multitask_batch()).item() == pytest.approx(expected, rel=1e-5)


def test_learned_weights_end_where_their_minimum_is():
    """exp(-s) L / 2 + s / 2 is least at s = log L: the weight of a task becomes 1 / (2 L)."""
    outputs, targets = multitask_batch()
    # Half a spread: a loss of 0 would have no minimum.
    outputs = outputs + torch.tensor([0.0, 0.125, 0.0])
    losses = torch.tensor([1.0, 0.25, MULTITASK_LOSSES[2]])
    loss = common.RegressionLoss(MULTITASK_STD, learned=True)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(outputs, targets)
        value.backward()
        return value

    optimizer.step(closure)
    best = torch.log(losses)
    torch.testing.assert_close(loss.log_var.detach(), best, atol=1e-3, rtol=1e-3)
    least = loss(outputs, targets).item()
    assert least == pytest.approx((1 + best).sum().item() / 2, rel=1e-4)  # each L / (2 L) + s / 2
    assert least == pytest.approx(learned_value(losses.tolist(), best.tolist()), rel=1e-4)
    for step in (-0.3, 0.3):  # and it is a minimum
        for task in range(3):
            aside = best.tolist()
            aside[task] += step
            assert learned_value(losses.tolist(), aside) > least


def test_weights_that_are_not_learned_stay_at_one():
    loss = common.RegressionLoss(MULTITASK_STD)
    assert not any(weights.requires_grad for weights in loss.parameters())


# --- training ---------------------------------------------------------------------------


class OneWeight(nn.Module):
    """A network that answers with its one weight, so that every step of it can be followed."""

    def __init__(self):
        super().__init__()
        self.backbone, self.config = nn.Identity(), {}
        self.backbone.config = {}
        self.weight = nn.Parameter(torch.tensor(0.0))

    def forward(self, x, lengths):
        return self.weight * x[:, 0, 0]


class MeanAnswer(nn.Module):
    """A loss of gradient 1 at every step: Adam moves the weight by about the learning rate."""

    def forward(self, outputs, targets):
        return outputs.mean()


def one_cycle(step, n_steps, highest, warm_up=0.1):
    """Rate and momentum of Smith's one-cycle schedule, along cosines.

    The rate goes up from 1/25 and down to 1/250,000 of the highest, the momentum against it.
    """
    turn = warm_up * n_steps - 1

    def along_cosine(start, top, end):
        first, last, share = (
            (start, top, step / turn)
            if step <= turn
            else (top, end, (step - turn) / (n_steps - 1 - turn))
        )
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    return along_cosine(highest / 25, highest, highest / 25 / 1e4), along_cosine(0.95, 0.85, 0.95)


@pytest.mark.parametrize("steps_per_epoch, decay", [(4, 1 - 10 / 40), (120, 0.99)])
def test_rate_and_running_average_follow_their_formulas(
    tmp_path, monkeypatch, steps_per_epoch, decay
):
    """In a short run the average must forget its start too: decay at most 1 - 10 / steps."""
    model, n_steps, validated = OneWeight(), 10 * steps_per_epoch, []
    x, targets = torch.ones(steps_per_epoch, 1, 1), torch.zeros(steps_per_epoch)
    data = torch.utils.data.TensorDataset(x, targets, torch.ones(steps_per_epoch, dtype=torch.long))
    part = torch.utils.data.Subset(data, list(range(steps_per_epoch)))
    settings = {"part": "genre", "names": ["a"], "priors": [1.0]}
    toy = common.Data(part, part, part, ["a"], None, None, settings)
    recipe = patrec.recipes.Recipe(epochs=10, lr=0.1, batch_size=1)

    def score(outputs, targets, settings):
        validated.append(outputs[0].item())  # the averaged weight is what is validated
        return 0.0

    patch_everywhere(monkeypatch, "validation_score", score)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=0.0)
    result = common.train(model, toy, MeanAnswer(), optimizer, recipe, tmp_path)
    weight, average, gradient, averages = 0.0, 0.0, 0.0, []
    for step in range(n_steps):
        rate, momentum = one_cycle(step, n_steps, 0.1)
        gradient = momentum * gradient + (1 - momentum)
        weight -= rate * gradient / (1 - momentum ** (step + 1))
        average = decay * average + (1 - decay) * weight if step else weight
        averages.append(average)
    np.testing.assert_allclose(
        validated, averages[steps_per_epoch - 1 :: steps_per_epoch], rtol=1e-3
    )
    # What is written is the rate that an epoch begins with.
    rates = [one_cycle(epoch * steps_per_epoch, n_steps, 0.1)[0] for epoch in range(10)]
    np.testing.assert_allclose(result.history["lr"], rates, rtol=1e-3)


@pytest.mark.parametrize("n_clips, examples, most_passes, expected", [
    (1000, 30_000, 80, (30, 1)),  # 30 passes
    (10_000, 30_000, 80, (20, 1)),  # 3 would be too few: at least 20
    (365, 100_000, 275, (55, 5)),  # 274 passes: 5 crops of a clip in each of 55 epochs
    (10, 100_000, 275, (55, 5)),  # at most 275 passes
    (500, 30_000, 80, (60, 1)),  # exactly the longest that need no second crop
    (400, 30_000, 80, (38, 2)),  # 75 passes, 37.5 epochs
])  # fmt: skip
def test_planned_epochs_by_hand(monkeypatch, n_clips, examples, most_passes, expected):
    args = types.SimpleNamespace(epochs=None, smoke=False, lr=0.001, batch_size=32)
    network = patrec.recipes.Network("lstm", "mel")
    for part, budget in (("genre", (examples, 1)), ("emotion", (1, examples))):
        budget = patrec.recipes.Budget(640, *budget, most_passes)
        patch_everywhere(monkeypatch, "BUDGETS", {"lstm": budget})
        settings = {"part": part}
        data = types.SimpleNamespace(train=range(n_clips), names=["a"], settings=settings)
        recipe = patrec.recipes.make_recipe(network, data, args)
        assert (recipe.epochs, recipe.crops) == expected
    args.smoke = True
    assert patrec.recipes.make_recipe(network, data, args).epochs == 2


def test_share_of_a_budget_by_hand(monkeypatch):
    """A fifth of 75 passes is 15; of the 20 that are the least, 4."""
    budget = patrec.recipes.Budget(crop=640, genre=30_000, emotion=1, most_passes=80)
    patch_everywhere(monkeypatch, "BUDGETS", {"lstm": budget})
    args = types.SimpleNamespace(epochs=None, smoke=False, lr=0.001, batch_size=32)
    for n_clips, expected in ((400, (15, 1)), (100_000, (4, 1)), (10, (16, 1))):
        settings = {"part": "genre"}
        data = types.SimpleNamespace(train=range(n_clips), names=["a"], settings=settings)
        recipe = patrec.recipes.make_recipe(
            patrec.recipes.Network("lstm", "mel"), data, args, share=0.2
        )
        assert (recipe.epochs, recipe.crops) == expected


# --- scores -----------------------------------------------------------------------------


@pytest.mark.parametrize("targets, predictions, by_hand", [
    ([0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 2, 3], (2 / 3 + 4 / 5 + 1 + 1) / 4),
    # Class 2 occurs nowhere and counts as 0, as in a report on all classes; 3 was only answered.
    ([0, 0, 1], [3, 3, 1], (0 + 1 + 0 + 0) / 4),
    ([2, 2, 2], [2, 2, 2], 1 / 4),
    ([0, 1], [1, 0], 0.0),
])  # fmt: skip
def test_macro_f1_by_hand_and_by_scikit_learn(targets, predictions, by_hand):
    targets, predictions = np.array(targets), np.array(predictions)
    assert common.macro_f1(targets, predictions, 4) == pytest.approx(by_hand)
    assert common.macro_f1(targets, predictions, 4) == pytest.approx(
        f1_score(targets, predictions, labels=range(4), average="macro", zero_division=0)
    )


def test_macro_f1_is_scikit_learns_on_random_answers():
    rng = np.random.default_rng(0)
    for n in (1, 5, 30, 300):
        targets, predictions = rng.integers(0, 10, n), rng.integers(0, 10, n)
        labels = {"labels": range(10), "average": "macro", "zero_division": 0}
        expected = f1_score(targets, predictions, **labels)
        assert common.macro_f1(targets, predictions, 10) == pytest.approx(expected)


def test_a_score_its_interval_and_the_validation_score_are_one_statistic():
    """Over all classes: three of four occur, all right, so 3/4 and not 1."""
    answers = np.repeat([0, 1, 2], 20)
    scores = patrec.scores.classification_scores(answers, answers, list("abcd"))
    assert scores["macro_f1"] == 0.75 and scores["macro_f1_ci95"] == [0.75, 0.75]
    frame = pd.DataFrame(np.eye(4)[answers], columns=list("abcd"))
    true = pd.Series(np.array(list("abcd"))[answers])
    other = pd.DataFrame(np.eye(4)[np.zeros(60, int)], columns=list("abcd"))
    gain = patrec.scores.paired_difference(true, frame, other)["macro_f1"]
    assert gain == pytest.approx(0.75 - 2 * 20 / 80 / 4)


def test_bootstrap_interval_of_coin_tosses():
    """A share of 30% of 400: its standard error is sqrt(.3 x .7 / 400) = .0229."""
    hits = np.arange(400) < 120
    low, high = patrec.scores.bootstrap(lambda rows: hits[rows].mean(), 400)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.006) and high == pytest.approx(
        0.3 + half, abs=0.006
    )
    assert patrec.scores.bootstrap(lambda rows: float(len(rows)), 7) == [
        7,
        7,
    ], "a resample is as large as the set"
    assert patrec.scores.bootstrap(lambda rows: float(len(set(rows))), 50)[1] < 40, (
        "clips are drawn with replacement"
    )


def test_spearman_with_ties_and_constants():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5."""
    targets, predictions = np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3, 0.4])
    assert patrec.scores.spearman(targets, predictions) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert patrec.scores.spearman(targets, -(predictions**3)) == pytest.approx(
        -4.5 / math.sqrt(4.5 * 5)
    )
    assert (
        patrec.scores.spearman(targets, np.full(4, 0.3))
        == 0
        == patrec.scores.spearman(np.full(4, 0.3), predictions)
    )
    rng = np.random.default_rng(1)
    many = rng.integers(0, 5, 60).astype(float), rng.integers(0, 7, 60).astype(float)
    assert patrec.scores.spearman(*many) == pytest.approx(spearmanr(*many).statistic)


# --- answers of several models ----------------------------------------------------------


def test_average_is_taken_clip_by_clip():
    """By position, a table in another order would answer for another clip."""
    first = pd.DataFrame({"a": [0.0, 2.0, 4.0], "b": [1.0, 1.0, 1.0]}, ["7", "10", "9"])
    second = pd.DataFrame({"b": [3.0, 5.0, 1.0], "a": [8.0, 0.0, 2.0]}, ["9", "7", "10"])
    third = first * 0
    mean = patrec.scores.average_predictions(table for table in (first, second, third))
    by_hand = pd.DataFrame({"a": [0.0, 4 / 3, 4.0], "b": [2.0, 2 / 3, 4 / 3]}, ["7", "10", "9"])
    pd.testing.assert_frame_equal(mean.loc[by_hand.index, ["a", "b"]], by_hand)
    pd.testing.assert_frame_equal(patrec.scores.average_predictions([first]), first)


def genre_answers(classes, rows):
    """{clip: class that is answered} as a table of log-probabilities."""
    table = np.log([[0.8 if name == said else 0.1 for name in classes] for said in rows.values()])
    return pd.DataFrame(table, list(rows), classes)


def test_paired_difference_of_genres_by_hand():
    """Four clips: one model has three right, the other two, of which one the first has not."""
    true = pd.Series({"4": "a", "30": "a", "2": "b", "1": "b"})
    first = genre_answers(["a", "b"], {"4": "a", "30": "a", "2": "b", "1": "a"})
    # Rows and columns in another order, and a clip that the first has not answered.
    second = genre_answers(["b", "a"], {"1": "b", "2": "a", "77": "b", "30": "b", "4": "a"})
    found = patrec.scores.paired_difference(true, first, second)
    assert found["n_clips"] == 4 and found["accuracy"] == pytest.approx(3 / 4 - 2 / 4)
    # F1 of a and b: 4/5 and 2/3 against 1/2 and 1/2.
    assert found["macro_f1"] == pytest.approx((4 / 5 + 2 / 3) / 2 - 1 / 2)
    assert (found["only_first"], found["only_second"]) == (2, 1)
    back = patrec.scores.paired_difference(true, second, first)
    for key in ("accuracy", "macro_f1"):
        assert back[key] == pytest.approx(-found[key])
        assert found[f"{key}_ci95"][0] <= found[key] <= found[f"{key}_ci95"][1]
    assert (back["only_first"], back["only_second"]) == (1, 2)


def test_paired_difference_of_emotions_by_hand():
    """Positive where the first is better; clips are matched by id, in whatever order."""
    ids = ["12", "3", "401", "5", "60"]
    true = pd.DataFrame({"energy": [0.1, 0.3, 0.5, 0.7, 0.9], "valence": 0.5}, ids)
    first = pd.DataFrame({"energy": [1.0, 2.0, 3.0, 4.0, 5.0]}, ids)
    # The last two exchanged: 1 - 6 (1 + 1) / (5 x 24) = .9.
    second = pd.DataFrame({"energy": [1.0, 2.0, 3.0, 5.0, 4.0]}, ids)
    turned = second.iloc[[3, 0, 4, 2, 1]]
    for one, other, sign in ((first, turned, 1), (turned, first, -1)):
        found = patrec.scores.paired_difference(true, one, other)
        assert found["n_clips"] == 5 and found["spearman"] == pytest.approx(sign * 0.1)
        low, high = found["spearman_ci95"]
        assert low <= found["spearman"] <= high
    line = patrec.tables.difference_line(
        "a", "b", patrec.scores.paired_difference(true, first, second)
    )
    assert line.startswith("`a` minus `b`: Spearman +0.100 [") and line.endswith("; 5 clips")


# --- time -------------------------------------------------------------------------------


def test_windows_by_hand():
    """Of 10 frames, windows of 4: three, or with two more between; a short clip repeats its own."""
    x = torch.stack([torch.arange(10.0), torch.arange(100.0, 110.0)])[:, :, None]
    x[1, 6:] = 0  # padding of a clip of 6
    cut, lengths = patrec.batches.cut_windows(x, torch.tensor([10, 6]), 4, overlap=False)
    assert cut[:3, :, 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert cut[3:, :, 0].tolist() == [
        [100, 101, 102, 103],
        [101, 102, 103, 104],
        [102, 103, 104, 105],
    ]
    assert lengths.tolist() == [4] * 6
    cut, lengths = patrec.batches.cut_windows(x, torch.tensor([10, 3]), 4)
    assert cut[:5, :, 0].tolist() == [
        [0, 1, 2, 3],
        [1, 2, 3, 4],
        [3, 4, 5, 6],
        [4, 5, 6, 7],
        [6, 7, 8, 9],
    ]
    assert cut[5:, 0, 0].tolist() == [100] * 5 and lengths.tolist() == [4] * 5 + [3] * 5


def test_frames_are_averaged_by_hand():
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0], [2.0, 4.0, 6.0, 0.0, 0.0]])[:, :, None]
    means, lengths = common.average_frames(x, torch.tensor([5, 3]), 2)
    assert means[..., 0].tolist() == [[2, 6, 9], [3, 6, 0]] and lengths.tolist() == [3, 2]
    same, lengths = common.average_frames(x, torch.tensor([5, 3]), 1)
    assert torch.equal(same, x) and lengths.tolist() == [5, 3]


def test_steps_are_described_by_hand():
    """Means, population standard deviations, mean absolute changes; padding counts in none."""
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0], [2.0, 6.0, 4.0, 0.0, 0.0]])[:, :, None]
    steps, lengths = common.frame_statistics(x, torch.tensor([5, 3]), 2)
    assert lengths.tolist() == [3, 2]
    # Changes: clip 1: 0, 2 | 2, 2 | 2; clip 2: 0, 4 | 2 (the next one leads into the padding).
    by_hand = [[[2, 1, 1], [6, 1, 2], [9, 0, 2]], [[4, 2, 2], [4, 0, 2]]]
    np.testing.assert_allclose(steps[0], by_hand[0], atol=1e-5)
    np.testing.assert_allclose(steps[1, :2], by_hand[1], atol=1e-5)


def test_mean_and_maximum_of_a_clips_own_steps_by_hand():
    x = torch.tensor(
        [[[1.0, -1.0], [3.0, -5.0], [8.0, 9.0]], [[-2.0, 0.5], [-4.0, 0.25], [-6.0, 0.0]]]
    )
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])[:, :, None]
    assert common.masked_mean_max(x, mask).tolist() == [[2, -3, 3, -1], [-4, 0.25, -2, 0.5]]


@pytest.mark.parametrize("readout", ["last", "pool"])
@pytest.mark.parametrize("n_layers, bidirectional", [(1, True), (2, True), (1, False)])
def test_lstm_is_torchs_own_on_packed_sequences(readout, n_layers, bidirectional):
    """Clips of unequal lengths, the same weights:
    torch's nn.LSTM on a packed sequence is the reference.
    """
    torch.manual_seed(0)
    lengths = torch.tensor([9, 4, 1, 7])
    x = torch.randn(4, 9, 6).masked_fill(
        torch.arange(9)[None, :, None] >= lengths[:, None, None], 0.0
    )
    options = {
        "hidden_size": 5,
        "n_layers": n_layers,
        "bidirectional": bidirectional,
        "readout": readout,
    }
    network = common.LSTMBackbone(6, **options).eval()
    reference = nn.LSTM(6, 5, n_layers, batch_first=True, bidirectional=bidirectional)
    mine = [module for module in network.modules() if isinstance(module, nn.LSTM)]
    suffixes = [
        f"_l{layer}{way}"
        for layer in range(n_layers)
        for way in ("", "_reverse")[: 1 + bidirectional]
    ]
    with torch.no_grad():
        for module, suffix in zip(mine, suffixes, strict=True):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(reference, kind + suffix).copy_(getattr(module, f"{kind}_l0"))
        packed, (hidden, _) = reference(
            pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        )
        outputs, _ = pad_packed_sequence(packed, batch_first=True)
        vector = network(x, lengths)
    if readout == "last":
        expected = torch.cat(list(hidden[-2:] if bidirectional else hidden[-1:]), dim=1)
    else:
        clips = [outputs[i, :n] for i, n in enumerate(lengths)]
        expected = torch.stack([torch.cat([clip.mean(0), clip.amax(0)]) for clip in clips])
    torch.testing.assert_close(vector, expected, atol=1e-6, rtol=1e-5)


# --- bands ------------------------------------------------------------------------------


def clip_store(arrays):
    """A ClipStore of (140, T) arrays."""
    lengths = torch.tensor([array.shape[1] for array in arrays])
    frames = torch.from_numpy(np.concatenate(arrays, axis=1).T.astype(np.float16).copy())
    entries = [patrec.labels.Entry(str(i), None, "Rock") for i in range(len(arrays))]
    return patrec.clips.ClipStore(
        entries, frames, lengths.cumsum(0) - lengths, lengths, [str(i) for i in range(len(arrays))]
    )


def random_clips(lengths, seed=0):
    """Clips with slow and fast changes, each about another mean, in the steps of half precision."""
    rng = np.random.default_rng(seed)
    clips = []
    for n in lengths:
        drift = 6 * np.sin(np.linspace(0, rng.uniform(2, 9), n)) + rng.uniform(-40, -20)
        mel = drift + 5 * rng.standard_normal((128, n)) + np.linspace(-10, 10, 128)[:, None]
        clips.append(
            np.vstack([np.clip(mel, -80, 0), rng.random((12, n))])
            .astype(np.float16)
            .astype(np.float64)
        )
    return clips


def test_band_features_are_numpys():
    clips = random_clips([700, 301, 2, 1])
    features = patrec.baselines.band_features(clip_store(clips))
    assert features.shape == (4, 640)
    for row, clip in zip(features, clips, strict=True):
        mel = clip[:128]
        change = np.abs(np.diff(mel, axis=1)).mean(1) if mel.shape[1] > 1 else np.zeros(128)
        low, high = np.percentile(mel, 10, axis=1), np.percentile(mel, 90, axis=1)
        np.testing.assert_allclose(
            row, np.concatenate([mel.mean(1), mel.std(1), low, high, change]), atol=1e-3
        )
    assert np.array_equal(
        patrec.baselines.band_features(clip_store(clips), [2, 0]), features[[2, 0]]
    )


@pytest.mark.parametrize(
    "features, rows",
    [("mel", slice(0, 128)), ("chroma", slice(128, 140)), ("fused", slice(0, 140))],
)
def test_band_statistics_are_those_of_the_given_clips(features, rows):
    """Exactly numpy's where every frame is read; of long clips a sample, which must come close."""
    clips = random_clips([200, 150, 90, 255])
    mean, std = common.band_statistics(clip_store(clips), [0, 2, 3], features)
    frames = np.concatenate([clips[i] for i in (0, 2, 3)], axis=1)[rows]
    np.testing.assert_allclose(mean, frames.mean(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(std, frames.std(1), rtol=1e-4, atol=1e-4)
    long = random_clips([1293, 1293, 1280, 1291, 1293], seed=1)
    mean, std = common.band_statistics(clip_store(long), [0, 1, 3, 4], features)
    frames = np.concatenate([long[i] for i in (0, 1, 3, 4)], axis=1)[rows]
    standard_error = frames.std(1) / math.sqrt(4 * 256)
    assert (np.abs(mean.numpy() - frames.mean(1)) < 4 * standard_error).all()
    np.testing.assert_allclose(std, frames.std(1), rtol=0.12)


@pytest.mark.parametrize("name", patrec.recipes.GENRE_NETWORKS)
def test_a_run_hears_what_its_name_says(name):
    network = patrec.recipes.GENRE_NETWORKS[name]
    assert network.features == name.split("_")[-1]
    assert network.beat == name.startswith("beat_")
    assert network.kind == ("cnn" if name.startswith("cnn") else "lstm")
    assert network.plain == name.startswith("plain")
    assert network.n_bands == {"mel": 128, "chroma": 12, "fused": 140}[network.features]
    crop = None if network.beat or network.plain else {"cnn": 256, "lstm": 640}[network.kind]
    assert patrec.recipes.window_size(network) == crop


GENRE = {"part": "genre", "names": ["a", "b"], "priors": [0.9, 0.1], "window": None}


def test_the_validation_score_is_macro_f1_of_adjusted_answers():
    logits = torch.tensor([[1.0, 0.9], [3.0, 0.0], [3.0, 0.0], [3.0, 0.0]])
    assert common.validation_score(logits, torch.tensor([1, 0, 0, 0]), GENRE) == 1
    score = common.validation_score(
        logits, torch.tensor([0, 0, 0, 1]), GENRE | {"priors": [0.5] * 2}
    )
    assert score == pytest.approx((6 / 7 + 0) / 2)


class Says(nn.Module):
    """Answers with the first two values of a clip, averaged over its frames."""

    def forward(self, x, lengths):
        return x[:, :, :2].mean(1)


def test_each_clip_gets_its_own_adjusted_answer():
    n = 150  # more than two batches
    frames = torch.zeros(n, 140)
    frames[:, 0], frames[:, 1] = -torch.arange(n) / 10, -torch.arange(n).flip(0) / 10
    entries = [patrec.labels.Entry(str(1000 - i), None, "a") for i in range(n)]
    store = patrec.clips.ClipStore(
        entries, frames.half(), torch.arange(n), torch.ones(n).long(), [""] * n
    )
    answers = common.predict_clips(
        Says(), common.SpectrogramDataset(store, np.zeros(n, int)), GENRE
    )
    assert list(answers.index) == [str(1000 - i) for i in range(n)]
    logits = frames.half().float()[:, :2] - 0.5 * torch.tensor([0.9, 0.1]).log()
    np.testing.assert_allclose(answers, logits.log_softmax(1), atol=1e-4)
    assert list(answers.columns) == ["a", "b"]


def test_windows_of_a_clip_are_averaged():
    """Windows of 4 in clips of 10, side by side: 0-3, 3-6, 6-9."""
    x = torch.stack([torch.arange(10.0), 100 + torch.arange(10.0) ** 2])[:, :, None].repeat(1, 1, 2)
    loader = [(x, torch.tensor([0, 1]), torch.tensor([10, 10]))]
    outputs, _ = common.predict(Says(), loader, window=4, overlap=False)
    first = np.mean([1.5, 4.5, 7.5])
    second = 100 + np.mean([14 / 4, (9 + 16 + 25 + 36) / 4, (36 + 49 + 64 + 81) / 4])
    np.testing.assert_allclose(outputs[:, 0], [first, second], rtol=1e-6)


def test_rows_of_predictions_by_hand():
    true = pd.DataFrame({"valence": [0.1, 0.2], "energy": [0.3, 0.4]}, ["7", "10"])
    answers = pd.DataFrame({"energy": [0.8, 0.9], "valence": [0.6, 0.5]}, ["10", "7"])
    folds = pd.Series({"7": 2, "10": 1})
    rows = patrec.tables.prediction_rows(
        "cnn", true, answers, test_set="held out", seed=3, fold=folds
    )
    found = {(r.clip, r.target): (r.truth, r.prediction, r.fold) for r in rows.itertuples()}
    assert found == {
        ("10", "energy"): (0.4, 0.8, 1), ("7", "energy"): (0.3, 0.9, 2),
        ("10", "valence"): (0.2, 0.6, 1), ("7", "valence"): (0.1, 0.5, 2),
    }  # fmt: skip
    true = pd.Series({"7": "b", "10": "a"})
    answers = pd.DataFrame({"b": [-1.0, -3.0], "a": [-2.0, -0.1]}, ["10", "7"])
    rows = patrec.tables.prediction_rows("cnn", true, answers, test_set="test", seed=3)
    assert rows[["clip", "truth", "prediction"]].to_numpy().tolist() == [
        ["10", "a", "b"], ["7", "b", "a"]
    ]  # fmt: skip


def test_submission_by_hand(tmp_path):
    answers = pd.DataFrame(
        {"energy": [0.5, -0.2], "danceability": [1.3, 0.25], "valence": [0.1, 0.2]}, ["9", "10"]
    )
    patrec.tables.write_submission(tmp_path / "submission.csv", answers)
    assert (tmp_path / "submission.csv").read_text().splitlines() == [
        "Id.fused.full.npy.gz,valence,energy,danceability",
        "9,0.100000,0.500000,1.000000",
        "10,0.200000,0.000000,0.250000",
    ]


def test_unlabelled_clips_are_answered_by_all_folds(monkeypatch):
    patch_everywhere(monkeypatch, "load_test", lambda source, settings: settings)
    patch_everywhere(
        monkeypatch,
        "predict_clips",
        lambda model, *_: pd.DataFrame({"energy": [model, 2 * model]}, ["7", "10"]),
    )
    folds = [types.SimpleNamespace(model=model, settings={}) for model in (0.1, 0.2, 0.6)]
    source = types.SimpleNamespace(device="cpu")
    mean = common.predict_unlabelled(source, types.SimpleNamespace(members=folds))
    assert mean["energy"].tolist() == pytest.approx([0.3, 0.6])


def test_a_table_in_markdown_by_hand():
    frame = pd.DataFrame({"score": [0.12349, math.nan], "wh|at": ["a|b", 7]}, ["x|", "y"])
    assert patrec.tables.markdown_table(frame.rename_axis("model")).splitlines() == [
        "| model | score | wh\\|at |",
        "| --- | --- | --- |",
        "| x\\| | 0.123 | a\\|b |",
        "| y |  | 7 |",
    ]
