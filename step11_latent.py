"""Step 11: what the trained networks see, as points in a plane.

The lab asks, for the best LSTM of step 5 and the CNN of step 7: a) the vector of every
clip of the genre test set just before the output layer, with its label; b) PCA of these
vectors, how far the classes are apart in it, and how the models compare; c) the same for
the LSTM that performed worst; d) other methods (t-SNE, UMAP), and which works better.

    python step11_latent.py

Input: the checkpoints of steps 5 and 7 (missing ones are trained here), the genre test
sets; the package umap-learn, if it is installed. Output, in outputs/step11_latent/:
latent_<run>.npz per model (vectors, labels, ids, classes, predicted classes and their
probabilities), maps_<run>.npz (points in the plane by method), figures, measures of
separation (summary.md, metrics.json). An interactive page of these maps: python -m tools.maps.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--seed 43").
import importlib.util
import itertools
import warnings

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, Isomap, trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits  # comes with scikit-learn
from torch.utils.data import DataLoader

import common
from patrec.errors import InputError
from patrec.files import part_folder, write_bytes
from patrec.machine import seed_everything
from patrec.plots import COLORS, MARKERS, panel_grid, run_title
from patrec.recipes import GENRE_NETWORKS, LSTM_NAMES
from patrec.scores import bootstrap, classification_scores
from patrec.step import Step
from patrec.tables import difference_line, with_interval

N_NEIGHBOURS = 5  # for the k-NN accuracy and for trustworthiness
SPACES = ("full space", "full space, untrained")

step = Step("step11_latent", __doc__, parts=("genre",))

# %% 11a. The vectors before the output layer, with their genres
# The lab: the best LSTM of step 5 and the CNN of step 7; one vector per clip of the test set
# of fma_genre_spectrograms and its label, as a new dataset. That set holds full spectrograms,
# so the best LSTM is chosen among those trained on them. The worst (11c) is the worst of all:
# one trained on beats gets the test set of beats. Both are chosen by the validation score in
# their checkpoints: the test scores belong to the very clips that are shown here.
step.heading("11a. The vectors before the output layer, with their genres")
models = common.genre_models(step.training, [*LSTM_NAMES, "cnn_mel"])
val = {name: fit.facts["val"]["macro_f1"] for name, fit in models.items()}
best = max((name for name in LSTM_NAMES if not GENRE_NETWORKS[name].beat), key=val.get)
worst = min((name for name in LSTM_NAMES if name != best), key=val.get)
roles = {best: "best LSTM", "cnn_mel": "CNN", worst: "worst LSTM"}
titles = {best: f"Best {run_title(best)}", "cnn_mel": run_title("cnn_mel")}
titles[worst] = f"Worst {run_title(worst)}"


def write_arrays(name, arrays):
    """Write named arrays into a file of the step's folder."""
    write_bytes(step.folder / name, lambda file: np.savez_compressed(file, **arrays))


def latent_vectors(model, settings):
    """What a model's output layer gets for every test clip, averaged over the clip's windows.

    Returns
    -------
    dict of np.ndarray
        vectors (N, feature_size), labels (N,) class numbers, ids (N,), classes (K,)
    """
    test = common.load_test(step.source, settings)
    loader = DataLoader(test, 64)
    vectors, labels = common.predict(model.backbone, loader, step.device, settings["window"])
    found = {"vectors": vectors.numpy(), "labels": labels.numpy()}
    return found | {"ids": np.array(common.clip_ids(test)), "classes": np.array(settings["names"])}


