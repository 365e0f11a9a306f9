"""Functions against answers that were worked out by hand, in closed form, or by another library.

What extract_features computes is compared with librosa's own functions in test_features.py.
"""

import math

import librosa
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import f1_score
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import common

# --- the lab's merge --------------------------------------------------------------------

# As the lab gives it: what each of the 20 classes becomes, None: left out.
LABS_MERGE = [
    ("Rock", "Rock"), ("Psych-Rock", "Rock"), ("Post-Rock", "Rock"), ("Psych-Folk", "Folk"), ("Folk", "Folk"),
    ("Metal", "Metal"), ("Punk", "Metal"), ("Electronic", "Electronic"), ("Chiptune", "Electronic"),
    ("Trip-Hop", "Trip-Hop"), ("Pop", "Pop"), ("Hip-Hop", "Hip-Hop"), ("Classical", "Classical"), ("Blues", "Blues"),
    ("Jazz", "Jazz"), ("Indie-Rock", None), ("Post-Punk", None), ("Soundtrack", None), ("International", None),
    ("Old-Time", None),
]  # fmt: skip


@pytest.mark.parametrize("genre, merged", LABS_MERGE)
def test_the_merge_is_the_labs(tmp_path, genre, merged):
    folder = tmp_path / "fma_genre_spectrograms"
    folder.mkdir()
    (folder / "train_labels.txt").write_text(f"Id\tGenre\n1.fused.full.npy.gz\t{genre}\n2.fused.full.npy.gz\tRock\n")
    entries = common.read_entries(tmp_path, "genre", "train", merge=True)
    assert [entry.label for entry in entries] == ([merged] if merged else []) + ["Rock"]
    as_it_is = common.read_entries(tmp_path, "genre", "train", merge=False)
    assert [entry.label for entry in as_it_is] == [genre, "Rock"]


# --- sounds -----------------------------------------------------------------------------


@pytest.mark.parametrize("n_samples", [4000, 22_050 + 300])
def test_percussive_part_is_librosas_bit_for_bit(n_samples):
    rng = np.random.default_rng(2)
    t = np.arange(n_samples) / 22_050
    sound = 0.3 * np.sin(2 * np.pi * 330 * t) + 0.05 * rng.standard_normal(n_samples)
    sound[:: n_samples // 4] += 0.8
    sound = sound.astype(np.float32)
    expected = librosa.effects.percussive(sound)
    assert np.abs(expected).max() > 0.01 and np.abs(expected - sound).max() > 0.01
    assert np.array_equal(common.percussive_part(sound), expected)


# --- classifier outputs -----------------------------------------------------------------


def test_logit_adjustment_by_hand():
    """Half of the log of each class's share is taken off: log(1/4) / 2 = -log 2, log(1/16) / 2 = -2 log 2."""
    log2 = math.log(2)
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, -1.0, 0.5]])
    adjusted = common.even_out(logits, [11 / 16, 1 / 4, 1 / 16])
    by_hand = logits + torch.tensor([-0.5 * math.log(11 / 16), log2, 2 * log2])
    torch.testing.assert_close(adjusted, by_hand)
    assert adjusted.argmax(1).tolist() == [2, 2]  # unadjusted: 0, 0


# --- augmentation -----------------------------------------------------------------------


def fixed(monkeypatch, weights, partners):
    """Let mixup draw these weights and partners."""
    monkeypatch.setattr(torch.distributions.Beta, "sample", lambda self, shape: torch.tensor(weights))
    monkeypatch.setattr(torch, "randperm", lambda n, **options: torch.tensor(partners))


def mixup(n_classes=0, alpha=0.3):
    return common.Augment(mixup=alpha, shift_bands=0, mask_bands=0, mask_frames=0, n_classes=n_classes)


def test_mixup_by_hand(monkeypatch):
    """A weight of .25 means .75 too: the clip itself keeps the larger share, in the input and in the target."""
    fixed(monkeypatch, [0.25, 0.6, 1.0], [1, 2, 0])
    x = torch.tensor([1.0, 2.0, 4.0])[:, None, None].expand(3, 5, 6)
    mixed, targets = mixup(n_classes=3)(x, torch.tensor([0, 1, 2]))
    expected = torch.tensor([0.75 * 1 + 0.25 * 2, 0.6 * 2 + 0.4 * 4, 4.0])
    torch.testing.assert_close(mixed, expected[:, None, None].expand(3, 5, 6))
    torch.testing.assert_close(targets, torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.6, 0.4], [0.0, 0.0, 1.0]]))


