"""Step 11: what the trained networks see, as points in a plane.

The lab asks, for the best LSTM of step 5 and the CNN of step 7: a) the vector of every
clip of the genre test set just before the output layer, with its label; b) PCA of these
vectors, how far the classes are apart in it, and how the models compare; c) the same for
the LSTM that did worst; d) other methods (t-SNE, UMAP), and which works better.

    python step11_latent.py

Input: the checkpoints of steps 5 and 7 (missing ones are trained here), the genre test
set. Output, in outputs/step11_latent/: latent_<run>.npz per model, the maps, measures of
separation and the answers (summary.md, metrics.json).

Measured on a small set of real music (see README), seed 42, one CPU thread, torch
2.13.0: k-NN accuracy in the latent space CNN .535, best LSTM .503, worst LSTM .325
(untrained .27 to .34); 16 s.
"""

import importlib.util

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import mode
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from common import (
    COLORS,
    GENRE_RUNS,
    MARKERS,
    InputError,
    Step,
    bootstrap,
    build_model,
    classification_scores,
    even_out,
    genre_model,
    load_checkpoint,
    load_genre_test,
    make_loader,
    make_parser,
    model_spec,
    parse_args,
    plot_scores,
    predict,
    run_main,
    seed_everything,
    write_bytes,
)  # fmt: skip

LSTMS = [name for name, run in GENRE_RUNS.items() if run.network == "lstm" and not run.plain]
N_NEIGHBOURS = 5  # whose majority decides in the k-NN measure


