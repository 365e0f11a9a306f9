"""Step 11: what the trained networks see, as points in a plane.

The lab asks, for the best LSTM of step 5 and the CNN of step 7: a) the vector of every
clip of the genre test set just before the output layer, with its label; b) PCA of these
vectors, how far the classes are apart in it, and how the models compare; c) the same for
the LSTM that did worst; d) other methods (t-SNE, UMAP), and which works better.

    python step11_latent.py

Input: the checkpoints of steps 5 and 7 (missing ones are trained here), the genre test
set; the package umap-learn, where it is installed. Output, in outputs/step11_latent/:
latent_<run>.npz per model (vectors, labels, ids, classes), the maps, measures of
separation (summary.md, metrics.json).

Measured on a small set of real music (see README), seed 42, bf16, one thread, a Xeon with AMX,
torch 2.13.0, 157 test clips: own class the commonest among the 5 nearest, LSTM on mel .507, CNN
.469, LSTM on chroma .443; trustworthiness of the CNN's map by PCA .784, Isomap .821, t-SNE .919.
"""

# %% Setup. In a notebook, flags go here: Step(..., flags="--seed 43").
import base64
import importlib.util
import io
import json
import re
import warnings

import joblib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import pdist
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, Isomap, trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader

from common import (
    adjust_logits,
    build_model,
    clip_ids,
    genre_models,
    load_test,
    model_spec,
    predict,
)
from patrec.errors import InputError
from patrec.features import BANDS, HOP, SR, mel_to_waveform
from patrec.files import write_bytes, write_text
from patrec.machine import seed_everything
from patrec.parallel import parallel_map
from patrec.plots import COLORS, MARKERS, plot_scores
from patrec.recipes import GENRE_NETWORKS, LSTM_NAMES
from patrec.scores import bootstrap, classification_scores
from patrec.step import Step
from patrec.tables import difference_line, with_interval

# plotly's names of MARKERS
SYMBOLS = ("circle", "square", "triangle-up", "triangle-down", "diamond")
SYMBOLS += ("cross", "x", "star", "triangle-left", "triangle-right")
N_NEIGHBOURS = 5  # that are asked for their class, and that trustworthiness looks at

step = Step("step11_latent", __doc__, parts=("genre",))

# %% 11a. The vectors before the output layer, with their genres
# The lab: the best LSTM of step 5 and the CNN of step 7; one vector per clip of the test set
# of fma_genre_spectrograms and its label, as a new dataset. That set holds full spectrograms,
# so the LSTMs to choose from are those trained on them. Best and worst go by the validation
# score in their checkpoints: the test scores belong to the very clips that are shown here.
step.heading("11a. The vectors before the output layer, with their genres")
lstms = [name for name in LSTM_NAMES if not GENRE_NETWORKS[name].beat]
models = genre_models(step.training, [*lstms, "cnn_mel"])
val = {name: fit.facts["val"]["macro_f1"] for name, fit in models.items()}
worst, *_, best = sorted(lstms, key=val.get)
roles = {best: "best LSTM", "cnn_mel": "CNN", worst: "worst LSTM"}


def latent_vectors(model, settings):
    """What a model's output layer gets for every test clip, averaged over the clip's windows.

    Returns
    -------
    dict of np.ndarray
        vectors (N, feature_size), labels (N,) class numbers, ids (N,), classes (K,)
    """
    test = load_test(step.source, settings)
    loader = DataLoader(test, 64)
    vectors, labels = predict(model.backbone, loader, step.device, settings["window"])
    found = {"vectors": vectors.numpy(), "labels": labels.numpy()}
    return found | {"ids": np.array(clip_ids(test)), "classes": np.array(settings["names"])}


