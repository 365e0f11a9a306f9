"""Step 10: multitask learning, one model for valence, energy and danceability.

The lab asks: a) what Kaiser et al. (2017) found; b) a loss that takes the outputs and the
targets of the three emotions and returns the sum of their losses, weighted into one order
of magnitude; c) a model trained with it; d) a comparison with step 8.

    python step10_multitask.py                     # CNN from the genre model and from scratch, LSTM, average
    python step10_multitask.py --learned-weights   # besides, with weights that are learned
    python step10_multitask.py --folds 5           # cross-validation, as in step 8

Input: the genre and emotion data sets, the checkpoints of steps 5 and 7 where there are
any, the scores of steps 8 and 9 if they were run. Output, in outputs/step10_multitask/: a
checkpoint and a history per run, curves and scores (summary.md, metrics.json),
predictions.csv for the held-out clips and submission.csv for the unlabelled ones.

Measured on a small set of real music (see README), seed 42, --folds 5, torch 2.13.0:
mean Spearman on 278 clips, average .657 [.600, .706], CNN .653, LSTM .599, SVR .606.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from common import (
    EMOTIONS,
    GENRE_RUNS,
    TRAINING_DEFAULTS,
    MultitaskLoss,
    Step,
    by_axis,
    difference_text,
    earlier_emotion,
    emotion_difference,
    emotion_flags,
    emotion_floors,
    emotion_folds,
    genre_model,
    held_out_clips,
    make_parser,
    overfit_emotion,
    parse_args,
    plot_history,
    report_emotion_rows,
    run_main,
    score_by_axis,
    stop_at_emotion_leak,
    submit_emotion,
    train_emotion_jobs,
    write_predictions,
)


def main(argv=None):
    parser = make_parser(__doc__, training=True, **TRAINING_DEFAULTS)
    parser.add_argument("--folds", type=int, choices=range(1, 11), default=1, metavar="K",
                        help="1: a fifth of the clips is held out; 2 to 10: cross-validation (default: %(default)s)")  # fmt: skip
    parser.add_argument("--learned-weights", action="store_true", help="train a third model that learns the weights of the three losses")
    args = parse_args(parser, argv)
    step = Step("step10_multitask", args)

    # The CNN of step 7 from two starts, and the LSTM on mel and chroma: networks that err
    # differently, whose average was better than either in cross-validation. The held-out clips
    # are those of step 8; the genre model must not have heard them.
    name = "cnn_mel"
    run, lstm = GENRE_RUNS[name], GENRE_RUNS["fused"]
    store, labels, splits = emotion_folds(step, [run, lstm], args.folds)
    if args.overfit_batch:
        return overfit_emotion(step, {"multitask_scratch": {"run": run}, "multitask_lstm": {"run": lstm}}, splits, emotion_flags(args))
    stop_at_emotion_leak(step, store, splits)
    targets, ids = held_out_clips(store, labels, splits)

    # b) The loss: measured before training, on training labels, so that no axis drowns the others.
    losses = measure_losses(step, labels[splits[False][0].train])

    # c) One backbone with three heads: from the genre weights (small emotion data, related
    # task), and from scratch, which is what step 8's single-task models are to be compared with.
    _, _, checkpoint_path = genre_model(step, name)
    jobs = {"multitask": {"run": run, "init": checkpoint_path}, "multitask_scratch": {"run": run}, "multitask_lstm": {"run": lstm}}
    if args.learned_weights:
        jobs["multitask_learned"] = {"run": run, "init": checkpoint_path, "learned_weights": True}
    runs, predictions, members, histories = train_emotion_jobs(step, jobs, splits, targets, emotion_flags(args))
    averaged = ("multitask", "multitask_lstm")
    predictions["multitask_average"] = {axis: np.mean([predictions[row][axis] for row in averaged], axis=0) for axis in EMOTIONS}
    runs["multitask_average"] = {"members": averaged, "val": {}, "test": score_by_axis(targets, predictions["multitask_average"])}
    predictions["svr"] = by_axis(emotion_floors(store, labels, splits, args.seed)["svr"])
    runs["svr"] = {"val": {}, "test": score_by_axis(targets, predictions["svr"])}

    report_training(step, name, runs, histories, losses)
    report_comparison(step, run, ids, targets, runs, predictions, histories)
    step.heading("Predictions for the unlabelled clips")
    step.text("Made by `multitask_average`: averaging two networks that err differently was better than either of them in cross-validation (docs/experiments.md).")
    submit_emotion(step, [[member for row in averaged for member in members[row]]])
    write_predictions(step, ids, targets, predictions)
    return step.finish(runs, seed=args.seed, smoke=args.smoke, folds=args.folds, genre_model=name, losses=losses)


def measure_losses(step, labels) -> dict:
    """b): what the three losses are before training, and the weights that even them out.

    labels : np.ndarray [shape=(n_train, 3)]

    Returns
    -------
    dict
        raw (mean squared error of always answering the mean label), weight, weighted.
    """
    mean_answer = np.broadcast_to(labels.mean(0), labels.shape)
    raw = ((labels - mean_answer) ** 2).mean(0)  # (3,), which is the labels' variance
    # The weights as the loss itself holds them: one over the squared spread it is given.
    weight = 1 / np.square(MultitaskLoss(labels.std(0)).std)
    losses = {"raw": by_axis(raw), "weight": by_axis(weight), "weighted": by_axis(raw * weight)}
    step.heading("10b. Three losses in one order of magnitude")
    table = pd.DataFrame(losses).astype(float)
    table.columns = ["squared error of the mean label", "weight", "weighted loss"]
    step.table(table.rename_axis("axis"), f"Measured on {len(labels)} training clips, before training")
    big, small = table.iloc[:, 0].idxmax(), table.iloc[:, 0].idxmin()
    step.text(
        f"`MultitaskLoss(outputs, targets)` takes two (B, 3) arrays and returns the sum of the three losses. Unweighted, {big} would weigh "
        f"{table.iloc[:, 0].max() / table.iloc[:, 0].min():.2f} times as much as {small}, for no better reason than that its labels are spread wider. One over the "
        "variance of each axis's training labels brings all three squared errors to 1 at the outset, when the best a network knows is the mean."
    )
    return {kind: {axis: float(value) for axis, value in values.items()} for kind, values in losses.items()}


def report_training(step, name, runs, histories, losses):
    """c): the runs, their curves, and the learned weights if there are any."""
    step.heading("10c. One backbone, three heads")
    step.text(
        f"The backbone is that of `{name}`, the CNN of step 7. `multitask` starts from its genre weights, `multitask_scratch` "
        "from random ones, with the same settings and number of epochs; `multitask_lstm` is the LSTM of step 5 on mel and chroma, from random weights. The loss is "
        "the same for all. `multitask_average` is the mean of the answers of `multitask` and `multitask_lstm`."
    )
    table = {row: {"training clips": runs[row]["n_train"], "weights": runs[row]["weights"], "epochs (best)": f"{runs[row]['epochs']} ({runs[row]['best_epoch']})",
                   "seconds": round(runs[row]["train_seconds"]), "validation mean Spearman": runs[row]["val"]["mean_spearman"]} for row in histories}  # fmt: skip
    step.table(pd.DataFrame(table).T.rename_axis("run"))
    fig, axes = plt.subplots(1, len(histories), figsize=(5 * len(histories), 3.8), squeeze=False, layout="constrained")
    for ax, (row, history) in zip(axes.flat, histories.items(), strict=True):
        plot_history(ax, history, row, "mean Spearman")
    step.figure(fig, "learning_curves", "Loss and mean validation Spearman against the epoch; the dot marks the epoch that was kept")
    if "multitask_learned" in runs:
        # The weights live in the loss, which train() keeps with the state to go on from.
        folder = next(path for path in sorted(step.folder.glob("multitask_learned*")) if (path / "last.pt").exists())
        log_var = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)["loss"]["log_var"]
        losses["learned_factor"] = {axis: float(value) for axis, value in by_axis(torch.exp(-log_var)).items()}
        factors = ", ".join(f"{axis} {value:.2f}" for axis, value in losses["learned_factor"].items())
        step.text(f"With `--learned-weights` the loss learned to multiply these weights by: {factors} (Kendall et al., 2018: an axis that is predicted worse is trusted less).")


def report_comparison(step, run, ids, targets, runs, predictions, histories):
    """a), d): one table with steps 8 and 9 on the same clips, and the paper's findings beside it."""
    step.heading("10d. Against steps 8 and 9")
    rows, facts = dict(predictions), {row: {"weights": runs[row]["weights"], "seconds": round(runs[row]["train_seconds"])} for row in histories}
    single, single_runs = earlier_emotion(step, "step08_regression", ids)
    transfer, transfer_runs = earlier_emotion(step, "step09_transfer", ids)
    sources = [(row, "step 8", single, single_runs) for row in ("lstm", "cnn")] + [("transfer", "step 9", transfer, transfer_runs)]
    for row, owner, earlier, earlier_runs in sources:
        if row in earlier:
            rows[f"{row} ({owner})"] = earlier[row]
            parts = [earlier_runs[f"{row}_{axis}"] for axis in earlier[row]]
            facts[f"{row} ({owner})"] = {"weights": sum(part["weights"] for part in parts), "seconds": round(sum(part["train_seconds"] for part in parts))}
    report_emotion_rows(step, {row: score_by_axis(targets, columns) for row, columns in rows.items()}, "Multitask and single-task models", facts)
    step.text(
        "`svr` is support vector regression on per-band statistics, fitted on the same folds. Weights and seconds of steps 8 and 9 are those of all "
        "their single-axis models together, which is what it takes to answer as many questions as the row does."
    )
    for other in list(rows)[1:]:
        step.text("- " + difference_text("multitask", other, emotion_difference(targets, rows["multitask"], rows[other])))

    step.heading("10a. Kaiser et al. (2017), One Model To Learn Them All")
    step.text("""
They trained one network at the same time on eight tasks from several domains (image recognition, captioning, speech, parsing, translation), with blocks taken from
each domain: convolutions, attention, a mixture of experts. In short: (1) one architecture learns all of them reasonably well, below the best specialised
systems; (2) tasks with little data gain much from being learned together with others, tasks with much data lose little if anything; (3) a block that a task does
not seem to need does not harm it and mostly helps.""")
    n_train = runs["multitask"]["n_train"]
    step.text(f"All three tasks here have the same {n_train} training clips, which is little data, so (2) would have each of them gain.")
    twin = f"{run.network} (step 8)"
    if twin in rows:
        # From scratch against from scratch: what learning together does, without the genre model's part in it.
        gains = {axis: emotion_difference(targets, {axis: rows["multitask_scratch"][axis]}, {axis: rows[twin][axis]}) for axis in EMOTIONS}
        sure = [axis for axis, (_, (low, high)) in gains.items() if low > 0 or high < 0]
        step.text(
            "Measured, from scratch in both cases, together minus alone: "
            + ", ".join(f"{axis} {value:+.3f} [{low:+.3f}, {high:+.3f}]" for axis, (value, (low, high)) in gains.items())
            + f". {sum(value > 0 for value, _ in gains.values())} of 3 axes gain; " + (f"the interval excludes 0 for {', '.join(sure)}. " if sure else "no interval excludes 0. ")
            + f"One model with {facts['multitask_scratch']['weights']:,} weights took {facts['multitask_scratch']['seconds']} s, three with {facts[twin]['weights']:,} took {facts[twin]['seconds']} s."
        )
    step.text("What the genre model adds to learning together: " + difference_text("multitask", "multitask_scratch", emotion_difference(targets, rows["multitask"], rows["multitask_scratch"])))


if __name__ == "__main__":
    metrics = run_main(main)
