"""Backbones and heads: padding, lengths and modes, against torch's own layers and by hand."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader

import common
from common import Classifier, CNNBackbone, LSTMBackbone, Regressor, predict


def backbone(name, **options):
    """One of the networks, small, for 20 bands."""
    torch.manual_seed(0)
    if name == "cnn":
        return CNNBackbone(20, channels=(4, 4, 6, 8), **options)
    n = 4 if name == "lstm of frames" else 1
    return LSTMBackbone(20, **{"hidden_size": 8, "n_layers": 2, "frames_per_step": n} | options)


def item(n_frames):
    return torch.randn(n_frames, 20), torch.tensor(0), torch.tensor(n_frames)


@pytest.mark.parametrize("name", ["cnn", "lstm", "lstm of frames"])
def test_a_clip_gives_the_same_vector_however_far_it_is_padded(name):
    """Bug 5: the last step, or the backward direction, was taken in the padding.

    And bug 6: layers made inside forward, sizes taken from the longest test clip.
    """
    network = backbone(name).eval()
    x, lengths = torch.randn(3, 200, 20), torch.tensor([200, 150, 1])  # 150: no multiple of a pool
    for i in range(3):
        x[i, lengths[i] :] = 0
    with torch.inference_mode():
        together = network(x, lengths)
        assert together.shape == (3, network.feature_size)
        for extra in (0, 1, 50):
            for i, n in enumerate(lengths.tolist()):
                padded = nn.functional.pad(x[i : i + 1, :n], (0, 0, 0, extra))
                alone = network(padded, lengths[i : i + 1])
                torch.testing.assert_close(alone, together[i : i + 1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "lstm of frames"])
def test_predict_scores_in_evaluation_mode(name):
    """Bug 4: dropout and batch norm stayed on, so the same clip scored differently each time."""
    model = Classifier(backbone(name), 3).train()
    buffers = [value.clone() for value in model.buffers()]
    loader = DataLoader([item(40) for _ in range(6)], 3)
    first, _ = predict(model, loader)
    model.train()
    assert torch.equal(first, predict(model, loader)[0])
    assert all(map(torch.equal, buffers, model.buffers())), "scoring moved running statistics"


@pytest.mark.parametrize(
    "name, n_frozen, options", [("cnn", 2, {}), ("lstm of frames", 1, {"projection": 5})]
)
def test_frozen_blocks_and_what_lies_below_keep_weights_and_statistics(name, n_frozen, options):
    network = backbone(name, **options)
    network.freeze(n_frozen)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network.train()(torch.randn(4, 64, 20), torch.full((4,), 64)).sum().backward()
    optimizer.step()
    after = network.state_dict()
    changed = {key[:8] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {f"blocks.{n}" for n in range(n_frozen, len(network.blocks))}


@pytest.mark.parametrize("readout", ["last", "pool"])
@pytest.mark.parametrize("n_layers, both", [(1, True), (2, True), (1, False)])
def test_lstm_is_torchs_own_on_packed_sequences(readout, n_layers, both):
    """Clips of unequal lengths, the same weights; the reference is nn.LSTM on a packed sequence."""
    torch.manual_seed(0)
    lengths = torch.tensor([9, 4, 1, 7])
    padding = torch.arange(9)[None, :, None] >= lengths[:, None, None]
    x = torch.randn(4, 9, 6).masked_fill(padding, 0.0)
    network = LSTMBackbone(6, 5, n_layers, bidirectional=both, readout=readout).eval()
    reference = nn.LSTM(6, 5, n_layers, batch_first=True, bidirectional=both)
    mine = [module for module in network.modules() if isinstance(module, nn.LSTM)]
    ways = ("", "_reverse")[: 1 + both]
    suffixes = [f"_l{layer}{way}" for layer in range(n_layers) for way in ways]
    with torch.no_grad():
        for module, suffix in zip(mine, suffixes, strict=True):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(reference, kind + suffix).copy_(getattr(module, f"{kind}_l0"))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        packed, (hidden, _) = reference(packed)
        outputs, _ = pad_packed_sequence(packed, batch_first=True)
        vector = network(x, lengths)
    if readout == "last":
        expected = torch.cat(list(hidden[-2:] if both else hidden[-1:]), dim=1)
    else:
        clips = [outputs[i, :n] for i, n in enumerate(lengths)]
        expected = torch.stack([torch.cat([clip.mean(0), clip.amax(0)]) for clip in clips])
    torch.testing.assert_close(vector, expected, atol=1e-6, rtol=1e-5)


def test_an_lstm_of_frames_standardises_and_gets_the_mean_of_what_a_beat_does_not_have():
    """Deviation and change are 0 after standardising; the mean is standardised as in training."""
    network = LSTMBackbone(6, frames_per_step=4, projection=5)
    norm, inputs, beats = network.stem[0], [], 30 + 7 * torch.randn(2, 9, 6)
    network.stem[1].register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    network(30 + 7 * torch.randn(64, 40, 6), torch.full((64,), 40))  # running statistics
    normed = inputs[0].flatten(0, 1)
    assert normed.mean(0).abs().max() < 1e-3 and (normed.std(0) - 1).abs().max() < 0.01
    network.eval().frames_per_step = 1
    assert network(beats, torch.tensor([9, 7])).isfinite().all()
    mean = (beats - norm.running_mean[:6]) / (norm.running_var[:6] + norm.eps).sqrt()
    torch.testing.assert_close(inputs[1], torch.cat([mean, torch.zeros(2, 9, 12)], dim=2))


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
    x = [[[1.0, -1.0], [3.0, -5.0], [8.0, 9.0]], [[-2.0, 0.5], [-4.0, 0.25], [-6.0, 0.0]]]
    mask = torch.tensor([[1.0, 1, 0], [1, 1, 1]])[:, :, None]
    pooled = common.masked_mean_max(torch.tensor(x), mask)
    assert pooled.tolist() == [[2, -3, 3, -1], [-4, 0.25, -2, 0.5]]


def test_regressor_predicts_in_the_labels_units_and_in_the_order_of_its_names():
    names = ["energy", "danceability"]
    model = Regressor(LSTMBackbone(6, hidden_size=4), names, [0.4, 0.7], [0.2, 0.1]).eval()
    for name, z in (("energy", 1.0), ("danceability", -3.0)):
        nn.init.zeros_(model.heads[name].weight)
        nn.init.constant_(model.heads[name].bias, z)
    values = model(torch.randn(2, 9, 6), torch.tensor([9, 7]))
    torch.testing.assert_close(values, torch.tensor([[0.6, 0.4], [0.6, 0.4]]))


def test_predict_computes_few_windows_at_once():
    """All windows of a batch in one go took gigabytes, and four times as long."""
    model, sizes = Classifier(backbone("cnn"), 3), []
    model.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    clips = [item(640) for _ in range(15)]
    outputs = {n: predict(model, DataLoader(clips, n), window=64)[0] for n in (1, 15)}
    assert max(sizes) == 128 and sum(sizes) == 2 * 15 * 10
    torch.testing.assert_close(outputs[15], outputs[1])


def test_a_prediction_does_not_depend_on_the_clips_beside_it():
    """A short clip has windows of its own number, also in a batch with a long one."""
    model, lengths = Classifier(backbone("lstm"), 3), [90, 40, 20]
    clips = [torch.randn(n, 20) for n in lengths]
    together = (pad_sequence(clips, batch_first=True), torch.zeros(3), torch.tensor(lengths))
    together, _ = predict(model, [together], window=32)
    for clip, outputs in zip(clips, together, strict=True):
        alone = (clip[None], torch.zeros(1), torch.tensor([len(clip)]))
        torch.testing.assert_close(predict(model, [alone], window=32)[0][0], outputs)