latent, called, runs, table = {}, {}, {}, {}
for name, role in roles.items():
    model, settings, facts = models[name].model, models[name].settings, models[name].facts
    latent[name] = latent_vectors(model, settings)
    labels, classes = latent[name]["labels"], list(latent[name]["classes"])
    n_classes = len(np.unique(labels))
    if not (len(labels) > 2 * N_NEIGHBOURS and 2 <= n_classes < len(labels)):
        fault = f"{len(labels)} genre test clips of {n_classes} classes are too few"
        raise InputError(f"{step.source.root}: {fault} to show how classes separate; add some")
    path, clips = step.folder / f"latent_{name}.npz", latent[name]
    write_bytes(path, lambda file, clips=clips: np.savez_compressed(file, **clips))
    # The output layer is linear: what it says of a clip's mean vector is its mean answer.
    with torch.no_grad():
        logits = model.eval().head(torch.tensor(latent[name]["vectors"], device=step.device))
    chances, answers = adjust_logits(logits.cpu(), settings["priors"]).softmax(1).max(1)
    called[name] = {"called": answers.tolist(), "probability": chances.numpy().round(3).tolist()}
    scores = classification_scores(labels, answers.numpy(), classes)
    runs[name] = {"val": {"macro_f1": val[name]}, "test": scores}
    table[role] = {
        "run": name,
        "file": f"`{path.name}`",
        "clips": len(labels),
        "numbers per clip": latent[name]["vectors"].shape[1],
        "epochs (planned)": f"{facts['epochs']} ({facts['planned_epochs']})",
        "val macro-F1": val[name],
        "accuracy of its output layer": with_interval(scores, "accuracy"),
    }
step.table(pd.DataFrame(table).T.rename_axis("model"), "One vector per clip of the genre test set")
step.text(f"""
A vector is the mean over overlapping windows of a clip of the fma_genre_spectrograms test set; the
file holds vectors, class numbers, clip ids and class names (NumPy). LSTMs on beats do not know this
set's input and are not among the candidates. Validation macro-F1 of all candidates, each the best
of its last epochs on {models[best].facts["n_val"]} validation clips: those that lie close may
change places with the seed.
""")
step.table(pd.Series(val, name="val macro-F1").sort_values().to_frame().rename_axis("run"))