def main(argv=None):
    args = parse_args(make_parser(__doc__), argv)
    step = Step("step11_latent", args)

    # Best and worst LSTM by the validation score kept in the checkpoints: the test scores
    # belong to the very clips that are shown here.
    found = {name: genre_model(step, name) for name in [*LSTMS, "cnn_mel"]}
    val = {name: load_checkpoint(path)["val_score"] for name, (_, _, path) in found.items()}
    worst, *_, best = sorted(LSTMS, key=val.get)
    roles = {best: "best LSTM", "cnn_mel": "CNN", worst: "worst LSTM"}

    # a) One vector per test clip, before the output layer, kept with its label and id.
    latent = {name: latent_vectors(step, *found[name][:2]) for name in roles}
    runs = {}
    for name, clips in latent.items():
        check_size(step, clips["labels"])
        logits = clips.pop("logits")
        runs[name] = {"val": {"macro_f1": val[name]}, "test": classification_scores(clips["labels"], logits.argmax(1), clips["classes"].tolist())}
        write_bytes(step.folder / f"latent_{name}.npz", lambda file, clips=clips: np.savez_compressed(file, **clips))

    # b), c), d) Every method on every model, and what separation is left in the plane. The
    # same networks with random weights show how much of it is in the input already.
    maps, explained, measures, trust = {}, {}, {}, {}
    for name, clips in latent.items():
        x = scaled(clips["vectors"])
        maps[name], explained[name] = project(x, args.seed)
        measures[name] = {space: separation(points, clips["labels"]) for space, points in ({"full space": x} | maps[name]).items()}
        # How far neighbours in the map are neighbours in the full space (Venna & Kaski, 2001).
        trust[name] = {method: trustworthiness(x, points, n_neighbors=min(N_NEIGHBOURS, (len(x) - 1) // 2)) for method, points in maps[name].items()}
        seed_everything(args.seed)
        untrained = latent_vectors(step, build_model(model_spec(found[name][0])).to(step.device), found[name][1])
        measures[name]["full space, untrained"] = separation(scaled(untrained["vectors"]), untrained["labels"])

    report_maps(step, roles, latent, maps, explained, val)
    kept = report_separation(step, roles, runs, measures, explained, trust)
    answer_questions(step, roles, latent, measures, explained, kept)
    return step.finish(runs, roles=roles, separation=kept)


def latent_vectors(step, model, settings) -> dict:
    """What a model's output layer gets for every test clip, averaged over the clip's windows.

    Returns
    -------
    dict of np.ndarray
        vectors (N, feature_size), labels (N,) class numbers, ids (N,), classes (K,);
        logits (N, K), the output layer's answer to these very vectors.
    """
    test = load_genre_test(step.data, settings, device=step.device, skip_bad=step.args.skip_bad, allow_leak=step.args.allow_leak)
    # predict averages the outputs of windows. The output layer is linear, so its answer to
    # the average vector is the average answer that steps 6 and 7 score.
    vectors, labels = predict(model.backbone, make_loader(test, 64), step.device, settings["window"])
    with torch.no_grad():
        logits = even_out(model.eval().head(vectors.to(step.device)).cpu(), settings["shares"])
    ids = np.array([entry.clip_id for entry in test.store.entries])
    return {"vectors": vectors.numpy(), "labels": labels.numpy(), "ids": ids, "classes": np.array(settings["classes"]), "logits": logits.numpy()}


def check_size(step, labels):
    """k-NN needs more clips than neighbours, a silhouette classes of several clips."""
    n_classes = len(np.unique(labels))
    if not (len(labels) > N_NEIGHBOURS and 2 <= n_classes < len(labels)):
        raise InputError(f"{step.data}: {len(labels)} genre test clips of {n_classes} classes are too few to show how classes separate; add test clips")


def scaled(vectors):
    """Each dimension to mean 0 and standard deviation 1: the maxima would drown the means."""
    return StandardScaler().fit_transform(vectors)


def project(x, seed):
    """Scaled vectors (N, D) -> {method: (N, 2)}, and the share of variance of every PCA axis."""
    pca = PCA(svd_solver="full").fit(x)
    maps = {"PCA": pca.transform(x)[:, :2], "t-SNE": TSNE(perplexity=min(30, (len(x) - 1) / 3), random_state=seed).fit_transform(x)}
    if importlib.util.find_spec("umap"):
        import umap

        maps["UMAP"] = umap.UMAP(n_neighbors=min(15, len(x) - 1), random_state=seed, n_jobs=1).fit_transform(x)
    return maps, pca.explained_variance_ratio_


def separation(points, labels) -> dict:
    """How far apart the classes lie among points.

    Parameters
    ----------
    points : np.ndarray [shape=(N, D)]
    labels : np.ndarray of int [shape=(N,)]

    Returns
    -------
    dict
        guesses (N,), what the majority of a clip's 5 nearest others says of its class;
        hits (N,), whether that is right; silhouette, the mean over clips, in [-1, 1].
    """
    # kneighbors without an argument leaves each clip itself out: leave-one-out.
    neighbours = NearestNeighbors(n_neighbors=N_NEIGHBOURS).fit(points).kneighbors(return_distance=False)
    guesses = mode(labels[neighbours], axis=1).mode
    return {"guesses": guesses, "hits": guesses == labels, "silhouette": float(silhouette_score(points, labels))}


def report_maps(step, roles, latent, maps, explained, val):
    """a), b), d): one row of maps per model, one colour and mark per genre."""
    step.heading("11a, b, d. Latent vectors of the genre test set")
    step.text(f"One vector per test clip ({len(latent['cnn_mel']['labels'])} clips), taken just before the output layer: " + ", ".join(
        f"{role} `{name}` (validation macro-F1 {val[name]:.3f}, {latent[name]['vectors'].shape[1]} numbers per clip)" for name, role in roles.items())
        + ". Best and worst LSTM are chosen by validation macro-F1: " + ", ".join(f"`{name}` {val[name]:.3f}" for name in LSTMS) + ".")  # fmt: skip
    methods = list(maps["cnn_mel"])
    fig, axes = plt.subplots(len(roles), len(methods), figsize=(5.4 * len(methods), 4.6 * len(roles) + 0.5), squeeze=False, layout="constrained")
    for row, (name, role) in zip(axes, roles.items(), strict=True):
        for ax, method in zip(row, methods, strict=True):
            for k, genre in enumerate(latent[name]["classes"]):
                points = maps[name][method][latent[name]["labels"] == k]
                # More classes than colours (--no-merge): the second round has other marks.
                ax.scatter(*points.T, s=24, color=COLORS[k % 10], marker=MARKERS[(k + k // 10) % 10], edgecolor="black", linewidth=0.3, label=genre)
            share = [f" ({value:.0%} of variance)" if method == "PCA" else "" for value in explained[name][:2]]
            ax.set(xlabel=f"{method} axis 1{share[0]}", ylabel=f"{method} axis 2{share[1]}", title=f"{role}, {name}: {method}")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    step.figure(fig, "maps", "The test clips by genre. Rows: models; columns: methods. In t-SNE and UMAP only what is near is to be read, not large distances")


def report_separation(step, roles, runs, measures, explained, trust) -> dict:
    """b), c), d): separation in numbers as table and figure; returns what metrics.json keeps."""
    kept, table = {}, {}
    for name in roles:
        kept[name] = {"pca_variance_2d": explained[name][:2].sum(), "pca_axes_for_90": int((explained[name].cumsum() < 0.9).sum() + 1)}
        for space, values in measures[name].items():
            hits = values["hits"]
            kept[name][space] = {"knn_accuracy": hits.mean(), "knn_accuracy_ci95": bootstrap(lambda i, hits=hits: hits[i].mean(), len(hits)),
                                 "silhouette": values["silhouette"]}  # fmt: skip
        for method, value in trust[name].items():
            kept[name][method]["trustworthiness"] = value
        table[name] = {"output layer's accuracy": f"{runs[name]['test']['accuracy']:.3f}"}
        table[name] |= {f"k-NN, {space}": f"{kept[name][space]['knn_accuracy']:.3f}" for space in measures[name]}
        table[name] |= {f"silhouette, {space}": f"{kept[name][space]['silhouette']:+.3f}" for space in measures[name]}
        table[name] |= {f"trustworthiness, {method}": f"{value:.3f}" for method, value in trust[name].items()}
        table[name] |= {"variance on 2 PCA axes": f"{kept[name]['pca_variance_2d']:.1%}", "PCA axes for 90% of it": kept[name]["pca_axes_for_90"]}
    step.heading("11b, c, d. Separation in numbers")
    step.table(pd.DataFrame(table).rename_axis("measure"), "Separation of the genres in the full space and in the plane")
    step.text(f"k-NN: share of clips whose {N_NEIGHBOURS} nearest others mostly are of their class (leave-one-out; the commonest class alone would give "
              f"{max(test['support'] for test in runs['cnn_mel']['test']['per_class'].values()) / runs['cnn_mel']['test']['n_clips']:.3f}). Silhouette: the distance to the "
              "nearest other class against that to the own class; 1 far apart, 0 touching, negative inside the other. Trustworthiness: how far neighbours in the map are neighbours in the full "
              "space, at best 1. Untrained: the same network with random weights.")  # fmt: skip
    bars = {f"{name}: {space}": kept[name][space] for name in roles for space in measures[name]}
    fig, ax = plt.subplots(figsize=(8, 0.4 * len(bars) + 1.2))
    plot_scores(ax, list(bars), [bar["knn_accuracy"] for bar in bars.values()], [bar["knn_accuracy_ci95"] for bar in bars.values()], "k-NN accuracy, leave-one-out (line: 95% interval)")
    step.figure(fig, "knn_accuracy", "How well a clip's neighbours tell its genre")
    return kept


def answer_questions(step, roles, latent, measures, explained, kept):
    """b), c), d) in sentences that follow from the numbers."""
    best, cnn, worst = roles
    classes, labels = latent[cnn]["classes"], latent[cnn]["labels"]

    def compare(first, second, space="full space"):
        """Difference of two models' k-NN accuracy on the same clips, in words."""
        # By id: the label files of frames and of beats need not be in the same order.
        _, i, j = np.intersect1d(latent[first]["ids"], latent[second]["ids"], return_indices=True)
        gain = measures[first][space]["hits"][i].astype(float) - measures[second][space]["hits"][j]
        low, high = bootstrap(lambda rows: gain[rows].mean(), len(gain))
        verdict = "more" if low > 0 else "less" if high < 0 else "not shown to be more or less"
        return f"`{first}` is {verdict} separated than `{second}` (k-NN {gain.mean():+.3f}, 95% interval [{low:+.3f}, {high:+.3f}])"

    per_class = pd.DataFrame({name: {genre: measures[name]["full space"]["hits"][latent[name]["labels"] == k].mean() for k, genre in enumerate(classes)
                                     if (latent[name]["labels"] == k).any()} for name in roles})  # fmt: skip
    step.table(per_class.rename_axis("class"), "Share of each class's clips whose nearest others in the full space are mostly of their class")
    guesses = measures[cnn]["full space"]["guesses"]
    mixed = pd.Series([f"{classes[a]} among {classes[b]}" for a, b in zip(labels, guesses, strict=True) if a != b]).value_counts()
    easy, hard = per_class[cnn].idxmax(), per_class[cnn].idxmin()
    maps = list(measures[cnn])[1:-1]  # between the full space and the untrained one
    mean = {key: {space: np.mean([kept[name][space][key] for name in roles]) for space in maps} for key in ("knn_accuracy", "silhouette", "trustworthiness")}
    winner = {key: max(choices, key=choices.get) for key, choices in mean.items()}

    def knn(name):
        return "; ".join(f"{space} {kept[name][space]['knn_accuracy']:.3f}" for space in measures[name])

    step.heading("Answers")
    step.text(f"""
**b) How much are the classes separated, and how do the models' spaces compare?** k-NN accuracy of `{best}`: {knn(best)}.
Of `{cnn}`: {knn(cnn)}. In the full space {compare(cnn, best)}. The mean silhouette in the full space is
{kept[best]['full space']['silhouette']:+.3f} for `{best}` and {kept[cnn]['full space']['silhouette']:+.3f} for `{cnn}`: genres
{'form groups with overlap' if min(kept[name]['full space']['silhouette'] for name in (best, cnn)) > 0 else 'overlap, at least in one of the two, rather than form islands'}.
For the CNN, {easy} is the most separate class ({per_class.loc[easy, cnn]:.0%} of its clips lie among their own) and {hard} the least
({per_class.loc[hard, cnn]:.0%}); most often{f' lies {mixed.index[0]} ({mixed.iloc[0]} clips)' if len(mixed) else ' nothing is mixed up'}. The first two PCA axes hold
{kept[best]['pca_variance_2d']:.0%} of `{best}`'s variance and {kept[cnn]['pca_variance_2d']:.0%} of `{cnn}`'s, whose 90% need {kept[best]['pca_axes_for_90']} and {kept[cnn]['pca_axes_for_90']} axes.

**c) The worst LSTM, `{worst}`.** In the full space {compare(best, worst)}; the silhouette is {kept[best]['full space']['silhouette']:+.3f} against
{kept[worst]['full space']['silhouette']:+.3f}. Against its own untrained twin, training brought `{worst}` {kept[worst]['full space']['knn_accuracy'] - kept[worst]['full space, untrained']['knn_accuracy']:+.3f}
of k-NN accuracy, `{best}` {kept[best]['full space']['knn_accuracy'] - kept[best]['full space, untrained']['knn_accuracy']:+.3f} and `{cnn}` {kept[cnn]['full space']['knn_accuracy'] - kept[cnn]['full space, untrained']['knn_accuracy']:+.3f}.

**d) Which method works better here?** Mean over the three models: """ + "; ".join(
        f"{space} k-NN {mean['knn_accuracy'][space]:.3f}, silhouette {mean['silhouette'][space]:+.3f}, trustworthiness {mean['trustworthiness'][space]:.3f}" for space in maps)
        + f""". By k-NN {winner['knn_accuracy']}, by silhouette {winner['silhouette']}, by trustworthiness {winner['trustworthiness']} is best.
PCA is linear, the same at every run and its axes have a size in variance; in {' and '.join(maps[1:])} neighbours come first and large
distances are given up: groups can be looked for there, but not how far apart they are.
""")  # fmt: skip


if __name__ == "__main__":
    metrics = run_main(main)
