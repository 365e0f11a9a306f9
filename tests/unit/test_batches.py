"""Augmentation and windows, against what was worked out by hand."""

import types

import numpy as np
import pytest
import torch

from patrec.batches import Augment, cut_windows, to_resident

OFF = {"mixup": 0, "shift_bands": 0, "mask_bands": 0, "mask_frames": 0}


@pytest.mark.parametrize("classes", [True, False])
def test_mixup_gives_inputs_and_targets_the_same_weight_and_partner(classes):
    """Clip i is 2^i everywhere, its target the i-th unit vector: both tell who was mixed how.

    As with three emotions, which are values from the beginning.
    """
    torch.manual_seed(0)
    n = 12
    powers, before, seen = 2.0 ** torch.arange(n), torch.eye(n), []
    mixup = Augment(**OFF | {"mixup": 0.3}, n_classes=n if classes else 0)
    for _ in range(200):
        x = powers[:, None, None].repeat(1, 3, 4)
        mixed, targets = mixup(x, torch.arange(n) if classes else before)
        torch.testing.assert_close(mixed[:, 0, 0], targets @ powers)
        torch.testing.assert_close(targets.sum(1), torch.ones(n))
        seen.append(targets.diagonal())
        assert torch.equal(x[:, 0, 0], powers) and torch.equal(before, torch.eye(n))
    seen = torch.stack(seen)
    assert (seen >= 0.5).all()
    # The larger of w and 1 - w, w from Beta(.3, .3); one clip in n is its own partner.
    draws = np.random.default_rng(0).beta(0.3, 0.3, 200_000)
    share = np.maximum(draws, 1 - draws).mean()
    assert seen.mean().item() == pytest.approx(share + (1 - share) / n, abs=0.01)
    assert (seen.std(1) > 0.02).all()  # a weight of its own for each clip, not one for the batch


@pytest.mark.parametrize(
    "dim, size, widest, allowed",
    [(2, 12, 16, 3), (1, 200, 38, 38)],
)
def test_masks_are_single_stripes_of_every_width_up_to_the_widest(dim, size, widest, allowed):
    """Never wider than a quarter of the 12 notes of a chromagram."""
    torch.manual_seed(0)
    augment, n = Augment(**OFF | {"mask_bands" if dim == 2 else "mask_frames": widest}), 3000
    x = torch.ones((n, size, 4) if dim == 1 else (n, 4, size))
    out, _ = augment(x, torch.zeros(n))
    rows = out[:, :, 0] if dim == 1 else out[:, 0]
    whole = (rows[:, :, None] if dim == 1 else rows[:, None]).expand_as(x)
    assert torch.equal(out, whole), "the stripe goes right through"
    blank = (rows == 0).float()
    edges = torch.nn.functional.pad(blank, (1, 1)).diff(dim=1)
    assert (edges.abs().sum(1) <= 2).all(), "one stripe, which begins and ends once"
    widths = blank.sum(1).numpy()
    assert widths.max() == allowed and set(widths) >= set(range(1, allowed + 1))
    assert widths.mean() == pytest.approx(allowed / 2, rel=0.07)  # uniform between 0 and the widest
    blanked = blank.mean(0)
    # Every place is hit (but the very first one), and no part of the middle more than another.
    assert (blanked[1:] > 0).all() and blanked[size // 4 : -size // 4].std() < 0.2 * blanked.mean()


@pytest.mark.parametrize("n_bands", [12, 140])
def test_bands_are_shifted_by_up_to_two_and_notes_are_not(n_bands):
    """The edges repeat the outermost band; chroma stays: a shift would be another key."""
    torch.manual_seed(0)
    n, n_mel = 500, 128 if n_bands >= 128 else 0
    x = torch.arange(float(n_bands)).expand(n, 3, n_bands)
    out, targets = Augment(**OFF | {"shift_bands": 2})(x, torch.arange(float(n)))
    assert torch.equal(out[..., n_mel:], x[..., n_mel:])
    assert torch.equal(targets, torch.arange(float(n)))
    if n_mel:
        shifts = out[:, 0, 64] - 64
        assert sorted(set(shifts.tolist())) == [-2, -1, 0, 1, 2]
        bands = (torch.arange(128)[None] + shifts[:, None]).clamp(0, 127)
        assert torch.equal(out[..., :128], bands[:, None].expand(n, 3, 128))
        assert torch.bincount((shifts + 2).long()).min() > 60  # of 100 each


def test_windows_by_hand():
    """Of 10 frames, windows of 4: three, or with two more between; a short clip repeats its own."""
    x = torch.stack([torch.arange(10.0), torch.arange(100.0, 110.0)])[:, :, None]
    x[1, 6:] = 0  # padding of a clip of 6
    cut, lengths = cut_windows(x, torch.tensor([10, 6]), 4, overlap=False)
    assert cut[:, :, 0].tolist() == [[n, n + 1, n + 2, n + 3] for n in (0, 3, 6, 100, 101, 102)]
    assert lengths.tolist() == [4] * 6
    cut, lengths = cut_windows(x, torch.tensor([10, 3]), 4)
    assert cut[:5, :, 0].tolist() == [[n, n + 1, n + 2, n + 3] for n in (0, 1, 3, 4, 6)]
    assert cut[5:, 0, 0].tolist() == [100] * 5 and lengths.tolist() == [4] * 5 + [3] * 5
    cut, _ = cut_windows(torch.arange(50.0)[None, :, None], torch.tensor([50]), 16)
    assert set(cut.flatten().tolist()) == set(range(50))  # windows cover the clip


@pytest.mark.parametrize(
    "device, nbytes, moved", [("cuda", 499, True), ("cuda", 501, False), ("cpu", 1, False)]
)
def test_clips_move_to_the_card_where_they_fit_in_half_of_its_free_memory(
    monkeypatch, device, nbytes, moved
):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 8000))
    frames = types.SimpleNamespace(nbytes=nbytes, to=lambda device: device.type)
    assert to_resident(frames, device) == (device if moved else frames)
