"""What an earlier step has left: which networks there are to go on from, and their backbones."""

import pytest
import torch
from conftest import write_data_set

import common
from patrec.flags import Source, TrainingOptions
from patrec.recipes import GENRE_NETWORKS, window_size


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_data_set(tmp_path_factory.mktemp("data"), per_class=(3, 1), n_frames=30)


def save_genre_model(training, name, val_score, **odd):
    """A checkpoint as step 5 or 7 leaves one, its weights and statistics unlike fresh ones."""
    torch.manual_seed(1)
    network = GENRE_NETWORKS[name]
    data = common.load_data(training.source, network.features, network.beat)
    model = common.Classifier(common.make_backbone(network), len(data.names))
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.05 * torch.rand_like(value))
    settings = data.settings | {"run": name, "window": window_size(network)} | odd
    folder = training.out / ("step07_cnn" if network.kind == "cnn" else "step05_lstm") / name
    folder.mkdir(parents=True)
    facts = {"planned_epochs": 1, "n_val": 9}
    common.save_checkpoint(
        folder / "best.pt", model, settings, epoch=1, val_score=val_score, facts=facts
    )
    return folder / "best.pt", model


def test_genre_networks_are_ranked_by_validation_score(data_dir, tmp_path):
    """Neither a smoke run's checkpoint nor one of other clips or another seed, whatever its score.

    `genre_models` takes what is found and trains what is missing.
    """
    training = TrainingOptions(Source(data_dir), tmp_path, tmp_path / "step09_transfer", epochs=1)
    assert common.genre_val_scores(training).empty
    save_genre_model(training, "mel", 0.3)
    save_genre_model(training, "beat_mel", 0.6)
    path, model = save_genre_model(training, "cnn_mel", 0.5)
    save_genre_model(training, "chroma", 0.9, smoke=True)
    save_genre_model(training, "fused", 0.8, fingerprint="of other clips")
    save_genre_model(training, "beat_chroma", 0.7, seed=43)
    assert list(common.genre_val_scores(training).index) == ["beat_mel", "cnn_mel", "mel"]
    found = common.genre_models(training, ["cnn_mel", "beat_chroma"])
    assert list(found) == ["cnn_mel", "beat_chroma"] and found["cnn_mel"].path == path
    for key, value in found["cnn_mel"].model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert found["beat_chroma"].path == training.folder / "beat_chroma" / "best.pt"
    assert found["beat_chroma"].settings["seed"] == 42


@pytest.mark.parametrize("name", ["cnn_mel", "mel"])
def test_transfer_takes_the_backbone_and_nothing_else(data_dir, tmp_path, name):
    training = TrainingOptions(Source(data_dir), tmp_path, tmp_path)
    path, model = save_genre_model(training, name, 0.5)
    backbone = common.load_backbone(path)
    assert backbone.state_dict().keys() == model.backbone.state_dict().keys()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value), key
    head = common.Regressor(backbone, ["valence"], [0.5], [0.2]).heads["valence"].weight
    assert head.shape == (1, backbone.feature_size)
    assert not torch.isclose(head, model.head[-1].weight).any(0).all()


def test_of_a_frozen_lstm_nothing_changes_below_its_block_either(data_dir, tmp_path):
    """The projection feeds the block and is frozen with it (the CNN has none, see step 9)."""
    training = TrainingOptions(Source(data_dir), tmp_path, tmp_path / "step09_transfer", epochs=2)
    path, model = save_genre_model(training, "mel", 0.5)

    def regressor(_, data):
        backbone = common.load_backbone(path, frozen=1)
        return common.Regressor(backbone, data.names, data.mean, data.std)

    run = common.Experiment(
        "frozen", GENRE_NETWORKS["mel"], regressor,
        lambda data: common.RegressionLoss(data.std), torch.optim.AdamW, target="valence",
    )  # fmt: skip
    trained = common.train_all(training, [run])["frozen"]
    heads = sum(weights.numel() for weights in trained.model.heads.parameters())
    assert trained.facts["trained_weights"] == heads
    after = trained.model.backbone.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in model.backbone.state_dict().items())
