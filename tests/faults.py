"""Plausible faults, planted one at a time: which of them do the tests notice?

    python tests/faults.py --check            # are all of them still in the code? (seconds)
    python tests/faults.py                    # all of them: hours
    python tests/faults.py --only "bug 5|eval" --jobs 1

Each fault is put into a copy of the project in a temporary folder, never into the project
itself, and the tests that ought to notice run there until the first one fails. Before that
they run without any fault: a test that fails by itself notices nothing. Printed are, per
fault, the test that caught it and the seconds it took, or SURVIVED, and the share that was
caught. Exit code 1: under 95% were caught, a text to be replaced is not there exactly once
any more, a named test is gone, or a test fails without a fault. A run that was stopped by
--timeout counts as not caught: a slow machine would do the same.

Run by hand, not by pytest. "bug N" in a name is a bug that published solutions of the lab
have shipped.
"""

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "data", "outputs", "kernels", "*.zip")


class Fault(NamedTuple):
    name: str
    file: str
    old: str  # stands in the file exactly once
    new: str
    # Who must notice: "data" is tests/test_data.py, "data::test_x" one test of it;
    # "tools/handin" is tests/tools/test_handin.py.
    tests: str


# fmt: off
# "file, section": rows of (name, old text, new text, tests)
TABLE = {
    "common.py, 1 run": [
        ('time: --max-minutes read as seconds', 'time.time() + 60 * minutes,',
         'time.time() + minutes,', 'resume::test_six_lstms_share_the_time_evenly'),
        ("seed: torch is not seeded", "    torch.manual_seed(seed)\n", "",
         "accelerator::test_the_loss_is_scaled_for_float16_and_gradients_clipped_after_unscaling"),
        ("flags: a mistyped one is guessed", "allow_abbrev=False,  # a mistyped", "allow_abbrev=True,  # a mistyped",
         "train::test_flags_out_of_range_exit_with_2"),
        ("flags: those of a notebook ignored", "shlex.split(flags) if in_notebook() else None",
         "[] if in_notebook() else None", "notebook::test_foreign_arguments_are_ignored_only_in_a_notebook"),
        ("data: $PATREC_DATA not looked at", 'given = data_dir or os.environ.get("PATREC_DATA")', "given = data_dir",
         "first_command::test_a_wrong_folder_is_never_replaced_by_the_demo_set"),
        ("data: folders of frames and beats swapped", '("_beat" if beat else "")', '("" if beat else "_beat")',
         "data::test_long_clips_come_out_whole"),
        ('data: the demo set is made on Kaggle too', '    if on_kaggle():\n        cure =',
         '    if on_kaggle() and given:\n        cure =', 'kaggle::test_missing_data_set_is_named_and_nothing_is_written first_command::test_on_kaggle_no_demo_set_is_made'),
        ("device: bfloat16 on a T4, which emulates it", ">= (8, 0) else torch.float16", ">= (7, 0) else torch.float16",
         "accelerator::test_bfloat16_only_on_cards_that_compute_in_it"),
    ],
    "common.py, 2 features": [
        ("mel: power taken for amplitude", "librosa.power_to_db(power, ref=np.max)",
         "librosa.amplitude_to_db(power, ref=np.max)", "features::test_same_as_the_labs_extractor"),
        ("percussive part: the harmonic one", "softmask(over_frequency, over_time,",
         "softmask(over_time, over_frequency,", "features::test_percussive_part_is_librosas_bit_for_bit"),
        ("bands: chroma is the first 12 mel bands", '"chroma": slice(N_MELS, N_ROWS)', '"chroma": slice(0, N_CHROMA)',
         "data::test_features_are_the_right_rows"),
    ],
    "common.py, 3 data: labels": [
        ("merge: two classes swapped", '"Pop": "Pop", "Classical": "Classical"',
         '"Pop": "Classical", "Classical": "Pop"', "known_answers::test_the_merge_is_the_labs"),
        ('bug 2: emotion columns by position', 'return tuple(values[name] for name in EMOTIONS)',
         'return tuple(map(float, cells))', 'data::test_emotion_columns_are_found_by_name'),
        ("bug 2: energy and danceability in the other order", 'EMOTIONS = ("valence", "energy", "danceability")',
         'EMOTIONS = ("valence", "danceability", "energy")', "data::test_emotion_labels_have_a_bare_id"),
        ("bug 2: every single emotion is valence", "columns = [EMOTIONS.index(name) for name in names]",
         "columns = list(range(len(names)))", "data::test_targets_go_with_their_clips_and_not_with_a_row_number"),
        ("bug 8: classes in the order of a set", "names = sorted(set(labels.values()))",
         "names = list(set(labels.values()))", "data::test_class_numbers_are_sorted_and_come_from_training"),
        ("bug 8: class numbers fitted on the test clips",
         "targets = encode_labels(store.entries, names)\n    else:\n        targets = np.full",
         "targets = encode_labels(store.entries, sorted({e.label for e in store.entries}))\n"
         "    else:\n        targets = np.full", "bad_input::test_test_labels_of_a_class_that_was_not_trained"),
        ("fingerprint: ignores labels", 'hashlib.sha256(b"\\n".join(sorted(lines)))',
         'hashlib.sha256(b"\\n".join(sorted(line.replace(b",", b"\\t").split(b"\\t")[0] for line in lines)))',
         "data::test_fingerprint_is_of_labels_and_not_of_their_order"),
    ],
    "common.py, 3 data: clips": [
        ("store: starts as if all clips were as long as the first", "lengths.cumsum(0) - lengths,",
         "lengths.cumsum(0) - lengths[0],", "data::test_store_holds_every_frame_of_every_clip_in_order"),
        ('store: turned by reshape, not transposed', 'return np.ascontiguousarray(array.T), None',
         'return np.ascontiguousarray(array.reshape(array.shape[::-1])), None', 'data::test_store_holds_every_frame_of_every_clip_in_order'),
        ("cache: a changed file of the same size is not read anew", "stat.st_size, stat.st_mtime_ns", "stat.st_size, 0",
         "data::test_a_changed_file_is_read_anew"),
        ("crops: run into the next clip", "spare = (lengths - self.crop).clamp(min=0)", "spare = lengths",
         "data::test_crops_are_random_and_stay_within_their_clip"),
        ("bug 12: dB padded with zeros, then standardised", """        if self.stats:
            mean, std = (value.to(x.device) for value in self.stats)
            x = x.sub_(mean).div_(std)
        padding = t >= lengths[:, None]
        if padding.any():
            x.masked_fill_(padding[..., None].to(x.device), 0.0)
""", """        padding = t >= lengths[:, None]
        if padding.any():
            x.masked_fill_(padding[..., None].to(x.device), 0.0)
        if self.stats:
            mean, std = (value.to(x.device) for value in self.stats)
            x = x.sub_(mean).div_(std)
""", "data::test_padding_is_the_mean_and_not_the_loudest_value"),
        ("bug 12: only the first 150 frames", "self.store.starts[indices], self.store.lengths[indices]",
         "self.store.starts[indices], self.store.lengths[indices].clamp(max=150)",
         "data::test_long_clips_come_out_whole"),
    ],
    "common.py, 3 data: parts and leaks": [
        ("split: not stratified", "random_state=seed, stratify=classes", "random_state=seed, stratify=None",
         "data::test_split_is_stratified_seeded_disjoint_and_covers_all"),
        ('split: validation clips are trained on', 'crops = Subset(whole.variant(crop=crop), train)',
         'crops = Subset(whole.variant(crop=crop), [*train, *val])', 'data::test_validation_and_training_clips_of_a_data_set_do_not_overlap'),
        ('split: validation hears random crops', 'return Data(crops, Subset(whole, val),',
         'return Data(crops, Subset(whole.variant(crop=crop), val),', 'data::test_only_training_clips_are_cropped'),
        ("subset: the first clips, which are of the first classes", "return (first + rest)[: max(n, len(first))]",
         "return sorted(rows, key=lambda row: targets[row])[:n]",
         "data::test_validation_and_training_clips_of_a_data_set_do_not_overlap"),
        ("split_ids: in the order of the network's own label file", '    if folder.is_dir():  # a data set',
         '    if not folder.is_dir():  # a data set', 'data::test_every_network_hears_the_same_parts_whatever_the_order_of_the_label_files'),
        ("split_ids: clips found by position, not by id",
         "{entry.clip_id: index for index, entry in enumerate(store.entries)}",
         "{clip_id: index for index, clip_id in enumerate(sorted(labels))}",
         "data::test_every_network_hears_the_same_parts_whatever_the_order_of_the_label_files"),
        ("folds: held-out clips are trained on", "return ids[known[train]].tolist()", "return ids[train].tolist()",
         "data::test_folds_hold_every_clip_out_once"),
        ("folds: every one is the first", "itertools.islice(cut, fold, None)", "itertools.islice(cut, 0, None)",
         "data::test_folds_hold_every_clip_out_once"),
        ("leak: band statistics of validation and held-out clips too", "band_statistics(store, train, features)",
         "band_statistics(store, range(len(targets)), features)",
         "data::test_statistics_come_from_the_training_part_only"),
        ("leak: class shares of validation clips too", "np.bincount(targets[train], minlength=len(names)).clip(min=1)",
         "np.bincount(targets, minlength=len(names)).clip(min=1) * len(train) / len(targets)",
         "data::test_priors_are_shares_of_the_training_part_and_never_zero"),
        ("leak: mean and spread of the labels of all clips", "targets[train].mean(0), targets[train].std(0)",
         "targets.mean(0), targets.std(0)", "data::test_labels_of_training_clips_alone_scale_an_emotion"),
        ("leak: test clips standardised by their own statistics",
         'SpectrogramDataset(store, targets, settings["features"], settings["stats"])',
         "SpectrogramDataset(store, targets, settings[\"features\"],"
         " band_statistics(store, range(9), settings[\"features\"]))",
         "data::test_statistics_that_are_given_are_used"),
        ("leak check: arrays not compared", "if entry.clip_id in ids or digest in digests", "if entry.clip_id in ids",
         "data::test_leak_is_found_by_id_and_by_content"),
        ("leak check: found and not refused", "if leaked and not source.allow_leak:",
         "if leaked and source.allow_leak:", "bad_input::test_test_clips_in_the_training_split_are_refused"),
        ('leak check: of all emotion clips but those held out', 'store, rows = held_out.dataset.store, held_out.indices',
         'store, rows = held_out.dataset.store, sorted(set(range(len(held_out.dataset))) - set(held_out.indices))', 'steps_08_10::test_leak_is_refused'),
    ],
    "common.py, 4 batches": [
        ("loader: answers shuffled under their ids", "DataLoader(dataset, 64), device",
         "DataLoader(dataset, 64, shuffle=True), device",
         "known_answers::test_each_clip_gets_its_own_adjusted_answer"),
        ("loader: training clips never shuffled", "DataLoader(shown, recipe.batch_size, shuffle=True)",
         "DataLoader(shown, recipe.batch_size)", "train::test_every_clip_is_shown_as_often_as_planned_each_time_in_another_order"),
        ("loader: one crop of a clip per epoch, whatever was planned", "data.train.indices * recipe.crops",
         "data.train.indices", "train::test_every_clip_is_shown_as_often_as_planned_each_time_in_another_order"),
        ("mixup: targets not mixed", "targets = torch.lerp(targets[other], targets, weight)", "weight = weight.clone()",
         "known_answers::test_mixup_by_hand"),
    ],
    "common.py, 5 models": [
        ("for_scoring: no ReLU", "(merged, max_pool, relu).eval()", "(merged, max_pool).eval()",
         "data::test_a_copy_for_scoring_answers_as_the_network_does"),
        ("for_scoring: the network itself is changed", "    model = copy.deepcopy(model).eval()\n    for network",
         "    model = model.eval()\n    for network", "data::test_scoring_takes_the_quick_copy"),
        ("mask: ignored in the mean", "mean = (x * mask).sum(1) / mask.sum(1)", "mean = x.mean(1)",
         "known_answers::test_mean_and_maximum_of_a_clips_own_steps_by_hand"),
        ("mask: padding goes through the CNN", "if (lengths < x.shape[2]).any():", "if (lengths < 1).any():",
         "data::test_a_clip_gives_the_same_vector_however_far_it_is_padded"),
        ("bug 5: the last step is taken in the padding",
         "forward_h[torch.arange(len(x), device=x.device), (lengths - 1).to(x.device)]", "forward_h[:, -1]",
         "known_answers::test_lstm_is_torchs_own_on_packed_sequences"),
        ("bug 5: the backward direction is read at the clip's end", "[h[:, 0] for h in backward_h]",
         "[h[:, -1] for h in backward_h]", "data::test_bidirectional_lstm_reads_both_ends"),
        ("bug 5: the backward direction begins in the padding", "lengths[:, None] - 1 - t, t)", "len(t) - 1 - t, t)",
         "data::test_backward_direction_is_the_forward_one_of_the_reversed_clip"),
        ("bug 6: batch norm inside forward, without a memory", "return super().forward(x.flatten(0, 1)).view_as(x)",
         "return nn.functional.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x)",
         "data::test_a_clip_gives_the_same_vector_however_far_it_is_padded"),
        ("times: other programs are measured too", "return time.thread_time if", "return time.perf_counter if",
         "steps_01_04::test_while_a_thread_has_no_core_no_time_is_measured"),
        ("first block: the frozen one follows the batch", "learns = norm.training and not x.requires_grad",
         "learns = not x.requires_grad", "data::test_only_a_first_block_that_learns_is_normalised_by_the_batch"),
        ("first block: no gradient for an input that wants one", "learns = norm.training and not x.requires_grad",
         "learns = norm.training", "data::test_the_first_block_alone_takes_the_short_way"),
        ("first block: variance around 0 instead of the mean", " - torch.outer(mean, mean)  # (9, 9)", "  # (9, 9)",
         "data::test_the_first_block_is_what_its_layers_do"),
        ("first block: running variance of the batch as it is", "n_cells / (n_cells - 1)", "n_cells / n_cells",
         "data::test_the_first_block_is_what_its_layers_do"),
        ("first block: the last of equal outputs", "if output > best[channel]:", "if output >= best[channel]:",
         "data::test_of_equal_outputs_the_first_has_the_gradient"),
        ("first block: the gradient of bands and steps swapped", "t, f = step * pool + k // 2, 2 * band + k % 2\n                        bias",
         "t, f = step * pool + k // pool, 2 * band + k % pool\n                        bias",
         "data::test_the_first_block_is_what_its_layers_do"),
        ("first block: outputs below 0 have a gradient", "0 * bias[channel], -1", "0 * bias[channel], 0",
         "data::test_of_equal_outputs_the_first_has_the_gradient"),
        ("first block: NaN becomes 0", "0 * bias[channel], -1", "0, -1", "data::test_a_first_block_that_diverged_shows"),
        ("attributions: of a network in training mode", 'raise ValueError("attributions are of a network in evaluation mode")',
         "pass", "explain::test_attributions_of_a_linear_model_are_weight_times_input"),
        ("first block: one thread's clips alone give the gradient", "kernels, bias = map(sum, zip(*by_clips(kernel_gradient, arrays, ctx.pool), strict=True))",
         "kernels, bias = by_clips(kernel_gradient, arrays, ctx.pool)[0]",
         "data::test_the_first_block_is_what_its_layers_do"),
        ("pitch: chroma rows are moved too", "torch.where(row < N_MELS, (row + shift).clamp(0, N_MELS - 1), row)",
         "(row + shift).clamp(0, x.shape[2] - 1)", "known_answers"),
        ("SpecAugment: when scoring too", "if not (self.training and self.widest):", "if not self.widest:",
         "data::test_stripes_are_cut_in_training_only_and_alike_in_means_spreads_and_changes"),
        ("heads: valence's answers for all three emotions", "[head(vector) for head in self.heads.values()]",
         "[next(iter(self.heads.values()))(vector) for _ in self.heads]",
         "steps_08_10::test_multitask_gradient_reaches_every_head_and_the_backbone"),
        ("heads: in another order than their names", "for name in names})\n        for name, value in",
         "for name in sorted(names)})\n        for name, value in",
         "steps_08_10::test_each_head_answers_for_its_own_axis"),
        ("heads: answers not in the labels' units", "return self.mean + self.std * z", "return z",
         "data::test_regressor_answers_in_the_labels_units_and_in_the_order_of_its_names"),
        ("bug 11: squeeze() of a batch of one clip", "return self.mean + self.std * z",
         "return (self.mean + self.std * z).squeeze()",
         "train::test_regression_output_and_target_shapes_cannot_broadcast"),
        ("freeze: batch normalisation moves", "module.eval()  # a frozen block must not",
         "module.train(mode)  # a frozen block must not", "steps_08_10::test_frozen_blocks_stay_as_they_were"),
        ("freeze: what comes before the first block learns", "return [self.stem, *self.blocks[: self.n_frozen]] if",
         "return [*self.blocks[: self.n_frozen]] if", "steps_08_10::test_frozen_blocks_stay_as_they_were"),
        ("freeze: ignored", "backbone.freeze(frozen)", "backbone.freeze(0)",
         "steps_08_10::test_frozen_blocks_stay_as_they_were"),
    ],
    "common.py, 6 losses": [
        ("bug 1: (B, 1) against (B,) is let through", "\n    if outputs.shape != targets.shape:",
         "\n    if len(outputs) != len(targets):",
         "train::test_regression_output_and_target_shapes_cannot_broadcast"),
        ("regression loss: the wrong order is rewarded", "error + 0.5 * (1 - pearson)", "error + 0.5 * (1 + pearson)",
         "known_answers::test_regression_loss_by_hand"),
        ("regression loss: the first emotion's spread for all", "outputs.T, targets.T, self.std, strict=True",
         "outputs.T, targets.T, self.std[:1] * len(self.std), strict=True",
         "known_answers::test_multitask_loss_by_hand"),
        ("learned weights: wrong sign", "torch.exp(-self.log_var) * losses", "torch.exp(self.log_var) * losses",
         "known_answers::test_learned_weights_by_hand"),
        ("learned weights: without the half", "(torch.exp(-self.log_var) * losses + self.log_var) / 2",
         "torch.exp(-self.log_var) * losses + self.log_var", "known_answers::test_learned_weights_by_hand"),
    ],
    "common.py, 7 training": [
        ("bug 4: scored without eval()", "model, outputs, targets, fast = for_scoring(model), [],",
         "model, outputs, targets, fast = model, [],", "data::test_predict_scores_in_evaluation_mode"),
        ("average: never updated", '        parts["average"].update_parameters(model)\n', "",
         "known_answers::test_rate_and_running_average_follow_their_formulas"),
        ('average: best.pt holds the live model', 'save_checkpoint(folder / "best.pt", average.module, settings,',
         'save_checkpoint(folder / "best.pt", model, settings,', 'train::test_best_checkpoint_holds_the_averaged_weights'),
        ("bug 7: the last epoch is written over the best", "kept = epoch == first_settled or rank > best",
         "kept = True", "train::test_best_checkpoint_is_not_the_last_model"),
        ("best epoch: an early, lucky peak wins", "kept = epoch == first_settled or rank > best", "kept = rank > best",
         "train::test_an_early_peak_does_not_win_against_the_last_epochs"),
        ('bug 13: best begins at 0', 'history, best = [], (-math.inf, -math.inf)',
         'history, best = [], (0.0, 0.0)', 'train::test_a_negative_first_score_of_a_run_cut_short_is_kept'),
        ("schedule: a step per epoch", "        schedule.step()\n",
         "        if len(rates) == 1:\n            schedule.step()\n",
         "known_answers::test_rate_and_running_average_follow_their_formulas"),
        ("schedule: a warm-up of one step divides by zero",
         "recipe.warm_up * (1.5 if abs(recipe.warm_up * n_steps - 1) < 1e-6 else 1)", "recipe.warm_up",
         "resume::test_a_training_of_ten_steps_works"),
        ("gradients: clipped before they are unscaled", """        scaler.unscale_(optimizer)  # before clipping, which must see the true gradients
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
""", """        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.unscale_(optimizer)
""", "accelerator::test_the_loss_is_scaled_for_float16_and_gradients_clipped_after_unscaling"),
        ("gradients: never set to zero", "        optimizer.zero_grad(set_to_none=True)\n", "",
         "train::test_gradients_of_a_step_are_its_own"),
        ("loss: computed in half precision", "loss = loss_fn(outputs.float(), targets)",
         "loss = loss_fn(outputs, targets)",
         "accelerator::test_the_loss_gets_single_precision"),
        ("unfinished mark: never taken away", "    (folder / UNFINISHED).unlink()\n", "",
         "kaggle::test_step_6_uses_the_checkpoints_of_attached_kernels"),
        ('bug 9: the overfit check is content with .3', 'n_batches=4, limit=300, goal=0.01',
         'n_batches=4, limit=300, goal=0.3', 'train::test_overfit_reaches_zero_loss_with_regularisation_off'),
        ("bug 9: the overfit check never fails", "        if not reached:\n", "        if reached is None:\n",
         "train::test_overfit_fails_where_nothing_can_be_learned"),
        ("overfit check: --overfit-batch writes over the full run",
         '            self.folder = self.folder / "overfit_batch"\n', "            pass\n",
         "crashes::test_overfit_batch_after_a_full_run_leaves_that_run_untouched "
         "train::test_step05_overfit_batch"),
        ("resume: random numbers begin anew", '    torch.set_rng_state(state["rng"]["cpu"])\n', "",
         "train::test_resume_gives_exactly_what_an_uninterrupted_run_gives"),
        ("resume: the optimizer begins anew", '"optimizer": optimizer,\n', "\n",
         "train::test_resume_gives_exactly_what_an_uninterrupted_run_gives"),
        ('resume: the learned weights of the losses begin anew', '        "loss": loss_fn,\n        "optimizer": optimizer,\n        "schedule": schedule,\n        "scaler"',
         '        "loss": copy.deepcopy(loss_fn),\n        "optimizer": optimizer,\n        "schedule": schedule,\n        "scaler"', 'train::test_resume_gives_exactly_what_an_uninterrupted_run_gives resume::test_interrupted_and_resumed_is_uninterrupted'),
        ("resume: another seed or other clips are let through", "if not equal_settings(value, known.get(name))]",
         "if not equal_settings(value, value)]", "bad_input::test_resume_of_another_run_is_refused"),
    ],
    "common.py, 7 scoring": [
        ("windows: only the first is scored", "(n_clips, -1)).mean(1)", "(n_clips, -1))[:, 0]",
         "known_answers::test_windows_of_a_clip_are_averaged"),
        ("windows: those of different clips are mixed", "out.unflatten(0, (n_clips, -1)).mean(1)",
         "out.unflatten(0, (-1, n_clips)).mean(0)", "data::test_predict_computes_few_windows_at_once"),
        ("logit adjustment: wrong sign", "return logits - strength *", "return logits + strength *",
         "known_answers::test_logit_adjustment_by_hand"),
        ("logit adjustment: left out of the answers",
         'outputs = adjust_logits(outputs, settings["priors"]).log_softmax(1)', "outputs = outputs.log_softmax(1)",
         "known_answers::test_each_clip_gets_its_own_adjusted_answer"),
        ("logit adjustment: left out of the validation score",
         'answers = adjust_logits(outputs, settings["priors"]).argmax(1)', "answers = outputs.argmax(1)",
         "known_answers::test_the_validation_score_is_macro_f1_of_adjusted_answers"),
        ("validation score: accuracy, called macro-F1",
         "return macro_f1(targets.numpy(), answers.numpy(), outputs.shape[1])",
         "return float((targets == answers).float().mean())",
         "known_answers::test_the_validation_score_is_macro_f1_of_adjusted_answers"),
        ("epoch: chosen on training clips", "DataLoader(data.val, recipe.batch_size)",
         "DataLoader(data.train, recipe.batch_size)",
         "train::test_validation_clips_choose_the_epoch"),
    ],
    "common.py, 7 runs": [
        ("runs: beat_mel hears frames", '"beat_mel": Network("lstm", "mel", beat=True)',
         '"beat_mel": Network("lstm", "mel")',
         "known_answers::test_a_run_hears_what_its_name_says"),
        ("runs: fused hears mel only", '"fused": Network("lstm", "fused"),', '"fused": Network("lstm", "mel"),',
         "known_answers::test_a_run_hears_what_its_name_says"),
        ("workers: compute with vanishing numbers", "    torch.set_flush_denormal(True)\n    network, source", "    network, source",
         "workers::test_a_training_that_fails_is_one_line_and_ends_the_step"),
        ("runs: what comes before changes a run's numbers", '    seed_everything(source.seed)\n    device = source.device',
         '    device = source.device', 'train::test_same_seed_same_numbers_in_another_process'),
        ('runs: a seed asked for is not taken', 'source = dataclasses.replace(source, seed=run.seed)',
         'source = dataclasses.replace(source)', 'steps_07_11::test_ensemble_is_of_different_networks'),
        ('flags: --lr not heeded', '        training.lr,\n        training.batch_size,',
         '        2e-3,\n        training.batch_size,', 'train::test_small_sets_get_more_passes_and_several_crops_per_epoch'),
        ('flags: --resume not heeded', '"resume": training.resume,',
         '"resume": False,', 'resume::test_interrupted_and_resumed_is_uninterrupted'),
        ('fine-tuning: at the full rate', '    recipe.lr *= run.lr_factor\n',
         '', 'steps_08_10::test_each_fold_is_answered_by_the_network_that_did_not_hear_it'),
        ("fine-tuning: statistics of the genre checkpoint ignored", "stats = stats or band_statistics(",
         "stats = band_statistics(",
         "data::test_statistics_that_are_given_are_used"),
        ("learned weights: not given to the optimizer", "[*model.parameters(), *loss_fn.parameters()]",
         "[*model.parameters()]",
         "steps_08_10::test_each_fold_is_answered_by_the_network_that_did_not_hear_it"),
        ('folds: in the wrong order', 'jobs = [(run, fold) for run in runs for fold in range(run.n_folds)]',
         'jobs = [(run, fold) for run in runs for fold in reversed(range(run.n_folds))]', 'steps_08_10::test_a_run_of_several_folds_knows_which_fold_answered'),
        ("folds: the first one's answers repeated", '    answers = pd.concat(answers)\n    folds =',
         '    answers = pd.concat([answers[0]] * len(answers))\n    folds =', 'steps_08_10::test_a_run_of_several_folds_knows_which_fold_answered'),
        ("folds: the first one's network answers for all, having heard them", '"fold": fold, "n_folds": run.n_folds, "stats"',
         '"fold": 0, "n_folds": run.n_folds, "stats"', 'steps_08_10::test_each_fold_is_answered_by_the_network_that_did_not_hear_it'),
        ("checkpoints: one of another seed is taken", '        "seed": source.seed,\n        "window"', '        "window"',
         "train::test_a_checkpoint_of_something_else_is_passed_over_and_said_so"),
        ("checkpoints: one of other labels is taken",
         '        "fingerprint": fingerprint(source.root, "genre", network.beat),\n', "",
         "train::test_a_checkpoint_of_something_else_is_passed_over_and_said_so"),
        ('checkpoints: an unfinished one is taken', 'if not path.exists() or path.with_name(UNFINISHED).exists():',
         'if not path.exists():', 'resume::test_a_genre_model_trained_on_the_way_and_interrupted_is_not_taken_for_finished'),
        ("transfer: the backbone begins anew", "model, _ = load_model(path)\n    backbone",
         'model = build_model(load_checkpoint(path)["spec"])\n    backbone',
         "steps_08_10::test_transfer_takes_the_backbone_and_nothing_else"),
    ],
    "common.py, 7 side by side": [
        ("workers: --workers not heeded", "    if training.workers:\n        most = training.workers\n    elif", "    if",
         "workers::test_a_process_per_core_or_card_unless_told_otherwise"),
        ("workers: every card's work goes to the first card", "torch.cuda.set_device(place % torch.cuda.device_count())",
         "torch.cuda.set_device(0)", "workers::test_each_worker_takes_a_card_of_its_own"),
        ("workers: go on when the step was killed", "        if parent == os.getppid():\n", "        if False:\n",
         "workers::test_nothing_goes_on_without_its_step"),
        ("workers: a killed one is a traceback", '("TerminatedWorkerError", "KilledWorker")', '("KilledWorker",)',
         "workers::test_a_training_that_fails_is_one_line_and_ends_the_step"),
        ("workers: the time is not shared by rounds", "math.ceil((later + len(jobs) - place) / workers)",
         "math.ceil((later + len(jobs) - place))", "workers::test_trainings_share_the_time_that_is_left"),
        ("workers: results in the order in which they end", 'order="generator"):', 'order="generator_unordered"):',
         "workers::test_side_by_side_gives_the_same_numbers"),
    ],
    "common.py, 8 explain": [
        ("attributions: the gradient at the clip alone", "point = (x * ((step + 0.5) / n_steps)).requires_grad_()",
         "point = x.clone().requires_grad_()", "explain::test_attributions_add_up_to_the_logit"),
        ("attributions: not multiplied by the clip", "return (x * total / n_steps).cpu()", "return (total / n_steps).cpu()",
         "explain::test_attributions_of_a_linear_model_are_weight_times_input"),
        ("attributions: of windows that overlap the last one's", "total[start : start + size] += part", "total[start : start + size] = part",
         "explain::test_a_clips_attributions_add_up_to_its_logit"),
        ("attributions: not the windows of the answer", "cut, sizes = cut_windows(x[None], lengths, size)\n",
         "cut, sizes = cut_windows(x[None], lengths, size)\n    cut = cut[:1].expand_as(cut)\n",
         "explain::test_a_cell_in_two_windows_gets_the_sum_of_both"),
        ("insertion and deletion swapped", "there = (rank < levels) if insert else", "there = (rank < levels) if not insert else",
         "explain::test_a_curve_begins_and_ends_at_nothing_and_all"),
        ("temperature: logits multiplied by it", "cross_entropy(logits / t, targets)", "cross_entropy(logits * t, targets)",
         "explain::test_the_temperature_that_was_put_in_is_found"),
        ("calibration error: bins count alike", "(right[bins == b] - sure[bins == b]).sum().abs()",
         "(right[bins == b] - sure[bins == b]).mean().nan_to_num().abs()", "explain::test_calibration_error_by_hand"),
        ("sound: amplitude taken for power", "magnitude = np.sqrt(np.maximum(power, 0))", "magnitude = np.maximum(power, 0)",
         "explain::test_sound_comes_back_like_the_spectrogram_it_was_made_of"),
    ],
    "listen.py": [
        ("listen: no logit adjustment", 'logits.append(adjust_logits(answers, cnn.settings["priors"]))', "logits.append(answers)",
         "listen::test_a_song_is_answered_as_the_networks_answer_its_windows"),
        ("listen: the temperature is not used", "overall = (logits.mean(0) / temperature).softmax(0)",
         "overall = logits.mean(0).softmax(0)", "listen::test_a_song_is_answered_as_the_networks_answer_its_windows"),
        ("listen: times begin anew in every block", "times.append((n_frames + middles.numpy()) * HOP / SR)",
         "times.append(middles.numpy() * HOP / SR)", "listen::test_a_song_of_any_length_is_covered"),
        ("listen: a name ends the script", '.replace("<", "\\\\u003c")', "", "listen::test_a_name_never_becomes_markup"),
        ("listen: neighbours of another data set", 'if fingerprint(root, "genre") != settings["fingerprint"]:', "if False:",
         "listen::test_nearest_clips_are_of_the_networks_own_data_set"),
        ("listen: unfinished networks are heard", " and not (r / UNFINISHED).exists()]", "]",
         "listen::test_only_finished_networks_are_heard"),
        ("listen: the LSTM's classes are called as the CNN's", 'dict(zip(lstm.settings["names"], by_lstm', "dict(zip(names, by_lstm",
         "listen::test_each_network_names_its_own_classes"),
        ("listen: a demo set is made for the neighbours", 'find_data(args.data_dir, ("genre",), demo=False)',
         'find_data(args.data_dir, ("genre",))', "listen::test_without_the_training_clips_there_are_no_nearest"),
        ("listen: one odd song ends all", "            failed.append(path)\n            continue",
         "            raise", "listen::test_odd_songs_are_named_and_the_others_are_heard"),
        ("listen: the cursor stands still", 'cursor.style.left = 100 * t / song.seconds + "%"', 'cursor.style.left = "0%"',
         "listen::test_the_page_plays_follows_and_jumps"),
    ],
    "lab.py": [
        ("lab: what is done runs again", "if not again and is_done(", "if not again and not is_done(",
         "lab::test_all_steps_run_once_and_the_report_is_drafted"),
        ("lab: what builds on a step that runs anew is kept", "again = args.again or any(name[4:6] in builds_on for name in jobs)",
         "again = args.again", "lab::test_all_steps_run_once_and_the_report_is_drafted"),
        ("lab: a step that failed is done", "    if (folder / UNFINISHED).exists():\n        return False\n", "",
         "lab::test_a_step_that_failed_when_run_again_is_not_done"),
        ("lab: another data set counts as done", "return same and Path(root) == find_data(args.data_dir, parts=())", "return same",
         "lab::test_another_data_set_is_not_done_yet"),
        ("lab: a step does not wait for what it builds on", "if len(alike) == LANES or to_come & set(EARLIER.get(number, ())):", "if len(alike) == LANES:",
         "lab::test_steps_wait_for_what_they_build_on_and_share_the_cores"),
        ("lab: what nothing builds on comes first", "alike = busy & FILL if number in FILL else busy - FILL", "alike = busy",
         "lab::test_steps_wait_for_what_they_build_on_and_share_the_cores"),
        ("lab: what fills gaps takes as much as the trainings", "if fill and hasattr(os", "if not fill and hasattr(os",
         "lab::test_what_fills_gaps_has_the_lowest_priority"),
        ("lab: one step at a time", "LANES = 2", "LANES = 1",
         "lab::test_steps_wait_for_what_they_build_on_and_share_the_cores"),
        ("lab: all cores for each of two steps", "joblib.cpu_count() // LANES", "joblib.cpu_count()",
         "lab::test_a_step_beside_another_gets_half_of_the_cores"),
        ("lab: why a step failed stays in its log", "file=sys.stderr)\n    return seconds", "file=open(os.devnull, 'w'))\n    return seconds",
         "lab::test_a_step_that_fails_is_named_and_the_others_go_on"),
        ("lab: a failure is not told", "    if failed:\n", "    if not failed:\n",
         "lab::test_a_step_that_fails_is_named_and_the_others_go_on"),
    ],
    "common.py, 8 metrics": [
        ("confusion matrix: transposed", "confusion_matrix(targets, predictions, labels=labels)",
         "confusion_matrix(predictions, targets, labels=labels)",
         "answers_genre::test_scores_of_a_hand_made_example"),
        ("macro-F1: classes that do not occur are left out", "counts.diagonal() / np.maximum(seen, 1))",
         "counts.diagonal()[seen > 0] / seen[seen > 0])", "known_answers::test_macro_f1_by_hand_and_by_scikit_learn"),
        ("bug 10: Spearman of all emotions in one heap", "scores[name] = spearman(*pair)",
         "scores[name] = spearman(true[answers.columns].to_numpy().ravel(), answers.to_numpy().ravel())",
         "train::test_spearman_is_over_the_whole_set"),
        ("bug 10: Spearman averaged over batches", "scores[name] = spearman(*pair)",
         "scores[name] = float(np.mean([spearman(*(x[j : j + 8] for x in pair))"
         " for j in range(0, len(answers), 8)]))", "train::test_spearman_is_over_the_whole_set"),
        ("bug 10: truth by position, not by id", "    true = true.loc[answers.index]\n    scores,", "    scores,",
         "train::test_spearman_is_over_the_whole_set"),
        ("interval: of 90%, called 95%", "np.nanpercentile(values, [2.5, 97.5])", "np.nanpercentile(values, [5, 95])",
         "known_answers::test_bootstrap_interval_of_coin_tosses"),
        ("difference: not on the same resamples", "- resampled_spearman(t, b) for", "- resampled_spearman(t, b, seed=1) for",
         "steps_08_10::test_difference_is_paired"),
        ("difference: by position, not by id", "(table.loc[ids, classes].to_numpy().argmax(1) for table in (first, second))",
         "(table[classes].to_numpy()[: len(ids)].argmax(1) for table in (first, second))",
         "known_answers::test_paired_difference_of_genres_by_hand"),
        ("floors: fitted on held-out clips", "np.array(data.train.indices + data.val.indices)",
         "np.array(data.train.indices + data.val.indices + data.held_out.indices)",
         "answers_emotion::test_held_out_clips_change_nothing_but_their_own_predictions"),
        ("floors: each fold its own constant, which ranks backwards",
         "constant = targets[known].mean(0) if constant is None else constant", "constant = targets[known].mean(0)",
         "answers_emotion::test_a_constant_answer_scores_nothing"),
    ],
    "common.py, 10 records": [
        ("files: written in place", """        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
""", '        with open(path, "wb") as file:\n            write(file)\n',
         "bad_input::test_full_disk crashes::test_kill_9_at_random_moments"),
        ("files: two processes may write into one folder", "        lock.acquire(timeout=0)\n", "        lock.path = None\n",
         "crashes::test_two_processes_do_not_write_into_one_folder"),
        ("files: what a killed run has left stays", 'for leftover in folder.rglob(".*.tmp"):',
         'for leftover in folder.glob("*.temp"):', "crashes::test_two_processes_do_not_write_into_one_folder"),
        ("demo: metrics.json says it is real music", '"demo": self.demo,', '"demo": False,',
         "first_command::test_without_data_the_demo_set_is_made_once_and_named_in_all_that_comes_of_it"),
        ("predictions.csv: truth and prediction swapped", "truth=t.to_numpy(), prediction=p",
         "truth=p, prediction=t.to_numpy()", "train::test_earlier_answers_are_those_for_the_same_clips_by_id"),
        ("predictions.csv: truth of another target", "columns = {name: (true[name], answers[name]",
         "columns = {name: (true.iloc[:, 0], answers[name]",
         "known_answers::test_rows_of_predictions_by_hand"),
        ("predictions.csv: truth by position, not by id", "    true = true.loc[answers.index]\n    fold =", "    fold =",
         "known_answers::test_rows_of_predictions_by_hand"),
        ('earlier answers: of another seed taken', 'wanted = (fingerprint(source.root, "emotion"), source.seed,',
         'wanted = (fingerprint(source.root, "emotion"), found[1],', 'train::test_earlier_answers_are_those_for_the_same_clips_by_id'),
        ("average: by position, not by id", "return (sum(frames[1:], frames[0]) / len(frames)).dropna()",
         "return frames[0] * 0 + np.mean([frame.to_numpy() for frame in frames], axis=0)",
         "known_answers::test_average_is_taken_clip_by_clip"),
        ("submission: values beyond [0, 1]", "answers[list(EMOTIONS)].clip(0, 1)", "answers[list(EMOTIONS)]",
         "known_answers::test_submission_by_hand"),
        ("submission: columns under each other's names", "answers[list(EMOTIONS)].clip(0, 1)",
         "answers[list(EMOTIONS)[::-1]].set_axis(list(EMOTIONS), axis=1).clip(0, 1)",
         "known_answers::test_submission_by_hand"),
        ("submission: only the last fold answers", "for fit in run.members\n", "for fit in run.members[-1:]\n",
         "known_answers::test_unlabelled_clips_are_answered_by_all_folds"),
    ],
    "step04_dataset.py": [
        ("step 4: the same array in two sets not seen", '(test["digest"] != "")', '(test["digest"] == "")',
         "steps_01_04::test_audit_finds_leaks_between_sets"),
    ],
    "step05_lstm.py": [
        ("bug 3: step 5 shows the validation score as test score", "scores[name] = genre_scores(true, answers)",
         'scores[name] = genre_scores(true, answers) | {"macro_f1": run.facts["val"]["macro_f1"]}',
         "answers_genre::test_scores_are_those_of_the_predictions"),
        ('step 5: test clips are read before all runs are trained', 'runs = train_all(step.training, [Experiment(name',
         'load_test(step.source, data.settings)\nruns = train_all(step.training, [Experiment(name', 'train::test_test_split_is_read_only_after_training'),
        ("step 5: label smoothing in the overfit check", "loss_fn = nn.CrossEntropyLoss()",
         "loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)", "train::test_step05_overfit_batch"),
    ],
    "step06_eval.py": [
        ("step 6: the other test set is its own", "load_test(step.source, model.settings, beat=beat)",
         "load_test(step.source, model.settings)",
         "answers_genre::test_each_model_is_tested_on_its_own_kind_of_clips_and_in_step_6_on_the_other_too "
         "answers_genre::test_an_answer_follows_its_array_and_a_truth_its_label"),
        ("step 6: the SVM is fitted on test clips", '    entries = read_entries(step.source.root, "genre", "train", beat, step.source.merge)\n    known',
         '    entries = read_entries(step.source.root, "genre", "test", beat, step.source.merge)\n    known',
         "answers_genre::test_floors_are_fitted_on_training_clips_alone"),
        ("step 6: the average takes all answers to frames", "average_predictions(answers[name, own_set[name]] for name in models)",
         'average_predictions(answers[name, "full"] for name in models)',
         "answers_genre::test_an_average_is_the_mean_of_its_members_log_probabilities"),
    ],
    "step07_cnn.py": [
        ('step 7: the rival is the worst LSTM', 'in genre_val_scores(step.training).index if',
         'in genre_val_scores(step.training).index[::-1] if', 'answers_genre::test_the_average_of_cnns_takes_in_the_lstm_that_validated_best'),
        ("step 7: three CNNs and an LSTM, each a quarter",
         'average_predictions([answers["cnn_ensemble"], answers[best_lstm]])',
         "average_predictions(answers[name] for name in [*runs, best_lstm])",
         "answers_genre::test_an_average_is_the_mean_of_its_members_log_probabilities"),
    ],
    "step08_regression.py": [
        ("step 8: the network is chosen on held-out clips", 'facts[kind]["val"]["mean_spearman"]',
         'facts[kind]["test"]["mean_spearman"]',
         "answers_emotion::test_held_out_clips_change_nothing_but_their_own_predictions"),
        ("step 8: energy and danceability answered by each other's network", 'predict_unlabelled(step.source, runs[f"{best}_{emotion}"]) for emotion in EMOTIONS]',
         'predict_unlabelled(step.source, runs[f"{best}_{other}"]).set_axis([emotion], axis=1) for emotion, other in zip(EMOTIONS, (EMOTIONS[0], *EMOTIONS[:0:-1]), strict=True)]', 'answers_emotion::test_submission_gives_each_unlabelled_clip_its_own_values'),
    ],
    "step09_transfer.py": [
        ("step 9: 'from scratch' begins with the genre model, too", 'scratch = make(f"scratch_{emotion}", make_model=untrained,',
         'scratch = make(f"scratch_{emotion}", make_model=functools.partial(copied, frozen=0),', 'answers_emotion::test_step_9_starts_from_the_genre_model_that_is_best_on_validation_clips'),
        ("step 9: networks on beats are candidates", "if not GENRE_NETWORKS[name].beat]", "if name]",
         "steps_08_10::test_networks_on_beats_are_no_candidates_of_step_9"),
        ('step 9: --freeze is ignored', 'load_backbone(genre_path, frozen=frozen)',
         'load_backbone(genre_path)', 'answers_emotion::test_frozen_blocks_are_the_genre_models_bit_for_bit'),
        ('step 9: the fine-tuning begins with a new head', 'functools.partial(copied, frozen=depth, head=head)',
         'functools.partial(copied, frozen=depth)', 'steps_08_10::test_fine_tuning_goes_on_from_the_head_that_was_learned_first'),
        ('step 9: no look for leaked clips', 'if leak := find_emotion_leak(step.source, data.held_out):',
         'if leak := None:', 'steps_08_10::test_leak_is_refused'),
    ],
    "step10_multitask.py": [
        ('step 10: multitask does not begin with the genre model', 'Experiment("multitask", cnn, from_genre, stats',
         'Experiment("multitask", cnn, untrained, stats', 'steps_08_10::test_step_10_goes_on_from_the_genre_network'),
        ("step 10: the average is of other networks", "average_predictions(answers[name] for name in averaged)",
         'average_predictions(answers[name] for name in ("multitask", "multitask_scratch"))',
         "answers_emotion::test_the_average_is_that_of_its_members"),
        ("step 10: only one network answers in the submission", "runs[name]) for name in averaged)",
         "runs[name]) for name in averaged[:1])",
         "steps_08_10::test_step_10_hands_in_the_average_of_both_networks"),
        ('step 10: --learned-weights learns none', 'RegressionLoss(data.std, learned=True)',
         'RegressionLoss(data.std)', 'steps_08_10::test_step_10_measures_its_loss_and_compares_with_both_steps'),
    ],
    "step11_latent.py": [
        ("step 11: clips shuffled, ids not", "loader = DataLoader(test, 64)", "loader = DataLoader(test, 64, shuffle=True)",
         "steps_07_11::test_latent_files"),
        ("step 11: a clip is its own neighbour", ".kneighbors(return_distance=False)",
         ".kneighbors(points, return_distance=False)", "steps_07_11::test_separation_is_leave_one_out"),
        ("step 11: the untrained twin is trained", "build_model(model_spec(models[name].model)).to(step.device)",
         "models[name].model", "steps_07_11 answers_genre::test_knn_accuracy_is_that_of_the_latent_vectors"),
    ],
    "make_dataset.py": [
        ("audio: test clips counted anew for files added later", '- old.count("test"), 0)', ", 0)",
         "make_dataset::test_files_added_later_bring_the_test_part_to_its_share"),
        ("labels: those of the emotion test clips given away", "for i in order if some[i].split == split]",
         "for i in order]", "make_dataset::test_demo_layout_is_the_labs"),
    ],
    "tools/handin.py": [
        ("draft: trial runs not named", '[f["step"] for f in facts if f[flaw]]', "[]",
         "tools/handin::test_draft_says_what_is_missing_and_what_is_no_result"),
        ("draft: written over what a student wrote", "made.get(target.name) != checksum", "not checksum",
         "tools/handin::test_draft_never_overwrites_what_a_student_wrote"),
        ("zip: without its folders", "path.relative_to(HERE)", "path.name",
         "tools/handin::test_unpacked_zip_has_the_layout_of_the_project"),
    ],
    "kaggle_kernel.py": [
        ("kernel: no GPU where networks must be trained", '("genre_model" in text and not earlier)',
         '("genre_model" in text and earlier)', "kaggle::test_the_official_client_pushes_the_folder"),
        ("kernel: step 11 without the CNN of step 7", '"11": ("05", "07")', '"11": ("05",)',
         "kaggle::test_steps_get_the_outputs_of_these_earlier_ones"),
        ("kernel: a step's clash of names with common.py is let through",
         "if name in known and (own[name] is None or own[name] != known[name])", "if name in known and not own",
         "kaggle::test_steps_that_cannot_become_one_file_are_refused"),
    ],
}
# fmt: on
FAULTS = [
    Fault(row[0], title.split(",")[0], *row[1:]) for title, rows in TABLE.items() for row in rows
]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--tb=no"]
RUNNING = set()  # of processes: stopped by hand, they are to end too


