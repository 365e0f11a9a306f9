"""What decides and how sure: attributions, insertion and deletion, calibration."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from common import Classifier, CNNBackbone
from patrec.explain import (
    calibration_error,
    cell_ranks,
    clip_attributions,
    fit_temperature,
    integrated_gradients,
    patches,
    probability_curve,
)
from patrec.machine import seed_everything


@pytest.fixture(scope="module")
def model():
    seed_everything(0)
    model = Classifier(CNNBackbone(), 3).eval()
    for module in model.modules():  # without shifts f(t x) = t f(x), and every path gives the same
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.5)
    return model


def clip(n_frames=256, seed=0):
    return torch.randn(n_frames, 128, generator=torch.Generator().manual_seed(seed))


def logits_of(model, x):
    with torch.no_grad():
        return model(x[None], torch.tensor([len(x)]))[0]


def test_attributions_add_up_to_the_logit(model):
    """Minus that of the mean clip: completeness (Sundararajan et al., 2017, proposition 1)."""
    x = clip()
    lengths, classes = torch.tensor([256]), torch.tensor([2])
    found = integrated_gradients(model, x[None], lengths, classes, n_steps=100)
    gain = float((logits_of(model, x) - logits_of(model, torch.zeros_like(x)))[2])
    assert float(found.sum()) == pytest.approx(gain, rel=0.05)
    with pytest.raises(ValueError, match="evaluation mode"):
        integrated_gradients(copy.deepcopy(model).train(), x[None], lengths, classes)


def test_a_cell_in_two_windows_gets_the_sum_of_both():
    """700 frames in windows of 256, which begin every 222. By hand: input times summed weight."""
    weights = torch.randn(256, 128, generator=torch.Generator().manual_seed(1))

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.Parameter(weights)

        def forward(self, x, lengths):
            logit = (x * self.weights).sum((1, 2))
            return torch.stack([-logit, logit], 1)

    x = clip(700)
    found = clip_attributions(Linear(), x, 256, 1)
    for t in (0, 221, 222, 255, 256, 443, 444, 477, 478, 699):
        inside = [weights[t - s] for s in (0, 222, 444) if 0 <= t - s < 256]
        expected = x[t] * torch.stack(inside).sum(0)
        torch.testing.assert_close(found[t], expected, rtol=1e-3, atol=1e-4)


def test_patches_are_sums_in_their_own_cells():
    cells = torch.arange(20 * 6).float().view(20, 6)
    found = patches(cells, frames=8, bands=4)
    assert found.shape == cells.shape
    assert (found[:8, :4] == cells[:8, :4].sum()).all()
    assert (found[16:, 4:] == cells[16:, 4:].sum()).all()  # cut off at the edges


@pytest.mark.parametrize("insert", [True, False])
def test_a_curve_begins_and_ends_at_nothing_and_all(model, insert):
    assert cell_ranks(torch.tensor([[0.1, 0.9], [0.5, -3.0]])).tolist() == [[0.5, 0], [0.25, 0.75]]
    x, rank = clip(), cell_ranks(clip(seed=5))
    curve = probability_curve(model, x, rank, 1, insert)
    whole, nothing = (logits_of(model, y).softmax(0)[1] for y in (x, torch.zeros_like(x)))
    first, last = (nothing, whole) if insert else (whole, nothing)
    torch.testing.assert_close(curve[0], first, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(curve[-1], last, rtol=1e-3, atol=1e-4)
    half = x * ((rank < 0.5) if insert else (rank >= 0.5))
    expected = logits_of(model, half).softmax(0)[1]
    torch.testing.assert_close(curve[10], expected, rtol=1e-3, atol=1e-4)


def test_the_temperature_that_was_put_in_is_found():
    rng = np.random.default_rng(0)
    z = torch.tensor(1.5 * rng.standard_normal((6000, 5)), dtype=torch.float32)
    targets = torch.multinomial(z.softmax(1), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    for factor in (0.4, 1.0, 3.0):
        assert fit_temperature(factor * z, targets) == pytest.approx(factor, rel=0.08)
    assert calibration_error(z, targets) < 0.02
    assert calibration_error(3 * z, targets) > 0.1  # too sure


def test_calibration_error_by_hand():
    """Eight clips answered with .75, of which half are right; two with .95, both right."""
    sure = torch.tensor([0.75] * 8 + [0.95] * 2)
    logits = torch.stack([sure.log(), (1 - sure).log()], 1)
    targets = torch.tensor([0, 1] * 4 + [0, 0])
    expected = 0.8 * abs(0.75 - 0.5) + 0.2 * abs(0.95 - 1)
    assert calibration_error(logits, targets) == pytest.approx(expected, abs=1e-6)
    certain = torch.tensor([[100.0, 0.0]] * 4)  # a probability of 1; three of four are right
    assert calibration_error(certain, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)