latent, runs, table = {}, {}, {}
for name, title in titles.items():
    model, settings = models[name].model, models[name].settings
    latent[name] = clips = latent_vectors(model, settings)
    labels, classes = clips["labels"], list(clips["classes"])
    n_classes = len(np.unique(labels))
    if not (len(labels) > 2 * N_NEIGHBOURS and 2 <= n_classes < len(labels)):
        fault = f"{len(labels)} genre test clips of {n_classes} classes are too few"
        raise InputError(f"{step.source.root}: {fault} to show how classes separate; add some")
    # The output layer is linear: its output for a clip's mean vector is the clip's mean output.
    with torch.no_grad():
        logits = model.eval().head(torch.tensor(clips["vectors"], device=step.device))
    chances, predicted = logits.cpu().softmax(1).max(1)
    clips |= {"predicted": predicted.numpy(), "probability": chances.numpy()}
    write_arrays(f"latent_{name}.npz", clips)
    scores = classification_scores(labels, clips["predicted"], classes)
    runs[name] = {"val": {"macro_f1": val[name]}, "test": scores}
    table[title] = {
        "test set": part_folder(".", "genre", settings["beat"]).name,
        "clips": len(labels),
        "feature_size": clips["vectors"].shape[1],
        "test accuracy": with_interval(scores, "accuracy"),
    }
step.table(pd.DataFrame(table).T.rename_axis("model"), "One vector per clip of the genre test set")
step.text(f"""
A vector is the mean over the windows of a clip. `latent_<run>.npz` (NumPy) holds the vectors, their
labels and what the network predicts. The best LSTM (`{best}`, {val[best]:.3f}) is chosen among
those trained on full spectrograms, the worst (`{worst}`, {val[worst]:.3f}) among all, by validation
macro-F1 on {models[best].facts["n_val"]} clips. With another seed, LSTMs of similar score may
change places. Before PCA and all measures below, each dimension is brought to mean 0 and standard
deviation 1 over the clips.
""")

# %% 11b. PCA of the vectors: best LSTM and CNN
# The lab: PCA, a picture of each model's space, how far the classes separate in it. Each
# dimension is brought to mean 0 and standard deviation 1 first, so that all count the same (PCA of
# the correlation matrix). A plane cannot hold a space of hundreds of dimensions, so separation is
# also measured in the full space: which classes have the five nearest neighbours of a clip? The
# same network with random weights shows how much of the separation is there without any training.
step.heading("11b. PCA of the vectors: best LSTM and CNN")


# The measures and the picture, which 11c and 11d use again.
def scaled(vectors):
    """Each dimension to mean 0 and standard deviation 1."""
    return StandardScaler().fit_transform(vectors)


def separation(points, labels):
    """How far apart classes lie among points.

    Parameters
    ----------
    points : np.ndarray [shape=(N, D)]
    labels : np.ndarray of int [shape=(N,)]

    Returns
    -------
    hits : np.ndarray of float [shape=(N,)]
        1 where the most common class among a clip's neighbours (without itself) is its own class;
        1 / n where n classes are equally common and its own is one of them; else 0.
    facts : dict of knn_accuracy, knn_accuracy_ci95, silhouette
    """
    near = NearestNeighbors(n_neighbors=N_NEIGHBOURS).fit(points).kneighbors(return_distance=False)
    counts = np.eye(labels.max() + 1, dtype=int)[labels[near]].sum(1)  # (N, classes)
    commonest = counts == counts.max(1, keepdims=True)
    hits = commonest[np.arange(len(labels)), labels] / commonest.sum(1)
    facts = {"knn_accuracy": hits.mean()}
    facts["knn_accuracy_ci95"] = bootstrap(lambda i: hits[i].mean(), len(hits))
    return hits, facts | {"silhouette": float(silhouette_score(points, labels))}


