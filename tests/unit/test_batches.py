"""Augmentation and windows, against what was worked out by hand."""

import types

import pytest
import torch

from patrec.batches import cut_windows, shift_bands, to_resident


@pytest.mark.parametrize("n_bands", [12, 140])
def test_bands_are_shifted_by_up_to_two_and_notes_are_not(n_bands):
    """The edges repeat the outermost band; chroma stays: a shift would be another key."""
    torch.manual_seed(0)
    n, n_mel = 500, 128 if n_bands >= 128 else 0
    x = torch.arange(float(n_bands)).expand(n, 3, n_bands)
    out = shift_bands(x, 2)
    assert torch.equal(out[..., n_mel:], x[..., n_mel:])
    if n_mel:
        shifts = out[:, 0, 64] - 64
        assert sorted(set(shifts.tolist())) == [-2, -1, 0, 1, 2]
        bands = (torch.arange(128)[None] + shifts[:, None]).clamp(0, 127)
        assert torch.equal(out[..., :128], bands[:, None].expand(n, 3, 128))
        assert torch.bincount((shifts + 2).long()).min() > 60  # of 100 each


def test_windows_by_hand():
    """Of 10 frames three windows of 4, spread evenly; a short clip has fewer."""
    x = torch.stack([torch.arange(10.0), torch.arange(100.0, 110.0)])[:, :, None]
    x[1, 6:] = 0  # padding of a clip of 6
    cut, lengths, counts = cut_windows(x, torch.tensor([10, 6]), 4)
    assert cut[:, :, 0].tolist() == [[n, n + 1, n + 2, n + 3] for n in (0, 3, 6, 100, 102)]
    assert lengths.tolist() == [4] * 5 and counts == [3, 2]
    cut, lengths, counts = cut_windows(x, torch.tensor([10, 3]), 4)
    assert cut[3:, 0, 0].tolist() == [100] and lengths.tolist() == [4] * 3 + [3]
    cut, *_ = cut_windows(torch.arange(50.0)[None, :, None], torch.tensor([50]), 16)
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