def test_mixup_of_one_and_of_three_emotions_by_hand(monkeypatch):
    fixed(monkeypatch, [0.9, 0.8], [1, 0])
    x = torch.tensor([0.0, 10.0])[:, None, None].expand(2, 4, 3)
    mixed, targets = mixup()(x, torch.tensor([0.2, 0.6]))
    torch.testing.assert_close(mixed[:, 0, 0], torch.tensor([1.0, 8.0]))
    torch.testing.assert_close(targets, torch.tensor([0.24, 0.52]))
    _, targets = mixup()(x, torch.tensor([[0.2, 0.0, 1.0], [0.6, 1.0, 1.0]]))
    torch.testing.assert_close(targets, torch.tensor([[0.24, 0.1, 1.0], [0.52, 0.8, 1.0]]))


def test_mixup_gives_inputs_and_targets_the_same_weight_and_partner():
    """Clip i is the number 2^i everywhere and its target the i-th unit vector, so both tell who was mixed how."""
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
    # The larger of w and 1 - w where w is drawn from Beta(.3, .3); one clip in n is its own partner.
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
    "dim, size, widest, allowed", [(2, 128, 16, 16), (1, 200, 38, 38), (2, 12, 16, 3), (1, 40, 38, 10)]
)
def test_spectrogram_masks_are_single_stripes_of_every_width_up_to_the_widest(dim, size, widest, allowed):
    """And never wider than a quarter of what there is: 12 notes of a chromagram, 40 frames of a beat clip."""
    torch.manual_seed(0)
    masks = {"mask_bands": widest if dim == 2 else 0, "mask_frames": widest if dim == 1 else 0}
    augment = common.Augment(mixup=0, shift_bands=0, **masks)
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
    # Every place is hit (but today the very first one), and no part of the middle more often than another.
    assert (blanked[1:] > 0).all() and blanked[size // 4 : -size // 4].std() < 0.2 * blanked.mean()


def test_bands_are_shifted_by_up_to_two_and_notes_are_not():
    """The edges repeat the outermost band; chroma, for which a shift would be another key, stays as it is."""
    torch.manual_seed(0)
    n = 500
    x = torch.arange(140.0).expand(n, 3, 140)
    out, targets = common.Augment(mixup=0, shift_bands=2, mask_bands=0, mask_frames=0)(x, torch.arange(float(n)))
    assert torch.equal(out[..., 128:], x[..., 128:]) and torch.equal(targets, torch.arange(float(n)))
    shifts = out[:, 0, 64] - 64
    assert sorted(set(shifts.tolist())) == [-2, -1, 0, 1, 2]
    bands = (torch.arange(128)[None] + shifts[:, None]).clamp(0, 127)
    assert torch.equal(out[..., :128], bands[:, None].expand(n, 3, 128))
    counts = torch.bincount((shifts + 2).long())
    assert counts.min() > 60  # of 100 each


# --- losses -----------------------------------------------------------------------------


def test_regression_loss_by_hand():
    """Errors 1, -1, 0, 2 in units of a spread of 2: (1 + 1 + 0 + 4) / 4 / 4 = 3 / 8; r = 9 / sqrt(90)."""
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0])
    outputs = targets + torch.tensor([1.0, -1.0, 0.0, 2.0])  # 2, 1, 3, 6: centred -1, -2, 0, 3
    # Targets centred: -1.5, -.5, .5, 1.5. Products 1.5 + 1 + 0 + 4.5 = 7; squares 14 and 5.
    expected = 3 / 8 + 0.5 * (1 - 7 / math.sqrt(14 * 5))
    assert common.regression_loss(outputs, targets, 2.0).item() == pytest.approx(expected, rel=1e-6)
    assert common.RegressionLoss(2.0)(outputs, targets).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("outputs, targets, expected", [
    ([0.9], [0.4], (0.5 / 0.25) ** 2),  # of one clip there is no correlation
    ([0.9, 0.1], [0.4, 0.6], ((0.5 / 0.25) ** 2 + (0.5 / 0.25) ** 2) / 2),  # of two it would always be 1 or -1
    ([0.5, 0.5, 0.5], [0.0, 0.5, 1.0], (4 + 0 + 4) / 3 + 0.5),  # a constant answer correlates with nothing
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
    loss = common.MultitaskLoss(MULTITASK_STD)(*multitask_batch())
    assert loss.item() == pytest.approx(sum(MULTITASK_LOSSES), rel=1e-5)


def learned_value(losses, log_var):
    """What the loss with learned weights is by its documentation: s is log_var of a task."""
    pairs = zip(losses, log_var, strict=True)
    return sum(math.exp(-s) * loss + s / 2 for loss, s in pairs)  # the one line that says the formula


def test_learned_weights_by_hand():
    loss = common.MultitaskLoss(MULTITASK_STD, learned=True)
    assert loss(*multitask_batch()).item() == pytest.approx(learned_value(MULTITASK_LOSSES, [0, 0, 0]), rel=1e-5)
    log_var = [0.5, -1.0, 2.0]
    with torch.no_grad():
        loss.log_var.copy_(torch.tensor(log_var))
    assert loss(*multitask_batch()).item() == pytest.approx(learned_value(MULTITASK_LOSSES, log_var), rel=1e-5)


def test_learned_weights_end_where_their_minimum_is():
    """exp(-s) L + s / 2 is least at s = log(2 L): the weight of a task becomes 1 / (2 L)."""
    outputs, targets = multitask_batch()
    outputs = outputs + torch.tensor([0.0, 0.125, 0.0])  # half a spread: a loss of 0 would have no minimum
    losses = torch.tensor([1.0, 0.25, MULTITASK_LOSSES[2]])
    loss = common.MultitaskLoss(MULTITASK_STD, learned=True)
    optimizer = torch.optim.LBFGS(loss.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(outputs, targets)
        value.backward()
        return value

    optimizer.step(closure)
    best = torch.log(2 * losses)  # changes with the formula in `learned_value`
    torch.testing.assert_close(loss.log_var.detach(), best, atol=1e-3, rtol=1e-3)
    assert loss(outputs, targets).item() == pytest.approx(learned_value(losses.tolist(), best.tolist()), rel=1e-4)


def test_weights_that_are_not_learned_stay_at_one():
    loss = common.MultitaskLoss(MULTITASK_STD)
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
    """A loss whose gradient is 1 at every step: then Adam moves the weight by about the learning rate."""

    def forward(self, outputs, targets):
        return outputs.mean()


def one_cycle(step, n_steps, highest, warm_up=0.1):
    """Rate and momentum of Smith's one-cycle schedule, along cosines.

    The rate goes up from 1/25 and down to 1/250,000 of the highest, the momentum against it.
    """
    turn = warm_up * n_steps - 1

    def along_cosine(start, top, end):
        first, last, share = (
            (start, top, step / turn) if step <= turn else (top, end, (step - turn) / (n_steps - 1 - turn))
        )
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2

    return along_cosine(highest / 25, highest, highest / 25 / 1e4), along_cosine(0.95, 0.85, 0.95)


@pytest.mark.parametrize("steps_per_epoch, decay", [(4, 1 - 10 / 40), (120, 0.99)])
def test_rate_and_running_average_follow_their_formulas(tmp_path, steps_per_epoch, decay):
    """Ten epochs. In a short run the average must forget its start too: its decay is at most 1 - 10 / steps."""
    model, n_steps, validated = OneWeight(), 10 * steps_per_epoch, []
    x, targets = torch.ones(steps_per_epoch, 1, 1), torch.zeros(steps_per_epoch)
    data = torch.utils.data.TensorDataset(x, targets, torch.ones(steps_per_epoch, dtype=torch.long))
    train, val = (torch.utils.data.DataLoader(data, size) for size in (1, steps_per_epoch))
    recipe = common.Recipe(epochs=10, lr=0.1, weight_decay=0.0)

    def score(outputs, targets):
        validated.append(outputs[0].item())  # the averaged weight is what is validated
        return 0.0

    result = common.train(model, train, val, MeanAnswer(), score, recipe, tmp_path, {})
    weight, average, gradient, averages = 0.0, 0.0, 0.0, []
    for step in range(n_steps):
        rate, momentum = one_cycle(step, n_steps, 0.1)
        gradient = momentum * gradient + (1 - momentum)
        weight -= rate * gradient / (1 - momentum ** (step + 1))
        average = decay * average + (1 - decay) * weight if step else weight
        averages.append(average)
    np.testing.assert_allclose(validated, averages[steps_per_epoch - 1 :: steps_per_epoch], rtol=1e-3)
    # What is written is the rate of the step to come; past the last one, the last one's.
    rates = [one_cycle(epoch * steps_per_epoch, n_steps, 0.1)[0] for epoch in range(1, 10)]
    np.testing.assert_allclose([row["lr"] for row in result["history"]][:-1], rates, rtol=1e-3)


@pytest.mark.parametrize("n_clips, presentations, high, expected", [
    (1000, 30_000, 80, (30, 1)),  # 30 passes
    (10_000, 30_000, 80, (20, 1)),  # 3 would be too few: at least 20
    (365, 100_000, 275, (55, 5)),  # 274 passes: 5 crops of a clip in each of 55 epochs
    (10, 100_000, 275, (55, 5)),  # at most 275 passes
    (500, 30_000, 80, (60, 1)),  # exactly the longest that need no second crop
    (400, 30_000, 80, (38, 2)),  # 75 passes, 37.5 epochs
])  # fmt: skip
def test_planned_epochs_by_hand(n_clips, presentations, high, expected):
    assert common.plan_epochs(n_clips, presentations, high) == expected


# --- scores -----------------------------------------------------------------------------


@pytest.mark.parametrize("targets, predictions, by_hand", [
    ([0, 0, 1, 1], [0, 1, 1, 1], (2 / 3 + 4 / 5) / 2),
    ([0, 0, 1], [3, 3, 1], (0 + 1 + 0) / 3),  # class 2 occurs nowhere and does not count; class 3 was only answered
    ([2, 2, 2], [2, 2, 2], 1.0),
    ([0, 1], [1, 0], 0.0),
])  # fmt: skip
def test_macro_f1_by_hand_and_by_scikit_learn(targets, predictions, by_hand):
    targets, predictions = np.array(targets), np.array(predictions)
    assert common.macro_f1(targets, predictions, 4) == pytest.approx(by_hand)
    assert common.macro_f1(targets, predictions, 4) == pytest.approx(f1_score(targets, predictions, average="macro"))


def test_macro_f1_is_scikit_learns_on_random_answers():
    rng = np.random.default_rng(0)
    for n in (1, 5, 30, 300):
        targets, predictions = rng.integers(0, 10, n), rng.integers(0, 10, n)
        expected = f1_score(targets, predictions, average="macro", zero_division=0)
        assert common.macro_f1(targets, predictions, 10) == pytest.approx(expected)


def test_bootstrap_interval_of_coin_tosses():
    """A share of 30% of 400: its standard error is sqrt(.3 x .7 / 400) = .0229."""
    hits = np.arange(400) < 120
    low, high = common.bootstrap(lambda rows: hits[rows].mean(), 400)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - half, abs=0.006) and high == pytest.approx(0.3 + half, abs=0.006)
    assert common.bootstrap(lambda rows: float(len(rows)), 7) == [7, 7], "a resample is as large as the set"
    assert common.bootstrap(lambda rows: float(len(set(rows))), 50)[1] < 40, "clips are drawn with replacement"


def test_spearman_with_ties_and_constants():
    """Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, squares 4.5 and 5."""
    targets, predictions = np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3, 0.4])
    assert common.spearman(targets, predictions) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert common.spearman(targets, -(predictions**3)) == pytest.approx(-4.5 / math.sqrt(4.5 * 5))
    assert common.spearman(targets, np.full(4, 0.3)) == 0 == common.spearman(np.full(4, 0.3), predictions)
    rng = np.random.default_rng(1)
    many = rng.integers(0, 5, 60).astype(float), rng.integers(0, 7, 60).astype(float)
    assert common.spearman(*many) == pytest.approx(spearmanr(*many).statistic)


