"""tools.listen by its command line: predictions for a song, odd songs, its page in a browser.

The networks have random weights: tested is what is done with their predictions.
"""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
from conftest import assert_clean_error, patch_everywhere, run_forked, write_data_set

import common
from patrec.batches import cut_windows
from patrec.explain import clip_attributions, patches
from patrec.features import BANDS, HOP, SR, extract_features
from patrec.flags import Source
from patrec.labels import EMOTIONS, read_entries
from patrec.recipes import Network, window_size
from tools import listen

TEMPERATURE = 0.8
ODD_NAME = "a <script>alert('x')<\\script> & \"quoted\"\nsong.wav"
NAMES = [ODD_NAME, "Άνοιξη.wav", "Θάλασσα.wav"]
NAMES += ["caf\udce9.wav"] if sys.platform == "linux" else []  # no UTF-8


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


def save_networks(out, data):
    """Checkpoints as steps 5, 7 and 10 leave them."""
    for role, (step, run) in listen.NETWORKS.items():
        torch.manual_seed(len(role))
        features = "fused" if role == "emotion_lstm" else "mel"
        network = Network("lstm" if "lstm" in role else "cnn", features)
        target = "emotion" if "emotion" in role else "genre"
        cut = common.load_data(Source(data), features, target=target)
        if target == "genre":
            model = common.make_classifier(network, cut)
        else:
            model = common.make_regressor(network, cut)
            for head in model.heads.values():  # untrained, all would predict the mean label
                torch.nn.init.normal_(head.weight, std=0.05)
        settings = cut.settings | {"run": run, "window": window_size(network)}
        (out / step / run).mkdir(parents=True)
        path = out / step / run / "best.pt"
        common.save_checkpoint(path, model, settings, epoch=1, val_score=0.5, facts={})
    (out / "explain").mkdir()
    facts = {"calibration": {"temperature": TEMPERATURE}}
    (out / "explain" / "metrics.json").write_text(json.dumps(facts))


def networks_of(out):
    return listen.find_networks(out, "cpu")


