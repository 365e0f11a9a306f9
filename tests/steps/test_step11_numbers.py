"""Step 11 by its numbers: whose vectors they are, and what is said of them."""

import numpy as np
import pytest
from conftest import CLASSES, labels_of, read_metrics
from genre_runs import FULL, GenreRuns
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

pytestmark = pytest.mark.slow
STEP = "step11_latent"
NAMES = ["fused", "chroma", "cnn_mel"]  # best and worst LSTM by VAL_SCORES, and the CNN


@pytest.fixture(scope="module")
def spoiled(data_dir, tmp_path_factory):
    return GenreRuns(data_dir, tmp_path_factory).spoiled


def latent(out, name):
    with np.load(out / STEP / f"latent_{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.mark.parametrize("name", NAMES)
def test_latent_vectors_belong_to_their_ids(name, data_dir, spoiled):
    """Labels are the label file's; the vectors are their arrays', whatever the labels say."""
    clips, truth = latent(spoiled.out, name), labels_of(spoiled.data, split="test")
    assert sorted(clips["ids"]) == sorted(truth)
    assert clips["classes"].tolist() == CLASSES
    assert [CLASSES[label] for label in clips["labels"]] == [truth[clip] for clip in clips["ids"]]

    heard = [spoiled.donors[FULL][clip] for clip in clips["ids"]]
    vectors = clips["vectors"] - clips["vectors"].mean(0)
    distance = np.linalg.norm(vectors[:, None] - vectors, axis=2)
    same = np.equal.outer(heard, heard)
    assert distance[same].max() < 0.02 * distance.mean(), "one array, one vector"
    content = labels_of(data_dir, split="test")
    classes = [content[donor] for donor in heard]
    # Without the clip itself and those with the very same array, the next vector is one of the
    # same music.
    nearest = np.where(same, np.inf, distance).argmin(1)
    fair = [sum(content[donor] == content[other] for other in set(heard)) > 1 for donor in heard]
    hits = [classes[i] == classes[j] for i, j in enumerate(nearest) if fair[i]]
    assert np.mean(hits) > 0.7


@pytest.mark.parametrize("name", NAMES)
def test_knn_accuracy_is_that_of_the_latent_vectors(name, spoiled):
    """Each clip judged by its five nearest others, on standardised dimensions."""
    clips = latent(spoiled.out, name)
    x = StandardScaler().fit_transform(clips["vectors"])
    labels, hits = clips["labels"], []
    for i in range(len(x)):
        others = np.arange(len(x)) != i
        nearest = KNeighborsClassifier(5).fit(x[others], labels[others])
        votes = nearest.predict_proba(x[i : i + 1])[0]
        commonest = nearest.classes_[votes == votes.max()]  # several, where there is a tie
        hits.append((labels[i] in commonest) / len(commonest))
    found = read_metrics(spoiled.out / STEP)["separation"][name]["full space"]["knn_accuracy"]
    # Equal distances may be ordered otherwise.
    assert found == pytest.approx(np.mean(hits), abs=2.5 / len(x))