# --- time -------------------------------------------------------------------------------


def test_windows_by_hand():
    """Of 10 frames, windows of 4: three from 0 to 6, or with two more between them; a short clip repeats its own."""
    x = torch.stack([torch.arange(10.0), torch.arange(100.0, 110.0)])[:, :, None]
    x[1, 6:] = 0  # padding of a clip of 6
    cut, lengths = common.cut_windows(x, torch.tensor([10, 6]), 4, overlap=False)
    assert cut[:3, :, 0].tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert cut[3:, :, 0].tolist() == [[100, 101, 102, 103], [101, 102, 103, 104], [102, 103, 104, 105]]
    assert lengths.tolist() == [4] * 6
    cut, lengths = common.cut_windows(x, torch.tensor([10, 3]), 4)
    assert cut[:5, :, 0].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [3, 4, 5, 6], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert cut[5:, 0, 0].tolist() == [100] * 5 and lengths.tolist() == [4] * 5 + [3] * 5


def test_frames_are_averaged_by_hand():
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0], [2.0, 4.0, 6.0, 0.0, 0.0]])[:, :, None]
    means, lengths = common.average_frames(x, torch.tensor([5, 3]), 2)
    assert means[..., 0].tolist() == [[2, 6, 9], [3, 6, 0]] and lengths.tolist() == [3, 2]
    same, lengths = common.average_frames(x, torch.tensor([5, 3]), 1)
    assert torch.equal(same, x) and lengths.tolist() == [5, 3]


