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
    tests: str  # who must notice, cheap ones first: "data" is tests/test_data.py, "data::test_x" one test of it


# "file, section": rows of (name, old text, new text, tests)
TABLE = {
    "common.py, 1 run": [
        ("time: --max-minutes read as seconds", "args.started + 60 * args.max_minutes",
         "args.started + args.max_minutes", "resume::test_six_lstms_share_the_time_evenly resume"),
        ("time: the first run may take all of it", "- time.monotonic()) / runs_left", "- time.monotonic())",
         "resume::test_six_lstms_share_the_time_evenly resume"),
        ("exit code: bad input ends with 1", 'f"error: {error}", 2', 'f"error: {error}", 1',
         "train::test_wrong_data_folder_is_one_line"),
        ("exit code: a goal not reached ends with 0", 'f"failed: {error}", 1', 'f"failed: {error}", 0',
         "bad_input::test_a_loss_that_is_no_number_stops_with_exit_code_1"),
        ("seed: torch is not seeded", "    torch.manual_seed(seed)\n", "",
         "train::test_same_seed_same_numbers_in_another_process resume"),
        ("data: $PATREC_DATA not looked at", 'given = data_dir or os.environ.get("PATREC_DATA")', "given = data_dir",
         "first_command bad_input"),
        ("data: folders of frames and beats swapped", '("_beat" if beat else "")', '("" if beat else "_beat")',
         "data::test_genre_labels_of_every_form answers_genre"),
        ("data: the demo set is made on Kaggle too",
         '    if on_kaggle():\n        raise InputError(f"data set not attached',
         '    if on_kaggle() and given:\n        raise InputError(f"data set not attached',
         "kaggle::test_missing_data_set_is_named_and_nothing_is_written"),
        ("device: bfloat16 on a T4, which emulates it", ">= (8, 0) else torch.float16", ">= (7, 0) else torch.float16",
         "accelerator known_answers"),
    ],
    "common.py, 2 features": [
        ("mel: power taken for amplitude", "librosa.power_to_db(power, ref=np.max)",
         "librosa.amplitude_to_db(power, ref=np.max)", "features"),
        ("beats: mean of the frames, not median", "idx=beat_frames, aggregate=np.median",
         "idx=beat_frames, aggregate=np.mean", "features"),
        ("beats: tracked on all of the sound", "beat_track(y=percussive_part(waveform)", "beat_track(y=waveform",
         "features known_answers"),
        ("percussive part: the harmonic one", "softmask(over_frequency, over_time,",
         "softmask(over_time, over_frequency,", "known_answers::test_percussive_part_is_librosas_bit_for_bit features"),
        ("percussive part: other values beyond the edge", 'mode="symmetric"', 'mode="edge"',
         "known_answers::test_percussive_part_is_librosas_bit_for_bit features"),
        ("bands: chroma is the first 12 mel bands", '"chroma": slice(N_MELS, N_ROWS)', '"chroma": slice(0, N_CHROMA)',
         "data::test_features_are_the_right_rows"),
        ("bands: fused leaves the chroma out", '"fused": slice(0, N_ROWS)', '"fused": slice(0, N_MELS)',
         "data::test_features_are_the_right_rows train"),
    ],
    "common.py, 3 data: labels": [
        ("merge: two classes swapped", '"Pop": "Pop", "Classical": "Classical"',
         '"Pop": "Classical", "Classical": "Pop"', "known_answers::test_the_merge_is_the_labs"),
        ("merge: Punk becomes Rock", '"Punk": "Metal"', '"Punk": "Rock"', "known_answers::test_the_merge_is_the_labs"),
        ("merge: a dropped class is kept", '"Soundtrack": None', '"Soundtrack": "Classical"',
         "known_answers::test_the_merge_is_the_labs"),
        ("bug 2: emotion columns by position", "label = tuple(values[name] for name in EMOTIONS)",
         "label = tuple(map(float, cells[1:]))",
         "data::test_emotion_columns_are_found_by_name bad_input"),
        ("bug 2: energy and danceability in the other order", 'EMOTIONS = ("valence", "energy", "danceability")',
         'EMOTIONS = ("valence", "danceability", "energy")',
         "data::test_emotion_labels_have_a_bare_id answers_emotion"),
        ("ids: cut at the last dot", 'clip_id = cells[0].split(".")[0]', "clip_id = Path(cells[0]).stem",
         "data::test_genre_labels_of_every_form"),
        ("bug 8: classes in the order of a set", "classes = sorted({entry.label for entry in store.entries})",
         "classes = list({entry.label for entry in store.entries})",
         "train::test_same_seed_same_numbers_in_another_process answers_genre"),
        ("bug 8: class numbers fitted on the test clips", 'encode_labels(store.entries, settings["classes"])',
         "encode_labels(store.entries, sorted({e.label for e in store.entries}))", "bad_input answers_genre"),
    ],
    "common.py, 3 data: clips": [
        ("store: starts as if all clips were as long as the first", "lengths.cumsum(0) - lengths,",
         "lengths.cumsum(0) - lengths[0],", "data::test_store_holds_every_frame_of_every_clip_in_order"),
        ("store: entries sorted, arrays not", 'kept = [entries[index] for index in footer["kept"]]',
         'kept = sorted(entries[index] for index in footer["kept"])',
         "data::test_store_holds_every_frame_of_every_clip_in_order answers_genre"),
        ("store: turned by reshape, not transposed", "array.half().numpy().T)",
         "array.half().numpy().reshape(array.shape[::-1]))",
         "data::test_store_holds_every_frame_of_every_clip_in_order"),
        ("store: clips left out shift the others' ids", 'footer["kept"].append(index)',
         'footer["kept"].append(len(footer["kept"]))', "data::test_bad_files_stop_or_are_left_out_also_from_the_cache"),
        ("cache: a changed file of the same size is not read anew", "stat.st_size, stat.st_mtime_ns", "stat.st_size, 0",
         "data::test_a_changed_file_is_read_anew"),
        ("crops: always the first frames", "(torch.rand(len(indices)) * (spare + 1)).long()",
         "torch.zeros(len(indices)).long()",
         "data::test_crops_are_random_and_stay_within_their_clip"),
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
         "data::test_item_is_the_standardised_clip answers_genre"),
        ("features: all rows whatever is asked for", "frames = self.store.frames[:, BANDS[self.features]]",
         'frames = self.store.frames[:, BANDS["fused"]]', "data::test_features_are_the_right_rows"),
    ],
    "common.py, 3 data: splits and leaks": [
        ("split: not stratified", "stratify=classes))", "stratify=None))",
         "data::test_split_is_stratified_seeded_disjoint_and_covers_all"),
        ("split: by the global random state", "random_state=seed, stratify=", "random_state=None, stratify=",
         "data::test_split_is_stratified_seeded_disjoint_and_covers_all"),
        ("split: validation clips are trained on", "Subset(whole.variant(crop=crop), train_idx.tolist())",
         "Subset(whole.variant(crop=crop), [*train_idx.tolist(), *val_idx.tolist()])",
         "data::test_validation_and_training_clips_of_a_data_set_do_not_overlap"),
        ("split: validation hears random crops", "Subset(whole, val_idx.tolist()), classes",
         "Subset(whole.variant(crop=crop), val_idx.tolist()), classes",
         "answers_genre::test_the_validation_score_is_that_of_the_kept_weights_on_the_validation_clips answers_genre"),
        ("subset: the first clips, which are of the first classes",
         "train_idx = np.array((first + rest)[: max(subset, len(classes))])",
         'train_idx = train_idx[np.argsort(targets[train_idx], kind="stable")][:subset]',
         "data::test_validation_and_training_clips_of_a_data_set_do_not_overlap"),
        ("leak: band statistics of validation clips too", "stats = band_statistics(store, train_idx, features)",
         "stats = band_statistics(store, range(len(targets)), features)",
         "answers_genre::test_statistics_and_class_shares_are_of_the_training_part_alone answers_genre"),
        ("leak: class shares of validation clips too",
         "np.bincount(targets[train_idx], minlength=len(classes)) / len(train_idx)",
         "np.bincount(targets, minlength=len(classes)) / len(targets)",
         "answers_genre::test_statistics_and_class_shares_are_of_the_training_part_alone answers_genre"),
        ("leak: test clips standardised by their own statistics",
         'settings["classes"]), settings["features"], settings["stats"]',
         'settings["classes"]), settings["features"], band_statistics(store, range(9), settings["features"])',
         "answers_genre::test_an_answer_is_the_networks_own_to_that_array answers_genre"),
        ("leak check: ids compared as numbers with text",
         "{entry.clip_id for entry in train.entries}, set(train.digests)",
         "{int(entry.clip_id) for entry in train.entries}, set(train.digests)",
         "data::test_leak_is_found_by_id_and_by_content"),
        ("leak check: arrays not compared", "if e.clip_id in ids or digest in digests]", "if e.clip_id in ids]",
         "data::test_leak_is_found_by_id_and_by_content"),
        ("leak check: found and not refused", "if leaked and not allow_leak:", "if leaked and allow_leak:",
         "bad_input::test_test_clips_in_the_training_split_are_refused"),
        ("ensemble: averaged by position, not by id",
         'sorted(read_entries(data_dir, "genre", "test", beat, settings["merge"]))',
         'read_entries(data_dir, "genre", "test", beat, settings["merge"])',
         "answers_genre::test_an_average_says_what_all_its_members_say answers_genre"),
    ],
    "common.py, 4 batches": [
        ("loader: test clips shuffled under their ids", "batch_size, shuffle=shuffle)", "batch_size, shuffle=True)",
         "answers_genre::test_an_answer_is_the_networks_own_to_that_array answers_genre"),
        ("loader: training clips never shuffled", "batch_size, shuffle=shuffle)", "batch_size)",
         "known_answers train answers_genre"),
        ("loader: the last, smaller batch is dropped", "batch_size, shuffle=shuffle)",
         "batch_size, shuffle=shuffle, drop_last=True)",
         "answers_genre::test_an_answer_is_the_networks_own_to_that_array"),
        ("mixup: targets not mixed", "targets = torch.lerp(targets[other], targets, weight)", "weight = weight.clone()",
         "known_answers"),
        ("mixup: targets mixed with another clip's", "targets = torch.lerp(targets[other], targets, weight)",
         "targets = torch.lerp(targets.flip(0), targets, weight)", "known_answers"),
        ("mixup: the input keeps the smaller share", "torch.lerp(x[other], x, weight[:, None, None])",
         "torch.lerp(x, x[other], weight[:, None, None])", "known_answers"),
        ("shift: the bass comes back in at the top", "+ shift).clamp(0, N_MELS - 1)", "+ shift) % N_MELS",
         "known_answers"),
    ],
    "common.py, 5 models": [
        ("mask: off by one", "(torch.arange(n_steps) < lengths[:, None])",
         "(torch.arange(n_steps) < lengths[:, None] - 1)",
         "data::test_a_clip_gives_the_same_vector_however_far_it_is_padded "
         "known_answers::test_mean_and_maximum_of_a_clips_own_steps_by_hand"),
        ("mask: ignored in the mean", "mean = (x * mask).sum(1) / mask.sum(1)", "mean = x.mean(1)",
         "data::test_a_clip_gives_the_same_vector_however_far_it_is_padded "
         "known_answers::test_mean_and_maximum_of_a_clips_own_steps_by_hand"),
        ("mask: ignored in the maximum", "x.masked_fill(mask == 0, -torch.inf).amax(1)", "x.amax(1)",
         "data::test_a_clip_gives_the_same_vector_however_far_it_is_padded "
         "known_answers::test_mean_and_maximum_of_a_clips_own_steps_by_hand"),
        ("mask: padding goes through the CNN", "if (lengths < x.shape[2]).any():", "if (lengths < 1).any():",
         "data::test_a_clip_gives_the_same_vector_however_far_it_is_padded "
         "steps_07_11::test_cnn_gives_the_same_vector_however_far_a_clip_is_padded"),
        ("lengths: an unfinished step is cut off", "torch.div(lengths + n - 1, n,", "torch.div(lengths, n,",
         "data::test_steps_are_described_by_mean_spread_and_change_of_their_own_frames known_answers"),
        ("steps: an unfinished one is averaged with its padding", "return x.sum(2) / counts,", "return x.sum(2) / n,",
         "data::test_steps_are_described_by_mean_spread_and_change_of_their_own_frames known_answers"),
        ("steps: the change into the padding counts", "(0, 0, 1, 0)) * time_mask(lengths, x.shape[1], x.device)",
         "(0, 0, 1, 0))",
         "data::test_steps_are_described_by_mean_spread_and_change_of_their_own_frames known_answers"),
        ("bug 5: the last step is taken in the padding",
         "forward_h[torch.arange(len(x), device=x.device), (lengths - 1).to(x.device)]", "forward_h[:, -1]",
         "data::test_a_clip_gives_the_same_vector_however_far_it_is_padded"),
        ("bug 5: the backward direction is read at the clip's end", "[h[:, 0] for h in backward_h]",
         "[h[:, -1] for h in backward_h]",
         "data::test_bidirectional_lstm_reads_both_ends"),
        ("bug 5: the backward direction begins in the padding", "lengths[:, None] - 1 - t, t)", "n_steps - 1 - t, t)",
         "data::test_backward_direction_is_the_forward_one_of_the_reversed_clip"),
        ("bug 6: batch norm inside forward, without a memory", "return super().forward(x.flatten(0, 1)).view_as(x)",
         "return nn.functional.batch_norm(x.flatten(0, 1), None, None, training=True).view_as(x)",
         "data::test_a_clip_gives_the_same_vector_however_far_it_is_padded known_answers"),
        ("SpecAugment: when scoring too", "if not (self.training and self.widest):", "if not self.widest:",
         "data::test_stripes_are_cut_in_training_only_and_alike_in_means_spreads_and_changes"),
        ("bug 1: one output per clip as a column", ".squeeze(1)  # only dim 1: a batch of one stays a batch", "",
         "data::test_a_batch_of_one_clip_stays_a_batch train"),
        ("bug 11: squeeze() of a batch of one clip", ".squeeze(1)  # only", ".squeeze()  # only",
         "data::test_a_batch_of_one_clip_stays_a_batch train"),
        ("heads: valence's answers for all axes", "self.heads[name](vector) for name in EMOTIONS",
         'self.heads["valence"](vector) for name in EMOTIONS',
         "steps_08_10::test_multitask_gradient_reaches_every_head_and_the_backbone"),
        ("freeze: weights go on learning", "module.requires_grad_(False)", "module.requires_grad_(True)",
         "steps_08_10::test_frozen_blocks_stay_as_they_were"),
        ("freeze: batch normalisation moves", "module.eval()  # a frozen block must not",
         "module.train(mode)  # a frozen block must not",
         "steps_08_10::test_frozen_blocks_stay_as_they_were "
         "answers_emotion::test_frozen_blocks_are_the_genre_models_bit_for_bit"),
        ("freeze: what comes before the first block learns", "return [self.stem, *self.blocks[: self.n_frozen]] if",
         "return [*self.blocks[: self.n_frozen]] if",
         "steps_08_10::test_frozen_blocks_stay_as_they_were answers_emotion"),
    ],
    "common.py, 6 losses": [
        ("bug 1: (B, 1) against (B,) is let through", "if outputs.shape != targets.shape:",
         "if len(outputs) != len(targets):", "train known_answers"),
        ("regression loss: squared error not in units of the spread",
         "error = ((outputs - targets) / std).square().mean()", "error = (outputs - targets).square().mean() / std",
         "known_answers"),
        ("regression loss: the wrong order is rewarded", "error + 0.5 * (1 - pearson)", "error + 0.5 * (1 + pearson)",
         "known_answers"),
        ("multitask loss: valence's spread for all axes", "self.std[i]) for i in range(3)",
         "self.std[0]) for i in range(3)", "train"),
        ("learned weights: wrong sign", "torch.exp(-self.log_var) * losses", "torch.exp(self.log_var) * losses",
         "known_answers"),
        ("learned weights: they cost nothing", "* losses + self.log_var / 2)", "* losses)", "known_answers"),
    ],
    "common.py, 7 training": [
        ("bug 4: scored without eval()", "    model.eval()\n    outputs, targets = [], []",
         "    outputs, targets = [], []", "data::test_predict_scores_in_evaluation_mode"),
        ("bug 4: trained in evaluation mode", "model.train()  # every epoch", "model.eval()  # every epoch",
         "train known_answers"),
        ("average: never updated", "        average.update_parameters(model)\n", "", "train"),
        ("average: best.pt holds the live model", 'save_checkpoint(folder / "best.pt", average.module,',
         'save_checkpoint(folder / "best.pt", model,', "train"),
        ("bug 7: the last model is scored, not the best",
         '    model.load_state_dict(checkpoint["state"])\n    return {"epochs"', '    return {"epochs"', "train"),
        ("bug 7: the last epoch is written over the best", "kept = epoch == first_settled or rank > best",
         "kept = True", "train"),
        ("best epoch: an early, lucky peak wins", "kept = epoch == first_settled or rank > best", "kept = rank > best",
         "train"),
        ("best epoch: of equal scores the one with the higher loss", "rank = (score, -val_loss)",
         "rank = (score, val_loss)", "known_answers train"),
        ("bug 13: best begins at 0", "history, best, spent = [], (-math.inf, -math.inf), 0.0",
         "history, best, spent = [], (0.0, 0.0), 0.0", "train known_answers"),
        ("schedule: a step per epoch", "        schedule.step()\n",
         "        if len(rates) == 1:\n            schedule.step()\n", "known_answers train"),
        ("gradients: clipped before they are unscaled", """        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
""", """        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
""", "accelerator known_answers"),
        ("gradients: not clipped",
         "        nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n        scaler.step(optimizer)\n",
         "        scaler.step(optimizer)\n", "accelerator known_answers"),
        ("gradients: never set to zero", "        optimizer.zero_grad(set_to_none=True)\n", "",
         "known_answers train answers_genre"),
        ("loss: computed in half precision", "loss = loss_fn(outputs.float(), targets)",
         "loss = loss_fn(outputs, targets)", "accelerator known_answers"),
        ("loss: history shows that of the last batch", "return float(losses.mean())", "return float(losses[-1])",
         "known_answers train"),
        ("loss: NaN seen in the last batch only", "if not losses.isfinite().all():", "if not losses[-1].isfinite():",
         "train::test_nan_loss_names_epoch_batch_and_rate_and_keeps_the_best"),
        ("learned weights: not given to the optimizer", "[*model.parameters(), *loss_fn.parameters()] if",
         "[*model.parameters()] if",
         "answers_emotion::test_learned_weights_trust_the_axis_that_cannot_be_predicted_less steps_08_10"),
        ("time: an epoch is begun that ends too late", "time.monotonic() - began + seconds > max_seconds",
         "time.monotonic() - began > max_seconds", "resume::test_six_lstms_share_the_time_evenly resume"),
        ("bug 9: the overfit check uses all batches",
         "[batch for batch, _ in zip(loader, range(n_batches), strict=False)]", "list(loader)", "train"),
        ("bug 9: the overfit check is content with .3", "limit=300, goal=0.01)", "limit=300, goal=0.3)", "train"),
        ("bug 9: the overfit check never fails", "    if not done:\n", "    if not history:\n", "train"),
        ("overfit check: dropout stays on", "            module.p = 0.0\n",
         "            module.p = min(module.p, 0.5)\n", "train"),
        ("overfit check: label smoothing stays on", "0.0 if overfit_batch else 0.1", "0.1",
         "train::test_step05_overfit_batch"),
        ("resume: random numbers begin anew", '    torch.set_rng_state(state["rng"]["cpu"])\n', "", "train resume"),
        ("resume: the best epoch is forgotten", 'return state["history"], tuple(state["best"]),',
         'return state["history"], (-math.inf, -math.inf),', "train resume"),
        ("resume: the optimizer begins anew", '"optimizer": optimizer, "schedule"', '"schedule"', "train resume"),
        ("resume: the average of the weights begins anew", '"average": average, "loss": loss_fn, "optimizer"',
         '"loss": loss_fn, "optimizer"', "train resume"),
        ("resume: another split of the clips is let through", '_same(value, state["settings"].get(name))]',
         "_same(value, value)]", "bad_input resume"),
    ],
    "common.py, 7 scoring": [
        ("windows: only the first is scored", "(n_clips, -1)).mean(1)", "(n_clips, -1))[:, 0]",
         "known_answers answers_genre::test_what_can_be_learned_is_learned answers_genre"),
        ("windows: those of different clips are mixed", "(n_clips, -1)).mean(1)", "(-1, n_clips)).mean(0)",
         "known_answers answers_genre::test_what_can_be_learned_is_learned answers_genre"),
        ("windows: the second half is never heard", "torch.linspace(0, 1, n_windows)",
         "torch.linspace(0, 0.5, n_windows)", "train"),
        ("logit adjustment: wrong sign", "return logits - strength *", "return logits + strength *",
         "train::test_a_rare_class_is_believed_a_little_earlier"),
        ("validation score: accuracy, called macro-F1",
         "macro_f1(targets.numpy(), even_out(logits, shares).argmax(1).numpy(), len(shares))",
         "float((targets == even_out(logits, shares).argmax(1)).float().mean())",
         "answers_genre::test_the_validation_score_is_that_of_the_kept_weights_on_the_validation_clips answers_genre"),
        ("epoch: chosen on training clips", "make_loader(data.val, batch_size)", "make_loader(data.train, batch_size)",
         "answers_genre::test_the_validation_score_is_that_of_the_kept_weights_on_the_validation_clips answers_genre"),
        ("test set: step 6's other one is its own", "load_genre_test(step.data, settings, beat=beat, device",
         "load_genre_test(step.data, settings, device",
         "answers_genre::test_scores_on_the_other_test_set_are_of_the_other_test_set answers_genre"),
        ("predictions: truth and prediction swapped", '"truth": names[targets], "prediction": names[answers]',
         '"truth": names[answers], "prediction": names[targets]',
         "answers_genre::test_every_test_clip_is_answered_once_and_carries_its_own_truth answers_genre"),
    ],
    "common.py, 7 genre runs": [
        ("runs: beat_mel hears frames", '"beat_mel": GenreRun("lstm", "mel", True)',
         '"beat_mel": GenreRun("lstm", "mel", False)',
         "answers_genre::test_each_model_is_tested_on_its_own_kind_of_clips_and_in_step_6_on_the_other_too "
         "answers_genre"),
        ("runs: fused hears mel only", '"fused": GenreRun("lstm", "fused", False)',
         '"fused": GenreRun("lstm", "mel", False)', "known_answers answers_genre train"),
        ("runs: what comes before changes a run's numbers", "    seed_everything(seed)  # each run alone",
         "    # each run alone", "answers_genre resume train"),
        ("flags: --lr not heeded", 'planned_lr = lr or TRAINING_DEFAULTS["lr"]', 'planned_lr = TRAINING_DEFAULTS["lr"]',
         "resume answers_genre train"),
        ("second training: begins with new weights",
         '        model.load_state_dict(load_checkpoint(folder / "best.pt")["state"])\n', "",
         "steps_07_11::test_all_clips_means_training_and_validation_clips_and_no_other"),
        ("second training: on the training clips only", "train_idx + data.val.indices, max(", "train_idx, max(",
         "steps_07_11::test_all_clips_means_training_and_validation_clips_and_no_other"),
        ("checkpoints: one of --smoke is taken", 'and settings["smoke"] <= step.args.smoke', "",
         "steps_08_10::test_best_genre_model_is_chosen_by_validation_score"),
        ("checkpoints: one of other classes is taken", 'settings["classes"] == classes and settings["smoke"]',
         'settings["smoke"]', "steps_08_10::test_best_genre_model_is_chosen_by_validation_score"),
        ("checkpoints: the weights are not loaded",
         '        model = build_model(checkpoint["spec"])\n        model.load_state_dict(checkpoint["state"])\n',
         '        model = build_model(checkpoint["spec"])\n', "train::test_checkpoint_rebuilds_the_model"),
        ("transfer: the backbone begins anew", "return model.backbone.train(), checkpoint",
         'return build_model(checkpoint["spec"]).backbone.train(), checkpoint',
         "steps_08_10::test_transfer_takes_the_backbone_and_nothing_else"),
        ("best genre model: the worst", "key=lambda item: -item[1]))", "key=lambda item: item[1]))",
         "steps_08_10::test_best_genre_model_is_chosen_by_validation_score"),
    ],
    "common.py, 7 emotion": [
        ("folds: held-out clips are trained on", "EmotionSplit(rest[train], rest[val], test)",
         "EmotionSplit(train, val, test)", "steps_08_10::test_splits_are_disjoint_and_cover"),
        ("folds: overlap", "KFold(n_folds, shuffle=True, random_state=seed).split(np.arange(n_clips))",
         "[split_indices(n_clips, 1 / n_folds, seed + i) for i in range(n_folds)]",
         "steps_08_10::test_splits_are_disjoint_and_cover"),
        ("folds: not seeded", "KFold(n_folds, shuffle=True, random_state=seed).split",
         "KFold(n_folds, shuffle=True, random_state=np.random.RandomState()).split",
         "answers_emotion::test_all_steps_hold_out_the_same_clips_each_predicted_once_by_each_model answers_emotion"),
        ("folds: beats by the frames' positions",
         "splits[True] = [EmotionSplit(*(np.array([position[ids[index]] for index in part])",
         "splits[True] = [EmotionSplit(*(part",
         "steps_08_10::test_beat_and_full_clips_are_split_alike_in_whatever_order_they_are_listed "
         "answers_emotion::test_statistics_of_beats_are_those_of_the_same_training_clips"),
        ("axes: all three learn valence", "columns = EMOTIONS.index(axis) if axis else slice(None)",
         "columns = 0 if axis else slice(None)",
         "answers_emotion::test_statistics_are_those_of_the_training_clips answers_emotion"),
        ("axes: labels' means in another order", "MultitaskRegressor(backbone, mean.tolist(), std.tolist())",
         "MultitaskRegressor(backbone, mean.tolist()[::-1], std.tolist())",
         "answers_emotion::test_statistics_are_those_of_the_training_clips answers_emotion"),
        ("axes: columns named in alphabetical order", "dict(zip(EMOTIONS, np.asarray(predictions).T, strict=True))",
         "dict(zip(sorted(EMOTIONS), np.asarray(predictions).T, strict=True))",
         "known_answers answers_emotion::test_truth_is_the_clips_own_label_of_that_axis answers_emotion"),
        ("leak: mean and spread of the labels of all clips", "targets[train_idx].mean(0), targets[train_idx].std(0)",
         "targets.mean(0), targets.std(0)",
         "answers_emotion::test_statistics_are_those_of_the_training_clips answers_emotion"),
        ("leak: band statistics of held-out emotion clips too", "band_statistics(store, train_idx, run.features)",
         "band_statistics(store, range(len(targets)), run.features)",
         "answers_emotion::test_statistics_are_those_of_the_training_clips answers_emotion"),
        ("leak: the epoch is chosen on held-out clips", "for part in (split.val, split.test))",
         "for part in (split.test, split.test))",
         "answers_emotion::test_held_out_clips_change_nothing_but_their_own_predictions answers_emotion"),
        ("leak: floors are fitted on held-out clips", "np.concatenate([split.train, split.val]) for split",
         "np.concatenate(split) for split",
         "answers_emotion::test_held_out_clips_change_nothing_but_their_own_predictions answers_emotion"),
        ("leak: unlabelled clips standardised by their own statistics",
         'targets, settings["features"], settings["stats"])',
         'targets, settings["features"], band_statistics(store, range(9), settings["features"]))',
         "answers_emotion::test_submission_gives_each_unlabelled_clip_its_own_values answers_emotion"),
        ("transfer: statistics of the genre clips not used", 'stats = checkpoint["settings"]["stats"]',
         "stats = band_statistics(store, train_idx, run.features)",
         "answers_emotion::test_multitask_from_the_genre_model_hears_as_it_did answers_emotion"),
        ("transfer: --freeze does nothing", "backbone.freeze(frozen_blocks)", "backbone.freeze(0)",
         "steps_08_10::test_frozen_blocks_stay_as_they_were"),
        ("flags: --resume not heeded in steps 8 to 10", '("epochs", "batch_size", "lr", "subset", "resume")',
         '("epochs", "batch_size", "lr", "subset")', "resume::test_interrupted_and_resumed_is_uninterrupted resume"),
        ("submission: values beyond [0, 1]", "np.clip(predictions, 0, 1)", "np.asarray(predictions)",
         "steps_08_10::test_submission_has_the_competitions_format known_answers answers_emotion"),
        ("submission: another header", '"Id.fused.full.npy.gz", list(clip_ids)', '"Id", list(clip_ids)',
         "steps_08_10::test_submission_has_the_competitions_format answers_emotion"),
        ("submission: columns reversed", "np.hstack(columns))", "np.hstack(columns)[:, ::-1])",
         "answers_emotion::test_submission_gives_each_unlabelled_clip_its_own_values answers_emotion"),
        ("submission: ids reversed", "ids = outputs[0][0]", "ids = outputs[0][0][::-1]",
         "answers_emotion::test_submission_gives_each_unlabelled_clip_its_own_values answers_emotion"),
        ("submission: only the last fold answers", "np.mean([values for _, values in outputs], axis=0)",
         "np.asarray(outputs[-1][1])",
         "answers_emotion::test_submission_gives_each_unlabelled_clip_its_own_values answers_emotion"),
        ("predictions: ids sorted, values not", 'columns = {"Id": ids}', 'columns = {"Id": sorted(ids)}',
         "answers_emotion::test_truth_is_the_clips_own_label_of_that_axis answers_emotion"),
        ("earlier scores: of the same clips in another order", 'table["Id"].tolist() != ids:',
         'set(table["Id"]) != set(ids):', "steps_08_10::test_earlier_scores_are_taken_from_the_same_clips_only"),
    ],
    "common.py, 8 metrics": [
        ("confusion matrix: transposed", "confusion_matrix(targets, predictions, labels=labels)",
         "confusion_matrix(predictions, targets, labels=labels)",
         "answers_genre::test_scores_of_a_hand_made_example answers_genre"),
        ("precision and recall swapped", 'zip(("precision", "recall", "f1"), report',
         'zip(("recall", "precision", "f1"), report',
         "answers_genre::test_scores_of_a_hand_made_example answers_genre"),
        ("macro average: weighted by class size", "report(average=average)",
         'report(average=average.replace("macro", "weighted"))',
         "train::test_classification_scores_equal_scikit_learn"),
        ("macro-F1: classes that do not occur count as 0", "counts.diagonal()[seen > 0] / seen[seen > 0])",
         "counts.diagonal() / np.maximum(seen, 1))", "known_answers answers_genre train"),
        ("bug 10: Spearman of all axes in one heap", "scores[axis] = spearman(targets[:, i], predictions[:, i])",
         "scores[axis] = spearman(targets.ravel(), predictions.ravel())", "train::test_spearman_is_over_the_whole_set"),
        ("bug 10: Spearman averaged over batches",
         "scores[axis] = spearman(targets[:, i], predictions[:, i])",
         "scores[axis] = float(np.mean([spearman(targets[j : j + 8, i], predictions[j : j + 8, i])"
         " for j in range(0, len(targets), 8)]))",
         "train::test_spearman_is_over_the_whole_set"),
        ("Spearman: NaN for a constant", "if np.ptp(targets) == 0 or np.ptp(predictions) == 0:", "if len(targets) < 2:",
         "train::test_spearman_is_over_the_whole_set"),
        ("interval: of 90%, called 95%", "np.nanpercentile(values, [2.5, 97.5])", "np.nanpercentile(values, [5, 95])",
         "known_answers::test_bootstrap_interval_of_coin_tosses "
         "answers_genre::test_scores_of_a_hand_made_example answers_genre"),
        ("interval: of 90% for the emotions", "np.percentile(resampled[-1], [2.5, 97.5])",
         "np.percentile(resampled[-1], [5, 95])",
         "known_answers answers_emotion::test_scores_are_scipys_of_the_predictions_and_the_label_file answers_emotion"),
        ("interval: drawn without replacement", "rng.integers(0, n_clips, n_clips)) for _",
         "rng.permutation(n_clips)) for _", "train::test_classification_scores_equal_scikit_learn"),
        ("difference: not on the same resamples", "- resampled_spearman(target, b) for",
         "- resampled_spearman(target, b, seed=1) for", "steps_08_10::test_difference_is_paired"),
    ],
    "common.py, 10 records": [
        ("files: written in place", """        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
""", '        with open(path, "wb") as file:\n            write(file)\n',
         "crashes::test_kill_9_at_random_moments bad_input"),
        ("files: two processes may write into one folder", "fcntl.LOCK_EX | fcntl.LOCK_NB",
         "fcntl.LOCK_SH | fcntl.LOCK_NB", "crashes::test_two_processes_do_not_write_into_one_folder"),
        ("demo: no banner on its results", "        if self.demo:\n", "        if self.demo and on_kaggle():\n",
         "first_command"),
        ("demo: metrics.json says it is real music", '"demo": self.demo}', '"demo": False}', "first_command"),
    ],
    "step04_dataset.py": [
        ("step 4: counts after the merge under 'before'", '(("before", False),', '(("before", True),', "steps_01_04"),
        ("step 4: one still band makes a clip constant", "(array == array[:, :1]).all()",
         "(array == array[:, :1]).any()", "steps_01_04"),
        ("step 4: the same array in two sets not seen", 'test["digest"].isin(train["digest"]) & (test["digest"] != "")',
         'test["digest"].isin(train["digest"]) & (test["digest"] == "")', "steps_01_04"),
    ],
    "step05_lstm.py": [
        ("bug 3: step 5 shows the validation score as test score", '"test": test}',
         '"test": test | {"macro_f1": result["val_score"]}}',
         "answers_genre::test_scores_are_those_of_the_predictions answers_genre"),
        ("flags: --resume not heeded in step 5", "**flags, resume=args.resume,", "**flags,",
         "resume::test_interrupted_and_resumed_is_uninterrupted resume"),
        ("step 5: test clips scored before all runs are trained", "    trained = {}\n",
         "    trained = {}\n    score_genre(step, *train_genre(step, names[0], epochs=1)[:2])\n",
         "train::test_test_split_is_read_only_after_training"),
    ],
    "step06_eval.py": [
        ("step 6: answers on the other test set under the own one's name",
         "genre_predictions(name, not beat, classes, other_ids", "genre_predictions(name, beat, classes, other_ids",
         "answers_genre::test_each_model_is_tested_on_its_own_kind_of_clips_and_in_step_6_on_the_other_too "
         "answers_genre"),
        ("step 6: the other test set's scores are the own ones'", "score_genre(step, model, settings, beat=not beat)",
         "score_genre(step, model, settings, beat=beat)",
         "answers_genre::test_scores_on_the_other_test_set_are_of_the_other_test_set answers_genre"),
        ("step 6: the SVM is fitted on test clips", ".fit(x_train, y_train)", ".fit(x_test, y_test)",
         "answers_genre::test_floors_are_fitted_on_training_clips_alone answers_genre"),
    ],
    "step07_cnn.py": [
        ("step 7: the rival is the worst LSTM", "best = max(val, key=val.get)", "best = min(val, key=val.get)",
         "answers_genre::test_the_average_of_cnns_takes_in_the_lstm_that_validated_best answers_genre"),
        ("step 7: averages by position, not by id", "(cnn + tested[lstm][2]).dropna()",
         "(cnn + tested[lstm][2].to_numpy())", "steps_07_11::test_ensemble_averages_by_clip_id"),
        ("step 7: bootstrap not paired", "right[i].mean() - right_other[i].mean()",
         "right[i].mean() - right_other[len(targets) - 1 - i].mean()", "steps_07_11::test_paired_bootstrap"),
        ("step 7: --resume not heeded", "seed=seed, resume=args.resume, max_seconds", "seed=seed, max_seconds",
         "resume::test_interrupted_and_resumed_is_uninterrupted resume"),
        ("step 7: the second training takes the other networks' time", "seconds_left(args, 5 * left - 4)",
         "seconds_left(args)", "resume::test_three_seeds_share_the_time_evenly resume"),
        ("step 7: digits scored on those it learned", "data = x[train_idx], y[train_idx], x[test_idx], y[test_idx]",
         "data = x[train_idx], y[train_idx], x[train_idx], y[train_idx]", "steps_07_11 answers_genre"),
    ],
    "step08_regression.py": [
        ("step 8: the network is chosen on held-out clips",
         'key=lambda network: runs[network]["val"]["mean_spearman"])',
         'key=lambda network: runs[network]["test"]["mean_spearman"])',
         "answers_emotion::test_held_out_clips_change_nothing_but_their_own_predictions answers_emotion"),
        ("step 8: the worst LSTM of step 5", 'next(iter(lstm_scores), "beat_mel")',
         'next(reversed(lstm_scores), "beat_mel")',
         "answers_emotion::test_step_8_takes_the_lstm_that_is_best_on_validation_clips answers_emotion"),
        ("step 8: submission columns in reverse order", '[members[f"{best}_{axis}"] for axis in EMOTIONS]',
         '[members[f"{best}_{axis}"] for axis in EMOTIONS[::-1]]',
         "answers_emotion::test_submission_gives_each_unlabelled_clip_its_own_values answers_emotion"),
    ],
    "step09_transfer.py": [
        ("step 9: 'from scratch' begins with the genre model, too", 'jobs |= {f"scratch_{axis}": {"run": run,',
         'jobs |= {f"scratch_{axis}": {"init": checkpoint_path, "run": run,',
         "answers_emotion::test_step_9_starts_from_the_genre_model_that_is_best_on_validation_clips answers_emotion"),
        ("step 9: the worst genre model is transferred", 'next(iter(genre_scores), "cnn_mel")',
         'next(reversed(genre_scores), "cnn_mel")',
         "answers_emotion::test_step_9_starts_from_the_genre_model_that_is_best_on_validation_clips answers_emotion"),
        ("step 9: no look for leaked clips", "    stop_at_emotion_leak(step, store, splits)\n", "",
         "steps_08_10::test_leak_is_refused"),
    ],
    "step10_multitask.py": [
        ("step 10: multitask does not begin with the genre model",
         '{"run": run, "init": checkpoint_path}, "multitask_scratch"', '{"run": run}, "multitask_scratch"',
         "answers_emotion::test_multitask_from_the_genre_model_hears_as_it_did answers_emotion"),
        ("step 10: the average is of other networks", '("multitask", "multitask_lstm")',
         '("multitask", "multitask_scratch")',
         "answers_emotion::test_the_average_is_that_of_its_members answers_emotion"),
        ("step 10: only one network answers in the submission",
         "[[member for row in averaged for member in members[row]]]", '[members["multitask"]]',
         "answers_emotion::test_submission_gives_each_unlabelled_clip_its_own_values answers_emotion"),
        ("step 10: --learned-weights learns none", '"learned_weights": True', '"learned_weights": False',
         "answers_emotion::test_learned_weights_trust_the_axis_that_cannot_be_predicted_less steps_08_10"),
        ("step 10: no look for leaked clips", "    stop_at_emotion_leak(step, store, splits)\n", "",
         "steps_08_10::test_leak_is_refused"),
    ],
    "step11_latent.py": [
        ("step 11: labels sorted, vectors not", '"labels": labels.numpy()', '"labels": np.sort(labels.numpy())',
         "answers_genre::test_latent_vectors_belong_to_their_ids answers_genre"),
        ("step 11: clips shuffled, ids not", "predict(model.backbone, make_loader(test, 64)",
         "predict(model.backbone, make_loader(test, 64, shuffle=True)",
         "answers_genre::test_latent_vectors_belong_to_their_ids answers_genre"),
        ("step 11: ids sorted as numbers", "np.array([entry.clip_id for entry in test.store.entries])",
         "np.array(sorted((entry.clip_id for entry in test.store.entries), key=int))",
         "answers_genre::test_latent_vectors_belong_to_their_ids answers_genre"),
        ("step 11: a clip is its own neighbour", ".kneighbors(return_distance=False)",
         ".kneighbors(points, return_distance=False)", "steps_07_11::test_separation_is_leave_one_out"),
        ("step 11: best and worst LSTM swapped", "worst, *_, best = sorted", "best, *_, worst = sorted",
         "answers_genre::test_best_and_worst_lstm_are_chosen_by_validation answers_genre"),
        ("step 11: best and worst LSTM chosen by their answers to test clips", "sorted(LSTMS, key=val.get)",
         'sorted(LSTMS, key=lambda n: latent_vectors(step, *found[n][:2])["logits"].std())',
         "answers_genre::test_best_and_worst_lstm_are_chosen_by_validation answers_genre"),
        ("step 11: the untrained twin is trained", "build_model(model_spec(found[name][0])).to(step.device)",
         "found[name][0]", "answers_genre steps_07_11"),
    ],
    "make_dataset.py": [
        ("audio: the first 30 s, not the middle", "offset=max(0.0, spare_s / 2)", "offset=0.0", "make_dataset"),
        ("audio: test clips counted anew for files added later", '- old.count("test"), 0)', ", 0)", "make_dataset"),
        ("audio: emotion columns by position", "tuple(float(row[axis]) for axis in EMOTIONS)",
         "tuple(map(float, cells[1:]))", "make_dataset"),
        ("demo: every clip plays the same", "np.random.default_rng([seed, clip_id])", "np.random.default_rng(seed)",
         "make_dataset"),
        ("labels: those of the emotion test clips given away",
         'for clip in shuffled if clip.emotions and clip.split == "train"]', "for clip in shuffled if clip.emotions]",
         "make_dataset"),
    ],
    "handin.py": [
        ("zip: files under their whole path", "archive.write(path, path.name)", "archive.write(path)", "handin"),
        ("draft: trial runs not named", 'a trial": [f["step"] for f in facts if f["smoke"]]',
         'a trial": [f["step"] for f in facts if f["demo"]]', "handin"),
        ("draft: written over what a student wrote", "args.to.exists() and not is_untouched(args.to)",
         "args.to.exists() and not args.to.stat().st_size", "handin"),
    ],
    "kaggle_kernel.py": [
        ("kernel: public", '"is_private": True', '"is_private": False', "kaggle"),
        ("kernel: no GPU where networks must be trained", '("genre_model" in text and not earlier)',
         '("genre_model" in text and earlier)', "kaggle"),
        ("kernel: step 11 without the CNN of step 7", '"11": ("05", "07")', '"11": ("05",)', "kaggle"),
        ("kernel: a title that gives another name", 'slug.replace("-", " ").capitalize()',
         'step.stem.replace("_", " ").capitalize()', "kaggle"),
    ],
}  # fmt: skip
FAULTS = [Fault(row[0], title.split(",")[0], *row[1:]) for title, rows in TABLE.items() for row in rows]
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
        path = ROOT / "tests" / f"test_{stem}.py"
        found = path.exists() and (not function or f"def {function}(" in path.read_text(encoding="utf-8"))
        (there if found else gone).append(f"tests/{path.name}" + (f"::{function}" if function else ""))
    return there, gone