def plot_maps(panels, n_columns):
    """Clips as points, one colour and mark per genre.

    panels : list of (title, names of the two axes, run, points (N, 2)), row by row
    """
    fig, axes = panel_grid(len(panels), n_columns, 5.4, 4.85)
    for ax, (title, (x, y), run, points) in zip(axes, panels, strict=True):
        for k, genre in enumerate(latent[run]["classes"]):
            # More classes than colours (--no-merge): the second round has other marks.
            mark = {"color": COLORS[k % 10], "marker": MARKERS[(k + k // 10) % 10]}
            rows = latent[run]["labels"] == k
            ax.scatter(*points[rows].T, s=34, edgecolor="black", linewidth=0.4, label=genre, **mark)
        ax.set(title=title, xlabel=x, ylabel=y)
        ax.set_aspect("equal", "datalim")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def pca_panel(title, run, vectors):
    """A panel of `plot_maps`, its axes named with their share of the variance."""
    pca = PCA(n_components=2, svd_solver="full")
    points, shares = pca.fit_transform(vectors), pca.explained_variance_ratio_
    axes = [f"PCA axis {i} ({share:.0%} of variance)" for i, share in enumerate(shares, start=1)]
    return title, axes, run, points


# %% 11b. The pictures and the numbers
# The worst LSTM is measured along with the two; it is shown under 11c.
spaces = {name: scaled(clips["vectors"]) for name, clips in latent.items()}
untrained, planes, hits, kept, measures, per_class = {}, {}, {}, {}, {}, {}
for name, title in titles.items():
    labels = latent[name]["labels"]
    seed_everything(step.args.seed)
    twin = common.build_model(common.model_spec(models[name].model)).to(step.device)
    untrained[name] = scaled(latent_vectors(twin, models[name].settings)["vectors"])
    shares = PCA(svd_solver="full").fit(spaces[name]).explained_variance_ratio_
    facts = kept[name] = {"pca_variance_2d": shares[:2].sum()}
    facts["pca_axes_for_90"] = int((shares.cumsum() < 0.9).sum() + 1)
    right, facts["full space"] = separation(spaces[name], labels)
    _, facts["full space, untrained"] = separation(untrained[name], labels)
    planes[name] = pca_panel(title, name, spaces[name])
    plane, facts["PCA"] = separation(planes[name][3], labels)
    ids = latent[name]["ids"]
    hits[name] = {"full space": pd.Series(right, ids), "PCA plane": pd.Series(plane, ids)}
    for space, by_clip in hits[name].items():
        per_class[title, space] = by_clip.groupby(latent[name]["classes"][labels]).mean()
    column = measures[title] = {}
    for space in (*SPACES, "PCA"):
        column[f"5-NN accuracy, {space}"] = with_interval(facts[space], "knn_accuracy")
        column[f"silhouette, {space}"] = f"{facts[space]['silhouette']:+.3f}"
    column["variance on 2 PCA axes"] = f"{facts['pca_variance_2d']:.1%}"
    column["PCA axes for 90% of the variance"] = facts["pca_axes_for_90"]
measures = pd.DataFrame(measures).rename_axis("measure")
per_class = pd.DataFrame(per_class).rename_axis("class")
counts = np.bincount(latent["cnn_mel"]["labels"])


def class_table(titles):
    """5-NN accuracy by class of some models, in the plane and in the full space, with a caption."""
    shown = itertools.product(("PCA plane", "full space"), titles)
    table = pd.DataFrame({f"{title}: {space}": per_class[title, space] for space, title in shown})
    table.insert(0, "clips", pd.Series(counts, latent["cnn_mel"]["classes"][: len(counts)]))
    return table.rename_axis("class"), "5-NN accuracy by class"


def knn_difference(first, second, space="full space"):
    """5-NN accuracy, one model minus another on the same clips.

    Returns a line about it, and what the interval shows.
    """
    gain = (hits[first][space] - hits[second][space]).dropna().to_numpy()  # subtracted by id
    low, high = bootstrap(lambda i: gain[i].mean(), len(gain))
    facts = {"n_clips": len(gain), "accuracy": gain.mean(), "accuracy_ci95": (low, high)}
    pair = f"{roles[first]} and {roles[second]}"
    line = f"5-NN in the {space}, {pair}: {difference_line(first, second, facts)}."
    winner = first if low > 0 else second if high < 0 else None
    verdict = (
        f"the {roles[winner]} separates the genres better" if winner else "no difference is shown"
    )
    return line, verdict


panels = [planes[name] for name in (best, "cnn_mel")]
caption = "The test clips by genre on the first two PCA axes. Each panel has its own scale"
step.figure(plot_maps(panels, 2), "pca", caption)
commonest = counts.max() / counts.sum()
shown = [titles[best], titles["cnn_mel"]]
lstm, cnn = (kept[name]["PCA"] for name in (best, "cnn_mel"))
knn = {n: [f"{kept[n][space]['knn_accuracy']:.3f}" for space in SPACES] for n in titles}
recognised, extremes = {}, {}  # classes by their 5-NN accuracy
for name in (best, "cnn_mel"):
    in_plane = per_class[titles[name], "PCA plane"]
    recognised[name] = ", ".join(in_plane.index[in_plane > 0.5]) or "no class"
    for space in hits[name]:
        by = per_class[titles[name], space]
        lowest = f"lowest for {by.idxmin()} ({by.min():.3f})"
        extremes[name, space] = f"highest for {by.idxmax()} ({by.max():.3f}) and {lowest}"
step.table(measures[shown], "Separation of the genres, and the variance in the PCA plane")
step.text(f"""
*5-NN accuracy*: the {N_NEIGHBOURS} nearest other clips of a clip vote for its class. The accuracy
is the share of clips for which the vote is right. (If n classes have equally many votes and the
right one is among them, the clip counts 1/n.) Always naming the most common class gives
{commonest:.3f}. *Silhouette*: the mean over the clips of `(b - a) / max(a, b)`. Here `a` is the
mean distance of a clip to the other clips of its class, and `b` that to the clips of the nearest
other class. *Untrained*: the same network with random weights. Models with different numbers of
dimensions cannot be compared by their silhouettes alone, so first compare each model with its own
untrained network. 95% intervals are over test clips. They are approximate: the clips are not
independent, each is also a neighbour of others.

**How far are the classes apart?** In the PCA plane, most clips of these classes are recognised by
their neighbours (5-NN accuracy above 0.5): with the LSTM {recognised[best]}, with the
CNN {recognised["cnn_mel"]}. The other classes overlap with others. The silhouette of
the LSTM is {lstm["silhouette"]:+.3f}, that of the CNN {cnn["silhouette"]:+.3f} (1: far apart; near
0: the classes overlap; below 0: many clips lie nearer to another class). The 5-NN accuracy there is
{lstm["knn_accuracy"]:.3f} and {cnn["knn_accuracy"]:.3f}. The plane keeps
{kept[best]["pca_variance_2d"]:.0%} and {kept["cnn_mel"]["pca_variance_2d"]:.0%} of the variance.
The output layer uses all dimensions, so an overlap in the plane says little about the test
accuracy. In the full space training changes the 5-NN accuracy from {knn[best][1]} to {knn[best][0]}
(LSTM) and from {knn["cnn_mel"][1]} to {knn["cnn_mel"][0]} (CNN).

**Which classes?** In the PCA plane the 5-NN accuracy of the LSTM is
{extremes[best, "PCA plane"]}, that of the CNN {extremes["cnn_mel", "PCA plane"]}. In the full
space the LSTM's 5-NN accuracy is {extremes[best, "full space"]}, the CNN's
{extremes["cnn_mel", "full space"]}. A large class gets a higher 5-NN accuracy by chance alone,
because more of the possible neighbours belong to it. Compare this with the two pictures.
""")
step.table(*class_table(shown))
verdicts = {}
for space in ("PCA plane", "full space"):
    line, verdicts[space] = knn_difference("cnn_mel", best, space)
    step.text(line)
change = {
    name: " to ".join(f"{kept[name][space]['silhouette']:+.3f}" for space in reversed(SPACES))
    for name in (best, "cnn_mel")
}
step.text(f"""
**Comparison of the two models' spaces** by their 5-NN accuracy: in the PCA plane
{verdicts["PCA plane"]}; in the full space {verdicts["full space"]}. In the full space, training
changes the silhouette from {change[best]} (LSTM) and from {change["cnn_mel"]} (CNN). A network can
classify better and still have a lower 5-NN accuracy, because its output layer weights the
dimensions, and the distance counts all alike.
""")

# %% 11c. The same for the worst LSTM
# The lab: is there a qualitative difference to the others? Its PCA picture stands beside those of
# 11b, and beside that of its own network with random weights, to show what training did.
step.heading("11c. The same for the worst LSTM")
panels = [planes[name] for name in (best, "cnn_mel", worst)]
panels.append(pca_panel(f"{titles[worst]}, untrained", worst, untrained[worst]))
on = part_folder(".", "genre", models[worst].settings["beat"]).name
caption = (
    f"PCA. Above: the best LSTM and the CNN. Below: the worst LSTM on its own test set ({on}), and "
    "the same network before training. Each panel has its own scale"
)
step.figure(plot_maps(panels, 2), "pca_worst", caption)
shown = list(titles.values())
step.table(measures[shown], "Separation of the genres, all three models")
line, verdict = knn_difference(best, worst)
step.text(f"{line}\n\n{knn_difference('cnn_mel', worst)[0]}")
step.table(*class_table(shown))
best_by, worst_by = (per_class[titles[name], "full space"] for name in (best, worst))
gap = (best_by - worst_by).idxmax()
step.text(f"""
**Is there a difference?** In the full space {verdict}. There the 5-NN accuracy is {knn[best][0]}
for the best LSTM and {knn[worst][0]} for the worst one (the interval of the difference stands above
the table), and {knn["cnn_mel"][0]} for the CNN. Before training it was {knn[best][1]},
{knn["cnn_mel"][1]} and {knn[worst][1]}. In the plane it is {kept[best]["PCA"]["knn_accuracy"]:.3f},
{kept["cnn_mel"]["PCA"]["knn_accuracy"]:.3f} and {kept[worst]["PCA"]["knn_accuracy"]:.3f}. In the
full space, {gap} is the class with the largest lead of the best LSTM over the worst LSTM:
{best_by[gap]:.3f} against {worst_by[gap]:.3f}.

**Is the difference qualitative?** Look at the pictures: which genres have a region of their own in
the upper panels, and do they have one in the lower left panel? Does that panel look more like the
upper ones, or like its own network before training?
""")

# %% 11d. More methods of dimensionality reduction
# The lab: t-SNE and others; which works better for these data? The criteria are named before
# the methods are compared.
step.heading("11d. More methods of dimensionality reduction")
others = min(map(len, spaces.values())) - 1  # a clip has at most this many neighbours
n_isomap, n_umap, perplexity = min(10, others), min(15, others), min(30, others / 3)
seeds = range(step.args.seed, step.args.seed + (2 if step.args.smoke else 5))
step.text(f"""
The three criteria were chosen in advance. *Trustworthiness* (Venna & Kaski, 2001; at best 1) tells
whether a clip's {N_NEIGHBOURS} neighbours in the map are near it in the full space too. It does not
use the genres, and it favours methods that keep neighbours. *Silhouette* and *5-NN accuracy* tell
how well the map separates the genres. They say nothing about the full space: a map can separate the
genres better than the full space does.

PCA is linear: it projects onto the plane with the largest variance. Isomap ({n_isomap} neighbours;
Tenenbaum et al., 2000) keeps distances along a graph of neighbours. t-SNE (perplexity
{perplexity:.0f}; van der Maaten & Hinton, 2008) and UMAP ({n_umap} neighbours; McInnes et al.,
2018) keep neighbours together and do not keep large distances. So look for groups; their size and
the distances between them mean little. t-SNE and UMAP use random numbers, so each runs with
{len(seeds)} seeds. The pictures show the first seed.
""")
# If the graph of neighbours is in pieces, Isomap joins their nearest points and warns about it.
warnings.filterwarnings("ignore", "The number of connected components")
methods = {
    "PCA": [PCA(n_components=2, svd_solver="full")],
    "Isomap": [Isomap(n_neighbors=n_isomap, eigen_solver="dense")],
    "t-SNE": [TSNE(perplexity=perplexity, random_state=seed) for seed in seeds],
}
if importlib.util.find_spec("umap"):
    from umap import UMAP

    methods["UMAP"] = [UMAP(n_neighbors=n_umap, random_state=seed, n_jobs=1) for seed in seeds]
else:
    step.text("UMAP is missing from what follows: install `umap-learn` and run this step again.")

# %% 11d. Every method on every model, and the criteria
CRITERIA = {"trustworthiness": "Trustworthiness", "silhouette": "Silhouette of the genres"}
CRITERIA["knn_accuracy"] = "5-NN accuracy of the genres"
tables = {key: {} for key in CRITERIA}
for name, title in titles.items():
    panels, points = [], {}
    for method, estimators in methods.items():
        # For few points the threads of t-SNE can wait for each other far longer than they work.
        with threadpool_limits(1, "openmp"):
            maps = [estimator.fit_transform(spaces[name]) for estimator in estimators]
        points[method] = maps[0]
        axes = (f"{method} axis 1", f"{method} axis 2")
        panels.append((f"{title}: {method}", axes, name, maps[0]))
        found = [separation(xy, latent[name]["labels"])[1] for xy in maps]
        for facts, xy in zip(found, maps, strict=True):
            trust = trustworthiness(spaces[name], xy, n_neighbors=N_NEIGHBOURS)
            facts["trustworthiness"] = float(trust)
        for key, table in tables.items():
            values = [facts[key] for facts in found]
            found[0][f"{key} of all seeds"] = values
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            table.setdefault(method, {})[title] = f"{np.mean(values):.3f}{spread}"
        kept[name][method] = found[0]
    write_arrays(f"maps_{name}.npz", points)
    caption = f"{title}: the test clips in the map of each method. The axes have no unit"
    step.figure(plot_maps(panels, 2), f"maps_{name}", caption)
for key, table in tables.items():
    caption = f"{CRITERIA[key]} in the map; t-SNE and UMAP: mean and range of {len(seeds)} seeds"
    step.table(pd.DataFrame(table).T.rename_axis("method"), caption)
keys, best_by, better = [f"{key} of all seeds" for key in CRITERIA], {}, []
for name, title in titles.items():
    facts = kept[name]
    means = {method: [np.mean(facts[method][key]) for key in keys] for method in methods}
    means = pd.DataFrame(means, CRITERIA.values()).round(3)  # as the tables show them
    best_by[title] = means.apply(lambda row: ", ".join(row.index[row == row.max()]), axis=1)
    won = []
    for one in methods:
        beaten = [m for m in methods if all(min(facts[one][k]) > max(facts[m][k]) for k in keys)]
        if beaten:
            won.append(f"{one} works better than {' and '.join(beaten)}")
    better.append(f"- {title}: {', '.join(won) or 'no method is better by all three criteria'}.")
step.text("""
**Which method works better for these data?** With a high trustworthiness, neighbours in the map are
real neighbours. With a high silhouette and 5-NN accuracy, the genres are well separated in the map.
We say that one method works better than another only if it is better by all three criteria for the
same model, and if the ranges over the seeds do not overlap. By this rule:
""")
step.text("\n".join(better))
step.text("""
The rule does not show how much the result depends on the choice of test clips. If no method is
better by all three, the choice depends on the criterion that matters for your question:
""")
table = pd.DataFrame(best_by).T.rename_axis("model")
step.table(
    table, "Best method by each criterion: the highest mean over the seeds. Ranges can overlap"
)
step.finish(runs, roles=roles, separation=kept, criteria=list(CRITERIA))