def test_steps_are_described_by_hand():
    """Means, population standard deviations, and mean absolute changes; padding counts in none of them."""
    x = torch.tensor([[1.0, 3.0, 5.0, 7.0, 9.0], [2.0, 6.0, 4.0, 0.0, 0.0]])[:, :, None]
    steps, lengths = common.describe_steps(x, torch.tensor([5, 3]), 2)
    assert lengths.tolist() == [3, 2]
    # Changes: clip 1: 0, 2 | 2, 2 | 2; clip 2: 0, 4 | 2 (the next one leads into the padding).
    by_hand = [[[2, 1, 1], [6, 1, 2], [9, 0, 2]], [[4, 2, 2], [4, 0, 2]]]
    np.testing.assert_allclose(steps[0], by_hand[0], atol=1e-5)
    np.testing.assert_allclose(steps[1, :2], by_hand[1], atol=1e-5)


def test_mean_and_maximum_of_a_clips_own_steps_by_hand():
    x = torch.tensor([[[1.0, -1.0], [3.0, -5.0], [8.0, 9.0]], [[-2.0, 0.5], [-4.0, 0.25], [-6.0, 0.0]]])
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])[:, :, None]
    assert common.masked_mean_max(x, mask).tolist() == [[2, -3, 3, -1], [-4, 0.25, -2, 0.5]]


