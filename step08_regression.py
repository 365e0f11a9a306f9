"""Step 8: valence, energy and danceability by regression.

The lab asks: a) the best model of step 5 and the one of step 7 as regressors, by changing
the loss; b) one model of each for valence, c) for energy, d) for danceability; e) scored
by Spearman's correlation between truth and prediction, averaged over the three axes, on
a part of the labelled clips, since the test clips have no public labels.

    python step08_regression.py              # six regressors, a fifth of the clips held out
    python step08_regression.py --folds 5    # cross-validation: every clip predicted once
    python step08_regression.py --overfit-batch

Input: the emotion data set; of step 5 only which LSTM was best. Output, in
outputs/step08_regression/: a checkpoint and a history per run, curves, scatter plots,
scores (summary.md, metrics.json), predictions.csv for the held-out clips and
submission.csv for the unlabelled ones.

Measured on a small set of real music (see README), seed 42, one CPU thread, torch
2.13.0: mean Spearman CNN .643 [.501, .734], LSTM .575, SVR .634 on 56 held-out clips;
about 7 minutes.
"""


import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from common import (
    COLORS,
    EMOTIONS,
    GENRE_RUNS,
    TRAINING_DEFAULTS,
    Step,
    by_axis,
    difference_text,
    emotion_difference,
    emotion_flags,
    emotion_floors,
    emotion_folds,
    genre_val_scores,
    held_out_clips,
    join_axes,
    make_parser,
    overfit_emotion,
    parse_args,
    plot_history,
    report_emotion_rows,
    run_main,
    score_by_axis,
    submit_emotion,
    train_emotion_jobs,
    write_predictions,
)


def main(argv=None):
    parser = make_parser(__doc__, training=True, **TRAINING_DEFAULTS)
    parser.add_argument("--folds", type=int, choices=range(1, 11), default=1, metavar="K",
                        help="1: a fifth of the clips is held out; 2 to 10: cross-validation (default: %(default)s)")  # fmt: skip
    args = parse_args(parser, argv)
    step = Step("step08_regression", args)

    # a) The best LSTM of step 5 by its validation score, and the CNN of step 7. b) c) d) Each
    # of the two once per axis: same backbone, but a head with one output and a regression loss.
    lstm_scores = {name: score for name, score in genre_val_scores(step).items() if GENRE_RUNS[name].network == "lstm"}
    networks = {"lstm": next(iter(lstm_scores), "beat_mel"), "cnn": "cnn_mel"}
    jobs = {f"{network}_{axis}": {"run": GENRE_RUNS[name], "axis": axis} for network, name in networks.items() for axis in EMOTIONS}

    # e) Part of the labelled clips is set aside before anything is trained. Steps 8, 9 and 10
    # cut alike, so their scores are of the same clips; no choice is ever made on these.
    store, labels, splits = emotion_folds(step, [GENRE_RUNS[name] for name in networks.values()], args.folds)
    if args.overfit_batch:
        return overfit_emotion(step, jobs, splits, emotion_flags(args))
    targets, ids = held_out_clips(store, labels, splits)

    runs, single, members, histories = train_emotion_jobs(step, jobs, splits, targets, emotion_flags(args))
    predictions = {network: {axis: single[f"{network}_{axis}"][axis] for axis in EMOTIONS} for network in networks}

    # Floors: a network that does not beat a ridge or support vector regression on mean, spread
    # and change of each band has learned nothing from the order of things in time.
    predictions |= {name: by_axis(values) for name, values in emotion_floors(store, labels, splits, args.seed).items()}

    # e) Spearman over the whole held-out set at once (a mean over batches is another number).
    scores = {row: score_by_axis(targets, columns) for row, columns in predictions.items()}
    runs |= {network: join_axes({axis: runs[f"{network}_{axis}"] for axis in EMOTIONS}, scores[network]) for network in networks}
    runs |= {name: {"val": {}, "test": scores[name]} for name in scores if name not in runs}

    report_training(step, networks, lstm_scores, runs, histories)
    report_scores(step, targets, predictions, scores)
    best = max(networks, key=lambda network: runs[network]["val"]["mean_spearman"])
    step.heading("Predictions for the unlabelled clips")
    step.text(f"Made by `{best}`, the network with the better mean Spearman on validation clips ({runs[best]['val']['mean_spearman']:.3f}).")
    submit_emotion(step, [members[f"{best}_{axis}"] for axis in EMOTIONS])
    write_predictions(step, ids, targets, predictions)
    return step.finish(runs, seed=args.seed, smoke=args.smoke, folds=args.folds, networks=networks)


