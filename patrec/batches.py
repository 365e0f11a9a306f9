"""Augmentation of batches, and windows of a clip."""

import dataclasses
import math

import torch
from torch import nn

from patrec.features import N_MELS


def to_resident(frames, device) -> torch.Tensor:
    """Move all frames (the lab's: 1.9 GB) to the GPU if they fit in half of its free memory."""
    device = torch.device(device)
    fits = device.type == "cuda" and frames.nbytes < torch.cuda.mem_get_info()[0] / 2
    return frames.to(device) if fits else frames


@dataclasses.dataclass
class Augment:
    """Random changes of a training batch, drawn on the device; 0 switches one off."""

    mixup: float = 0.3  # alpha of the mixing weight's Beta distribution (Zhang et al., 2018, mixup)
    shift_bands: int = 2  # furthest shift of the mel bands, like a change of pitch; not of chroma
    mask_bands: int = 16  # widest stripe that is set to the mean (Park et al., 2019, SpecAugment)
    mask_frames: int = 38
    n_classes: int = 0  # > 0: class numbers are turned into probabilities

    def __call__(self, x, targets):
        """x (B, T, F), targets (B,) or (B, 3) -> augmented x, targets; classes become (B, K)."""
        if self.n_classes:
            targets = nn.functional.one_hot(targets, self.n_classes).float()
        if self.shift_bands and x.shape[2] >= N_MELS:
            limits = -self.shift_bands, self.shift_bands + 1
            shift = torch.randint(*limits, (len(x), 1), device=x.device)
            row = torch.arange(x.shape[2], device=x.device)
            moved = torch.where(row < N_MELS, (row + shift).clamp(0, N_MELS - 1), row)  # (B, F)
            x = x.gather(2, moved[:, None].expand_as(x))
        for dim, widest in ((1, self.mask_frames), (2, self.mask_bands)):
            if widest:
                x = mask_stripe(x, dim, min(widest, x.shape[dim] // 4))
        if self.mixup:
            weight = torch.distributions.Beta(self.mixup, self.mixup).sample((len(x),)).to(x.device)
            weight = torch.maximum(weight, 1 - weight)  # the clip itself has the larger weight
            other = torch.randperm(len(x), device=x.device)
            x = x[other].lerp_(x, weight[:, None, None])
            weight = weight.view(-1, *[1] * (targets.dim() - 1))
            targets = torch.lerp(targets[other], targets, weight)
        return x, targets


def mask_stripe(x, dim, widest):
    """Set a random stripe of each clip, at most `widest` along `dim` (1 or 2), to 0 (the mean)."""
    size = x.shape[dim]
    width = torch.rand(len(x), 1, device=x.device) * widest
    start = torch.rand(len(x), 1, device=x.device) * (size - width)
    position = torch.arange(size, device=x.device)
    stripe = (position >= start) & (position < start + width)  # (B, size)
    return x.masked_fill(stripe.unsqueeze(3 - dim), 0.0)


def window_starts(lengths, window, overlap=True) -> torch.Tensor:
    """(B,) -> (B, W): first frames of W windows that are spread evenly over each clip."""
    n_windows = math.ceil(int(lengths.max()) / window)
    n_windows = 2 * n_windows - 1 if overlap else n_windows
    last = (lengths - window).clamp(min=0)  # (B,)
    return (last[:, None] * torch.linspace(0, 1, n_windows)).long()


def cut_windows(x, lengths, window, overlap=True) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, F) -> (B * W, window, F): the windows of `window_starts`, and their lengths."""
    starts = window_starts(lengths, window, overlap)  # (B, W)
    rows = starts[:, :, None] + torch.arange(window)  # (B, W, window)
    clips = torch.arange(len(x))[:, None, None]
    cut = x[clips.to(x.device), rows.to(x.device)].flatten(0, 1)
    return cut, lengths.clamp(max=window).repeat_interleave(starts.shape[1])
