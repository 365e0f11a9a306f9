"""Step 9: transfer learning, from genres to emotions.

The lab asks: a) what Yosinski et al. (2014) found; b) a model of steps 5 and 7, and why;
c) its training on the genre data, keeping the best epoch: by which metric, on which set,
why; d) an emotion model that starts from these weights, trained for few epochs on one
axis; e) a comparison with step 8.

    python step09_transfer.py                    # valence: from the genre model, and from scratch
    python step09_transfer.py --axis all         # each of the three axes, one after another
    python step09_transfer.py --freeze 2         # the first two blocks stay as genre taught them
    python step09_transfer.py --compare-depths   # one run per number of frozen blocks

Input: both data sets; checkpoints of steps 5 and 7 and scores of step 8 where there are
any. Output, in outputs/step09_transfer/: as of step 8, without submission.csv.

Measured on a small set of real music (see README), seed 42, one CPU thread, torch
2.13.0: valence .557 from the genre model (CNN), .503 from scratch, difference
+.054 [-.075, +.218] on 56 held-out clips; 205 s.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from common import (
    COLORS,
    EMOTIONS,
    GENRE_RUNS,
    TRAINING_DEFAULTS,
    InputError,
    Step,
    difference_text,
    earlier_emotion,
    emotion_difference,
    emotion_flags,
    emotion_folds,
    genre_model,
    genre_val_scores,
    held_out_clips,
    join_axes,
    load_checkpoint,
    make_backbone,
    make_parser,
    overfit_emotion,
    parse_args,
    report_emotion_rows,
    run_main,
    score_by_axis,
    stop_at_emotion_leak,
    train_emotion_jobs,
    write_predictions,
)


def main(argv=None):
    parser = make_parser(__doc__, training=True, **TRAINING_DEFAULTS)
    parser.add_argument("--axis", choices=[*EMOTIONS, "all"], default="valence", help="which emotion to learn (default: %(default)s)")
    parser.add_argument("--freeze", type=int, choices=range(5), default=0, metavar="N",
                        help="blocks that stay as they were after genre training (default: %(default)s)")  # fmt: skip
    parser.add_argument("--compare-depths", action="store_true", help="train once per number of frozen blocks")
    args = parse_args(parser, argv)
    step = Step("step09_transfer", args)
    axes = EMOTIONS if args.axis == "all" else (args.axis,)

    # b) The model with the best genre score on validation clips: it has found the features
    # that carry furthest within the genre data, and no test clip had a say in it.
    genre_scores = genre_val_scores(step)
    name = next(iter(genre_scores), "cnn_mel")
    run = GENRE_RUNS[name]
    n_blocks = len(make_backbone(run).blocks)
    if args.freeze > n_blocks:
        raise InputError(f"--freeze {args.freeze}: the chosen model, {name}, has {n_blocks} blocks; freeze at most that many")

    # The same held-out clips as in step 8. Had the genre model heard them, its features
    # would know them, so that is looked into before anything is trained.
    store, labels, splits = emotion_folds(step, [run])
    if args.overfit_batch:
        return overfit_emotion(step, {f"scratch_{axis}": {"run": run, "axis": axis} for axis in axes}, splits, emotion_flags(args))
    stop_at_emotion_leak(step, store, splits)
    targets, ids = held_out_clips(store, labels, splits)

    # c) Genre training, as steps 5 and 7 do it; train() keeps the epoch of best validation macro-F1.
    _, _, checkpoint_path = genre_model(step, name)
    report_choice(step, name, genre_scores, checkpoint_path)

    # d) Per axis: from the genre weights (new head), and from scratch, for as many epochs.
    depths = range(n_blocks + 1) if args.compare_depths else [args.freeze]
    names = {(axis, depth): f"transfer_{axis}" + ("" if depth == args.freeze else f"_frozen{depth}") for axis in axes for depth in depths}
    jobs = {names[axis, depth]: {"run": run, "axis": axis, "init": checkpoint_path, "frozen_blocks": depth} for axis, depth in names}
    jobs |= {f"scratch_{axis}": {"run": run, "axis": axis} for axis in axes}
    runs, predictions, _, histories = train_emotion_jobs(step, jobs, splits, targets, emotion_flags(args))

    # e) Compared epoch by epoch, at the end, and with step 8.
    rows = {kind: {axis: predictions[f"{kind}_{axis}"][axis] for axis in axes} for kind in ("transfer", "scratch")}
    if len(axes) == len(EMOTIONS):
        runs |= {kind: join_axes({axis: runs[f"{kind}_{axis}"] for axis in axes}, score_by_axis(targets, rows[kind])) for kind in rows}
    report_epochs(step, axes, histories)
    report_comparison(step, axes, args.freeze, ids, targets, rows, runs)
    differences = {"from the genre model minus from scratch": emotion_difference(targets, rows["transfer"], rows["scratch"])}
    if args.compare_depths:
        report_depths(step, {axis: [runs[names[axis, depth]] for depth in depths] for axis in axes}, runs)
        none, every = ({axis: predictions[names[axis, depth]][axis] for axis in axes} for depth in (0, n_blocks))
        differences["none minus all blocks frozen"] = emotion_difference(targets, none, every)
    report_paper(step, axes, differences, len(targets))
    write_predictions(step, ids, targets, rows)
    return step.finish(runs, seed=args.seed, smoke=args.smoke, genre_model=name, frozen_blocks=args.freeze)


def report_choice(step, name, genre_scores, path):
    """b), c): which genre model, and which of its epochs, and why."""
    checkpoint = load_checkpoint(path)
    step.heading("9b. The model that is transferred")
    if genre_scores:
        step.table(pd.DataFrame({"validation macro-F1": genre_scores}).rename_axis("genre model"), "Genre models that steps 5 and 7 have trained")
        step.text(f"`{name}` has the best macro-F1 on validation clips and is taken for that: features that tell genres apart on clips the model was not "
                  "fitted to are the ones worth handing on. Neither the genre test clips nor the emotion clips had a say.")  # fmt: skip
    else:
        step.text(f"Steps 5 and 7 have left no genre model in this output folder, so there is nothing to choose from: `{name}`, the CNN, is trained here.")
    step.heading("9c. The epoch that is kept")
    step.text(
        f"Kept: epoch {checkpoint['epoch']}, with macro-F1 {checkpoint['val_score']:.3f} on the validation set, the best among the last fifth of the epochs: "
        "the learning rate has come down by then and the weights hardly move, while an earlier peak on so few clips is mostly luck. *Which metric*: macro-F1, because genres "
        "are unequally common and accuracy would forgive a model that neglects the rare ones; the loss would go on rewarding certainty "
        "about clips that are right already. *Which set*: the validation set. On training clips the last epoch nearly always looks best, "
        "overfitting included; choosing on test clips would make the test score a score of the choice."
    )
    if path.with_name("history.csv").exists():
        history = pd.read_csv(path.with_name("history.csv"))
        fig, ax = plt.subplots(figsize=(7, 3.8))
        ax.plot(history["epoch"], history["val_score"], color=COLORS[0])
        ax.plot(checkpoint["epoch"], checkpoint["val_score"], "o", color=COLORS[3], label="kept")
        ax.set(xlabel="Epoch of genre training", ylabel="Validation macro-F1", title=f"{name}: genre training")
        ax.locator_params(axis="x", integer=True)
        ax.legend()
        step.figure(fig, "genre_training", "Validation macro-F1 of the genre model; the dot, best of the last fifth, is the epoch whose weights are transferred")


def report_epochs(step, axes, histories):
    """d), e): both starts, epoch by epoch."""
    step.heading("9d. Fine-tuning against training from scratch, epoch by epoch")
    step.text("Both learn from the same clips, with the same settings and number of epochs; only the weights at the start differ.")
    fig, panels = plt.subplots(1, len(axes), figsize=(5 * len(axes) + 2, 4), squeeze=False, layout="constrained")
    for ax, axis in zip(panels.flat, axes, strict=True):
        transfer, scratch = (pd.DataFrame(histories[f"{kind}_{axis}"]).set_index("epoch")["val_score"] for kind in ("transfer", "scratch"))
        ax.plot(transfer, color=COLORS[0], label="from the genre model")
        ax.plot(scratch, color=COLORS[3], linestyle="--", label="from scratch")
        ax.set(xlabel="Epoch", ylabel="Validation Spearman", title=axis)
        ax.locator_params(axis="x", integer=True)
        ax.legend(fontsize="small", loc="lower right")
        reached = transfer.index[transfer >= scratch.max()]
        step.text(
            f"- {axis}: after one epoch {transfer.iloc[0]:.3f} from the genre model, {scratch.iloc[0]:.3f} from scratch; the best from scratch, {scratch.max():.3f} "
            f"(epoch {scratch.idxmax()}), is {f'reached from the genre model in epoch {reached[0]}' if len(reached) else 'not reached from the genre model'}."
        )
    step.figure(fig, "epochs", "Spearman's correlation on validation clips against the epoch, for both starts under the same budget")


def report_comparison(step, axes, frozen, ids, targets, rows, runs):
    """e): scores at the end, beside those of step 8."""
    step.heading("9e. Scores at the end, and step 8's")
    earlier, _ = earlier_emotion(step, "step08_regression", ids)
    rows = rows | {f"{row} (step 8)": {axis: earlier[row][axis] for axis in axes} for row in ("lstm", "cnn", "svr") if row in earlier}
    facts = {kind: {"epochs per axis": runs[f"{kind}_{axes[0]}"]["epochs"]} for kind in ("transfer", "scratch")}
    caption = "Transfer, its twin from scratch" + (", and step 8" if earlier else "")
    report_emotion_rows(step, {row: score_by_axis(targets, columns) for row, columns in rows.items()}, caption, facts)
    step.text(f"`transfer` starts from the genre model{f' with {frozen} blocks frozen' if frozen else ''}, `scratch` from random weights.")
    for other in list(rows)[1:]:
        step.text("- " + difference_text("transfer", other, emotion_difference(targets, rows["transfer"], rows[other])))


def report_depths(step, by_depth, runs):
    """Spearman against the number of frozen blocks, as one figure."""
    step.heading("How many blocks to freeze")
    fig, panels = plt.subplots(1, len(by_depth), figsize=(5 * len(by_depth) + 2, 4), squeeze=False, layout="constrained")
    for ax, (axis, tried) in zip(panels.flat, by_depth.items(), strict=True):
        val, test = ([run[part][axis] for run in tried] for part in ("val", "test"))
        ax.plot(test, "o-", color=COLORS[0], label="held-out clips")
        ax.fill_between(range(len(test)), *np.array([run["test"][f"{axis}_ci95"] for run in tried]).T, color=COLORS[0], alpha=0.15, label="95% interval of these")
        ax.plot(val, "s--", color=COLORS[2], label="validation clips")
        ax.axhline(runs[f"scratch_{axis}"]["test"][axis], color=COLORS[3], linestyle=":", label="from scratch, held-out clips")
        ax.set(xlabel="Blocks frozen after genre training", ylabel="Spearman", title=axis, xticks=range(len(test)))
        step.text(f"- {axis}: best on validation clips with {np.argmax(val)} frozen ({max(val):.3f}); on held-out clips {test[0]:.3f} with none frozen, "
                  f"{test[-1]:.3f} with all {len(test) - 1}, when only the head learns.")  # fmt: skip
    panels[0, 0].legend(fontsize="small")
    step.figure(fig, "depths", "Spearman's correlation against the number of blocks left as genre training made them")


def report_paper(step, axes, differences, n_clips):
    """a): the conclusions of the paper next to what was measured here."""
    step.heading("9a. Yosinski et al. (2014), How transferable are features in deep neural networks?")
    step.text("""
They trained networks on one half of ImageNet's classes, copied the first n layers into a network for the other half, and froze or fine-tuned them. In short:
(1) features go from general in the first layers to specific in the last ones; (2) a copied and frozen layer does worse for two reasons: it is specific to
the old task, or neighbouring layers that had adapted to each other are cut apart, in the middle; (3) the more the tasks differ, the less carries over, yet
features of a distant task still beat random ones; (4) copied layers that are then fine-tuned generalise better than training from scratch.""")
    for (what, (value, (low, high))), claim in zip(differences.items(), ("(4)", "(1) and (2)"), strict=False):
        finding = f"agrees with {claim}" if low > 0 else f"goes against {claim}" if high < 0 else f"neither shows nor refutes {claim}: too small a difference for {n_clips} clips"
        step.text(f"- Measured here, genre to {', '.join(axes)}: {what}, {value:+.3f} Spearman [{low:+.3f}, {high:+.3f}], which {finding}.")
    step.text("`--compare-depths` measures what freezing costs, (1) to (3)." if len(differences) == 1 else "")


if __name__ == "__main__":
    metrics = run_main(main)
