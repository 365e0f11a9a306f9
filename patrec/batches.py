"""Augmentation of batches, and windows of a clip."""

import math

import torch

from patrec.features import N_MELS


def to_resident(frames, device) -> torch.Tensor:
    """Move all frames (the lab's: 1.9 GB) to the GPU if they fit in half of its free memory."""
    device = torch.device(device)
    fits = device.type == "cuda" and frames.nbytes < torch.cuda.mem_get_info()[0] / 2
    return frames.to(device) if fits else frames


def shift_bands(x, furthest) -> torch.Tensor:
    """Shift the mel bands of each clip (B, T, F) at random, up or down by at most `furthest`.

    Like a change of pitch. The edges repeat the outermost band; chroma stays as it is.
    """
    if x.shape[2] < N_MELS:
        return x
    shift = torch.randint(-furthest, furthest + 1, (len(x), 1), device=x.device)
    row = torch.arange(x.shape[2], device=x.device)
    moved = torch.where(row < N_MELS, (row + shift).clamp(0, N_MELS - 1), row)  # (B, F)
    return x.gather(2, moved[:, None].expand_as(x))


def window_starts(lengths, window) -> torch.Tensor:
    """(B,) -> (B, W): first frames of W windows that are spread evenly over each clip."""
    n_windows = math.ceil(int(lengths.max()) / window)
    last = (lengths - window).clamp(min=0)  # (B,)
    return (last[:, None] * torch.linspace(0, 1, n_windows)).long()


def cut_windows(x, lengths, window) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, F) -> (B * W, window, F): the windows of `window_starts`, and their lengths."""
    starts = window_starts(lengths, window)  # (B, W)
    rows = starts[:, :, None] + torch.arange(window)  # (B, W, window)
    clips = torch.arange(len(x))[:, None, None]
    cut = x[clips.to(x.device), rows.to(x.device)].flatten(0, 1)
    return cut, lengths.clamp(max=window).repeat_interleave(starts.shape[1])
