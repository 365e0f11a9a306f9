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


def window_starts(length, window) -> torch.Tensor:
    """First frames (W,) of as few windows as cover a clip, spread evenly over it."""
    n_windows = max(math.ceil(length / window), 1)
    return torch.linspace(0, max(length - window, 0), n_windows).long()


def cut_windows(x, lengths, window) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Cut clips (B, T, F), T >= window, into the windows of `window_starts`.

    Returns the windows (W, window, F) of all clips, clip after clip, their lengths (W,), and the
    number of windows of each clip, which does not depend on the other clips.
    """
    starts = [window_starts(int(length), window) for length in lengths]
    counts = [len(part) for part in starts]
    clips = torch.arange(len(x)).repeat_interleave(torch.tensor(counts))
    rows = torch.cat(starts)[:, None] + torch.arange(window)  # (W, window)
    cut = x[clips[:, None].to(x.device), rows.to(x.device)]
    return cut, lengths.clamp(max=window)[clips], counts