def report_training(step, networks, lstm_scores, runs, histories):
    """a) to d): what was changed, and the learning curves of the six regressors."""
    lstm = networks["lstm"]
    step.heading("8a. From classifier to regressor")
    if lstm_scores:
        step.text(f"Best LSTM of step 5 by validation macro-F1: `{lstm}` ({', '.join(f'{name} {score:.3f}' for name, score in lstm_scores.items())}).")
    else:
        step.text(f"Step 5 has left no LSTM in this output folder, so its default choice, `{lstm}`, is taken.")
    step.text(
        "The backbone and its input stay as they were. The head gives one number instead of one per class, and cross-entropy, "
        "for which a wrong class is equally wrong however near it lies, is replaced by a regression loss built on the squared error, "
        "for which the distance counts. Outputs have the labels' shape, (B,): against (B, 1) the difference would be a B x B matrix "
        "without any error message, and every prediction would be drawn to the mean. All six start from random weights."
    )
    step.heading("8b-d. One model per axis")
    names = [f"{network}_{axis}" for network in networks for axis in EMOTIONS]
    table = {name: {"hears": networks[name.split("_")[0]], "training clips": runs[name]["n_train"], "weights": runs[name]["weights"],
                    "epochs (best)": f"{runs[name]['epochs']} ({runs[name]['best_epoch']})", "seconds": round(runs[name]["train_seconds"]),
                    "validation Spearman": next(iter(runs[name]["val"].values()))} for name in names}  # fmt: skip
    step.table(pd.DataFrame(table).T.rename_axis("run"))
    fig, axes = plt.subplots(len(networks), len(EMOTIONS), figsize=(15, 7.5), layout="constrained")
    for ax, name in zip(axes.flat, names, strict=True):
        plot_history(ax, histories[name], name, "Spearman")
    step.figure(fig, "learning_curves", "Loss and validation Spearman against the epoch; the dot marks the epoch that was kept")


def report_scores(step, targets, predictions, scores):
    """e): table, figure, scatter plots, and what the comparison shows."""
    step.heading("8e. Scores on the held-out clips")
    spread = targets.std(0)
    errors = {row: np.sqrt([np.mean((targets[:, i] - columns[axis]) ** 2) for i, axis in enumerate(EMOTIONS)]) for row, columns in predictions.items()}
    report_emotion_rows(step, scores, "Regressors and floors", {row: {"RMSE (mean of axes)": float(error.mean())} for row, error in errors.items()})
    step.text(
        "Spearman's correlation compares ranks: 1 if the clips are put in the right order, 0 if the order says nothing. `constant` answers "
        "the mean training label, `ridge` and `svr` hear mean, spread, percentiles and change of each mel band, but no order in time."
    )
    for first, second in (("cnn", "lstm"), ("cnn", "svr"), ("lstm", "svr")):
        step.text("- " + difference_text(first, second, emotion_difference(targets, predictions[first], predictions[second])))
    easiest, hardest = (choose(EMOTIONS, key=lambda axis: scores["cnn"][axis]) for choose in (max, min))
    shrink = {network: np.mean([predictions[network][axis].std() / spread[i] for i, axis in enumerate(EMOTIONS)]) for network in ("lstm", "cnn")}
    step.text(
        f"The CNN orders the clips best by {easiest} ({scores['cnn'][easiest]:.3f}) and worst by {hardest} ({scores['cnn'][hardest]:.3f}). "
        f"Its predictions spread {shrink['cnn']:.2f} times as wide as the labels (LSTM: {shrink['lstm']:.2f}): below 1, a model answers nearer "
        "to the mean than the truth is, which keeps the squared error small and leaves the ranks alone."
    )
    fig, axes = plt.subplots(2, len(EMOTIONS), figsize=(12, 8.2), layout="constrained")
    for row, network in enumerate(("lstm", "cnn")):
        for column, axis in enumerate(EMOTIONS):
            ax, x, y = axes[row, column], targets[:, column], predictions[network][axis]
            ax.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfect")
            ax.axhline(x.mean(), color=COLORS[3], linestyle="--", linewidth=1, label="mean of the true values")
            ax.scatter(x, y, s=14, alpha=0.6, color=COLORS[0])
            ax.set(xlabel=f"True {axis} (0 to 1)", ylabel=f"Predicted {axis}", xlim=(-0.03, 1.03), ylim=(min(-0.03, y.min() - 0.02), max(1.03, y.max() + 0.02)),
                   title=f"{network}: Spearman {scores[network][axis]:.2f}, RMSE {errors[network][column]:.2f} (label sd {spread[column]:.2f})")  # fmt: skip
            ax.title.set_fontsize("medium")
    axes[0, 0].legend(fontsize="small", loc="upper left")
    step.figure(fig, "scatter", "Predicted against true values of the held-out clips, one dot per clip")


if __name__ == "__main__":
    metrics = run_main(main)
