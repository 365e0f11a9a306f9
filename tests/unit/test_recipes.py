"""How much each network is shown, worked out by hand."""

import dataclasses
import types

import pytest
from conftest import patch_everywhere

from patrec.recipes import GENRE_NETWORKS, Budget, Network, make_recipe, window_size


def plan(monkeypatch, n_clips, examples, most_passes, part="genre", plain=False, **flags):
    """The recipe of an LSTM for so many clips; the budget of the other part is 1."""
    budget = {"genre": 1, "emotion": 1} | {part: examples}
    budgets = {"lstm": Budget(crop=640, **budget, most_passes=most_passes)}
    patch_everywhere(monkeypatch, "BUDGETS", budgets)
    args = {"epochs": None, "smoke": False, "demo": False, "recipe": "full"}
    args |= {"lr": 0.003, "batch_size": 7} | flags
    data = types.SimpleNamespace(train=range(n_clips), settings={"part": part}, names=["a"])
    return make_recipe(Network("lstm", "mel", plain=plain), data, types.SimpleNamespace(**args))


@pytest.mark.parametrize("part", ["genre", "emotion"])
@pytest.mark.parametrize("n_clips, examples, most_passes, expected", [
    (1000, 30_000, 80, (30, 1)),  # 30 passes
    (10_000, 30_000, 80, (20, 1)),  # 3 would be too few: at least 20
    (365, 100_000, 275, (55, 5)),  # 274 passes: 5 crops of a clip in each of 55 epochs
    (400, 30_000, 80, (38, 2)),  # 75 passes, 37.5 epochs
])  # fmt: skip
def test_planned_epochs_by_hand(monkeypatch, part, n_clips, examples, most_passes, expected):
    recipe = plan(monkeypatch, n_clips, examples, most_passes, part)
    assert (recipe.epochs, recipe.crops) == expected
    assert (recipe.lr, recipe.batch_size, recipe.window) == (0.003, 7, 640)


@pytest.mark.parametrize("flags, epochs", [
    ({"smoke": True}, 2), ({"epochs": 7}, 7), ({"epochs": 7, "smoke": True}, 7),
])  # fmt: skip
def test_what_was_asked_for_is_done(monkeypatch, flags, epochs):
    recipe = plan(monkeypatch, 400, 30_000, 80, **flags)
    assert (recipe.epochs, recipe.crops) == (epochs, 1)


def test_the_demo_set_is_trained_on_as_long_as_it_takes_to_learn_it(monkeypatch):
    recipe = plan(monkeypatch, 100, 30_000, 80, demo=True)
    assert (recipe.epochs, recipe.crops) == (27, 1)  # 2,700 examples
    assert plan(monkeypatch, 60, 10_000, 80, "emotion", demo=True).epochs == 25  # 1,500
    assert plan(monkeypatch, 100, 2_500, 80, demo=True).epochs == 25  # never longer than real music


def test_the_labs_recipe_has_no_augmentation_no_averaged_weights_and_the_best_epoch(monkeypatch):
    full, lab = (plan(monkeypatch, 400, 30_000, 80, recipe=name) for name in ("full", "lab"))
    assert full.shift == 2 and full.ema == 0.99
    assert lab == dataclasses.replace(full, shift=0, ema=0.0, settled=1.0)
    textbook = plan(monkeypatch, 400, 30_000, 80, plain=True)  # on whole clips
    assert textbook == dataclasses.replace(full, shift=0, ema=0.0, window=None)


@pytest.mark.parametrize("name", GENRE_NETWORKS)
def test_a_run_hears_what_its_name_says(name):
    network = GENRE_NETWORKS[name]
    assert network.features == name.split("_")[-1]
    assert network.beat == name.startswith("beat_")
    assert network.kind == ("cnn" if name.startswith("cnn") else "lstm")
    assert network.plain == name.startswith("plain")
    assert network.n_bands == {"mel": 128, "chroma": 12, "fused": 140}[network.features]
    crop = 32 if network.beat else {"cnn": 256, "lstm": 640}[network.kind]
    crop = None if network.plain else crop
    assert window_size(network) == crop