@pytest.mark.parametrize("readout", ["last", "pool"])
@pytest.mark.parametrize("n_layers, bidirectional", [(1, True), (2, True), (1, False)])
def test_lstm_is_torchs_own_on_packed_sequences(readout, n_layers, bidirectional):
    """Clips of unequal lengths, the same weights: torch's nn.LSTM on a packed sequence is the reference."""
    torch.manual_seed(0)
    lengths = torch.tensor([9, 4, 1, 7])
    x = torch.randn(4, 9, 6).masked_fill(torch.arange(9)[None, :, None] >= lengths[:, None, None], 0.0)
    options = {"hidden_size": 5, "n_layers": n_layers, "bidirectional": bidirectional, "readout": readout}
    network = common.LSTMBackbone(6, **options).eval()
    reference = nn.LSTM(6, 5, n_layers, batch_first=True, bidirectional=bidirectional)
    mine = [module for module in network.modules() if isinstance(module, nn.LSTM)]
    suffixes = [f"_l{layer}{way}" for layer in range(n_layers) for way in ("", "_reverse")[: 1 + bidirectional]]
    with torch.no_grad():
        for module, suffix in zip(mine, suffixes, strict=True):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(reference, kind + suffix).copy_(getattr(module, f"{kind}_l0"))
        packed, (hidden, _) = reference(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
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
    entries = [common.Entry(str(i), None, "Rock") for i in range(len(arrays))]
    return common.ClipStore(entries, frames, lengths.cumsum(0) - lengths, lengths, [str(i) for i in range(len(arrays))])


def random_clips(lengths, seed=0):
    """Clips with slow and fast changes, each about another mean, in the steps of half precision."""
    rng = np.random.default_rng(seed)
    clips = []
    for n in lengths:
        drift = 6 * np.sin(np.linspace(0, rng.uniform(2, 9), n)) + rng.uniform(-40, -20)
        mel = drift + 5 * rng.standard_normal((128, n)) + np.linspace(-10, 10, 128)[:, None]
        clips.append(np.vstack([np.clip(mel, -80, 0), rng.random((12, n))]).astype(np.float16).astype(np.float64))
    return clips


def test_band_features_are_numpys():
    clips = random_clips([700, 301, 2, 1])
    features = common.band_features(clip_store(clips))
    assert features.shape == (4, 640)
    for row, clip in zip(features, clips, strict=True):
        mel = clip[:128]
        change = np.abs(np.diff(mel, axis=1)).mean(1) if mel.shape[1] > 1 else np.zeros(128)
        low, high = np.percentile(mel, 10, axis=1), np.percentile(mel, 90, axis=1)
        np.testing.assert_allclose(row, np.concatenate([mel.mean(1), mel.std(1), low, high, change]), atol=1e-3)
    assert np.array_equal(common.band_features(clip_store(clips), [2, 0]), features[[2, 0]])


@pytest.mark.parametrize(
    "features, rows", [("mel", slice(0, 128)), ("chroma", slice(128, 140)), ("fused", slice(0, 140))]
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
