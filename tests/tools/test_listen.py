"""tools.listen by its command line: predictions for a song, odd songs, its page in a browser.

The networks have random weights: tested is what is done with their predictions.
"""

import io
import json
import os
import re
import shutil
import sys
import types

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import Page, assert_clean_error, patch_everywhere, run_forked, write_data_set

import common
import patrec.batches
import patrec.errors
import patrec.features
import patrec.flags
import patrec.labels
import patrec.recipes
import patrec.step
from patrec.features import SR
from tools import listen

TEMPERATURE = 0.8
PAGES = shutil.ignore_patterns("listen")
ODD_NAME = "a <script>alert('x')<\\script> & \"quoted\"\nsong.wav"


def tones(seconds, seed=0):
    """Chords and clicks, unlike from second to second."""
    rng, t = np.random.default_rng(seed), np.arange(round(SR * seconds)) / SR
    pitch = np.repeat(rng.uniform(80, 2000, int(seconds) + 1), SR)[: len(t)]
    return (0.3 * np.sin(2 * np.pi * pitch * t) + 0.02 * rng.standard_normal(len(t))).astype("f4")


pytestmark = pytest.mark.slow  # librosa computes in nearly all of them


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    return write_data_set(root, per_class=(3, 1), n_emotion=(24, 3), n_frames=(300, 320))