def run_tests(tests, fault, timeout, *flags) -> tuple[str, list[str], float]:
    """Run tests on a copy with a fault or none: green, red, timed out or broken; what failed; seconds."""
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
    verdict, failed, seconds = run_tests(tests, fault, timeout, "-x") if tests else ("no test", [""], 0.0)
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--check", action="store_true", help="only say whether every fault can still be planted; run no test")
    add("--only", default="", metavar="PATTERN", help="faults in whose 'file: name' this regular expression is found")
    add("--jobs", type=int, default=2, metavar="N", help="copies that are tested at a time (default: %(default)s)")
    add("--timeout", type=float, default=1800, metavar="S", help="seconds for one fault (default: %(default)g)")
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
    print(f"{len(faults)} faults, {len(stale)} stale, {len(gone)} named tests that do not exist", flush=True)
    if args.check:
        raise SystemExit(bool(stale or gone))

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    pool, results = ThreadPoolExecutor(args.jobs), {}
    try:
        if not args.no_baseline:
            check_baseline(faults, pool, args.timeout)
        futures = {pool.submit(judge, fault, args.timeout): fault for fault in faults if fault not in stale}
        for future in as_completed(futures):
            verdict, by, seconds = results[futures[future]] = future.result()
            print(f"{verdict:9} {seconds:5.0f} s  {futures[future].file}: {futures[future].name}  {by}", flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in [process for process in RUNNING if process.poll() is None]:
            os.killpg(process.pid, signal.SIGKILL)

    print("\n| fault | verdict | by | s |\n| --- | --- | --- | --- |")
    for fault in [fault for fault in faults if fault in results]:  # in the table's order
        verdict, by, seconds = results[fault]
        print(f"| {fault.file}: {fault.name} | {verdict} | {by} | {seconds:.0f} |")
    n_caught = sum(verdict == "caught" for verdict, _, _ in results.values())
    print(f"\n{n_caught} of {len(faults)} caught ({n_caught / max(len(faults), 1):.1%}), {len(stale)} stale")
    raise SystemExit(n_caught < 0.95 * len(faults) or bool(stale or gone))


if __name__ == "__main__":
    main()
