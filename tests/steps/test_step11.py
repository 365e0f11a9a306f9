"""Step 11: the latent vectors, whose they are, how far their classes are apart, and the maps."""

import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import (
    CLASSES,
    assert_clean_error,
    functions_of,
    labels_of,
    read_metrics,
    read_table,
    run_forked,
)
from genre_runs import GenreRuns, copy_data, folder_of, log_probabilities, set_of
from sklearn.manifold import trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from common import load_model
from patrec.tables import with_interval

STEP = "step11_latent"
# Best and worst LSTM by VAL_SCORES, and the CNN: {run: how tables name it}.
TITLES = {"chroma": "Best LSTM, chroma", "beat_chroma": "Worst LSTM, chroma, beats"}
TITLES |= {"cnn_mel": "CNN, mel"}
CRITERIA = {"trustworthiness": "Trustworthiness", "silhouette": "Silhouette of"}
CRITERIA |= {"knn_accuracy": "5-NN accuracy of"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return GenreRuns(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(runs):
    return runs.spoiled.out / STEP


def latent(folder, name):
    with np.load(folder / f"latent_{name}.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.mark.slow
def test_report_is_whole_and_in_the_labs_order(folder):
    summary = (folder / "summary.md").read_text()
    figures = {"pca", "pca_worst"} | {f"maps_{name}" for name in TITLES}
    assert {path.stem for path in folder.glob("*.png")} == figures
    assert all(f"]({name}.png)" in summary for name in figures)
    items = re.findall(r"^## (\d+[a-e])\.", summary, flags=re.MULTILINE)
    assert items == ["11a", "11b", "11c", "11d"]
    for word in ("nan", "None", "{", "tensor("):
        assert word not in summary, word


@pytest.mark.slow
def test_best_lstm_is_of_full_clips_and_worst_is_of_all(folder):
    """The worst is shown on the test set of its own kind of input, and the page says so."""
    roles = {"chroma": "best LSTM", "cnn_mel": "CNN", "beat_chroma": "worst LSTM"}
    assert read_metrics(folder)["roles"] == roles
    table = read_table(folder, "One vector per clip")
    for name, title in TITLES.items():
        test, shape = (
            read_metrics(folder)["runs"][name]["test"],
            latent(folder, name)["vectors"].shape,
        )
        cells = [set_of(name), *(f"{n:,}" for n in shape), with_interval(test, "accuracy")]
        assert table.loc[title].tolist() == cells
    summary = (folder / "summary.md").read_text()
    assert "the worst LSTM on its own test set (fma_genre_spectrograms_beat)" in summary


@pytest.mark.slow
@pytest.mark.parametrize("name", TITLES)
def test_latent_vectors_belong_to_their_ids(name, runs, folder):
    """Labels are the label file's; the vectors are their arrays', whatever the labels say."""
    clips, truth = latent(folder, name), labels_of(runs.spoiled.data, split="test")
    assert sorted(clips["ids"]) == sorted(truth)
    assert clips["classes"].tolist() == CLASSES
    assert [CLASSES[label] for label in clips["labels"]] == [truth[clip] for clip in clips["ids"]]

    heard = [runs.spoiled.donors[set_of(name)][clip] for clip in clips["ids"]]
    vectors = clips["vectors"] - clips["vectors"].mean(0)
    distance = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    same = np.equal.outer(heard, heard)
    assert distance[same].max() < 0.02 * distance.mean(), "one array, one vector"
    content = labels_of(runs.learned.data, split="test")
    classes = [content[donor] for donor in heard]
    # Without the clip itself and those with the very same array, the next vector is one of the
    # same music.
    nearest = np.where(same, np.inf, distance).argmin(1)
    fair = [sum(content[donor] == content[other] for other in set(heard)) > 1 for donor in heard]
    hits = [classes[i] == classes[j] for i, j in enumerate(nearest) if fair[i]]
    assert np.mean(hits) > 0.7


@pytest.mark.slow
def test_predicted_classes_and_probabilities_are_the_output_layers(runs, folder):
    for name in TITLES:
        model, checkpoint = load_model(folder_of(runs.spoiled.out, name) / "best.pt")
        clips = latent(folder, name)
        with torch.no_grad():
            logits = model.head(torch.from_numpy(clips["vectors"]))
        probability, predicted = logits.softmax(1).max(1)
        assert clips["predicted"].tolist() == predicted.tolist()
        np.testing.assert_allclose(clips["probability"], probability, atol=1e-3)
        # Of the whole network, which averages over windows of the size that it was trained on.
        expected = np.exp(log_probabilities(runs.spoiled, name, clips["ids"]).max(1))
        np.testing.assert_allclose(clips["probability"], expected, atol=0.01)
        accuracy = read_metrics(folder)["runs"][name]["test"]["accuracy"]
        assert np.mean(clips["predicted"] == clips["labels"]) == pytest.approx(accuracy)


@pytest.mark.slow
def test_methods_are_judged_by_three_criteria(folder):
    """In the tables too, with the mean over two starts of what draws random numbers."""
    metrics = read_metrics(folder)
    assert metrics["criteria"] == list(CRITERIA)
    tables = {key: read_table(folder, caption) for key, caption in CRITERIA.items()}
    for name, title in TITLES.items():
        clips, means = latent(folder, name), {}
        scaled = StandardScaler().fit_transform(clips["vectors"])
        with np.load(folder / f"maps_{name}.npz") as maps:
            for method in ("PCA", "Isomap", "t-SNE", "UMAP"):
                facts, points = metrics["separation"][name][method], maps[method]
                assert points.shape == (len(clips["ids"]), 2) and points.std(0).min() > 0
                trust = trustworthiness(scaled, points, n_neighbors=5)
                assert facts["trustworthiness"] == pytest.approx(trust, abs=0.01)
                silhouette = silhouette_score(points, clips["labels"])
                assert facts["silhouette"] == pytest.approx(silhouette, abs=1e-4)
                for key, table in tables.items():
                    values = facts[f"{key} of all seeds"]
                    assert len(values) == (2 if method in ("t-SNE", "UMAP") else 1)
                    assert values[0] == facts[key]
                    means.setdefault(method, []).append(np.mean(values))
                    cell = [np.mean(values), min(values), max(values)][: 2 * len(values) - 1]
                    found = re.findall(r"-?\d\.\d+", table.loc[method, title])
                    assert [float(number) for number in found] == pytest.approx(cell, abs=6e-4)
        best = read_table(folder, "Best method").loc[title].tolist()
        columns = [column for _, column in pd.DataFrame(means).T.round(3).items()]
        assert best == [", ".join(c.index[c == c.max()]) for c in columns]


@pytest.mark.slow
def test_the_tables_of_step_11_say_what_metrics_json_says(folder):
    """Measured in the full space, in that of the untrained twin, in the plane: each by its name."""
    kept = read_metrics(folder)["separation"]
    for caption, shown in (
        ("Separation of the genres, and", ("chroma", "cnn_mel")),
        ("Separation of the genres, all", ("chroma", "cnn_mel", "beat_chroma")),
    ):
        table = read_table(folder, caption)
        assert list(table) == [TITLES[name] for name in shown]
        for name in shown:
            column, facts = table[TITLES[name]], kept[name]
            # Random weights: a network with the trained ones would measure the very same.
            full, untrained = facts["full space"], facts["full space, untrained"]
            assert full["silhouette"] != untrained["silhouette"]
            for space in ("full space", "full space, untrained", "PCA"):
                written = column[f"5-NN accuracy, {space}"]
                # Some arrays are alike: rounding decides which are nearest in the plane.
                assert space == "PCA" or written == with_interval(facts[space], "knn_accuracy")
                written = float(column[f"silhouette, {space}"])
                assert written == pytest.approx(facts[space]["silhouette"], abs=6e-4)
    summary = (folder / "summary.md").read_text()
    minus = r"5-NN in the {}, [^:]+: `(\w+)` minus `(\w+)`, \d+ clips: accuracy ([-+.\d]+) \["
    lines = re.findall(minus.format("full space"), summary)
    ((*names, gain),) = re.findall(minus.format("PCA plane"), summary)
    one, other = (kept[name]["PCA"]["knn_accuracy"] for name in names)
    assert names == ["cnn_mel", "chroma"] and float(gain) == pytest.approx(one - other, abs=6e-4)
    pairs = [("cnn_mel", "chroma"), ("chroma", "beat_chroma"), ("cnn_mel", "beat_chroma")]
    assert [pair[:2] for pair in lines] == pairs
    (low, high), *_ = re.findall(r"`beat_chroma`,.* accuracy \S+ \[(.+), (.+)\]", summary)
    text = " ".join(summary.split())
    answer = "no difference is shown"
    if float(low) > 0 or float(high) < 0:
        answer = f"the {'best' if float(low) > 0 else 'worst'} LSTM separates the genres better"
    assert f"Is there a difference?** In the full space {answer}." in text
    assert re.search(r"in the PCA plane (the|no) .*; in the full space (the|no) ", text)
    rows = r"\| (\S+) \| \d+ \| \S+ \| \S+ \| \S+ \| (\S+) \| \S+ \| (\S+) \|"  # full space
    rows = re.findall(rows, summary.partition("## 11c")[2].partition("## 11d")[0])
    ahead = max(rows, key=lambda row: float(row[1]) - float(row[2]))
    said = "{} is the class with the largest lead of the best LSTM over the worst LSTM: {} "
    said += "against {}."
    assert said.format(*ahead) in text
    for name, kind in (("chroma", "LSTM"), ("cnn_mel", "CNN")):
        full, before = (kept[name][f"full space{end}"] for end in ("", ", untrained"))
        said = f"from {before['knn_accuracy']:.3f} to {full['knn_accuracy']:.3f} ({kind})"
        assert said in text
    for *names, gain in lines:
        one, other = (kept[name]["full space"]["knn_accuracy"] for name in names)
        assert float(gain) == pytest.approx(one - other, abs=6e-4)


@pytest.mark.slow
def test_the_planes_share_and_the_neighbours_are_those_of_standardised_vectors(folder):
    metrics, separation = read_metrics(folder), functions_of(f"{STEP}.py")["separation"]
    for name in TITLES:
        clips = latent(folder, name)
        spread = clips["vectors"].std(0)
        scaled = (clips["vectors"] - clips["vectors"].mean(0)) / np.where(spread > 1e-6, spread, 1)
        shares = np.linalg.svd(scaled, compute_uv=False) ** 2
        shares = np.cumsum(shares / shares.sum())
        found = metrics["separation"][name]
        assert found["pca_variance_2d"] == pytest.approx(shares[1], abs=2e-3)
        n_axes = found["pca_axes_for_90"]
        assert shares[n_axes - 1] > 0.9 - 1e-3 and shares[n_axes - 2] < 0.9 + 1e-3
        # Equal distances may be ordered otherwise.
        hits, facts = separation(scaled, clips["labels"])
        accuracy = facts["knn_accuracy"]
        if name != "beat_chroma":  # the table of 11b
            table = read_table(folder, "5-NN accuracy by class")
            present, counts = np.unique(clips["labels"], return_counts=True)
            assert list(table.index) == [CLASSES[number] for number in present]
            plane = separation(np.load(folder / f"maps_{name}.npz")["PCA"], clips["labels"])[0]
            for space, right in (("full space", hits), ("PCA plane", plane)):
                column = table[f"{TITLES[name]}: {space}"].astype(float)
                shares = [right[clips["labels"] == number].mean() for number in present]
                assert (abs(column - shares) < 1.5 / counts).all(), space
                assert np.ptp(shares) > 0.3, "cannot tell"
            assert not np.array_equal(hits, plane)
        few = 2.5 / len(scaled)
        assert found["full space"]["knn_accuracy"] == pytest.approx(accuracy, abs=few)
        silhouette = silhouette_score(scaled, clips["labels"])
        assert found["full space"]["silhouette"] == pytest.approx(silhouette, abs=2e-3)


def test_separation_is_leave_one_out():
    separation = functions_of(f"{STEP}.py")["separation"]
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
def test_the_page_is_made_of_what_is_saved(runs):
    where = ("--data-dir", runs.spoiled.data, "--out-dir", runs.spoiled.out)
    run_forked("tools/maps.py", "--smoke", *where)
    n_clips = len(labels_of(runs.spoiled.data, split="test"))
    assert read_metrics(runs.spoiled.out / "maps")["clips"] == n_clips


@pytest.mark.slow
def test_too_few_test_clips_are_named(runs, tmp_path):
    data, out = copy_data(runs.learned.data, tmp_path / "data"), tmp_path / "out"
    for beat in ("", "_beat"):
        labels = data / f"fma_genre_spectrograms{beat}" / "test_labels.txt"
        header, *lines = labels.read_text().splitlines()
        few = [line for line in lines if "Blues" in line or "Metal" in line]
        labels.unlink()  # a hard link, see copy_data
        labels.write_text("\n".join([header, *few]) + "\n")
    for step in ("step05_lstm", "step07_cnn"):
        shutil.copytree(runs.learned.out / step, out / step)
    flags = ("--smoke", "--data-dir", data, "--out-dir", out)
    result = run_forked(f"{STEP}.py", *flags, check=False)
    assert_clean_error(result, "4 genre test clips of 2 classes", "too few")
