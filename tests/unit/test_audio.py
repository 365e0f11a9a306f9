"""The reader of sound files: as librosa for wav and flac, to the end for all, damage named."""

import sys

import librosa
import numpy as np
import pytest
import soundfile

from patrec.audio import Sound, read_clip, require_decoder
from patrec.errors import InputError
from patrec.features import SR


def noise(seconds, rate=SR, channels=1, seed=0):
    return 0.2 * np.random.default_rng(seed).uniform(-1, 1, (round(seconds * rate), channels))


def write(path, seconds=3, rate=SR, channels=1, **options):
    soundfile.write(path, noise(seconds, rate, channels), rate, **options)
    return path


def write_with_av(path, seconds, codec, rate=SR):
    """Encode noise with FFmpeg, for what soundfile does not write."""
    import av

    samples = np.ascontiguousarray(noise(seconds, rate).T.astype(np.float32))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def decoded(path):
    """Seconds that come out of a file, and what is said of it."""
    sound = Sound(path)
    n = sum(len(block) for block in sound.blocks())
    assert n / sound.rate == pytest.approx(sound.seconds, abs=0.01)
    return sound.seconds, sound.damage


@pytest.mark.parametrize("reader", ["av", "soundfile"])
@pytest.mark.parametrize("ending, subtype, channels, rate", [
    ("wav", "PCM_U8", 1, SR), ("wav", "PCM_24", 6, 48_000), ("wav", "FLOAT", 2, 16_000),
    ("flac", "PCM_16", 2, 44_100),
])  # fmt: skip
def test_wav_and_flac_as_librosa(tmp_path, monkeypatch, reader, ending, subtype, channels, rate):
    """The middle 30 s, mixed and resampled by librosa.load: the same bits by either library."""
    if reader == "soundfile":
        monkeypatch.setitem(sys.modules, "av", None)
    path = write(tmp_path / f"song.{ending}", 33.3, rate, channels, subtype=subtype)
    offset = (soundfile.info(path).frames / rate - 30) / 2
    expected, _ = librosa.load(path, sr=SR, offset=offset, duration=30)
    waveform, damage = read_clip(path)
    assert waveform.dtype == np.float32 and not damage
    assert len(waveform) == 30 * SR and np.array_equal(waveform, expected)


