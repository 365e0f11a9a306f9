"""Plausible faults, planted one at a time: do the tests notice them?

    python tests/faults.py --check              # can all of them still be planted? (seconds)
    python tests/faults.py --only "bug 5|eval"  # some of them; without it all, most of an hour

Each fault is put into a copy of the project in a temporary folder, never into the project
itself, and the test that ought to notice it runs there, before that once without the fault.
Printed is whether it was caught. Exit code 1: one survived, or its old text does not stand
exactly once in the project any more, or its test is not there. Run by hand, not by pytest.
"bug N" in a name is a bug that published solutions of the lab have shipped.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "data", "outputs", "kernels", "*.zip")

# fmt: off
FAULTS = [  # name, the test that must notice it, old text, new text
    ("time: --max-minutes read as seconds", "test_six_lstms_share_the_time_evenly",
     "time.time() + 60 * minutes,", "time.time() + minutes,"),
    ("seed: not set", "test_a_seed_fixes_all_random_numbers",
     "    torch.manual_seed(seed)\n", ""),
    ("data: $PATREC_DATA not looked at", "test_a_wrong_folder_is_never_replaced_by_the_demo_set",
     'given = data_dir or os.environ.get("PATREC_DATA")', "given = data_dir"),
    ("files: written in place", "test_on_a_full_disk_the_old_file_stays",
     '        with open(partial, "wb") as file:\n            write(file)\n            file.flush()\n            os.fsync(file.fileno())\n        os.replace(partial, path)\n',
     '        with open(path, "wb") as file:\n            write(file)\n'),
    ("mel: power taken for amplitude", "test_same_as_the_labs_extractor",
     "librosa.power_to_db(mel_power, ref=np.max)", "librosa.amplitude_to_db(mel_power, ref=np.max)"),
    ("bands: chroma is the first 12 mel bands", "test_every_item_is_its_clips_own_whatever_the_order_of_the_label_files",
     '"chroma": slice(N_MELS, N_ROWS)', '"chroma": slice(0, N_CHROMA)'),
    ("bug 8: classes in the order of a set", "test_class_numbers_are_sorted_and_come_from_training",
     "names = sorted(set(labels.values()))", "names = list(set(labels.values()))"),
    ("crops: run into the next clip", "test_crops_are_random_and_stay_within_their_clip",
     "spare = (lengths - self.crop).clamp(min=0)", "spare = lengths"),
    ("bug 12: dB padded with zeros", "test_a_batch_is_its_items_padded_with_the_mean_and_not_the_loudest_value",
     "x.masked_fill_(padding[..., None].to(x.device), 0.0)",
     "x[padding.to(x.device)] = -mean / std"),
    ("leak: band statistics of all clips", "test_statistics_come_from_the_training_part_only",
     "(store, train, features)", "(store, range(len(targets)), features)"),
    ("leak: test clips' own statistics", "test_statistics_that_are_given_are_used",
     ', settings["stats"])', ", band_statistics(store, range(9)))"),
    ("loader: predictions shuffled under their ids", "test_each_clip_gets_its_own_answer",
     "DataLoader(dataset, 64), device", "DataLoader(dataset, 64, shuffle=True), device"),
    ("crops: only one", "test_training_clips_are_shown_as_often_as_planned_and_validation_clips_validate",
     "data.train.indices * recipe.crops", "data.train.indices"),
    ("mask: ignored in the mean", "test_mean_and_maximum_of_a_clips_own_steps_by_hand",
     "mean = (x * mask).sum(1) / mask.sum(1)", "mean = x.mean(1)"),
    ("mask: padding in the CNN", "test_a_clip_gives_the_same_vector_however_far_it_is_padded",
     "if (lengths < x.shape[2]).any():", "if (lengths < 1).any():"),
    ("bug 5: last step in the padding", "test_lstm_is_torchs_own_on_packed_sequences",
     "(lengths - 1).to(x.device)]", "-1]"),
    ("bug 5: backward read at the end", "test_lstm_is_torchs_own_on_packed_sequences",
     "[h[:, 0] for h in backward_h]", "[h[:, -1] for h in backward_h]"),
    ("bug 6: batch norm unsaved", "test_a_clip_gives_the_same_vector_however_far_it_is_padded",
     "return super().forward(x.flatten(0, 1)).view_as(x)",
     "return nn.functional.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x)"),
    ("bug 11: squeeze() of one clip", "test_regression_output_and_target_shapes_cannot_broadcast",
     "return self.mean + self.std * z", "return (self.mean + self.std * z).squeeze()"),
    ("bug 1: (B, 1) against (B,)", "test_regression_output_and_target_shapes_cannot_broadcast",
     "\n    if outputs.shape != targets.shape:", "\n    if len(outputs) != len(targets):"),
    ("regression loss: the wrong order is rewarded", "test_regression_loss_by_hand",
     "error + 0.5 * (1 - pearson)", "error + 0.5 * (1 + pearson)"),
    ("gradients: never set to zero", "test_gradients_of_a_step_are_its_own_and_the_loss_gets_single_precision",
     "        optimizer.zero_grad(set_to_none=True)\n", ""),
    ("windows: only the first is scored", "test_windows_of_a_clip_are_averaged",
     "part.mean(0) for part in", "part[0] for part in"),
    ("--recipe lab: augmentation stays",
     "test_the_labs_recipe_has_no_augmentation_no_averaged_weights_and_the_best_epoch",
     '{"shift": 0, "ema": 0.0} if lab or', '{"ema": 0.0} if lab or'),
    ("epoch: chosen on training clips", "test_training_clips_are_shown_as_often_as_planned_and_validation_clips_validate",
     "DataLoader(data.val, recipe.batch_size)", "DataLoader(data.train, recipe.batch_size)"),
    ("runs: a seed asked for is not taken", "test_ensemble_is_of_different_networks",
     "source = dataclasses.replace(source, seed=run.seed)", "source = dataclasses.replace(source)"),
    ("fine-tuning: as long as from scratch", "test_each_fold_is_predicted_by_the_network_that_did_not_hear_it",
     "    recipe.epochs = min(run.epochs or recipe.epochs, recipe.epochs)\n", ""),
    ("folds: always the first", "test_each_fold_is_predicted_by_the_network_that_did_not_hear_it",
     '"fold": fold, "n_folds": run.n_folds, "stats"', '"fold": 0, "n_folds": run.n_folds, "stats"'),
    ("checkpoint: other seed", "test_a_checkpoint_of_something_else_is_passed_over_and_said_so",
     '        "seed": source.seed,\n        "window"', '        "window"'),
    ("transfer: the backbone begins anew", "test_transfer_takes_the_backbone_and_nothing_else",
     "model, _ = load_model(path)\n    backbone",
     'model = build_model(load_checkpoint(path)["spec"])\n    backbone'),
    ("workers: --workers not heeded", "test_a_process_per_core_or_card_unless_told_otherwise",
     "    if training.workers:\n", "    if not training:\n"),
    ("fingerprint: ignores labels", "test_fingerprint_is_of_labels_and_not_of_their_order",
     'hashlib.sha256(b"\\n".join(sorted(lines)))',
     'hashlib.sha256(b"\\n".join(sorted(line.replace(b",", b"\\t").split(b"\\t")[0] for line in lines)))'),
    ("split: not stratified", "test_split_is_stratified_seeded_disjoint_and_covers_all",
     "random_state=seed, stratify=classes", "random_state=seed, stratify=None"),
    ("folds: held-out clips are trained on", "test_folds_hold_every_clip_out_once",
     "return ids[known[train]].tolist()", "return ids[train].tolist()"),
    ("leak check: arrays not compared", "test_leak_is_found_by_id_and_by_content",
     "if clip_id in ids or digest in digests", "if clip_id in ids"),
    ("bug 9: the overfit check never fails",
     "test_a_goal_not_reached_ends_the_step_and_leaves_what_was_shown",
     "        if not reached:\n", "        if reached is None:\n"),
    ("runs: beat_mel gets frames", "test_a_run_hears_what_its_name_says",
     '"beat_mel": Network("lstm", "mel", beat=True)', '"beat_mel": Network("lstm", "mel")'),
    ("attributions: the gradient at the clip alone", "test_attributions_add_up_to_the_logit",
     "point = (x * ((step + 0.5) / n_steps))", "point = (x.clone())"),
    ("temperature: logits multiplied by it", "test_the_temperature_that_was_put_in_is_found",
     "cross_entropy(logits / t, targets)", "cross_entropy(logits * t, targets)"),
    ("listen: another data set", "test_without_the_training_clips_there_are_no_nearest",
     'if fingerprint(root, "genre") != settings["fingerprint"]:', "if False:"),
    ("lab: a step that failed is done", "test_a_step_that_failed_when_run_again_is_not_done",
     "    if (folder / UNFINISHED).exists():\n        return False\n", ""),
    ("confusion matrix: transposed", "test_scores_of_a_hand_made_example",
     "confusion_matrix(targets, predictions", "confusion_matrix(predictions, targets"),
    ("macro-F1: absent classes left out", "test_a_score_its_interval_and_the_validation_score_are_one_statistic",
     "counts.diagonal() / np.maximum(seen, 1))", "counts.diagonal()[seen > 0] / seen[seen > 0])"),
    ("bug 10: Spearman averaged over batches", "test_spearman_is_over_the_whole_set",
     "scores[name] = spearman(*pair)",
     "scores[name] = float(np.mean([spearman(*(x[j : j + 8] for x in pair)) for j in range(0, len(answers), 8)]))"),
    ("interval: of 90%, named 95%", "test_bootstrap_interval_of_coin_tosses",
     "np.nanpercentile(values, [2.5, 97.5])", "np.nanpercentile(values, [5, 95])"),
    ("difference: by position, not by id", "test_paired_difference_of_genres_by_hand",
     "(table.loc[ids, classes].to_numpy()", "(table[classes].to_numpy()[: len(ids)]"),
    ("average: by position, not by id", "test_average_is_taken_clip_by_clip",
     "return (sum(frames[1:], frames[0]) / len(frames)).dropna()",
     "return frames[0] * 0 + np.mean([frame.to_numpy() for frame in frames], axis=0)"),
    ("step 4: the same array in two sets not seen", "test_audit_finds_leaks_between_sets",
     'test["digest"].notna()', 'test["digest"].isna()'),
    ("step 6: the same test set twice", "test_a_prediction_follows_its_array_and_a_truth_its_label",
     "load_test(step.source, model.settings, beat=beat)", "load_test(step.source, model.settings)"),
    ("step 8: chosen on test clips", "test_held_out_clips_change_nothing_but_their_own_predictions",
     'facts[kind]["val"]["mean_spearman"]', 'facts[kind]["test"]["mean_spearman"]'),
    ("step 9: --freeze is ignored", "test_frozen_blocks_are_the_genre_models_bit_for_bit",
     "load_backbone(genre_path, frozen=frozen)", "load_backbone(genre_path)"),
    ("step 11: a clip is its own neighbour", "test_separation_is_leave_one_out",
     ".kneighbors(return_distance=False)", ".kneighbors(points, return_distance=False)"),
    ("draft: written over what a student wrote", "test_draft_never_overwrites_what_a_student_wrote",
     "made.get(target.name) != checksum", "not checksum"),
]
# fmt: on


def find(text, *patterns) -> Path | None:
    """The file of the project that holds a text; None unless it stands exactly once in all."""
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    counts = {path: path.read_text(encoding="utf-8").count(text) for path in paths}
    return max(counts, key=counts.get) if sum(counts.values()) == 1 else None


def places(fault) -> tuple[Path | None, Path | None]:
    """The files in which a fault is planted and its test stands; None: not exactly one."""
    _, test, old, _ = fault
    program = find(old, "*.py", "patrec/*.py", "tools/*.py")
    return program, find(f"def {test}(", "tests/*/test_*.py")


def passes(fault, planted) -> bool:
    """Whether a fault's test passes in a copy of the project, with the fault planted or not."""
    _, test, old, new = fault
    program, test_file = (path.relative_to(ROOT) for path in places(fault))
    with tempfile.TemporaryDirectory(prefix="patrec-fault-", ignore_cleanup_errors=True) as scratch:
        copy = Path(scratch) / "project"
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        if planted:
            text = (copy / program).read_text(encoding="utf-8")
            (copy / program).write_text(text.replace(old, new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "", "--tb=no"]
        command += [f"--basetemp={scratch}/tmp", f"{test_file}::{test}"]
        return subprocess.run(command, cwd=copy, capture_output=True).returncode == 0


def judge(fault) -> str:
    if not passes(fault, planted=False):
        return "FAILS WITHOUT IT"
    return "SURVIVED" if passes(fault, planted=True) else "caught"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="only whether all can be planted")
    parser.add_argument("--only", default="", metavar="PATTERN", help="in the name")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="copies at a time")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if re.search(args.only, fault[0])]
    stale = [fault for fault in faults if None in places(fault)]
    for name, test, *_ in stale:
        print(f"STALE   {name} ({test})")
    print(f"{len(faults)} faults, {len(stale)} stale", flush=True)
    if args.check:
        raise SystemExit(bool(stale))
    faults = [fault for fault in faults if fault not in stale]
    survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for fault, verdict in zip(faults, pool.map(judge, faults), strict=True):
            survived += verdict != "caught"
            print(f"{verdict:16} {fault[0]}", flush=True)
    print(f"{len(faults) - survived} of {len(faults)} caught")
    raise SystemExit(bool(survived or stale))


if __name__ == "__main__":
    main()