@pytest.fixture(scope="module")
def outputs(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("outputs")
    save_networks(out, data)
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Songs of 29 s (twice), of 71 s, and short ones with names of every kind."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "again").mkdir()
    for place in (folder, folder / "again"):
        soundfile.write(place / "clip.wav", tones(29), SR, subtype="FLOAT")
    soundfile.write(folder / "long.flac", np.stack([tones(71, 1)] * 2, 1), SR)
    for name in NAMES:
        soundfile.write(folder / "plain.wav", tones(1.7, 2), SR)
        (folder / "plain.wav").rename(folder / name)
    return folder


@pytest.fixture(scope="module")
def listened(data, outputs, folder):
    """What the tool says of all songs; what listen.json holds, by the songs' names and all."""
    songs = sorted(path for path in folder.rglob("*") if path.is_file())
    result = run_forked("tools/listen.py", *songs, "--out-dir", outputs, "--data-dir", data)
    found = json.loads((outputs / "listen" / "listen.json").read_text())["songs"]
    return result, {song["file"].rpartition("/")[2]: song for song in found}, found


def prediction_of(network, rows, starts=None, part=None):
    """Outputs of a network: for windows of 6 s from `starts` on, or for as few as cover the rows.

    Computed here once more, from the lab's own extractor. `part`: of its backbone, say.
    """
    settings = network.settings
    mean, std = settings["stats"]
    x = (torch.from_numpy(rows[BANDS[settings["features"]]]).float().T - mean) / std
    if starts is None:
        n = torch.tensor([len(x)])
        windows, lengths, _ = cut_windows(x[None], n, settings["window"])
    else:
        windows = torch.stack([x[s : s + 256] for s in starts])
        lengths = torch.full((len(windows),), 256)
    with torch.no_grad():
        return (part or network.model)(windows, lengths)


def test_predictions_are_those_of_the_networks_for_the_windows(listened, outputs, folder, data):
    """Emotions are the mean of both networks, and the LSTM names a genre too."""
    song, networks = listened[1]["clip.wav"], networks_of(outputs)
    rows, _ = extract_features(soundfile.read(folder / "clip.wav", dtype="float32")[0])
    starts = range(0, rows.shape[1] - 256 + 1, round(3 * SR / HOP))
    logits = prediction_of(networks["cnn"], rows, starts) / TEMPERATURE
    names = networks["cnn"].settings["names"]
    assert song["classes"] == names
    found = torch.tensor(song["genre_over_time"])
    assert torch.allclose(found, logits.softmax(1).T, atol=2e-3)
    middles = [(s + 128) * HOP / SR for s in starts]
    assert song["times_s"] == pytest.approx(middles, abs=0.01)
    emotion = prediction_of(networks["emotion"], rows, starts)
    found = torch.tensor(song["emotion_over_time"])
    assert torch.allclose(found, emotion.clamp(0, 1).T, atol=2e-3)
    emotion, cnn = emotion.mean(0), networks["cnn"]
    emotion_lstm = prediction_of(networks["emotion_lstm"], rows).mean(0)
    assert (emotion - emotion_lstm).abs().max() > 0.01  # or one would do
    for key, keys, values in (
        ("genre", names, logits.mean(0).softmax(0)),
        ("genre_lstm", names, prediction_of(networks["lstm"], rows).mean(0).softmax(0)),
        ("emotion", networks["emotion"].settings["names"], (emotion + emotion_lstm) / 2),
    ):
        assert song[key] == pytest.approx(dict(zip(keys, values.tolist(), strict=True)), abs=2e-3)
    known = listen.training_vectors(cnn, data)
    path = data / "fma_genre_spectrograms" / "train" / f"{known[1].index[5]}.fused.full.npy"
    vector = prediction_of(cnn, np.load(path), part=cnn.model.backbone).mean(0)
    np.testing.assert_allclose(known[0][5], vector, atol=0.02)
    x = (torch.tensor(rows[:128]).float().T - cnn.settings["stats"][0]) / cnn.settings["stats"][1]
    expected = patches(clip_attributions(cnn.model, x, 256, 3)).T
    np.testing.assert_allclose(listen.attributions(cnn, rows[:128], 3), expected, atol=1e-4)


def test_only_finished_networks_are_taken(outputs, tmp_path):
    out = shutil.copytree(outputs, tmp_path / "out")
    for run in ("multitask_from_genre", "multitask_lstm"):  # as step 10 leaves them with --folds 5
        (out / "step10_multitask" / run).rename(out / "step10_multitask" / f"{run}_fold1of5")
    assert set(networks_of(out)) == set(listen.NETWORKS)
    (out / "step07_cnn" / "cnn_mel" / common.UNFINISHED).touch()
    result = run_forked("tools/listen.py", "song.wav", "--out-dir", out, check=False)
    assert_clean_error(result, "no checkpoints of step07_cnn; run python step07_cnn.py")


def test_without_the_training_clips_there_are_no_nearest(outputs, data, tmp_path, monkeypatch):
    """Nor with clips of emotions alone, or of another data set; no demo set is made for this."""
    cnn = networks_of(outputs)["cnn"]
    monkeypatch.delenv("PATREC_DATA", raising=False)
    patch_everywhere(monkeypatch, "PROJECT", tmp_path)
    patch_everywhere(monkeypatch, "write_demo", lambda *args: pytest.fail("made a demo set"))
    (tmp_path / "set" / "multitask_dataset").mkdir(parents=True)
    other = write_data_set(tmp_path / "other", per_class=(3, 1), n_emotion=(4, 2), n_frames=40)
    for data_dir in (None, tmp_path / "set", other):
        assert listen.training_vectors(cnn, data_dir) is None
    assert listen.nearest(None, None) == []


def test_attributions_are_for_the_class_predicted_for_the_whole_song(outputs, folder, monkeypatch):
    """Not for that of its first window. And each network names its own classes."""

    networks, asked, predict = networks_of(outputs), [], listen.predict_windows

    def undecided(network, rows, every=None):
        found = predict(network, rows, every)
        if network is networks["cnn"]:
            found = torch.zeros_like(found)
            found[0, 3], found[1:, 5] = 9.0, 9.0
        return found

    monkeypatch.setattr(listen, "predict_windows", undecided)
    others = [f"other {name}" for name in networks["lstm"].settings["names"]]
    networks["lstm"].settings["names"] = others

    def attributions(cnn, mel, predicted):
        asked.append(predicted)
        return np.zeros(mel.shape)

    monkeypatch.setattr(listen, "attributions", attributions)
    facts, _, _ = listen.listen(folder / "clip.wav", networks, 1.0, None)
    assert set(asked) == {5}
    assert max(facts["genre"], key=facts["genre"].get) == facts["classes"][5]
    assert list(facts["genre_lstm"]) == others


def test_the_picture_loses_nothing_loud_and_tells_curves_apart(monkeypatch):
    """A picture of an hour has fewer columns than the hour has frames."""
    mel, parts = np.full((128, 42_000), -80, np.int8), np.zeros((128, 42_000), np.float32)
    mel[5, 1000], mel[100, 30_000], parts[7, 9] = 0, -20, 3
    classes = [f"class {k}" for k in range(8)]
    genres = pd.DataFrame([np.arange(8) / 40, np.arange(8) / 20], [100.0, 900.0], classes)
    emotions = pd.DataFrame(0.5, [100.0, 900.0], EMOTIONS)
    monkeypatch.setattr(listen.plt, "close", lambda fig: None)
    listen.draw(mel, parts, genres, emotions, 975.3, "class 1")
    fig = listen.plt.gcf()
    (image,), lines = fig.axes[0].images, [ax.lines for ax in fig.axes[2:]]
    bands, columns = np.nonzero(image.get_array() > -80)
    assert image.origin == "lower" and image.get_array().shape == (128, 1400)
    assert bands.tolist() == [5, 100] and columns.tolist() == [1000 // 30, 30_000 // 30]
    image = fig.axes[1].images[0]
    assert (image.get_array() == parts).all() and image.cmap(1.0)[0] > image.cmap(1.0)[2]  # red
    assert fig.axes[1].get_xlim() == (0, 975.3) and image.get_extent() == [0, 975.3, 0, 128]
    assert fig.axes[3].xaxis.get_major_formatter()(125, 0) == "2:05"
    assert lines[0][0].get_xydata().tolist() == [[100, 7 / 40], [900, 7 / 20]]
    # Of the genres the six likeliest over time.
    for drawn, names in zip(lines, (classes[:1:-1], EMOTIONS), strict=True):
        assert [line.get_label() for line in drawn] == list(names)
        assert len(
            {(line.get_linestyle(), str(line._unscaled_dash_pattern)) for line in drawn}
        ) == len(names)
    monkeypatch.undo()
    listen.plt.close(fig)


def test_networks_of_the_demo_set_are_named_on_the_page(outputs, tmp_path):
    for demo in (False, True):
        (tmp_path / "step10_multitask").mkdir(exist_ok=True)
        facts = {"data": {"demo": demo}}
        (tmp_path / "step10_multitask" / "metrics.json").write_text(json.dumps(facts))
        limits = listen.limits_of(tmp_path, networks_of(outputs), 1.5 if demo else 1.0)
        assert ("demo music" in limits) is demo and ("not calibrated" in limits) is not demo


def test_a_song_of_any_length_is_covered(listened):
    for name, seconds in (("clip.wav", 29), ("long.flac", 71)):
        song = listened[1][name]
        times = np.array(song["times_s"])
        assert song["seconds"] == seconds and (np.diff(times) > 0).all()
        assert times[0] < 4 and seconds - times[-1] < 7 and np.diff(times).max() < 9
        assert np.shape(song["genre_over_time"]) == (len(song["classes"]), len(times))


def test_after_a_silent_block_the_curves_keep_their_time(outputs, tmp_path):
    path = tmp_path / "song.wav"
    soundfile.write(path, np.concatenate([np.zeros(30 * SR), tones(8)]), SR, subtype="FLOAT")
    song, _, _ = listen.listen(path, networks_of(outputs), 1.0, None)
    assert song["times_s"][0] == pytest.approx(30 + 128 * HOP / SR, abs=0.05)


def test_a_training_clip_is_nearest_to_itself(data, outputs, listened):
    """By its own latent vector; the other clips follow by distance."""
    known = listen.training_vectors(networks_of(outputs)["cnn"], data)
    found = listen.nearest(known[0][5], known)
    assert found[0] == {"clip": known[1].index[5], "genre": known[1].iloc[5], "distance": 0}
    distances = [clip["distance"] for clip in found]
    assert len(found) == 5 and distances == sorted(distances)
    units = np.geomspace(1, 100, known[0].shape[1])  # of the dimensions: they do not matter
    again = listen.nearest(known[0][5] * units, (known[0] * units, known[1]))
    assert [clip["clip"] for clip in again] == [clip["clip"] for clip in found]
    assert len(listened[1]["clip.wav"]["nearest"]) == 5


def test_training_clips_have_the_classes_of_the_network(data, outputs):
    """Those of one trained with --no-merge are the label file's."""
    cnn = networks_of(outputs)["cnn"]
    labels = {entry.clip_id: entry.label for entry in read_entries(data, "genre", "train")}
    cnn.settings |= {"merge": False, "names": sorted(set(labels.values()))}
    _, classes = listen.training_vectors(cnn, data)
    assert set(classes) == set(labels.values())
    assert classes.to_dict() == {clip_id: labels[clip_id] for clip_id in classes.index}


def test_long_songs_are_read_in_blocks(tmp_path):
    """So that an hour needs no more memory than a minute."""
    sound = tones(95.0, 3)
    soundfile.write(tmp_path / "song.wav", sound, SR, subtype="FLOAT")
    blocks = list(listen.read_blocks(tmp_path / "song.wav"))
    assert [len(block) / SR for block in blocks] == [30, 30, 30, 5]
    assert np.allclose(np.concatenate(blocks), sound, atol=1e-6)
    # Another rate, and a tail of 1.5 s, which is no block of its own.
    soundfile.write(tmp_path / "song.wav", tones(61.5)[: round(61.5 * 8000)], 8000)
    seconds = [len(block) / SR for block in listen.read_blocks(tmp_path / "song.wav")]
    assert seconds == pytest.approx([30, 31.5], abs=0.1)


def test_odd_songs_are_named_and_the_others_go_on(folder, data, outputs, tmp_path):
    soundfile.write(tmp_path / "silence.wav", np.zeros(SR * 4), SR)
    soundfile.write(tmp_path / "blip.wav", tones(1)[: SR // 3], SR)
    (tmp_path / "text.mp3").write_text("no sound\n" * 50)
    words = {"silence.wav": "silence", "blip.wav": "0.33 s of sound is too short"}
    words |= {"text.mp3": "not readable as sound", "nowhere.wav": "no such file"}
    songs = [tmp_path / name for name in words] + [folder / "clip.wav"]
    out = shutil.copytree(outputs, tmp_path / "out")
    where = ("--out-dir", out, "--data-dir", data)
    result = run_forked("tools/listen.py", *songs, *where, check=False)
    lines = result.stderr.splitlines()
    assert result.returncode == 2 and len(lines) == len(words), result.stderr
    for line, (name, word) in zip(lines, words.items(), strict=True):
        assert line.startswith(f"error: {tmp_path / name}: ") and word in line
    assert "clip.wav" in result.stdout


def test_every_song_has_a_page_of_its_own_whatever_its_name(listened):
    names = {song["page"].rpartition("/")[2] for song in listened[2]}
    assert len(names) == 3 + len(NAMES)
    assert all(re.fullmatch(r"\d\d_[\w.-]+\.html", name) for name in names)
    greek = {name[3:] for name in names if not name.isascii()}
    assert greek == {"Άνοιξη.html", "Θάλασσα.html"}
    lines = [line for line in listened[0].stdout.splitlines() if "clip.wav" in line]
    assert len(lines) == 2 and len({line.split()[-1] for line in lines}) == 2
    assert all(" 0:29 " in line for line in lines) and " 0:02 " in listened[0].stdout
    song = listened[1]["clip.wav"]
    best = [f"{n} {v:.0%}" for n, v in sorted(song["genre"].items(), key=lambda pair: -pair[1])]
    emotions = [f"{value:.2f}" for value in song["emotion"].values()]
    nearest = [clip["genre"] for clip in song["nearest"]]
    said = f"{', '.join(best[:3])} {' '.join(emotions)} {', '.join(nearest[:3])}"
    assert all(said in " ".join(line.split()) for line in lines)
    rows = re.findall(r"<th>(.*)</th>\s*<td>(.*)</td>", Path(song["page"]).read_text())
    assert [" ".join(row) for row in rows[: len(best)]] == best
    assert [cell for _, cell in rows[len(best) :]] == emotions + nearest


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_plays_follows_and_jumps(open_page, listened, width):
    page = open_page(Path(listened[1]["long.flac"]["page"]), width)
    page.wait_for_function("audio.readyState > 1")
    assert page.evaluate("audio.duration") == pytest.approx(71, abs=0.2)

    def cursor():
        """Where the cursor is on the time axis, in seconds."""
        left = page.evaluate("parseFloat(document.querySelector('#cursor').style.left)") / 100
        return 71 * (left - listen.LEFT) / (listen.RIGHT - listen.LEFT)

    assert cursor() == pytest.approx(0, abs=0.1)
    box = page.locator("#picture").bounding_box()
    middle = (listen.LEFT + listen.RIGHT) / 2 * box["width"]  # half of the song
    page.locator("#picture").click(position={"x": middle, "y": box["height"] / 2})
    page.wait_for_function("Math.abs(audio.currentTime - 35.5) < 1")
    assert cursor() == pytest.approx(35.5, abs=1)
    page.evaluate("audio.muted = true; audio.play(); 0")  # returns before the promise is kept
    page.wait_for_function("audio.currentTime > 36.2")
    page.evaluate("audio.pause()")
    assert cursor() > 36
    page.focus("#picture")
    for key, expected in (("Home", 0), ("ArrowRight", 5), ("ArrowRight", 10), ("ArrowLeft", 5)):
        page.keyboard.press(key)
        page.wait_for_function(f"Math.abs(audio.currentTime - {expected}) < 0.2")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_an_odd_name_is_shown_as_text_and_never_becomes_markup(open_page, listened):
    path = Path(listened[1][ODD_NAME]["page"])
    text = path.read_text()
    assert text.count("<script>") == text.count("</script>") == 1
    page = open_page(path)
    assert page.text_content("h1") == ODD_NAME
    n_classes = len(listened[1][ODD_NAME]["classes"])
    assert page.locator("table").first.locator("tbody tr").count() == n_classes