@pytest.mark.parametrize("seconds", [0.5, 100.7])
def test_the_middle_30_s_of_any_length(tmp_path, seconds):
    """Blocks from before the middle are dropped on the way; none of the clip's may be."""
    samples = np.linspace(0, 1, round(seconds * SR), dtype=np.float32)
    soundfile.write(tmp_path / "ramp.wav", samples, SR, subtype="FLOAT")
    start = max(0, (len(samples) - 30 * SR) // 2)
    waveform, _ = read_clip(tmp_path / "ramp.wav")
    assert np.allclose(waveform, samples[start : start + 30 * SR], atol=2 / len(samples))


def test_an_mp3_without_a_header_is_not_judged_by_its_bit_rate(tmp_path):
    """FFmpeg guesses the length from the first frames, which here are silent."""
    path, samples = tmp_path / "song.mp3", np.concatenate([0 * noise(60), noise(60)])
    options = {"bitrate_mode": "VARIABLE", "compression_level": 0.5}
    soundfile.write(path, samples, SR, format="MP3", **options)
    data = path.read_bytes()
    assert b"Xing" in data
    path.write_bytes(data.replace(b"Xing", bytes(4), 1))
    seconds, damage = decoded(path)
    assert seconds == pytest.approx(120, abs=0.2) and not damage


@pytest.mark.parametrize("form, codec, rate", [("m4a", "aac", 44_100), ("opus", "libopus", 48_000)])
def test_other_formats_are_read(tmp_path, form, codec, rate):
    seconds, damage = decoded(write_with_av(tmp_path / f"a.{form}", 5, codec, rate))
    assert seconds == pytest.approx(5, abs=0.1) and not damage


@pytest.mark.parametrize("name", ["song.flac", "song.mp3"])
def test_an_incomplete_file_gives_what_it_has_and_both_lengths(tmp_path, name, capfd):
    path = write(tmp_path / name, 40)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    seconds, damage = decoded(path)
    assert 8 < seconds < 11
    assert damage.startswith(f"only {seconds:.1f} s of 40.0 s")
    waveform, said = read_clip(path)
    assert len(waveform) == pytest.approx(seconds * SR, abs=2) and said == damage
    assert not capfd.readouterr().err  # of decoders


def test_a_damaged_stretch_does_not_end_a_file(tmp_path, capfd):
    data = bytearray(write(tmp_path / "song.mp3", 40).read_bytes())
    rng = np.random.default_rng(1)
    for place in rng.integers(1000, len(data) - 200, 120):
        data[place : place + 100] = rng.bytes(100)
    for header in (True, False):  # without one, the packets that fail are counted
        found = bytes(data) if header else data.replace(b"Xing", bytes(4), 1)
        (tmp_path / "song.mp3").write_bytes(found)
        seconds, damage = decoded(tmp_path / "song.mp3")
        assert 25 < seconds < 37 and damage.startswith(f"only {seconds:.1f} s of ")
        assert ("of 40.0 s" in damage) is header
    assert not capfd.readouterr().err


@pytest.mark.parametrize("channels", [(1, 2), (1, 1)])  # unlike: they change a frame earlier
def test_joined_files_may_change_rate_and_channels(tmp_path, channels):
    """All of it comes out at the first rate: at another it would play at the wrong speed."""
    forms = zip(("1.mp3", "2.mp3"), (SR, 2 * SR), channels, strict=True)
    parts = [write(tmp_path / name, 3, rate, n).read_bytes() for name, rate, n in forms]
    (tmp_path / "song.mp3").write_bytes(b"".join(parts))
    assert decoded(tmp_path / "song.mp3")[0] == pytest.approx(6, abs=0.2)


def test_opposite_channels_do_not_become_silence(tmp_path):
    """Nor the noise of one bit that rounding leaves of them."""
    left = noise(2)[:, 0]
    samples = np.stack([left, -left + 2**-15], axis=1)
    soundfile.write(tmp_path / "song.wav", samples, SR, subtype="PCM_16")
    waveform, _ = read_clip(tmp_path / "song.wav")
    assert np.abs(waveform - left).max() < 1e-4


@pytest.mark.parametrize("value", [np.nan, -1e20])
def test_samples_that_are_no_numbers_are_named(tmp_path, value):
    samples = noise(2)
    samples[5000] = value
    soundfile.write(tmp_path / "song.wav", samples, SR, subtype="FLOAT")
    with pytest.raises(InputError, match=r"song\.wav: holds samples that are not finite or beyond"):
        read_clip(tmp_path / "song.wav")


@pytest.mark.parametrize("content", [b"", b"<p>404</p>\n" * 900, b"\xff\xfb\x90" * 3, b"RIFF"])
def test_what_is_no_sound_is_one_line(tmp_path, content, capfd):
    (tmp_path / "song.mp3").write_bytes(content)
    with pytest.raises(InputError, match=r"song.mp3: not readable as sound \(.+\); check") as error:
        read_clip(tmp_path / "song.mp3")
    assert "\n" not in str(error.value) and not capfd.readouterr().err
    with pytest.raises(InputError, match="no such file"):
        read_clip(tmp_path / "nowhere.mp3")


def test_without_av_it_is_named_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    files = ["Rock/a.wav", "Rock/b.FLAC"]
    require_decoder(files)
    with pytest.raises(InputError, match=r'Rock/c\.mp3: .*"pip install av"'):
        require_decoder([*files, "Rock/c.mp3"])
    assert decoded(write(tmp_path / "song.mp3", 5))[0] == pytest.approx(5, abs=0.1)
    (tmp_path / "song.m4a").write_bytes(bytes(5000))
    with pytest.raises(InputError, match="pip install av"):
        read_clip(tmp_path / "song.m4a")