def save_networks(out, data, **odd):
    """Checkpoints as steps 5, 7 and 10 leave them; odd : settings of the CNN's that are changed."""
    source = patrec.flags.Source(data)
    for role, (step, run) in listen.NETWORKS.items():
        torch.manual_seed(len(role))
        kind = "lstm" if "lstm" in role else "cnn"
        features = "fused" if role == "emotion_lstm" else "mel"
        network = patrec.recipes.Network(kind, features)
        target = "emotion" if "emotion" in role else "genre"
        cut = common.load_data(source, features, target=target)
        backbone = common.make_backbone(network)
        if target == "genre":
            model = common.Classifier(backbone, len(cut.names))
        else:
            model = common.Regressor(backbone, cut.names, cut.mean, cut.std)
            for head in model.heads.values():  # untrained, all would predict the mean label
                torch.nn.init.normal_(head.weight, std=0.05)
        settings = cut.settings | {"run": run, "window": patrec.recipes.window_size(network)}
        settings |= odd if role == "cnn" else {}
        (out / step / run).mkdir(parents=True)
        path = out / step / run / "best.pt"
        common.save_checkpoint(path, model, settings, epoch=1, val_score=0.5, facts={})
    (out / "explain").mkdir()
    facts = {"calibration": {"temperature": TEMPERATURE}}
    (out / "explain" / "metrics.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def outputs(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("outputs")
    save_networks(out, data)
    return out


@pytest.fixture(scope="module")
def listened(data, outputs, tmp_path_factory):
    """Four songs of 29 s (twice), 71 s and 1.7 s; the last two are no lab clip's length."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "again").mkdir()
    for place in (folder, folder / "again"):
        soundfile.write(place / "clip.wav", tones(29), SR, subtype="FLOAT")
    soundfile.write(folder / "long.flac", np.stack([tones(71, 1)] * 2, 1), SR)
    if os.name == "posix":  # a name may hold anything but / there
        soundfile.write(folder / "plain.wav", tones(1.7, 2), SR)
        (folder / "plain.wav").rename(folder / ODD_NAME.replace("/", "_"))
    songs = sorted(path for path in folder.rglob("*") if path.is_file())
    result = run_forked("tools/listen.py", *songs, "--out-dir", outputs, "--data-dir", data)
    found = json.loads((outputs / "listen" / "listen.json").read_text())
    return result, {os.path.basename(song["file"]): song for song in found["songs"]}, folder


def test_the_predictions_are_those_of_the_networks_for_the_windows(listened, outputs):
    """Computed here once more, from the lab's own extractor."""
    _, songs, folder = listened
    song = songs["clip.wav"]
    rows, _ = patrec.features.extract_features(
        soundfile.read(folder / "clip.wav", dtype="float32")[0]
    )
    model, checkpoint = common.load_model(outputs / "step07_cnn" / "cnn_mel" / "best.pt")
    settings, every = checkpoint["settings"], round(3 * SR / patrec.features.HOP)
    mean, std = settings["stats"]
    x = (torch.from_numpy(rows[:128]).float().T - mean) / std
    starts = range(0, len(x) - 256 + 1, every)
    with torch.no_grad():
        windows = torch.stack([x[s : s + 256] for s in starts])
        logits = model(windows, torch.full((len(windows),), 256))
    logits = (logits - 0.5 * torch.tensor(settings["priors"]).log()) / TEMPERATURE
    expected = logits.softmax(1).T
    assert torch.allclose(torch.tensor(song["genre_over_time"]), expected, atol=2e-3)
    assert song["classes"] == settings["names"]
    overall = dict(zip(settings["names"], logits.mean(0).softmax(0).tolist(), strict=True))
    assert song["genre"] == pytest.approx(overall, abs=2e-3)
    middles = [(s + 128) * patrec.features.HOP / SR for s in starts]
    assert song["times_s"] == pytest.approx(middles, abs=0.01)
    for name in patrec.labels.EMOTIONS:
        assert 0 <= song["emotion"][name] <= 1


def networks_of(out):
    return listen.find_networks(
        out, types.SimpleNamespace(train=False, data_dir=None, device="cpu")
    )


def test_songs_of_one_name_have_a_row_and_a_page_each(listened):
    lines = [line for line in listened[0].stdout.splitlines() if "clip.wav" in line]
    assert len(lines) == 2 and len({line.split()[-1] for line in lines}) == 2
    assert all(" 0:29 " in line for line in lines) and " 0:02 " in listened[0].stdout


def test_only_finished_networks_are_taken(outputs, data, tmp_path):
    out = shutil.copytree(outputs, tmp_path / "out")
    for run in ("multitask_from_genre", "multitask_lstm"):  # as step 10 leaves them with --folds 5
        (out / "step10_multitask" / run).rename(out / "step10_multitask" / f"{run}_fold1of5")
    assert set(networks_of(out)) == set(listen.NETWORKS)
    (out / "step07_cnn" / "cnn_mel" / common.UNFINISHED).touch()
    with pytest.raises(
        patrec.errors.InputError, match=r"no checkpoints of step07_cnn; run python step07"
    ):
        networks_of(out)


def test_each_network_names_its_own_classes(outputs, tmp_path):
    networks = networks_of(outputs)
    names = [f"other {name}" for name in networks["lstm"].settings["names"]]
    networks["lstm"].settings["names"] = names
    soundfile.write(tmp_path / "song.wav", tones(2), SR)
    facts, _, _ = listen.listen(tmp_path / "song.wav", networks, 1.0, None)
    assert list(facts["genre_lstm"]) == names != list(facts["genre"])


def test_without_the_training_clips_there_are_no_nearest(outputs, data, tmp_path, monkeypatch):
    cnn = networks_of(outputs)["cnn"]
    monkeypatch.delenv("PATREC_DATA", raising=False)
    patch_everywhere(
        monkeypatch, "PROJECT", tmp_path
    )  # no data set anywhere: none is made for this
    patch_everywhere(monkeypatch, "write_demo", lambda *args: pytest.fail("made a demo set"))
    assert listen.training_vectors(cnn, types.SimpleNamespace(data_dir=None)) is None
    # One of emotions alone.
    (tmp_path / "set" / "multitask_dataset").mkdir(parents=True)
    args = types.SimpleNamespace(data_dir=tmp_path / "set")
    assert listen.training_vectors(cnn, args) is None
    args = types.SimpleNamespace(data_dir=data)
    assert len(listen.training_vectors(cnn, args)[0]) > 0


def network_of(outputs, role):
    step, run = listen.NETWORKS[role]
    model, checkpoint = common.load_model(outputs / step / run / "best.pt")
    return model, checkpoint["settings"]


def prediction_of(outputs, role, rows, starts=None):
    """Mean output of a network: for windows of 6 s from `starts` on, or for as few as cover it."""
    model, settings = network_of(outputs, role)
    mean, std = settings["stats"]
    x = (torch.from_numpy(rows[patrec.features.BANDS[settings["features"]]]).float().T - mean) / std
    if starts is None:
        n = torch.tensor([len(x)])
        windows, lengths = patrec.batches.cut_windows(x[None], n, settings["window"], overlap=False)
    else:
        windows = torch.stack([x[s : s + 256] for s in starts])
        lengths = torch.full((len(windows),), 256)
    with torch.no_grad():
        return model(windows, lengths).mean(0)


def test_emotions_are_the_mean_of_both_networks_and_the_lstm_names_a_genre_too(listened, outputs):
    _, songs, folder = listened
    rows, _ = patrec.features.extract_features(
        soundfile.read(folder / "clip.wav", dtype="float32")[0]
    )
    starts = range(0, rows.shape[1] - 256 + 1, round(3 * SR / patrec.features.HOP))
    both = (
        prediction_of(outputs, "emotion", rows, starts),
        prediction_of(outputs, "emotion_lstm", rows),
    )
    assert (both[0] - both[1]).abs().max() > 0.01  # or one would do
    _, settings = network_of(outputs, "emotion")
    expected = dict(zip(settings["names"], (sum(both) / 2).tolist(), strict=True))
    assert songs["clip.wav"]["emotion"] == pytest.approx(expected, abs=2e-3)
    _, settings = network_of(outputs, "lstm")
    logits = prediction_of(outputs, "lstm", rows) - 0.5 * torch.tensor(settings["priors"]).log()
    expected = dict(zip(settings["names"], logits.softmax(0).tolist(), strict=True))
    assert songs["clip.wav"]["genre_lstm"] == pytest.approx(expected, abs=2e-3)


def test_attributions_are_for_the_class_predicted_for_the_whole_song(
    listened, outputs, monkeypatch
):
    """Not for that of its first window."""

    class Undecided(listen.LoadedModel):
        def predict_clips(self, rows, every=None):
            outputs, middles = super().predict_clips(rows, every)
            outputs = torch.zeros_like(outputs)
            outputs[0, 3], outputs[1:, 5] = 9.0, 9.0
            return outputs, middles

    kinds = {"cnn": Undecided}
    networks = {
        role: kinds.get(role, listen.LoadedModel)(*network_of(outputs, role))
        for role in listen.NETWORKS
    }
    asked = []
    monkeypatch.setattr(
        listen,
        "attributions",
        lambda cnn, mel, predicted: asked.append(predicted) or np.zeros(mel.shape),
    )
    facts, _, _ = listen.listen(listened[2] / "clip.wav", networks, 1.0, None)
    assert {facts["classes"][k] for k in asked} == {max(facts["genre"], key=facts["genre"].get)}
    assert set(asked) == {5}


def test_low_bands_are_drawn_below_and_nothing_loud_is_lost():
    """A picture of an hour has fewer columns than the hour has frames."""
    mel = np.full((128, 4000), -80.0)
    mel[:10, 1000], mel[100, 3000] = 0.0, -20.0
    png = listen.picture(mel, "magma", -80, 0)
    shown = plt.imread(io.BytesIO(png))[..., :3].sum(2)
    assert shown.shape[0] == 128 and shown.shape[1] <= 1600
    rows, columns = np.nonzero(shown > shown.min() + 0.1)
    low = columns < shown.shape[1] / 2
    assert set(rows[low]) == set(range(118, 128)) and set(rows[~low]) == {127 - 100}
    assert set(columns) == {1000 // 3, 3000 // 3}


@pytest.mark.parametrize("demo", [True, False])
def test_networks_of_the_demo_set_are_named_on_the_page(outputs, tmp_path, demo):
    for step in ("step05_lstm", "step10_multitask"):
        (tmp_path / step).mkdir()
        facts = {"data": {"demo": demo and step == "step10_multitask"}}
        (tmp_path / step / "metrics.json").write_text(json.dumps(facts))
    networks = {role: listen.LoadedModel(*network_of(outputs, role)) for role in listen.NETWORKS}
    limits = listen.limits_of(tmp_path, networks, 1.0)
    assert ("demo music" in limits) is demo


def test_train_runs_what_is_missing_on_the_same_data(outputs, tmp_path, monkeypatch):
    shutil.copytree(outputs / "step07_cnn", tmp_path / "step07_cnn")
    commands = []

    def run(command):
        commands.append(command[1:])
        return type("Done", (), {"returncode": int(len(commands) == 2)})

    monkeypatch.setattr(listen.subprocess, "run", run)
    args = type("Args", (), {"train": True, "data_dir": tmp_path / "set", "device": "cpu"})
    with pytest.raises(patrec.errors.InputError, match="step10_multitask could not be trained"):
        listen.find_networks(tmp_path, args)
    where = ["--out-dir", str(tmp_path), "--data-dir", str(tmp_path / "set")]
    steps = ("step05_lstm", "step10_multitask")
    assert commands == [[str(listen.PROJECT / f"{step}.py"), *where] for step in steps]


def test_a_song_of_any_length_is_covered(listened):
    _, songs, _ = listened
    for name, seconds in (("clip.wav", 29), ("long.flac", 71)):
        song = songs[name]
        times = np.array(song["times_s"])
        assert song["seconds"] == seconds and (np.diff(times) > 0).all()
        assert times[0] < 4 and seconds - times[-1] < 7 and np.diff(times).max() < 9
        curves = np.array(song["genre_over_time"])
        assert curves.shape == (len(song["classes"]), len(times))
        assert np.allclose(curves.sum(0), 1, atol=1e-2)
        assert sum(song["genre"].values()) == pytest.approx(1, abs=1e-4)


def test_a_training_clip_is_nearest_to_itself(data, outputs):
    """By its own latent vector; the other clips follow by distance."""
    model, checkpoint = common.load_model(outputs / "step07_cnn" / "cnn_mel" / "best.pt")
    args = type("Args", (), {"data_dir": data})
    known = listen.training_vectors(listen.LoadedModel(model, checkpoint["settings"]), args)
    for place in (0, 5):
        found = listen.nearest(known[0][place], known)
        assert found[0]["clip"] == known[1].index[place] and found[0]["distance"] == 0
        assert found[0]["genre"] == known[1].iloc[place]
        distances = [clip["distance"] for clip in found]
        assert len(found) == 5 and distances == sorted(distances)


def test_nearest_clips_are_of_the_networks_own_data_set(listened, outputs, tmp_path):
    _, songs, folder = listened
    assert len(songs["clip.wav"]["nearest"]) == 5
    other = write_data_set(tmp_path, per_class=(3, 1), n_emotion=(24, 3), n_frames=40, seed=9)
    arguments = (folder / "clip.wav", "--data-dir", other, "--out-dir", tmp_path / "out")
    shutil.copytree(outputs, tmp_path / "out", ignore=PAGES)
    result = run_forked("tools/listen.py", *arguments)
    (song,) = json.loads((tmp_path / "out" / "listen" / "listen.json").read_text())["songs"]
    assert song["nearest"] == [] and "clip.wav" in result.stdout


def test_long_songs_are_read_in_blocks(tmp_path):
    """So that an hour needs no more memory than a minute."""
    sound = tones(95.0, 3)
    soundfile.write(tmp_path / "song.wav", sound, SR, subtype="FLOAT")
    blocks = list(listen.read_blocks(tmp_path / "song.wav"))
    assert [len(block) / SR for block in blocks] == [30, 30, 30, 5]
    assert np.allclose(np.concatenate(blocks), sound, atol=1e-6)
    soundfile.write(tmp_path / "song.wav", tones(61.5), 8000)  # another rate, and a short tail
    seconds = [len(block) / SR for block in listen.read_blocks(tmp_path / "song.wav")]
    assert sum(seconds) == pytest.approx(61.5 * SR / 8000, abs=0.1) and min(seconds) >= 3


# --- odd input --------------------------------------------------------------------------


@pytest.fixture
def odd(tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(SR * 4), SR)
    soundfile.write(tmp_path / "blip.wav", tones(1)[: SR // 3], SR)
    for name, value in (("infinite.wav", np.inf), ("huge.wav", 1e20)):
        samples = tones(4)
        samples[5000] = value
        soundfile.write(tmp_path / name, samples, SR, subtype="FLOAT")
    (tmp_path / "text.mp3").write_text("no sound\n" * 50)
    (tmp_path / "empty.wav").write_bytes(b"")
    return tmp_path


def test_odd_songs_are_named_and_the_others_go_on(odd, listened, data, outputs, tmp_path):
    _, _, folder = listened
    words = {
        "silence.wav": "silence",
        "blip.wav": "0.33 s of sound is too short",
        "text.mp3": "not readable as sound",
        "empty.wav": "not readable as sound",
        "nowhere.wav": "no such file",
        "infinite.wav": "not finite",
        "huge.wav": "beyond 1e+06",
    }
    songs = [odd / name for name in words] + [folder / "clip.wav"]
    arguments = ("--out-dir", outputs, "--data-dir", data)
    result = run_forked("tools/listen.py", *songs, *arguments, check=False)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == len(words), result.stderr
    for line, (name, word) in zip(lines, words.items(), strict=True):
        assert line.startswith(f"error: {odd / name}: ") and word in line
    assert "clip.wav" in result.stdout


def test_a_damaged_song_is_used_as_far_as_it_goes(outputs, tmp_path, capsys):
    soundfile.write(tmp_path / "cut.flac", tones(20), SR)
    data = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(data[: len(data) // 2])
    facts, _, _ = listen.listen(tmp_path / "cut.flac", networks_of(outputs), 1.0, None)
    assert 8 < facts["seconds"] < 11
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path / 'cut.flac'}: only ") and "s of 20.0 s" in said


def test_missing_checkpoints_name_the_steps(listened, outputs, tmp_path):
    _, _, folder = listened
    shutil.copytree(outputs / "step07_cnn", tmp_path / "step07_cnn")
    result = run_forked("tools/listen.py", folder / "clip.wav", "--out-dir", tmp_path, check=False)
    assert_clean_error(result, "python step05_lstm.py", "python step10_multitask.py", "--train")
    assert "step07" not in result.stderr


@pytest.mark.parametrize("change", [{"features": "chroma"}, {"beat": True}, {"window": None}])
def test_a_network_for_other_input_is_refused(listened, data, tmp_path, change):
    save_networks(tmp_path, data, **change)
    song = listened[2] / "clip.wav"
    result = run_forked("tools/listen.py", song, "--out-dir", tmp_path, check=False)
    assert_clean_error(result, "cnn_mel", "other input", "train step07_cnn again")


# --- the page ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pages(listened, outputs):
    result, songs, _ = listened
    assert result.returncode == 0
    return {name: outputs / "listen" / os.path.basename(s["page"]) for name, s in songs.items()}


def test_names_that_are_greek_or_no_utf_8_have_pages_of_their_own(outputs, data, tmp_path):
    names = ["Άνοιξη.wav", "Θάλασσα.wav", *(["caf\udce9.wav"] if sys.platform == "linux" else [])]
    for name in names:  # in calls of their own
        soundfile.write(tmp_path / "song.wav", tones(1.5), SR)
        (tmp_path / "song.wav").rename(tmp_path / name)
        arguments = (tmp_path / name, "--out-dir", tmp_path / "out", "--data-dir", data)
        shutil.copytree(outputs, tmp_path / "out", dirs_exist_ok=True, ignore=PAGES)
        run_forked("tools/listen.py", *arguments)
    pages = {page.name for page in (tmp_path / "out" / "listen").glob("*.html")}
    assert len(pages) == len(names) and {"01_Άνοιξη.html", "01_Θάλασσα.html"} <= pages


def test_a_name_never_becomes_markup(pages):
    name = ODD_NAME.replace("/", "_")
    assert re.fullmatch(r"\d\d_[\w.-]+\.html", pages[name].name)
    text = pages[name].read_text()
    assert text.count("<script>") == 1 and text.count("</script>") == 1
    assert "<script>alert" not in text


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_plays_follows_and_jumps(browser, pages, width):
    page = Page(browser, pages["long.flac"], width)
    page.wait("audio.readyState > 1")
    assert page("audio.duration") == pytest.approx(71, abs=0.2)

    def cursor():
        return page("parseFloat(document.querySelector('.cursor').style.left)")

    assert cursor() == 0
    panel = page.page.locator(".panel").nth(1)
    box = panel.bounding_box()
    panel.click(position={"x": box["width"] / 2, "y": 20})  # half of the song
    page.wait("Math.abs(audio.currentTime - 35.5) < 1")
    assert cursor() == pytest.approx(50, abs=2)
    page("audio.muted = true; audio.play(); 0")  # returns before the promise is kept
    page.wait("audio.currentTime > 36.2")
    page("audio.pause()")
    assert cursor() > 50.5
    page.page.focus("#panels")
    for key, expected in (("Home", 0), ("ArrowRight", 5), ("ArrowRight", 10), ("ArrowLeft", 5)):
        page.page.keyboard.press(key)
        page.wait(f"Math.abs(audio.currentTime - {expected}) < 0.2")
    assert page("document.querySelectorAll('#genres polyline').length") == 6
    assert page("document.querySelectorAll('#emotions polyline').length") == 3
    assert page("mel.getBoundingClientRect().height > 100 && attributions.hidden")
    page.page.check("#explain")
    assert page("attributions.getBoundingClientRect().height > 100 && mel.hidden")
    dashes = page("[...document.querySelectorAll('#genres polyline')]"
                  ".map(p => p.getAttribute('stroke-dasharray'))")  # fmt: skip
    assert len(set(dashes)) == 6  # told apart without colours too
    assert page.fits() and not page.faults


def test_the_page_of_an_odd_name_shows_it_as_text(browser, pages):
    name = ODD_NAME.replace("/", "_")
    page = Page(browser, pages[name], 800)
    title = page("document.querySelector('h1').textContent")
    assert title == name and not page.faults
    rows = pd.DataFrame(page("[...genre.rows].map(r => r.textContent)"))
    assert len(rows) == len(json.loads(page("JSON.stringify(song.classes)")))
