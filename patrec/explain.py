"""What decides a prediction, and how far its probability can be trusted."""

import numpy as np
import torch
from torch import nn

from patrec.batches import cut_windows, window_starts


def integrated_gradients(model, x, lengths, classes, n_steps=16) -> torch.Tensor:
    """How much every cell of a spectrogram added to a class's logit.

    The gradient is averaged along the straight line from a clip that is the mean in every
    band (0, after standardisation) to the clip, and multiplied by the clip: the sum over all
    cells is the logit there minus the logit of the mean clip.

    model : nn.Module, (x, lengths) -> logits, in evaluation mode
    x : torch.Tensor [shape=(B, T, F)], standardised
    classes : torch.Tensor [shape=(B,)], class numbers

    Returns torch.Tensor [shape=(B, T, F)], on the CPU.
    Source: Sundararajan et al., 2017, Axiomatic Attribution for Deep Networks.
    """
    if model.training:  # the output depends on chance and on the batch
        raise ValueError("attributions need a network in evaluation mode")
    total = torch.zeros_like(x)
    for step in range(n_steps):
        point = (x * ((step + 0.5) / n_steps)).requires_grad_()
        logits = model(point, lengths).float()
        chosen = logits.gather(1, classes[:, None].to(logits.device)).sum()
        total += torch.autograd.grad(chosen, point)[0]  # of the clip alone, not of the weights
    return (x * total / n_steps).cpu()


def clip_attributions(model, x, window, number) -> torch.Tensor:
    """`integrated_gradients` of a whole clip (T, F) for a class number, summed over its windows.

    The clip's logit is the mean over W windows, so a cell's sum is W times its share of what the
    clip adds to the logit. Cells near both ends lie in fewer windows and count less.
    """
    lengths, size = torch.tensor([len(x)]), min(window, len(x))
    cut, sizes, _ = cut_windows(x[None], lengths, size)
    classes = torch.full((len(cut),), int(number))
    device = next(model.parameters()).device
    parts = integrated_gradients(model.eval(), cut.to(device), sizes, classes)
    total = torch.zeros(x.shape)
    for start, part in zip(window_starts(len(x), size).tolist(), parts, strict=True):
        total[start : start + size] += part
    return total


def patches(cells, frames=8, bands=4) -> torch.Tensor:
    """Put into each cell (..., T, F) the sum of its patch: single cells' attributions are noise."""
    t, f = cells.shape[-2:]
    padded = nn.functional.pad(cells.reshape(-1, 1, t, f), (0, -f % bands, 0, -t % frames))
    sums = nn.functional.avg_pool2d(padded, (frames, bands)) * frames * bands
    spread = sums.repeat_interleave(frames, 2).repeat_interleave(bands, 3)
    return spread[..., :t, :f].reshape(cells.shape)


def cell_ranks(values) -> torch.Tensor:
    """Share of the cells that have a higher value: 0 for the highest; the shape of `values`."""
    order = values.flatten().argsort(descending=True, stable=True).argsort()
    return (order / order.numel()).view(values.shape)


@torch.no_grad()
def probability_curve(model, x, rank, number, insert, n_levels=20) -> torch.Tensor:
    """Probability of a class while the cells of a clip are put back, or taken away, by rank.

    What is away is the mean of its band (0). The mean of the curve is the area under it.
    x (T, F), rank (T, F) from `cell_ranks`, number of the class -> (n_levels + 1,)

    Source: insertion and deletion; Petsiuk et al., 2018, RISE.
    """
    levels = torch.linspace(0, 1, n_levels + 1)[:, None, None]
    there = (rank < levels) if insert else (rank >= levels)
    lengths = torch.full((len(levels),), len(x))
    return model(x * there, lengths).softmax(1)[:, number]


def fit_temperature(logits, targets) -> float:
    """The number to divide logits (N, K) by for the least cross-entropy with targets (N,).

    The clips were not trained on (Guo et al., 2017, On Calibration of Modern Neural Networks).
    Which class is the likeliest does not change.
    """
    temperatures = np.geomspace(0.1, 10, 401)
    losses = [float(nn.functional.cross_entropy(logits / t, targets)) for t in temperatures]
    return float(temperatures[int(np.argmin(losses))])


def calibration_error(logits, targets, n_bins=10) -> float:
    """Expected calibration error: how far confidence is from accuracy, averaged over the clips.

    Clips are put into bins by the probability of their likeliest class (Guo et al., 2017).
    """
    sure, called = logits.softmax(1).max(1)
    right, bins = (called == targets).float(), (sure * n_bins).long().clamp(max=n_bins - 1)
    gaps = [(right[bins == b] - sure[bins == b]).sum().abs() for b in range(n_bins)]
    return float(sum(gaps) / len(targets))
