"""tools.explain: what decides and how sure the CNN is, tested before it is shown."""

import re
import shutil

import numpy as np
import pytest
import soundfile
import torch
from conftest import FEW_GENRES, assert_clean_error, read_metrics, run_forked

import common
from patrec import explain
from patrec.clips import sample_clips
from patrec.explain import calibration_error, fit_temperature
from patrec.features import mel_and_chroma, stack_rows
from patrec.flags import Source, TrainingOptions
from patrec.scores import class_numbers
from tools import listen

pytestmark = pytest.mark.slow
TOOL = "tools/explain.py"


@pytest.fixture(scope="module")
def data(small_data, tmp_path_factory):
    """The small set with wrong genres for eight test clips, which no network can be sure of."""
    root = tmp_path_factory.mktemp("copy") / "data"
    shutil.copytree(small_data, root)
    path = root / "fma_genre_spectrograms" / "test_labels.txt"
    header, *rows = path.read_text().splitlines()
    following = dict(zip(FEW_GENRES, FEW_GENRES[1:] + FEW_GENRES[:1], strict=True))
    wrong = ["\t".join([row.split("\t")[0], following[row.split("\t")[1]]]) for row in rows[:8]]
    path.write_text("\n".join([header, *wrong, *rows[8:]]) + "\n")
    return root


@pytest.fixture(scope="module")
def outputs(data, tmp_path_factory):
    """What the tool leaves after a step 7 that has trained for eight epochs."""
    out = tmp_path_factory.mktemp("out")
    options = TrainingOptions(Source(data), out, out / "step07_cnn", epochs=8, workers=1)
    common.train_all(options, [common.genre_experiment("cnn_mel")])
    run_forked(TOOL, "--smoke", "--data-dir", data, "--out-dir", out)
    return out


@pytest.fixture(scope="module")
def judged(outputs, data):
    """{split: (predictions, true classes)} of the network, for its validation and test clips."""
    model, checkpoint = common.load_model(outputs / "step07_cnn" / "cnn_mel" / "best.pt")
    settings, source = checkpoint["settings"], Source(data)
    parts = {"validation": common.load_data(source).val, "test": common.load_test(source, settings)}
    return {
        split: (common.predict_clips(model, clips, settings), common.true_labels(clips, settings))
        for split, clips in parts.items()
    }


def test_without_the_cnn_of_step_7_it_says_what_to_run(small_data, tmp_path):
    where = ("--smoke", "--data-dir", small_data, "--out-dir", tmp_path)
    result = run_forked(TOOL, *where, check=False)
    assert_clean_error(result, "no CNN of step 7", "run python step07_cnn.py")


def test_the_temperature_is_fitted_on_the_validation_clips(outputs, judged):
    found, pairs = read_metrics(outputs / "explain")["calibration"], {}
    for split, (table, true) in judged.items():
        numbers = class_numbers(true, list(table.columns))
        pairs[split] = torch.tensor(table.to_numpy()), torch.tensor(numbers)
    temperature = found["temperature"]
    assert temperature == pytest.approx(fit_temperature(*pairs["validation"]), rel=0.03)
    assert abs(np.log(temperature / fit_temperature(*pairs["test"]))) > 0.05, "cannot tell"
    for split, (z, targets) in pairs.items():
        row = found[f"{split} ({len(targets)} clips)"]
        assert row["accuracy"] == pytest.approx(float((z.argmax(1) == targets).float().mean()))
        for key, scale in (("calibration error", 1), ("calibration error, scaled", temperature)):
            assert row[key] == pytest.approx(calibration_error(z / scale, targets), abs=0.02)
        for key, scale in (("mean confidence", 1), ("confidence, scaled", temperature)):
            confidence = float((z / scale).softmax(1).amax(1).mean())
            assert row[key] == pytest.approx(confidence, abs=0.005)
    assert listen.temperature_of(outputs) == temperature
    assert listen.temperature_of(outputs / "elsewhere") == 1


