"""The loss of the emotions, worked out by hand."""

import math

import pytest
import torch

from common import CNNBackbone, LSTMBackbone, RegressionLoss, Regressor, regression_loss
from patrec.labels import EMOTIONS


def test_regression_loss_by_hand():
    """Errors 1, -1, 0, 2, a spread of 2: (1 + 1 + 0 + 4) / 4 / 4 = 3 / 8; r = 7 / sqrt(70)."""
    targets = torch.tensor([1.0, 2.0, 3.0, 4.0])
    outputs = targets + torch.tensor([1.0, -1.0, 0.0, 2.0])  # 2, 1, 3, 6: centred -1, -2, 0, 3
    # Targets centred: -1.5, -.5, .5, 1.5. Products 1.5 + 1 + 0 + 4.5 = 7; squares 14 and 5.
    expected = 3 / 8 + 0.5 * (1 - 7 / math.sqrt(14 * 5))
    assert regression_loss(outputs, targets, 2.0).item() == pytest.approx(expected, rel=1e-6)
    loss = RegressionLoss([2.0])(outputs[:, None], targets[:, None])
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("outputs, targets, expected", [
    ([0.9], [0.4], (0.5 / 0.25) ** 2),  # of one clip there is no correlation
    # Of two it would always be 1 or -1.
    ([0.9, 0.1], [0.4, 0.6], ((0.5 / 0.25) ** 2 + (0.5 / 0.25) ** 2) / 2),
    # A constant prediction correlates with nothing.
    ([0.5, 0.5, 0.5], [0.0, 0.5, 1.0], (4 + 0 + 4) / 3 + 0.5),
    ([1.0, 0.5, 0.0], [0.0, 0.5, 1.0], (16 + 0 + 16) / 3 + 1.0),
])  # fmt: skip
def test_regression_loss_of_small_batches_and_constants(outputs, targets, expected):
    outputs = torch.tensor(outputs, requires_grad=True)
    loss = regression_loss(outputs, torch.tensor(targets), 0.25)
    assert loss.item() == pytest.approx(expected, abs=1e-6)
    loss.backward()
    assert outputs.grad.isfinite().all()


def test_regression_output_and_target_shapes_cannot_broadcast():
    """Bug 1: (B, 1) against (B,) makes a (B, B) error that pulls every prediction to the mean."""
    model = Regressor(LSTMBackbone(6, hidden_size=4, n_layers=1), ["energy"], [0.5], [0.2])
    for n in (1, 5):  # bug 11: squeeze() made a batch of one a scalar
        assert model(torch.randn(n, 12, 6), torch.full((n,), 12)).shape == (n, 1)
    with pytest.raises(ValueError, match="broadcast"):
        regression_loss(torch.zeros(5, 1), torch.zeros(5), 1.0)
    for outputs, targets in (((5, 1), (5,)), ((5,), (5, 1)), ((5, 1), (5, 3)), ((1, 3), (5, 3))):
        with pytest.raises(ValueError, match="broadcast"):
            RegressionLoss([1.0] * outputs[-1])(torch.zeros(outputs), torch.zeros(targets))


def test_multitask_loss_by_hand():
    """Each squared error in units of its label's spread, and a plain sum: nothing is learned.

    Valence is one spread off everywhere and perfectly ordered: 1. Energy is right: 0. Danceability
    is 5, 4 and 3 spreads off: 50 / 3, and its predictions are all alike, so + 1/2.
    """
    targets = torch.tensor([[0.0, 0.2, 0.25], [0.5, 0.4, 0.375], [1.0, 0.9, 0.5]])
    outputs = targets + torch.tensor([[0.5, 0.0, 0.625], [0.5, 0.0, 0.5], [0.5, 0.0, 0.375]])
    loss, by_hand = RegressionLoss((0.5, 0.25, 0.125)), (1.0, 0.0, 50 / 3 + 0.5)
    assert loss.terms(outputs, targets).tolist() == pytest.approx(by_hand, rel=1e-5)
    assert loss(outputs, targets).item() == pytest.approx(sum(by_hand), rel=1e-5)
    assert not list(loss.parameters())


def test_each_head_learns_from_its_own_axis_and_the_backbone_from_all():
    """Right on two axes: only the third one's head is corrected."""
    torch.manual_seed(0)
    model = Regressor(CNNBackbone(), EMOTIONS, [0.5] * 3, [0.25] * 3).eval()
    for head in model.heads.values():  # untrained heads answer all clips alike
        torch.nn.init.normal_(head.weight)
    x, lengths = torch.randn(6, 64, 128), torch.full((6,), 64)
    for column, axis in enumerate(EMOTIONS):
        outputs = model(x, lengths)
        targets = outputs.detach().clone()
        targets[:, column] += torch.rand(6)
        model.zero_grad()
        RegressionLoss([0.25, 0.25, 0.17])(outputs, targets).backward()
        largest = {name: head.weight.grad.abs().max() for name, head in model.heads.items()}
        assert largest.pop(axis) > 0.1 and max(largest.values()) < 1e-3
        for name, weights in model.backbone.named_parameters():
            assert weights.grad.abs().sum() > 0, name