# %% 11b. PCA of the vectors: best LSTM and CNN
# The lab: PCA, a picture of each model's space, how far the classes separate in it. Each
# dimension is brought to mean 0 and standard deviation 1 first, so that none weighs more for its
# unit (PCA of the correlation matrix). A plane cannot hold a space of hundreds of dimensions, so
# separation is also measured in the full space: which class have a clip's five nearest others?
# The same network with random weights tells how much of that the input brings by itself.
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
        1 where the commonest class among a clip's nearest others, itself left out, is its own;
        where n classes are equally common, its own among them, 1 / n.
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
    n_rows = -(-len(panels) // n_columns)
    size = (5.4 * n_columns, 4.6 * n_rows + 0.5)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    for ax, (title, (x, y), run, points) in zip(axes.flat, panels, strict=False):
        for k, genre in enumerate(latent[run]["classes"]):
            # More classes than colours (--no-merge): the second round has other marks.
            mark = {"color": COLORS[k % 10], "marker": MARKERS[(k + k // 10) % 10]}
            rows = latent[run]["labels"] == k
            ax.scatter(*points[rows].T, s=24, edgecolor="black", linewidth=0.3, label=genre, **mark)
        ax.set(title=title, xlabel=x, ylabel=y)
        ax.set_aspect("equal", "datalim")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return fig


def pca_panel(title, run, vectors):
    """A panel of `plot_maps`, its axes named with their share of the variance."""
    pca = PCA(n_components=2, svd_solver="full").fit(vectors)
    shares = pca.explained_variance_ratio_
    axes = [f"PCA axis {i} ({share:.0%} of variance)" for i, share in enumerate(shares, start=1)]
    return title, axes, run, pca.transform(vectors)


# %% 11b. The pictures and the numbers
# The worst LSTM is measured along with the two; it is shown under 11c.
spaces = {name: scaled(clips["vectors"]) for name, clips in latent.items()}
untrained, hits, kept = {}, {}, {}
for name in roles:
    seed_everything(step.args.seed)
    twin = build_model(model_spec(models[name].model)).to(step.device)
    untrained[name] = scaled(latent_vectors(twin, models[name].settings)["vectors"])
    shares = PCA(svd_solver="full").fit(spaces[name]).explained_variance_ratio_
    kept[name] = {"pca_variance_2d": shares[:2].sum()}
    kept[name]["pca_axes_for_90"] = int((shares.cumsum() < 0.9).sum() + 1)
    hits[name], kept[name]["full space"] = separation(spaces[name], latent[name]["labels"])
    _, kept[name]["full space, untrained"] = separation(untrained[name], latent[name]["labels"])
    _, kept[name]["PCA"] = separation(pca_panel("", name, spaces[name])[3], latent[name]["labels"])

panels = [pca_panel(f"{roles[name]}, {name}", name, spaces[name]) for name in (best, "cnn_mel")]
caption = "The test clips by genre on the first two PCA axes"
step.figure(plot_maps(panels, 2), "pca", caption)


def separation_table(names):
    """The measures of some models as a table, a column per model."""
    columns = {}
    for name in names:
        facts = kept[name]
        column = columns[f"{roles[name]}, {name}"] = {}
        for space in ("full space", "full space, untrained", "PCA"):
            column[f"5-NN accuracy, {space}"] = with_interval(facts[space], "knn_accuracy")
            column[f"silhouette, {space}"] = f"{facts[space]['silhouette']:+.3f}"
        column["variance on 2 PCA axes"] = f"{facts['pca_variance_2d']:.1%}"
        column["PCA axes for 90% of it"] = facts["pca_axes_for_90"]
    return pd.DataFrame(columns).rename_axis("measure")


def class_table(names):
    """Share of each class's clips among their own in the full space, a column per model."""
    table = {}
    for name in names:
        genres = latent[name]["classes"][latent[name]["labels"]]
        table[f"{roles[name]}, {name}"] = pd.Series(hits[name]).groupby(genres).mean()
    return pd.DataFrame(table).rename_axis("class")


def knn_difference(first, second):
    """5-NN accuracy in the full space, one model minus another on the same clips, as a line."""
    one, other = (
        pd.Series(hits[name].astype(float), latent[name]["ids"]) for name in (first, second)
    )
    gain = (one - other).dropna().to_numpy()  # pandas subtracts by id
    interval = bootstrap(lambda i: gain[i].mean(), len(gain))
    facts = {"n_clips": len(gain), "accuracy": gain.mean(), "accuracy_ci95": interval}
    return f"5-NN in the full space, {difference_line(first, second, facts)}."


commonest = np.bincount(latent["cnn_mel"]["labels"]).max() / len(latent["cnn_mel"]["labels"])
step.table(separation_table([best, "cnn_mel"]), "Separation of the genres, and the plane's share")
step.text(f"""
*5-NN accuracy*: share of clips whose own class is the commonest among their {N_NEIGHBOURS} nearest
others, the clip itself left out; where n classes are equally common, a clip of one of them counts
1/n. The fewer test clips a class has, the harder that is for it. Always naming the commonest
class gives {commonest:.3f}. *Silhouette*: (b - a) / max(a, b), averaged over the clips; a is a
clip's mean distance to its own class, b to the nearest other one. *Untrained*: the same network
with one draw of random weights, batch normalisation at mean 0 and variance 1. The vectors of two
models differ in dimension, which alone changes silhouettes: compare each with its untrained twin
first. Intervals (95%) are over test clips, for one training seed, and approximate: a clip counts
once as itself and again as others' neighbour.
""")
step.text(knn_difference("cnn_mel", best))
caption = "Share of each class's clips whose own class is the commonest among their nearest others"
step.table(class_table([best, "cnn_mel"]), caption)

# %% 11c. The same for the worst LSTM
# The lab: is there a qualitative difference to the others? So its PCA picture stands beside
# that of the best, and beside that of its own untrained twin: what did training move?
step.heading("11c. The same for the worst LSTM")
panels = [pca_panel(f"{roles[name]}, {name}", name, spaces[name]) for name in (best, worst)]
panels.append(pca_panel(f"{worst}, untrained", worst, untrained[worst]))
caption = "PCA of the best LSTM, of the worst, and of the worst before training (random weights)"
step.figure(plot_maps(panels, 3), "pca_worst", caption)
step.table(separation_table([best, worst]), "Separation of the genres, best and worst LSTM")
step.text(knn_difference(best, worst))
caption = "Share of each class's clips whose own class is the commonest among their nearest others"
step.table(class_table([best, worst]), caption)

# %% 11d. More methods of dimensionality reduction
# The lab: t-SNE and others; which works better for these data? The criterion is named before
# methods are compared, and it does not know the genres: a map that pulls apart what the network
# does not separate would be no better.
step.heading("11d. More methods of dimensionality reduction")
n_clips = min(map(len, spaces.values()))
near, far, perplexity = min(15, n_clips - 1), min(10, n_clips - 1), min(30, (n_clips - 1) / 3)
seeds = range(step.args.seed, step.args.seed + (2 if step.args.smoke else 5))
step.text(f"""
Criterion, named in advance: *trustworthiness* (Venna & Kaski, 2001), how far a clip's
{N_NEIGHBOURS} neighbours in the map are its neighbours in the full space; at best 1. It says
nothing of large distances, nor of neighbours that the map has torn apart. PCA is linear and the
same at every run; of all projections onto a plane it keeps the largest share of the squared
distances. Isomap ({far} neighbours) keeps distances along the graph of neighbours. t-SNE
(perplexity {perplexity:.0f}) and UMAP ({near} neighbours) keep who is near whom and do not aim at
large distances: groups can be looked for, but not how far apart or how large they are. t-SNE starts
from a randomised PCA, UMAP from a spectral layout and goes on at random, so they run with
{len(seeds)} seeds, the first of which is shown. One setting of each method. (Tenenbaum et al.,
2000; van der Maaten & Hinton, 2008; McInnes et al., 2018.)
""")
# Where its graph is in pieces, Isomap joins them at their nearest points, and warns.
warnings.filterwarnings("ignore", "The number of connected components")
methods = {
    "PCA": [PCA(n_components=2, svd_solver="full")],
    "Isomap": [Isomap(n_neighbors=far, eigen_solver="dense")],
    "t-SNE": [TSNE(perplexity=perplexity, random_state=seed) for seed in seeds],
}
if importlib.util.find_spec("umap"):
    from umap import UMAP

    methods["UMAP"] = [UMAP(n_neighbors=near, random_state=seed, n_jobs=1) for seed in seeds]
else:
    step.text("UMAP is missing from what follows: install `umap-learn` and run this step again.")

# %% 11d. Every method on every model: the criterion, and what is left of the classes
trust, knn, apart, drawn = {}, {}, {}, {}
for name, role in roles.items():
    panels, drawn[name] = [], {}
    for method, estimators in methods.items():
        maps = [estimator.fit_transform(spaces[name]) for estimator in estimators]
        axes = (f"{method} axis 1", f"{method} axis 2")
        panels.append((f"{role}, {name}: {method}", axes, name, maps[0]))
        _, facts = separation(maps[0], latent[name]["labels"])
        values = [
            trustworthiness(spaces[name], points, n_neighbors=N_NEIGHBOURS) for points in maps
        ]
        facts["trustworthiness"] = values[0]
        facts["trustworthiness of all seeds"] = values
        facts["distances"] = float(np.corrcoef(pdist(spaces[name]), pdist(maps[0]))[0, 1])
        kept[name][method], drawn[name][method] = facts, maps[0].round(3).tolist()
        spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
        trust.setdefault(method, {})[role] = f"{np.mean(values):.3f}{spread}"
        knn.setdefault(method, {})[role] = facts["knn_accuracy"]
        apart.setdefault(method, {})[role] = facts["distances"]
    caption = f"The test clips by genre, {role} ({name}), by every method. The axes have no unit"
    step.figure(plot_maps(panels, 2), f"maps_{name}", caption)
caption = f"The criterion: trustworthiness, mean (lowest to highest) of {len(seeds)} seeds"
step.table(pd.DataFrame(trust).T.rename_axis("method"), caption)
caption = (
    "For information only: correlation of the clips' distances in the map and in the full space"
)
step.table(pd.DataFrame(apart).T.rename_axis("method"), caption)
caption = "For information only: 5-NN accuracy among the points of the map"
step.table(pd.DataFrame(knn).T.rename_axis("method"), caption)
bars = {
    f"{name}: {space}": kept[name][space]
    for name in roles
    for space in ("full space, untrained", "full space", *methods)
}
fig, ax = plt.subplots(figsize=(8, 0.4 * len(bars) + 1.2))
values = [bar["knn_accuracy"] for bar in bars.values()]
intervals = [bar["knn_accuracy_ci95"] for bar in bars.values()]
plot_scores(ax, list(bars), values, intervals, "5-NN accuracy, leave-one-out (line: 95% interval)")
ax.axvline(commonest, color="grey", linestyle=":")
for place, bar in enumerate(ax.patches):
    bar.set_color(COLORS[place // (2 + len(methods)) % 3 * 2])  # a colour per model
    bar.set_alpha(0.5)
caption = (
    "How well a clip's neighbours tell its genre, in space and maps; dotted: always naming the "
    "commonest class"
)
step.figure(fig, "knn_accuracy", caption)

# %% 11d, besides: the maps to walk in
# A page to open in a browser: every model and method, a point per clip; what a clip is and
# was called shows on hovering, clicking plays five seconds of it (made audible as in step 1).
# plotly draws; it is no package of the lab's, so the step does without where it is missing.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Maps of the test clips</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 1300px }
h1 { font-size: 1.3rem } #map { width: 100%; height: min(75vh, 800px) }
#map:focus-visible { outline: 3px solid #0072B2 }
fieldset { border: 0; padding: 0; margin: .4rem 0 }
label { margin-right: 1rem; white-space: nowrap } #said { min-height: 3em }
</style>
<h1>The genre test clips as the networks see them</h1>
<fieldset><label>model <select id="model"></select></label>
<label>method <select id="method"></select></label></fieldset>
<fieldset id="right"><label><input type="radio" name="right" value="all" checked> all</label>
<label><input type="radio" name="right" value="right"> called right</label>
<label><input type="radio" name="right" value="wrong"> called wrong</label></fieldset>
<fieldset id="classes"></fieldset>
<div id="map" tabindex="0" role="application" aria-label="Map: arrow keys go from clip to clip,
 Enter plays"></div>
<p id="said" aria-live="polite">Click a point, or focus the map and use the arrow keys and Enter:
five seconds of the clip, made of its spectrogram.</p>
<script>@PLOTLY@</script>
<script>
"use strict";
const data = @DATA@, $ = id => document.getElementById(id), map = $("map");
const audio = new Audio();
let shown = [], chosen = -1;
for (const name of Object.keys(data.models)) $("model").add(new Option(data.models[name], name));
for (const name of data.methods) $("method").add(new Option(name));
data.classes.forEach((name, k) => {
  const label = document.createElement("label"), box = document.createElement("input");
  box.type = "checkbox"; box.checked = true; box.value = k;
  label.append(box, " " + name); $("classes").append(label);
});
function describe(i) {
  const run = data.runs[$("model").value], k = run.called[i];
  return "clip " + data.ids[i] + ", " + data.classes[data.labels[i]] + ", called " +
    data.classes[k] + " (unscaled probability " + run.probability[i].toFixed(2) + ")";
}
function draw() {
  const run = data.runs[$("model").value], points = run.points[$("method").value];
  const right = document.querySelector("[name=right]:checked").value;
  const on = new Set([...document.querySelectorAll("#classes :checked")].map(b => +b.value));
  shown = data.ids.map((id, i) => i).filter(i => on.has(data.labels[i]) && (right === "all" ||
    (run.called[i] === data.labels[i]) === (right === "right")));
  if (!shown.includes(chosen)) chosen = -1;
  const traces = data.classes.map((name, k) => {
    const rows = shown.filter(i => data.labels[i] === k);
    return {type: "scatter", mode: "markers", name, x: rows.map(i => points[i][0]),
      y: rows.map(i => points[i][1]), customdata: rows, text: rows.map(describe),
      hovertemplate: "%{text}<extra></extra>", marker: {color: data.colors[k % 10],
      symbol: data.symbols[k % 10], size: 10, line: {width: 1, color: "#000"}}};
  });
  const ring = chosen < 0 ? [] : [points[chosen]];
  traces.push({type: "scatter", mode: "markers", showlegend: false, hoverinfo: "skip",
    x: ring.map(p => p[0]), y: ring.map(p => p[1]),
    marker: {symbol: "circle-open", size: 24, color: "#d00", line: {width: 3}}});
  const axis = {title: "", zeroline: false, showticklabels: false};
  Plotly.react(map, traces, {margin: {l: 10, r: 10, t: 10, b: 10}, xaxis: axis, yaxis: axis,
    hovermode: "closest", legend: {orientation: "h"}}, {responsive: true, displaylogo: false,
    modeBarButtonsToRemove: ["toImage"]});
}
function choose(i, play) {
  chosen = i; draw(); $("said").textContent = describe(i);
  if (play) { audio.src = "data:audio/mpeg;base64," + data.sounds[i]; audio.play(); }
}
draw();
map.on("plotly_click", event => choose(event.points[0].customdata, true));
for (const id of ["model", "method", "right", "classes"]) $(id).addEventListener("change", draw);
map.addEventListener("keydown", event => {
  const points = data.runs[$("model").value].points[$("method").value];
  const order = [...shown].sort((a, b) => points[a][0] - points[b][0]);
  const at = order.indexOf(chosen), by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  if (by && order.length) choose(order[(at + by + order.length) % order.length], false);
  else if (event.key === "Enter" && chosen >= 0) choose(chosen, true);
  else return;
  event.preventDefault();
});
</script>
</html>
"""


def sound_of(mel) -> str:
    """Five seconds of a mel spectrogram (128, T) as MP3, in base64."""
    import soundfile

    file = io.BytesIO()
    quality = {"bitrate_mode": "VARIABLE", "compression_level": 0.99}
    soundfile.write(file, mel_to_waveform(mel), SR, format="MP3", **quality)
    return base64.b64encode(file.getvalue()).decode()


step.heading("11d, besides. The maps to walk in")
if importlib.util.find_spec("plotly"):
    from plotly.offline import get_plotlyjs

    test = load_test(step.source, models["cnn_mel"].settings)
    store, n_heard = test.store, round((1 if step.args.smoke else 5) * SR / HOP)
    middles = (store.starts + (store.lengths - n_heard).clamp(min=0) // 2).tolist()
    heard = [store.frames[m : m + n_heard, BANDS["mel"]].float().cpu().T.numpy() for m in middles]
    workers = 1 if step.args.smoke else joblib.cpu_count()
    first = latent["cnn_mel"]
    facts = {
        "ids": first["ids"].tolist(),
        "labels": first["labels"].tolist(),
        "classes": first["classes"].tolist(),
        "models": {name: f"{role} ({name})" for name, role in roles.items()},
        "methods": list(methods),
        "runs": {name: called[name] | {"points": drawn[name]} for name in roles},
        "sounds": list(parallel_map(sound_of, [(mel,) for mel in heard], workers)),
        "colors": COLORS,
        "symbols": SYMBOLS,
    }
    parts = {"PLOTLY": get_plotlyjs(), "DATA": json.dumps(facts).replace("<", "\\u003c")}
    page = re.sub("@([A-Z]+)@", lambda match: parts[match[1]], PAGE)
    write_text(step.folder / "maps.html", page)
    step.text("[maps.html](maps.html): all of these maps in one page, to hover and to listen.")
else:
    step.text("For a page of these maps to hover and to listen: install `plotly`, run again.")
step.finish(runs, roles=roles, separation=kept, criterion="trustworthiness")