def test_what_is_named_first_decides_more_than_a_random_order(outputs, data):
    """Put back, it raises the probability sooner; taken away, it lowers it sooner."""
    facts, gains = read_metrics(outputs / "explain")["faithfulness"], []
    for way, sign in (("insertion", 1), ("deletion", -1)):
        row = facts[way]
        assert 0 < row["by attribution"] < 1 and 0 < row["in random order"] < 1
        gains.append(sign * (row["by attribution"] - row["in random order"]))
        assert float(row["better by"].split()[0]) == pytest.approx(gains[-1], abs=6e-4)
    assert sum(gains) > 0  # small: two epochs of training
    mean, (low, high) = facts["randomised_weights"]["mean"], facts["randomised_weights"]["ci95"]
    assert -1 <= low <= mean <= high < 0.95  # other weights name other cells
    model, checkpoint = common.load_model(outputs / "step07_cnn" / "cnn_mel" / "best.pt")
    test, model, areas = common.load_test(Source(data), checkpoint["settings"]), model.eval(), []
    for index in np.random.default_rng(42).permutation(len(test))[:4].tolist():  # --smoke
        clip, _, n = test[index]
        size = min(int(n), checkpoint["settings"]["window"])
        x, lengths = clip[(int(n) - size) // 2 :][:size], torch.tensor([size])  # of the middle
        with torch.no_grad():
            label = model(x[None], lengths).argmax(1)
        named = explain.integrated_gradients(model, x[None], lengths, label, 4)[0]
        case = model, x, explain.cell_ranks(explain.patches(named)), int(label)
        areas.append([float(explain.probability_curve(*case, w).mean()) for w in (True, False)])
    found = [facts[way]["by attribution"] for way in ("insertion", "deletion")]
    assert found == pytest.approx(np.mean(areas, axis=0), abs=1e-3)


def mel_db(path):
    """Mel spectrogram of a sound file, in dB below its loudest cell."""
    waveform, _ = soundfile.read(path, dtype="float32")
    return stack_rows(*mel_and_chroma(waveform))[:128]


def test_the_clips_to_hear_are_step_1s_and_the_surest_mistakes(outputs, judged, data):
    folder, (table, true) = outputs / "explain", judged["test"]
    assert {path.stem for path in folder.glob("*.png")} == {"what_decides"}
    links = re.findall(r"\[(\w+), (\S+), (training split|test set), predicted: (\S+) \((\S+)\).*?\]"
                       r"\((clip_\d_\w+\.mp3)\)", (folder / "summary.md").read_text())  # fmt: skip
    mistakes = table[table.idxmax(axis=1) != true].max(axis=1).sort_values(ascending=False)
    surest = list(mistakes.index[:2])
    assert len(links) == 2 * (2 + len(surest))  # each as it is, and what decides
    assert [clip for clip, _, split, *_ in links[::2] if split == "test set"] == surest
    drawn = [(clip.clip_id, clip.genre) for clip in sample_clips(data, 1, 42, beat=False)[:2]]
    assert [(clip, genre) for clip, genre, *_ in links[:4:2]] == drawn
    assert all(true[clip] == genre for clip, genre, split, *_ in links if split == "test set")
    model, checkpoint = common.load_model(outputs / "step07_cnn" / "cnn_mel" / "best.pt")
    temperature = read_metrics(outputs / "explain")["calibration"]["temperature"]
    test = common.load_test(Source(data), checkpoint["settings"])
    for clip, _, _, predicted, probability, name in links[-4::2]:  # shorter than a window
        x, _, length = test[table.index.get_loc(clip)]
        size = min(int(length), 300)  # --smoke
        with torch.no_grad():
            logits = model(x[None, :size], torch.tensor([size]))[0]
        right = (logits / temperature).softmax(0).max()
        assert predicted == table.columns[int(logits.argmax())]
        assert float(probability) == pytest.approx(float(right), abs=0.006)
        assert abs(float(logits.softmax(0).max() - right)) > 0.02, "cannot tell"
        window = checkpoint["settings"]["window"]
        named = explain.clip_attributions(model, x[:size], window, int(logits.argmax()))
        kept = (explain.cell_ranks(explain.patches(named)) < 0.2).T.numpy()  # as loud as before
        drop = mel_db(folder / name) - mel_db(folder / name.replace("all", "deciding"))
        assert np.median(drop[~kept]) - np.median(drop[kept]) > 10
    quieter = []
    for *_, name in links[1::2]:  # most of the cells are 30 dB lower there
        whole, rest = mel_db(folder / name.replace("deciding", "all")), mel_db(folder / name)
        quieter.append(np.median(whole - rest))
    assert np.median(quieter) > 8
