"""Plausible faults, planted one at a time: do the tests notice them?

    python tests/faults.py --check              # can all of them still be planted? (seconds)
    python tests/faults.py --only "bug 5|eval"  # some of them; without it all, most of an hour

Each fault is put into a copy of the project in a temporary folder, never into the project
itself, and the test that ought to notice it runs there, before that once without the fault.
Printed is whether it was caught. Exit code 1: one survived, or its old text does not stand
exactly once in its file any more. Run by hand, not by pytest. "bug N" in a name is a bug that
published solutions of the lab have shipped.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "data", "outputs", "kernels", "*.zip")


class Fault(NamedTuple):
    file: str
    name: str
    old: str  # stands in the file exactly once
    new: str
    test: str  # in tests/, the one that must notice


# fmt: off
TABLE = {  # file: rows of (name, old text, new text, test)
    "patrec/flags.py": [
        ("time: --max-minutes read as seconds",
         "time.time() + 60 * minutes,",
         "time.time() + minutes,",
         "system/test_resume.py::test_six_lstms_share_the_time_evenly"),
        ("flags: a mistyped one is guessed",
         "allow_abbrev=False,  # a mistyped",
         "allow_abbrev=True,  # a mistyped",
         "unit/test_flags.py::test_flags_out_of_range_exit_with_2"),
    ],
    "patrec/machine.py": [
        ("seed: torch is not seeded",
         '    torch.manual_seed(seed)\n',
         "",
         "unit/test_train.py::test_the_loss_is_scaled_for_float16_and_gradients_clipped_after_unscaling"),
    ],
    "patrec/files.py": [
        ("data: $PATREC_DATA not looked at",
         'given = data_dir or os.environ.get("PATREC_DATA")',
         "given = data_dir",
         "system/test_first_command.py::test_a_wrong_folder_is_never_replaced_by_the_demo_set"),
        ("files: written in place",
         '        with open(partial, "wb") as file:\n            write(file)\n            file.flush()\n            os.fsync(file.fileno())\n        os.replace(partial, path)\n',
         '        with open(path, "wb") as file:\n            write(file)\n',
         "unit/test_files.py::test_on_a_full_disk_the_old_file_stays"),
    ],
    "patrec/measures.py": [
        ("mel: power taken for amplitude",
         "librosa.power_to_db(power, ref=np.max)",
         "librosa.amplitude_to_db(power, ref=np.max)",
         "unit/test_features.py::test_same_as_the_labs_extractor"),
    ],
    "patrec/features.py": [
        ("bands: chroma is the first 12 mel bands",
         '"chroma": slice(N_MELS, N_ROWS)',
         '"chroma": slice(0, N_CHROMA)',
         "unit/test_dataset.py::test_features_are_the_right_rows"),
        ("sound: amplitude taken for power",
         "magnitude = np.sqrt(np.maximum(power, 0))",
         "magnitude = np.maximum(power, 0)",
         "unit/test_measures.py::test_sound_comes_back_like_the_spectrogram_it_was_made_of"),
    ],
    "common.py": [
        ("bug 8: classes in the order of a set",
         "names = sorted(set(labels.values()))",
         "names = list(set(labels.values()))",
         "unit/test_dataset.py::test_class_numbers_are_sorted_and_come_from_training"),
        ("crops: run into the next clip",
         "spare = (lengths - self.crop).clamp(min=0)",
         "spare = lengths",
         "unit/test_dataset.py::test_crops_are_random_and_stay_within_their_clip"),
        ("bug 12: dB padded with zeros, then standardised",
         '        if self.stats:\n            mean, std = (value.to(x.device) for value in self.stats)\n            x = x.sub_(mean).div_(std)\n        padding = t >= lengths[:, None]\n        if padding.any():\n            x.masked_fill_(padding[..., None].to(x.device), 0.0)\n',
         '        padding = t >= lengths[:, None]\n        if padding.any():\n            x.masked_fill_(padding[..., None].to(x.device), 0.0)\n        if self.stats:\n            mean, std = (value.to(x.device) for value in self.stats)\n            x = x.sub_(mean).div_(std)\n',
         "unit/test_dataset.py::test_padding_is_the_mean_and_not_the_loudest_value"),
        ("leak: band statistics of validation and held-out clips too",
         "band_statistics(store, train, features)",
         "band_statistics(store, range(len(targets)), features)",
         "unit/test_dataset.py::test_statistics_come_from_the_training_part_only"),
        ("leak: class shares of validation clips too",
         "np.bincount(targets[train], minlength=len(names)).clip(min=1)",
         "np.bincount(targets, minlength=len(names)).clip(min=1) * len(train) / len(targets)",
         "unit/test_dataset.py::test_priors_are_shares_of_the_training_part_and_never_zero"),
        ("leak: test clips standardised by their own statistics",
         'SpectrogramDataset(store, targets, settings["features"], settings["stats"])',
         'SpectrogramDataset(store, targets, settings["features"], band_statistics(store, range(9), settings["features"]))',
         "unit/test_dataset.py::test_statistics_that_are_given_are_used"),
        ("loader: predictions shuffled under their ids",
         "DataLoader(dataset, 64), device",
         "DataLoader(dataset, 64, shuffle=True), device",
         "unit/test_train.py::test_each_clip_gets_its_own_adjusted_answer"),
        ("loader: one crop of a clip per epoch, whatever was planned",
         "data.train.indices * recipe.crops",
         "data.train.indices",
         "unit/test_train.py::test_every_clip_is_shown_as_often_as_planned_each_time_in_another_order"),
        ("mask: ignored in the mean",
         "mean = (x * mask).sum(1) / mask.sum(1)",
         "mean = x.mean(1)",
         "unit/test_networks.py::test_mean_and_maximum_of_a_clips_own_steps_by_hand"),
        ("mask: padding goes through the CNN",
         "if (lengths < x.shape[2]).any():",
         "if (lengths < 1).any():",
         "unit/test_networks.py::test_a_clip_gives_the_same_vector_however_far_it_is_padded"),
        ("bug 5: the last step is taken in the padding",
         "forward_h[torch.arange(len(x), device=x.device), (lengths - 1).to(x.device)]",
         "forward_h[:, -1]",
         "unit/test_networks.py::test_lstm_is_torchs_own_on_packed_sequences"),
        ("bug 5: the backward direction is read at the clip's end",
         "[h[:, 0] for h in backward_h]",
         "[h[:, -1] for h in backward_h]",
         "unit/test_networks.py::test_bidirectional_lstm_reads_both_ends"),
        ("bug 6: batch norm inside forward, without a memory",
         "return super().forward(x.flatten(0, 1)).view_as(x)",
         "return nn.functional.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x)",
         "unit/test_networks.py::test_a_clip_gives_the_same_vector_however_far_it_is_padded"),
        ("SpecAugment: when scoring too",
         "if not (self.training and self.widest):",
         "if not self.widest:",
         "unit/test_networks.py::test_stripes_are_cut_in_training_only_and_alike_in_means_spreads_and_changes"),
        ("bug 11: squeeze() of a batch of one clip",
         "return self.mean + self.std * z",
         "return (self.mean + self.std * z).squeeze()",
         "unit/test_losses.py::test_regression_output_and_target_shapes_cannot_broadcast"),
        ("bug 1: (B, 1) against (B,) is let through",
         '\n    if outputs.shape != targets.shape:',
         '\n    if len(outputs) != len(targets):',
         "unit/test_losses.py::test_regression_output_and_target_shapes_cannot_broadcast"),
        ("regression loss: the wrong order is rewarded",
         "error + 0.5 * (1 - pearson)",
         "error + 0.5 * (1 + pearson)",
         "unit/test_losses.py::test_regression_loss_by_hand"),
        ("gradients: never set to zero",
         '        optimizer.zero_grad(set_to_none=True)\n',
         "",
         "unit/test_train.py::test_gradients_of_a_step_are_its_own"),
        ("windows: only the first is scored",
         "(n_clips, -1)).mean(1)",
         "(n_clips, -1))[:, 0]",
         "unit/test_train.py::test_windows_of_a_clip_are_averaged"),
        ("logit adjustment: wrong sign",
         "return logits - strength *",
         "return logits + strength *",
         "unit/test_train.py::test_logit_adjustment_by_hand"),
        ("epoch: chosen on training clips",
         "DataLoader(data.val, recipe.batch_size)",
         "DataLoader(data.train, recipe.batch_size)",
         "unit/test_train.py::test_validation_clips_choose_the_epoch"),
        ("runs: a seed asked for is not taken",
         "source = dataclasses.replace(source, seed=run.seed)",
         "source = dataclasses.replace(source)",
         "steps/test_step07.py::test_ensemble_is_of_different_networks"),
        ("fine-tuning: at the full rate",
         '    recipe.lr *= run.lr_factor\n',
         "",
         "unit/test_emotion_training.py::test_each_fold_is_predicted_by_the_network_that_did_not_hear_it"),
        ("folds: the first one's network predicts for all, having trained on them",
         '"fold": fold, "n_folds": run.n_folds, "stats"',
         '"fold": 0, "n_folds": run.n_folds, "stats"',
         "unit/test_emotion_training.py::test_each_fold_is_predicted_by_the_network_that_did_not_hear_it"),
        ("checkpoints: one of another seed is taken",
         '        "seed": source.seed,\n        "window"',
         '        "window"',
         "unit/test_experiments.py::test_a_checkpoint_of_something_else_is_passed_over_and_said_so"),
        ("transfer: the backbone begins anew",
         'model, _ = load_model(path)\n    backbone',
         'model = build_model(load_checkpoint(path)["spec"])\n    backbone',
         "unit/test_earlier.py::test_transfer_takes_the_backbone_and_nothing_else"),
        ("workers: --workers not heeded",
         '    if training.workers:\n        most = training.workers\n    elif',
         "    if",
         "unit/test_experiments.py::test_a_process_per_core_or_card_unless_told_otherwise"),
    ],
    "patrec/labels.py": [
        ("fingerprint: ignores labels",
         'hashlib.sha256(b"\\n".join(sorted(lines)))',
         'hashlib.sha256(b"\\n".join(sorted(line.replace(b",", b"\\t").split(b"\\t")[0] for line in lines)))',
         "unit/test_labels.py::test_fingerprint_is_of_labels_and_not_of_their_order"),
    ],
    "patrec/splits.py": [
        ("split: not stratified",
         "random_state=seed, stratify=classes",
         "random_state=seed, stratify=None",
         "unit/test_dataset.py::test_split_is_stratified_seeded_disjoint_and_covers_all"),
        ("folds: held-out clips are trained on",
         "return ids[known[train]].tolist()",
         "return ids[train].tolist()",
         "unit/test_dataset.py::test_folds_hold_every_clip_out_once"),
    ],
    "patrec/clips.py": [
        ("leak check: arrays not compared",
         "if entry.clip_id in ids or digest in digests",
         "if entry.clip_id in ids",
         "unit/test_clips.py::test_leak_is_found_by_id_and_by_content"),
    ],
    "patrec/batches.py": [
        ("mixup: targets not mixed",
         "targets = torch.lerp(targets[other], targets, weight)",
         "weight = weight.clone()",
         "unit/test_batches.py::test_mixup_by_hand"),
    ],
    "patrec/step.py": [
        ("bug 9: the overfit check never fails",
         '        if not reached:\n',
         '        if reached is None:\n',
         "unit/test_train.py::test_overfit_fails_where_nothing_can_be_learned"),
    ],
    "patrec/recipes.py": [
        ("runs: beat_mel gets frames",
         '"beat_mel": Network("lstm", "mel", beat=True)',
         '"beat_mel": Network("lstm", "mel")',
         "unit/test_recipes.py::test_a_run_hears_what_its_name_says"),
    ],
    "patrec/explain.py": [
        ("attributions: the gradient at the clip alone",
         "point = (x * ((step + 0.5) / n_steps)).requires_grad_()",
         "point = x.clone().requires_grad_()",
         "unit/test_explain.py::test_attributions_add_up_to_the_logit"),
        ("insertion and deletion swapped",
         "there = (rank < levels) if insert else",
         "there = (rank < levels) if not insert else",
         "unit/test_explain.py::test_a_curve_begins_and_ends_at_nothing_and_all"),
        ("temperature: logits multiplied by it",
         "cross_entropy(logits / t, targets)",
         "cross_entropy(logits * t, targets)",
         "unit/test_explain.py::test_the_temperature_that_was_put_in_is_found"),
        ("calibration error: bins count alike",
         "(right[bins == b] - sure[bins == b]).sum().abs()",
         "(right[bins == b] - sure[bins == b]).mean().nan_to_num().abs()",
         "unit/test_explain.py::test_calibration_error_by_hand"),
    ],
    "tools/listen.py": [
        ("listen: neighbours of another data set",
         'if fingerprint(root, "genre") != settings["fingerprint"]:',
         "if False:",
         "tools/test_listen.py::test_nearest_clips_are_of_the_networks_own_data_set"),
    ],
    "tools/lab.py": [
        ("lab: a step that failed is done",
         '    if (folder / UNFINISHED).exists():\n        return False\n',
         "",
         "tools/test_lab.py::test_a_step_that_failed_when_run_again_is_not_done"),
    ],
    "patrec/scores.py": [
        ("confusion matrix: transposed",
         "confusion_matrix(targets, predictions, labels=labels)",
         "confusion_matrix(predictions, targets, labels=labels)",
         "unit/test_scores.py::test_scores_of_a_hand_made_example"),
        ("macro-F1: classes that do not occur are left out",
         "counts.diagonal() / np.maximum(seen, 1))",
         "counts.diagonal()[seen > 0] / seen[seen > 0])",
         "unit/test_scores.py::test_macro_f1_by_hand_and_by_scikit_learn"),
        ("bug 10: Spearman averaged over batches",
         "scores[name] = spearman(*pair)",
         "scores[name] = float(np.mean([spearman(*(x[j : j + 8] for x in pair)) for j in range(0, len(answers), 8)]))",
         "unit/test_scores.py::test_spearman_is_over_the_whole_set"),
        ("interval: of 90%, named 95%",
         "np.nanpercentile(values, [2.5, 97.5])",
         "np.nanpercentile(values, [5, 95])",
         "unit/test_scores.py::test_bootstrap_interval_of_coin_tosses"),
        ("difference: by position, not by id",
         "(table.loc[ids, classes].to_numpy().argmax(1) for table in (first, second))",
         "(table[classes].to_numpy()[: len(ids)].argmax(1) for table in (first, second))",
         "unit/test_scores.py::test_paired_difference_of_genres_by_hand"),
        ("average: by position, not by id",
         "return (sum(frames[1:], frames[0]) / len(frames)).dropna()",
         "return frames[0] * 0 + np.mean([frame.to_numpy() for frame in frames], axis=0)",
         "unit/test_scores.py::test_average_is_taken_clip_by_clip"),
    ],
    "step04_dataset.py": [
        ("step 4: the same array in two sets not seen",
         '(test["digest"] != "")',
         '(test["digest"] == "")',
         "steps/test_step04.py::test_audit_finds_leaks_between_sets"),
    ],
    "step06_eval.py": [
        ("step 6: the other test set is its own",
         "load_test(step.source, model.settings, beat=beat)",
         "load_test(step.source, model.settings)",
         "steps/test_step06.py::test_a_prediction_follows_its_array_and_a_truth_its_label"),
    ],
    "step08_regression.py": [
        ("step 8: the network is chosen on held-out clips",
         'facts[kind]["val"]["mean_spearman"]',
         'facts[kind]["test"]["mean_spearman"]',
         "steps/test_step08.py::test_held_out_clips_change_nothing_but_their_own_predictions"),
    ],
    "step09_transfer.py": [
        ("step 9: --freeze is ignored",
         "load_backbone(genre_path, frozen=frozen)",
         "load_backbone(genre_path)",
         "steps/test_step09.py::test_frozen_blocks_are_the_genre_models_bit_for_bit"),
    ],
    "step11_latent.py": [
        ("step 11: a clip is its own neighbour",
         ".kneighbors(return_distance=False)",
         ".kneighbors(points, return_distance=False)",
         "steps/test_step11.py::test_separation_is_leave_one_out"),
    ],
    "tools/handin.py": [
        ("draft: written over what a student wrote",
         "made.get(target.name) != checksum",
         "not checksum",
         "tools/test_handin.py::test_draft_never_overwrites_what_a_student_wrote"),
        ("zip: without its folders",
         "path.relative_to(HERE)",
         "path.name",
         "tools/test_handin.py::test_unpacked_zip_has_the_layout_of_the_project"),
    ],
}
# fmt: on
FAULTS = [Fault(file, *row) for file, rows in TABLE.items() for row in rows]


def passes(test, fault=None) -> bool:
    """Whether a test passes in a copy of the project, with a fault or without."""
    with tempfile.TemporaryDirectory(prefix="patrec-fault-", ignore_cleanup_errors=True) as scratch:
        copy = Path(scratch) / "project"
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        if fault:
            path = copy / fault.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "", "--tb=no"]
        command += [f"--basetemp={scratch}/tmp", f"tests/{test}"]
        return subprocess.run(command, cwd=copy, capture_output=True).returncode == 0


def judge(fault) -> str:
    if not passes(fault.test):
        return "FAILS WITHOUT IT"
    return "SURVIVED" if passes(fault.test, fault) else "caught"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only whether all can be planted")
    parser.add_argument("--only", default="", metavar="PATTERN", help="in 'file: name'")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="copies at a time")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if re.search(args.only, f"{fault.file}: {fault.name}")]
    stale = []
    for fault in faults:
        text = (ROOT / fault.file).read_text(encoding="utf-8")
        file, _, function = fault.test.partition("::")
        if text.count(fault.old) != 1 or f"def {function}(" not in (
            ROOT / "tests" / file
        ).read_text(encoding="utf-8"):
            stale.append(fault)
            print(f"STALE   {fault.file}: {fault.name}")
    print(f"{len(faults)} faults, {len(stale)} stale", flush=True)
    if args.check:
        raise SystemExit(bool(stale))
    faults = [fault for fault in faults if fault not in stale]
    survived = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for fault, verdict in zip(faults, pool.map(judge, faults), strict=True):
            survived += verdict != "caught"
            print(f"{verdict:16} {fault.file}: {fault.name}", flush=True)
    print(f"{len(faults) - survived} of {len(faults)} caught")
    raise SystemExit(bool(survived or stale))


if __name__ == "__main__":
    main()
