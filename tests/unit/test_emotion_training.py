"""Training for emotions: each head its own axis, each fold its own network."""

import pandas as pd
import torch
from conftest import EMOTIONS, write_data_set

import common
from patrec.flags import Source, TrainingOptions
from patrec.recipes import GENRE_NETWORKS


def test_each_head_learns_from_its_own_axis_and_the_backbone_from_all():
    """Right on two axes: only the third one's head is corrected."""
    torch.manual_seed(0)
    model = common.Regressor(common.CNNBackbone(), EMOTIONS, [0.5] * 3, [0.25] * 3).eval()
    for head in model.heads.values():  # untrained heads answer all clips alike
        torch.nn.init.normal_(head.weight)
    x, lengths = torch.randn(6, 64, 128), torch.full((6,), 64)
    for column, axis in enumerate(EMOTIONS):
        outputs = model(x, lengths)
        targets = outputs.detach().clone()
        targets[:, column] += torch.rand(6)
        model.zero_grad()
        common.RegressionLoss([0.25, 0.25, 0.17])(outputs, targets).backward()
        largest = {
            name: max(weights.grad.abs().max().item() for weights in head.parameters())
            for name, head in model.heads.items()
        }
        others = [value for name, value in largest.items() if name != axis]
        assert largest[axis] > 0.1 and max(others) < 1e-3, largest
        for name, weights in model.backbone.named_parameters():
            assert weights.grad.abs().sum() > 0, name


def test_each_fold_is_predicted_by_the_network_that_did_not_hear_it(tmp_path):
    """At the lower rate that is asked for."""
    source = Source(write_data_set(tmp_path / "data", per_class=(1, 1), n_frames=20))
    training = TrainingOptions(source, tmp_path, tmp_path / "out", epochs=1)

    def regressor(network, data):
        return common.Regressor(common.make_backbone(network), data.names, data.mean, data.std)

    run = common.Experiment(
        "run", GENRE_NETWORKS["beat_mel"], regressor,
        lambda data: common.RegressionLoss(data.std), torch.optim.AdamW,
        target="emotion", n_folds=2, lr_factor=0.5,
    )  # fmt: skip
    result = common.train_all(training, [run])["run"]
    for fold, member in enumerate(result.members):
        data = common.load_data(source, "mel", True, "emotion", fold=fold, n_folds=2)
        predictions = common.predict_clips(member.model, data.held_out, member.settings)
        pd.testing.assert_frame_equal(result.predictions.loc[predictions.index], predictions)
        assert set(result.folds[result.folds == fold + 1].index) == set(predictions.index)
        assert member.facts["lr"] == 0.5 * training.lr