def plant(fault) -> str:
    """The file's text with the fault in it; ValueError where that is no fault any more."""
    text = (ROOT / fault.file).read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        raise ValueError(f"its old text stands {text.count(fault.old)} times in {fault.file}")
    planted = text.replace(fault.old, fault.new)
    try:
        ast.parse(planted)
    except SyntaxError as error:
        raise ValueError(f"with it {fault.file} is no valid Python: {error}") from None
    return planted


def paths_of(tests) -> tuple[list[str], list[str]]:
    """'data train::test_x' as pytest wants it: what there is, and what there is not."""
    there, gone = [], []
    for name in tests.split():
        stem, _, function = name.partition("::")
        folder, _, stem = stem.rpartition("/")
        path = ROOT / "tests" / folder / f"test_{stem}.py"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        found = text and (not function or f"def {function}(" in text)
        place = path.relative_to(ROOT).as_posix()
        (there if found else gone).append(place + "::" * bool(function) + function)
    return there, gone


def run_tests(tests, fault, timeout, *flags) -> tuple[str, list[str], float]:
    """Run tests on a copy with a fault or none.

    Returns
    -------
    green, red, timed out or broken; what failed; seconds
    """
    with tempfile.TemporaryDirectory(prefix="patrec-fault-", ignore_cleanup_errors=True) as scratch:
        copy, began = Path(scratch) / "project", time.monotonic()
        shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
        if fault:
            (copy / fault.file).write_text(plant(fault), encoding="utf-8")
        # A session of its own, so that the steps that a test has started end with it.
        process = subprocess.Popen(
            [*PYTEST, *tests, f"--basetemp={scratch}/tmp", *flags], cwd=copy, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        RUNNING.add(process)
        try:
            output, _ = process.communicate(timeout=timeout)
            verdict = {0: "green", 1: "red"}.get(process.returncode, "broken")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            verdict, output = "timed out", process.communicate()[0]
        RUNNING.discard(process)
        failed = re.findall(r"^(?:FAILED|ERROR) tests/(.+?)(?: - |$)", output, re.MULTILINE)
        return verdict, failed or [output.strip().rpartition("\n")[2]], time.monotonic() - began


def judge(fault, timeout) -> tuple[str, str, float]:
    """Plant one fault; returns caught or not, by which test, and the seconds."""
    tests, _ = paths_of(fault.tests)
    verdict, failed, seconds = (
        run_tests(tests, fault, timeout, "-x") if tests else ("no test", [""], 0.0)
    )
    names = {"green": "SURVIVED", "red": "caught"}
    return names.get(verdict, verdict), failed[0] if verdict != "green" else "", seconds


def check_baseline(faults, pool, timeout) -> None:
    """Run all named tests without any fault: one that fails by itself would notice everything."""
    tests, red = {test for fault in faults for test in paths_of(fault.tests)[0]}, []
    runs = [  # one of each file: all of it, or the tests that are named
        [file] if file in tests else sorted(test for test in tests if test.startswith(f"{file}::"))
        for file in sorted({test.split("::")[0] for test in tests})
    ]
    results = pool.map(lambda run: run_tests(run, None, 4 * timeout), runs)
    for run, (verdict, failed, seconds) in zip(runs, results, strict=True):
        print(f"{verdict:9} {seconds:5.0f} s  without a fault: {' '.join(run)}", flush=True)
        red += [] if verdict == "green" else failed
    if red:
        raise SystemExit(f"fails without any fault: {', '.join(red)}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--check",
        action="store_true",
        help="only say whether every fault can still be planted; run no test",
    )
    add(
        "--only",
        default="",
        metavar="PATTERN",
        help="faults in whose 'file: name' this regular expression is found",
    )
    add(
        "--jobs",
        type=int,
        default=2,
        metavar="N",
        help="copies that are tested at a time (default: %(default)s)",
    )
    add(
        "--timeout",
        type=float,
        default=1800,
        metavar="S",
        help="seconds for one fault (default: %(default)g)",
    )
    add("--no-baseline", action="store_true", help="do not run the tests without any fault first")
    args = parser.parse_args()

    faults = [fault for fault in FAULTS if re.search(args.only, f"{fault.file}: {fault.name}")]
    stale = set()
    for fault in faults:
        try:
            plant(fault)
        except ValueError as error:
            stale.add(fault)
            print(f"STALE     {fault.file}: {fault.name}: {error}")
    gone = sorted({test for fault in faults for test in paths_of(fault.tests)[1]})
    print(*(f"NO TEST   {test}\n" for test in gone), sep="", end="")
    print(
        f"{len(faults)} faults, {len(stale)} stale, {len(gone)} named tests that do not exist",
        flush=True,
    )
    if args.check:
        raise SystemExit(bool(stale or gone))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool, results = ThreadPoolExecutor(args.jobs), {}
    try:
        if not args.no_baseline:
            check_baseline(faults, pool, args.timeout)
        futures = {
            pool.submit(judge, fault, args.timeout): fault for fault in faults if fault not in stale
        }
        for future in as_completed(futures):
            verdict, by, seconds = results[futures[future]] = future.result()
            print(
                f"{verdict:9} {seconds:5.0f} s  {futures[future].file}: {futures[future].name}  {by}",
                flush=True,
            )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in [process for process in RUNNING if process.poll() is None]:
            os.killpg(process.pid, signal.SIGKILL)

    print("\n| fault | verdict | by | s |\n| --- | --- | --- | --- |")
    for fault in [fault for fault in faults if fault in results]:  # in the table's order
        verdict, by, seconds = results[fault]
        print(f"| {fault.file}: {fault.name} | {verdict} | {by} | {seconds:.0f} |")
    n_caught = sum(verdict == "caught" for verdict, _, _ in results.values())
    print(
        f"\n{n_caught} of {len(faults)} caught ({n_caught / max(len(faults), 1):.1%}), {len(stale)} stale"
    )
    raise SystemExit(n_caught < 0.95 * len(faults) or bool(stale or gone))


if __name__ == "__main__":
    main()
