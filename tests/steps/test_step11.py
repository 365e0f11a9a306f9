"""Step 11: the latent vectors, how far their classes are apart, and the maps."""

import re
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_clean_error, functions_of, read_metrics, read_table, run_forked
from sklearn.metrics import silhouette_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from common import clip_ids, load_checkpoint, load_model, load_test
from patrec.flags import Source
from patrec.plots import run_title
from patrec.recipes import LSTM_NAMES
from patrec.tables import with_interval

STEP = "step11_latent"
CAPTIONS = {"trustworthiness": "Trustworthiness", "silhouette": "Silhouette of"}
CAPTIONS["knn_accuracy"] = "5-NN accuracy of"  # of the tables of the three criteria


@pytest.fixture(scope="module")
def outputs(small_data, tmp_path_factory):
    """The step after a step 5 whose LSTM on beat chroma is the worst of all."""
    out = tmp_path_factory.mktemp("out")
    where = ("--smoke", "--data-dir", small_data, "--out-dir", out)
    run_forked("step05_lstm.py", *where)
    path = out / "step05_lstm" / "beat_chroma" / "best.pt"
    torch.save(load_checkpoint(path) | {"val_score": -0.5}, path)
    run_forked(f"{STEP}.py", *where)
    return out


def roles_of(outputs):
    """{role: run}"""
    return {role: name for name, role in read_metrics(outputs / STEP)["roles"].items()}


def titles_of(outputs):
    """{role: how tables and figures name the model}"""
    roles = roles_of(outputs)
    titles = {f"{k} LSTM": f"{k} {run_title(roles[f'{k} LSTM'])}" for k in ("best", "worst")}
    return titles | {"CNN": "CNN, mel"}


@pytest.mark.slow
def test_report_is_whole_and_in_the_labs_order(outputs):
    summary = (outputs / STEP / "summary.md").read_text()
    maps = {f"maps_{name}" for name in roles_of(outputs).values()}  # all methods, per model
    figures = maps | {"pca", "pca_worst"}
    assert {path.stem for path in (outputs / STEP).glob("*.png")} == figures
    assert all(f"]({name}.png)" in summary for name in figures)
    items = re.findall(r"^## (\d+[a-e])\.", summary, flags=re.MULTILINE)
    assert items == ["11a", "11b", "11c", "11d"]
    for word in ("nan", "None", "{", "tensor("):
        assert word not in summary, word


@pytest.mark.slow
def test_best_lstm_is_of_full_clips_and_worst_is_of_all(outputs, small_data):
    """The worst is shown on the test set of its own kind of input, and the page says so."""
    folders = [outputs / "step05_lstm" / name for name in LSTM_NAMES]
    val = {folder.name: load_checkpoint(folder / "best.pt")["val_score"] for folder in folders}
    roles, titles = roles_of(outputs), titles_of(outputs)
    of_full = {name: score for name, score in val.items() if not name.startswith("beat")}
    assert val[roles["best LSTM"]] == max(of_full.values())
    assert roles["worst LSTM"] == min(val, key=val.get) == "beat_chroma"
    table = read_table(outputs / STEP, "One vector per clip")
    for role, ending in (("best LSTM", ""), ("CNN", ""), ("worst LSTM", "_beat")):
        assert table.loc[titles[role], "test set"] == f"fma_genre_spectrograms{ending}"
    summary = (outputs / STEP / "summary.md").read_text()
    assert "the worst of all on its test set (fma_genre_spectrograms_beat)" in summary
    beats = load_test(Source(small_data), load_checkpoint(folders[3] / "best.pt")["settings"])
    vectors = np.load(outputs / STEP / "latent_beat_chroma.npz")
    assert vectors["ids"].tolist() == clip_ids(beats)


@pytest.mark.slow
def test_predicted_classes_and_probabilities_are_the_output_layers(outputs):
    for name in roles_of(outputs).values():
        owner = STEP if name == "cnn_mel" else "step05_lstm"
        model, checkpoint = load_model(outputs / owner / name / "best.pt")
        clips = np.load(outputs / STEP / f"latent_{name}.npz", allow_pickle=False)
        with torch.no_grad():
            logits = model.head(torch.from_numpy(clips["vectors"]))
        logits -= 0.5 * torch.tensor(checkpoint["settings"]["priors"]).log()
        probability, predicted = logits.softmax(1).max(1)
        assert clips["predicted"].tolist() == predicted.tolist()
        np.testing.assert_allclose(clips["probability"], probability, atol=1e-3)
        accuracy = read_metrics(outputs / STEP)["runs"][name]["test"]["accuracy"]
        assert np.mean(clips["predicted"] == clips["labels"]) == pytest.approx(accuracy)


@pytest.mark.slow
def test_methods_are_judged_by_three_criteria(outputs):
    metrics = read_metrics(outputs / STEP)
    titles, roles = titles_of(outputs), roles_of(outputs)
    assert metrics["criteria"] == list(CAPTIONS)
    for role, name in roles.items():
        measures = metrics["separation"][name]
        # Random weights: a network with the trained ones would measure the very same.
        full, untrained = measures["full space"], measures["full space, untrained"]
        assert full["silhouette"] != untrained["silhouette"]
        maps = np.load(outputs / STEP / f"maps_{name}.npz")
        clips = np.load(outputs / STEP / f"latent_{name}.npz")
        for method in ("PCA", "Isomap", "t-SNE"):
            facts = measures[method]
            assert maps[method].shape == (len(clips["ids"]), 2) and maps[method].std(0).min() > 0
            assert 0 < facts["trustworthiness"] <= 1
            assert facts["silhouette"] == pytest.approx(
                silhouette_score(maps[method], clips["labels"]), abs=1e-4
            )
            # Two starts with --smoke; PCA and Isomap know no chance.
            n_starts = 2 if method == "t-SNE" else 1
            for key, caption in (
                ("trustworthiness", "Trustworthiness"),
                ("silhouette", "Silhouette of"),
                ("knn_accuracy", "5-NN accuracy of"),
            ):
                values = facts[f"{key} of all seeds"]
                assert len(values) == n_starts and values[0] == facts[key]
                cell = read_table(outputs / STEP, caption).loc[method, titles[role]]
                assert float(cell.split(" ")[0]) == pytest.approx(np.mean(values), abs=6e-4)


@pytest.mark.slow
def test_the_tables_of_step_11_say_what_metrics_json_says(outputs):
    """Measured in the full space, in that of the untrained twin, in the plane: each by its name."""
    folder = outputs / STEP
    metrics = read_metrics(folder)
    roles, titles = roles_of(outputs), titles_of(outputs)
    for caption, shown in (
        ("Separation of the genres, and", ("best LSTM", "CNN")),
        ("Separation of the genres, best", ("best LSTM", "worst LSTM")),
    ):
        table = read_table(folder, caption)
        assert list(table) == [titles[role] for role in shown]
        for role in shown:
            column, facts = table[titles[role]], metrics["separation"][roles[role]]
            for space in ("full space", "full space, untrained", "PCA"):
                written = column[f"5-NN accuracy, {space}"]
                assert written == with_interval(facts[space], "knn_accuracy")
                written = float(column[f"silhouette, {space}"])
                assert written == pytest.approx(facts[space]["silhouette"], abs=6e-4)
    kept = metrics["separation"]
    lines = re.findall(r"`(\w+)` minus `(\w+)`: accuracy ([-+.\d]+) \[",
                       (folder / "summary.md").read_text())  # fmt: skip
    pairs = [("CNN", "best LSTM"), ("best LSTM", "worst LSTM")]
    assert [pair[:2] for pair in lines] == [tuple(roles[role] for role in pair) for pair in pairs]
    for *names, gain in lines:
        one, other = (kept[name]["full space"]["knn_accuracy"] for name in names)
        assert float(gain) == pytest.approx(one - other, abs=6e-4)


@pytest.mark.slow
def test_the_planes_share_of_the_variance_is_numpys(outputs):
    metrics = read_metrics(outputs / STEP)
    for name in metrics["roles"]:
        vectors = np.load(outputs / STEP / f"latent_{name}.npz")["vectors"]
        spread = vectors.std(0)
        scaled = (vectors - vectors.mean(0)) / np.where(spread > 1e-6, spread, 1)
        shares = np.linalg.svd(scaled, compute_uv=False) ** 2
        shares = np.cumsum(shares / shares.sum())
        found = metrics["separation"][name]
        assert found["pca_variance_2d"] == pytest.approx(shares[1], abs=2e-3)
        n_axes = found["pca_axes_for_90"]
        assert shares[n_axes - 1] > 0.9 - 1e-3 and shares[n_axes - 2] < 0.9 + 1e-3


@pytest.fixture(scope="module")
def separation():
    return functions_of(f"{STEP}.py")["separation"]


def test_separation_is_leave_one_out(separation):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 4, 60)
    points = rng.standard_normal((60, 6)) + 0.8 * labels[:, None]
    hits, facts = separation(points, labels)
    knn, rows = KNeighborsClassifier(5), np.arange(len(labels))
    votes = cross_val_predict(knn, points, labels, cv=LeaveOneOut(), method="predict_proba")
    winners = votes == votes.max(1, keepdims=True)  # several, where as many neighbours are of each
    assert np.allclose(hits, winners[rows, labels] / winners.sum(1))
    assert facts["knn_accuracy"] == hits.mean() and ((hits > 0) & (hits < 1)).any()
    turned, _ = separation(points, 3 - labels)  # the classes' numbers decide nothing
    assert np.array_equal(hits, turned)
    # With the clip itself among its neighbours, random labels would look separable.
    hits, _ = separation(rng.standard_normal((400, 50)), rng.integers(0, 4, 400))
    assert hits.mean() < 0.35


@pytest.mark.slow
def test_the_page_is_made_of_what_is_saved(outputs, small_data):
    where = ("--smoke", "--data-dir", small_data, "--out-dir", outputs)
    run_forked("tools/maps.py", *where)
    assert read_metrics(outputs / "maps")["clips"] == 20


@pytest.mark.slow
def test_too_few_test_clips_are_named(small_data, tmp_path, outputs):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(small_data, data)
    for beat in ("", "_beat"):
        labels = data / f"fma_genre_spectrograms{beat}" / "test_labels.txt"
        header, *lines = labels.read_text().splitlines()
        few = [line for line in lines if "Blues" in line or "Metal" in line]
        labels.write_text("\n".join([header, *few]) + "\n")
    shutil.copytree(outputs / "step05_lstm", out / "step05_lstm")
    flags = ("--smoke", "--data-dir", data, "--out-dir", out)
    result = run_forked(f"{STEP}.py", *flags, check=False)
    assert_clean_error(result, "8 genre test clips of 2 classes", "too few")
