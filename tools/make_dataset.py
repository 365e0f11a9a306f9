"""Make a data set in the lab's layout: of your own audio, or of synthesised demo music.

    python make_dataset.py --demo                                  # synthesised, into data/demo
    python make_dataset.py --audio-dir songs --out data/songs      # songs/<genre>/<file>.mp3
    python make_dataset.py --audio-dir songs --out data/songs --emotions emotions.csv

Every clip goes through the lab's own extraction (common.extract_features): 128 mel bands
in dB and 12 chroma values, per frame and per beat. The four folders and their label files
are the lab's, odd file-name forms included, so that every step reads them unchanged.

--demo    20 genres, and clips with valence, energy and danceability, whose key, chords,
          tempo, drums, timbre and dynamics are drawn per genre (with overlap) and played
          by a small synthesiser. It shows that the pipeline works and says nothing about
          music. The same seed gives the same bytes.
--audio-dir
          Any length, rate and number of channels; .wav .mp3 .flac .ogg. Each file becomes
          one mono clip at 22,050 Hz: the middle 30 s, or the whole file where it is
          shorter. Folder names are the class names. The lab's 20 names are merged to 10
          by the steps; with other names give the steps --no-merge. Files are numbered in
          sources.csv; those that cannot be used are listed in unreadable.csv.
--emotions
          CSV with the header file,valence,energy,danceability; paths relative to the
          audio folder, values in [0, 1]. Both parts share one split by file: no test clip
          of one part is in the other's training part. As in the lab, the emotion test
          clips get no label file.

The set is built in <out>.unfinished, which becomes <out> when all is there. Interrupted,
the same command goes on where it stopped; files added to the audio folder since are added
to the set, and what is in it keeps its number and its split.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import filelock
import joblib
import numpy as np
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from patrec.errors import InputError, StepFailed, end_in_one_line
from patrec.features import N_FFT, SR, extract_features
from patrec.files import FOLDERS, cache_dir, part_folder, write_bytes, write_text
from patrec.flags import Parser, bounded
from patrec.labels import EMOTIONS, MERGE
from patrec.machine import in_notebook, show_bars
from patrec.parallel import WorkerDied, parallel_map

# ======================================================================================
# Demo music: a style per genre, a small synthesiser that plays it
# ======================================================================================


class Style(NamedTuple):
    """How a genre sounds. Levels are amplitudes relative to the chords."""

    tempo: float  # beats per minute
    minor: float  # chance of a minor key
    voices: tuple  # chord tones, in scale steps above the chord's root
    rate: float  # chord strokes per beat; .25: one sustained chord per bar
    arpeggio: float  # chance that the chord's tones are played one after the other
    sustain: float  # decay time of a tone, in s
    rolloff: float  # harmonic k has amplitude k ** -rolloff: 1 bright, 3 nearly a sine
    even: float  # share of the even harmonics: 0 is hollow, like a clarinet or a square wave
    drive: float  # distortion: gain in front of a soft clipper
    tilt: float  # of the whole spectrum, in dB per octave around 1 kHz
    bass: float
    lead: float
    drums: float
    pattern: str  # of the drums, a key of PATTERNS
    swing: float  # delay of every second eighth, share of an eighth
    octave: float  # of chords and lead, around the A below middle C
    swell: float  # slow changes of loudness, in dB
    noise: float  # hiss, in dB below the music


TRIAD, POWER, SEVENTH, DRONE = (0, 2, 4), (0, 4), (0, 2, 4, 6), (0, 4, 7)
STYLES = {
    #             tempo minor voices   rate arp sust roll even drive tilt bass lead drums pattern swing oct swell noise
    "Blues": Style(85, 0.3, SEVENTH, 1, 0.2, 0.5, 1.8, 0.9, 0.8, -1, 0.7, 0.8, 0.5, "swing", 0.33, 0, 5, -55),
    "Chiptune": Style(145, 0.4, TRIAD, 4, 0.9, 0.15, 1.0, 0.0, 0.3, 2, 0.5, 0.9, 0.4, "four", 0, 1, 1, -70),
    "Classical": Style(90, 0.5, TRIAD, 1, 0.5, 1.0, 1.9, 0.9, 0, -1, 0.5, 0.8, 0.0, "rock", 0, 0.5, 16, -58),
    "Electronic": Style(126, 0.6, TRIAD, 2, 0.5, 0.35, 1.1, 1.0, 0.6, 1, 0.9, 0.3, 1.0, "four", 0, 0, 3, -70),
    "Folk": Style(100, 0.3, TRIAD, 2, 0.7, 0.5, 1.5, 0.9, 0, 0, 0.3, 0.6, 0.05, "rock", 0, 0.3, 7, -55),
    "Hip-Hop": Style(92, 0.7, TRIAD, 0.5, 0.2, 0.4, 1.8, 0.8, 0.5, 0, 1.2, 0.2, 1.2, "boom", 0.15, -0.2, 2, -62),
    "Indie-Rock": Style(130, 0.3, TRIAD, 2, 0.2, 0.4, 1.2, 1.0, 1.5, 1, 0.6, 0.6, 0.7, "rock", 0, 0.2, 4, -58),
    "International": Style(108, 0.8, DRONE, 2, 0.6, 0.3, 1.3, 0.5, 0.3, 0, 0.4, 1.0, 0.6, "hand", 0.1, 0.3, 6, -56),
    "Jazz": Style(140, 0.5, SEVENTH, 0.5, 0.1, 0.6, 2.1, 0.8, 0, -1, 0.9, 0.9, 0.4, "swing", 0.33, 0.1, 8, -56),
    "Metal": Style(155, 0.95, POWER, 4, 0.0, 0.12, 1.0, 1.0, 7, 0, 0.8, 0.3, 1.0, "double", 0, -0.8, 2, -60),
    "Old-Time": Style(118, 0.1, TRIAD, 2, 0.6, 0.2, 1.3, 0.9, 0.4, -1, 0.3, 0.8, 0.0, "rock", 0.1, 0.7, 3, -28),
    "Pop": Style(114, 0.25, TRIAD, 1, 0.3, 0.6, 1.5, 0.9, 0.5, 1, 0.7, 1.1, 0.8, "rock", 0, 0.3, 3, -66),
    "Post-Punk": Style(145, 0.8, POWER, 2, 0.3, 0.3, 1.2, 1.0, 1.2, 0, 1.1, 0.3, 0.8, "fast", 0, 0, 3, -58),
    "Post-Rock": Style(95, 0.6, TRIAD, 0.5, 0.4, 1.4, 1.3, 1.0, 1.5, 0, 0.5, 0.5, 0.4, "rock", 0, 0.2, 14, -55),
    "Psych-Folk": Style(92, 0.5, DRONE, 2, 0.6, 0.8, 1.6, 0.8, 0.2, -1, 0.3, 0.6, 0.15, "hand", 0, 0.2, 8, -48),
    "Psych-Rock": Style(110, 0.6, TRIAD, 2, 0.1, 0.6, 1.2, 1.0, 2.5, -1, 0.7, 0.6, 0.6, "rock", 0, 0, 6, -48),
    "Punk": Style(180, 0.3, POWER, 2, 0.0, 0.25, 1.0, 1.0, 5, 1, 0.7, 0.3, 1.0, "fast", 0, -0.3, 1, -55),
    "Rock": Style(122, 0.4, TRIAD, 2, 0.0, 0.4, 1.1, 1.0, 3, 0, 0.7, 0.5, 0.8, "rock", 0, -0.2, 4, -58),
    "Soundtrack": Style(70, 0.7, DRONE, 0.25, 0.1, 2.5, 2.0, 0.9, 0, -3, 0.6, 0.3, 0.05, "break", 0, -0.2, 15, -52),
    "Trip-Hop": Style(80, 0.85, SEVENTH, 0.25, 0.2, 1.5, 1.9, 0.8, 0.4, -2, 1.2, 0.3, 0.9, "break", 0.15, -0.2, 3, -45),
}  # fmt: skip
PATTERNS = {  # strokes of kick, snare, hi-hat on the sixteenths of a bar
    "four": ("x...x...x...x...", "....x.......x...", "..x...x...x...x."),
    "rock": ("x.......x.x.....", "....x.......x...", "x.x.x.x.x.x.x.x."),
    "fast": ("x...x...x...x...", "..x...x...x...x.", "x.x.x.x.x.x.x.x."),
    "double": ("xxxxxxxxxxxxxxxx", "....x.......x...", "x...x...x...x..."),
    "break": ("x.....x...x.....", "....x..x.x..x...", "x.x.x.x.x.x.x.xx"),
    "boom": ("x..x......x..x..", "....x.......x...", "x.x.x.xxx.x.x.x."),
    "swing": ("x.......x.......", "....x.......x...", "x...x.x.x...x.x."),
    "hand": ("x..x..x...x.x...", "......x......x.x", "................"),
}
PROGRESSIONS = (
    (0, 4, 5, 3),
    (0, 3, 4, 0),
    (0, 5, 3, 4),
    (0, 0, 3, 0),
    (0, 3, 0, 4),
    (5, 3, 0, 4),
)  # scale steps
MAJOR, MINOR = (0, 2, 4, 5, 7, 9, 11), (0, 2, 3, 5, 7, 8, 10)  # semitones
TABLE = 4096  # samples of one stored period of a tone


def demo_style(genre, rng) -> Style:
    """Draw the style of one clip: its genre's, leaning towards that of another one.

    The leaning and the spread are what makes classes overlap, as they do in music.
    """
    own, other = STYLES[genre], STYLES[rng.choice(list(STYLES))]
    lean = 0.5 * rng.random() ** 2
    style = {}
    for name, a, b in zip(Style._fields, own, other, strict=True):
        if name in ("voices", "pattern"):
            style[name] = b if rng.random() < 0.6 * lean else a
        else:
            style[name] = a + lean * (b - a)
    spread = {
        "tempo": 0.12 * style["tempo"],
        "rolloff": 0.2,
        "tilt": 1.5,
        "bass": 0.2,
        "lead": 0.2,
        "drums": 0.2,
        "octave": 0.3,
        "swell": 2,
        "noise": 6,
        "drive": 0.3 * style["drive"],
        "sustain": 0.3 * style["sustain"],
    }
    for name, width in spread.items():
        low = {
            "noise": -80,
            "tilt": -6,
            "octave": -1.5,
            "tempo": 50,
            "rolloff": 0.8,
            "sustain": 0.08,
        }.get(name, 0)
        style[name] = max(low, style[name] + width * rng.standard_normal())
    return Style(**style)


def demo_emotion(rng) -> tuple[Style, tuple[float, float, float]]:
    """Draw the style of an emotion clip and what it is worth on the three axes.

    Valence follows mode, tempo and register, energy brightness, density, distortion and
    evenness of loudness, danceability the strength of the drums and a tempo near 120;
    each with noise, as people's judgements have it.

    Returns
    -------
    style : Style
    emotions : (valence, energy, danceability), each in [0, 1]
    """
    style = demo_style(rng.choice(list(STYLES)), rng)
    happy, power, beat = rng.random(3)
    style = style._replace(
        tempo=float(np.clip(75 + 75 * happy + 15 * rng.standard_normal(), 60, 180)),
        minor=float(rng.random() > happy),
        octave=1.6 * happy - 0.8 + 0.2 * rng.standard_normal(),
        tilt=-4 + 6 * power + rng.standard_normal(),
        rolloff=2.2 - 1.1 * power,
        drive=5 * power**2,
        rate=float(np.clip(2 ** (4 * power - 2 + 0.5 * rng.standard_normal()), 0.25, 4)),
        swell=14 * (1 - power),
        drums=1.2 * beat,
    )
    near_120 = np.exp(-(((style.tempo - 120) / 30) ** 2))
    emotions = (
        0.5 * happy + 0.3 * (1 - style.minor) + 0.2 * (style.tempo - 60) / 120,
        0.8 * power + 0.2 * beat,
        0.65 * beat + 0.35 * near_120,
    )
    noisy = np.clip(np.array(emotions) + 0.08 * rng.standard_normal(3), 0, 1)
    return style, tuple(noisy.round(3).tolist())


def play(style, seconds, rng) -> np.ndarray:
    """Play a style with chords, bass, lead and drums drawn at random.

    Returns
    -------
    waveform : np.ndarray [shape=(seconds * SR,)], float32, peak .9
    """
    beat_s = 60 / style.tempo
    scale = MINOR if rng.random() < style.minor else MAJOR
    degrees = PROGRESSIONS[rng.integers(len(PROGRESSIONS))]
    key = 45 + rng.integers(-5, 7)  # MIDI number, 45 is the A of 110 Hz
    arpeggio = rng.random() < style.arpeggio
    music = np.zeros(round(seconds * SR), np.float32)

    def pitch(step, octave=0.0):
        return key + scale[step % 7] + 12 * (step // 7) + 12 * round(octave)

    def note(start_s, length_s, midi, level, rolloff=style.rolloff):
        start = round(start_s * SR)
        tone = play_tone(
            440 * 2 ** ((midi - 69) / 12),
            min(round(length_s * SR), len(music) - start),
            rolloff,
            style.even,
            style.sustain,
            rng,
        )
        music[start : start + len(tone)] += level * rng.uniform(0.8, 1.2) * tone

    walk = 7  # the lead wanders over the scale, in steps
    for bar, bar_s in enumerate(np.arange(0, seconds, 4 * beat_s)):
        degree = degrees[bar % len(degrees)]
        strokes = max(1, round(4 * style.rate))
        for i in range(strokes):
            length_s = 4 * beat_s / strokes
            steps = [style.voices[i % len(style.voices)]] if arpeggio else style.voices
            for step in steps:
                note(
                    bar_s + i * length_s,
                    length_s,
                    pitch(degree + step, 1 + style.octave),
                    1 / len(steps) ** 0.5,
                )
        for i in range(8):
            eighth_s = bar_s + (i + style.swing * (i % 2)) * beat_s / 2
            if i % 2 == 0 or rng.random() < 0.3:
                note(eighth_s, beat_s / 2, pitch(degree, -1 if key > 45 else 0), style.bass, 2)
            if rng.random() < 0.6:
                walk = int(np.clip(walk + rng.integers(-2, 3), 3, 14))
                note(eighth_s, beat_s / 2, pitch(walk, 1 + style.octave), 0.8 * style.lead)
    music = shape(music, style, rng)
    music += style.drums * play_drums(style, len(music), beat_s, rng)
    return (0.9 * music / max(np.abs(music).max(), 1e-9)).astype(np.float32)


def play_tone(f_hz, n, rolloff, even, sustain_s, rng) -> np.ndarray:
    """n samples of a decaying tone, read from a table of one period.

    The table holds the harmonics below the Nyquist frequency and no others, so nothing
    is folded back.
    """
    if n < 64:
        return np.zeros(0, np.float32)
    k = np.arange(1, int(np.clip(0.45 * SR / f_hz, 1, 40)) + 1)
    phases = np.exp(2j * np.pi * rng.random(len(k)))
    spectrum = np.zeros(TABLE // 2 + 1, np.complex64)
    spectrum[k] = k ** -float(rolloff) * np.where(k % 2, 1, even) * phases
    period = (np.fft.irfft(spectrum) * TABLE / 2).astype(np.float32)
    t = np.arange(n, dtype=np.float32)
    place = (t * np.float32(f_hz * TABLE / SR)).astype(np.int32) % TABLE
    tone = period[place] * np.exp(t * np.float32(-1 / (sustain_s * SR)))
    # 5 ms: without it a tone would click
    ramp = np.linspace(0, 1, min(n // 2, 110), dtype=np.float32)
    tone[: len(ramp)] *= ramp
    tone[-len(ramp) :] *= ramp[::-1]
    return tone


def shape(music, style, rng) -> np.ndarray:
    """Distortion, loudness over time, spectral tilt and hiss."""
    music = music / max(np.abs(music).max(), 1e-9)
    if style.drive > 0.05:
        music = np.tanh(style.drive * music) / np.tanh(style.drive)
    t = np.linspace(0, 1, len(music), dtype=np.float32)
    swell_db = 0.5 * style.swell * np.sin(2 * np.pi * (rng.uniform(0.4, 1.2) * t + rng.random()))
    music = music * 10 ** (swell_db / 20)
    music += 10 ** (style.noise / 20) * rng.standard_normal(len(music), np.float32)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(len(music), 1 / SR), 30) / 1000)
    tilted = np.fft.rfft(music) * 10 ** (style.tilt * octaves / 20)
    return np.fft.irfft(tilted, len(music)).astype(np.float32)


def play_drums(style, n, beat_s, rng) -> np.ndarray:
    """n samples of kick, snare and hi-hat in the style's pattern, peak about 1."""
    t = np.arange(SR // 4) / SR  # a stroke lasts 0.25 s
    noise = rng.standard_normal(len(t) + 1)
    kick_hz = rng.uniform(45, 60) * (1 + 3 * np.exp(-t * 40))
    kit = (
        np.sin(2 * np.pi * np.cumsum(kick_hz) / SR) * np.exp(-t * 14),
        0.35 * (noise[1:] + np.sin(2 * np.pi * 190 * t)) * np.exp(-t * rng.uniform(16, 26)),
        # The difference takes the lows away.
        0.15 * np.diff(noise) * np.exp(-t * rng.uniform(35, 70)),
    )
    music = np.zeros(n + len(t), np.float32)
    sixteenth = beat_s / 4 * SR
    for stroke, pattern in zip(kit, PATTERNS[style.pattern], strict=True):
        for i in range(int(n / sixteenth)):
            if pattern[i % 16] == "x":
                late = 2 * style.swing * (i % 4 == 2)  # every second eighth
                start = int((i + late) * sixteenth)
                if start < n:
                    music[start : start + len(t)] += rng.uniform(0.7, 1) * stroke
    return music[:n]


def clip_rng(seed, clip_id) -> np.random.Generator:
    """Each clip has its own random numbers, so it is the same whatever the others are."""
    return np.random.default_rng([seed, clip_id])


def demo_waveform(seed, clip_id, genre, seconds) -> np.ndarray:
    """The waveform of a demo clip; an emotion clip where genre is None."""
    rng = clip_rng(seed, clip_id)
    style = demo_style(genre, rng) if genre else demo_emotion(rng)[0]
    return play(style, seconds, rng)


# ======================================================================================
# Audio files
# ======================================================================================

CLIP_S = 30  # length of a clip, in s: the middle of a longer file
SUFFIXES = (".wav", ".mp3", ".flac", ".ogg")


class UnusableAudio(Exception):
    """A file that gives no clip; its text is the reason."""


def read_audio(path) -> np.ndarray:
    """Read the middle 30 s of a file, all channels averaged, at SR.

    Returns
    -------
    waveform : np.ndarray [shape=(n,)], float32, n at most CLIP_S * SR

    Raises
    ------
    UnusableAudio
    """
    import librosa
    import soundfile

    try:
        with soundfile.SoundFile(path) as sound:
            spare_s = sound.frames / sound.samplerate - CLIP_S
            waveform, _ = librosa.load(sound, sr=SR, offset=max(0.0, spare_s / 2), duration=CLIP_S)
    except Exception as error:  # whatever a broken file makes the decoder raise
        lines = str(error).replace(str(path), path.name).splitlines()
        raise UnusableAudio(
            f"cannot be read: {lines[0] if lines else type(error).__name__}"
        ) from error
    if len(waveform) < N_FFT:
        raise UnusableAudio(
            f"{len(waveform) / SR:.3f} s of sound; at least {N_FFT / SR:.3f} s are needed"
        )
    if (
        np.ptp(waveform) < 1e-5
    ):  # under a third of a 16-bit step: nothing to learn from, and no array that the steps accept
        raise UnusableAudio("silence")
    return waveform


def find_audio(folder) -> list[str]:
    """List <genre>/<file> below a folder, sorted, with / on every system."""
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; --audio-dir must hold <genre>/<file>.mp3 (or .wav, .flac,"
            " .ogg)"
        )
    genres = [
        path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")
    ]
    if not genres:
        raise InputError(
            f"{folder}: no genre folders in it; --audio-dir must hold <genre>/<file>.mp3 (or .wav,"
            " .flac, .ogg)"
        )
    files = [
        f"{genre.name}/{path.name}"
        for genre in genres
        for path in sorted(genre.iterdir())
        if path.suffix.lower() in SUFFIXES and path.is_file() and not path.name.startswith(".")
    ]
    if not files:
        raise InputError(f"{folder}: no {' '.join(SUFFIXES)} files in its {len(genres)} folders")
    strange = [
        name for name in files if any(mark < " " or "\ud800" <= mark <= "\udfff" for mark in name)
    ]
    if strange:
        raise InputError(
            f"{folder}: the name {strange[0]!r} holds a tab, a line break or no UTF-8, which label"
            " files cannot; rename it"
        )
    return files


def read_emotions(path, files) -> dict[str, tuple[float, float, float]]:
    """Read the CSV of emotion values: file -> (valence, energy, danceability)."""
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8-sig").splitlines()))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; --emotions takes a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: no CSV in UTF-8 ({error}); save it as such") from None
    header = [name.strip() for name in rows[0]] if rows else []
    if sorted(header) != sorted(("file", *EMOTIONS)):
        raise InputError(
            f"{path}: header {','.join(header)!r}; expected 'file,{','.join(EMOTIONS)}'"
        )
    known, emotions = set(files), {}
    for line, cells in enumerate(rows[1:], start=2):
        where = f"{path}, line {line}"
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(header):
            raise InputError(
                f"{where}: {len(cells)} columns, expected {len(header)}; mend or remove the line"
            )
        row = dict(zip(header, map(str.strip, cells), strict=True))
        name = row["file"].replace("\\", "/").removeprefix("./")
        if name not in known:
            raise InputError(
                f"{where}: {name!r} is not among the audio files; paths are relative to"
                f" --audio-dir, e.g. {files[0]}"
            )
        if name in emotions:
            raise InputError(f"{where}: {name!r} stands in a line above too; keep one")
        try:
            values = tuple(float(row[axis]) for axis in EMOTIONS)
        except ValueError:
            raise InputError(
                f"{where}: a value that is no number; mend or remove the line"
            ) from None
        if not all(0 <= value <= 1 for value in values):
            raise InputError(f"{where}: a value outside [0, 1]; scale the column")
        emotions[name] = values
    if not emotions:
        raise InputError(f"{path}: a header and no files")
    return emotions


# ======================================================================================
# The data set: who is where, all clips in parallel, label files, done
# ======================================================================================


class Clip(NamedTuple):
    """One clip of the set and where it goes."""

    clip_id: int
    name: str  # what a person knows it by
    genre: str | None
    emotions: tuple[float, float, float] | None
    split: str  # train or test
    waveform: Callable  # () -> (n,) at SR, or UnusableAudio

    @property
    def parts(self):
        return [
            part for part, label in (("genre", self.genre), ("emotion", self.emotions)) if label
        ]


def array_path(root, clip, part, beat):
    return part_folder(root, part, beat) / clip.split / f"{clip.clip_id}.fused.full.npy"


def make_arrays(root, clip) -> tuple[int, str | None]:
    """Compute and write the arrays of one clip; returns its id and why there are none, or None."""
    paths = [[array_path(root, clip, part, beat) for part in clip.parts] for beat in (False, True)]
    if all(path.exists() for path in paths[0] + paths[1]):
        return clip.clip_id, None
    import librosa

    mark = begun(root, clip)
    mark.touch()
    try:
        compile_librosa()
        with threadpool_limits(1):  # there is a process per core
            arrays = extract_features(clip.waveform())
        if not all(np.isfinite(array).all() for array in arrays):
            return clip.clip_id, "its spectrogram is not finite; are the samples within -1 and 1?"
        for array, targets in zip(arrays, paths, strict=True):
            for path in targets:
                write_bytes(path, functools.partial(np.save, arr=array))
    except (UnusableAudio, librosa.ParameterError) as error:
        return clip.clip_id, str(error)
    finally:
        mark.unlink(missing_ok=True)
    return clip.clip_id, None


def begun(root, clip) -> Path:
    """The mark of a clip that is being made: it outlives a worker process that dies of it."""
    return root / ".begun" / str(clip.clip_id)


def compile_librosa() -> None:
    """Let librosa compile its numba functions, one process of a machine at a time.

    Processes that compile them at once into an empty cache ruin it for good: every later run
    dies of a segmentation fault (seen with numba 0.66 and 0.68).
    """
    if os.environ.get("PATREC_LIBROSA") == str(os.getpid()):  # this process has them
        return
    # Of silent or very short clips, which are meant to work.
    warnings.filterwarnings("ignore", module="librosa")
    with filelock.FileLock(cache_dir() / "librosa.lock"):
        extract_features(np.random.default_rng(0).standard_normal(2 * SR).astype(np.float32))
    os.environ["PATREC_LIBROSA"] = str(os.getpid())


def make_all(root, clips, workers=None, dask=None) -> dict[Clip, str]:
    """Make the arrays of all clips, side by side; returns the clips without, and why.

    A clip that was being made when a worker process died, or this one in an earlier run, is made
    again, alone: if the process dies again, it is left out like a file that cannot be read.

    workers : int, optional; else a process per core
    dask : str, optional, address of a Dask scheduler whose workers do it
    """
    print("preparing librosa (after an installation it compiles for half a minute)", flush=True)
    (root / ".begun").mkdir(exist_ok=True)
    workers = workers or joblib.cpu_count()
    failed, left = {}, {clip.clip_id: clip for clip in clips}
    suspects = [clip for clip in clips if begun(root, clip).exists()]
    bar = tqdm(total=len(clips), desc="clips", disable=not show_bars())
    shown, start = 0, time.monotonic()

    def make(some, workers):
        nonlocal shown
        tasks = [(root, clip) for clip in some]
        results = parallel_map(make_arrays, tasks, workers, dask, "generator_unordered")
        for clip_id, reason in results:
            bar.update()
            clip = left.pop(clip_id)
            if reason:
                failed[clip] = reason
            n_done = len(clips) - len(left)
            if not show_bars() and n_done * 10 // len(clips) > shown:
                shown = n_done * 10 // len(clips)
                seconds = time.monotonic() - start
                print(f"{n_done} of {len(clips)} clips, {seconds:.0f} s", flush=True)

    with bar:
        while some := [clip for clip in left.values() if clip not in suspects]:
            try:
                # One worker is this very process, which a suspect may end.
                make(some, min(workers, max(len(some), 2)))
            except WorkerDied:
                new = [clip for clip in some if clip.clip_id in left and begun(root, clip).exists()]
                if not new:  # it died before its first clip, or between two
                    raise StepFailed("a worker process died; the same command goes on") from None
                suspects += new
        for clip in suspects:
            try:
                make([clip], 2)
            except WorkerDied:
                failed[clip] = "its worker process died twice (out of memory, or a broken file)"
                left.pop(clip.clip_id)
    shutil.rmtree(root / ".begun", ignore_errors=True)
    return failed


def n_held_out(n_clips, fraction) -> int:
    """Test clips of a class: at least one of two or more, never all."""
    return min(max(round(fraction * n_clips), 1), n_clips - 1)


def write_labels(root, clips, seed) -> None:
    """Write the label files, each with the header and the form of names that the lab's has."""

    def rows_of(part, split, row):
        """Lines of a label file, in an order that says nothing of the classes."""
        some = [clip for clip in clips if part in clip.parts]
        order = np.random.default_rng(seed).permutation(len(some))
        return [row(some[i]) for i in order if some[i].split == split]

    def write(path, lines):
        if len(lines) > 1:
            write_text(path, "\n".join(lines) + "\n")

    for beat in (False, True):
        folder = part_folder(root, "genre", beat)
        for split, form in (("train", "fused.full"), ("test", "full.fused")):
            ending = f"{'beatsync.fused' if beat else form}.npy.gz"
            row = f"{{0.clip_id}}.{ending}\t{{0.genre}}"
            lines = ["Id\tGenre", *rows_of("genre", split, row.format)]
            write(folder / f"{split}_labels.txt", lines)
        values = rows_of("emotion", "train", lambda c: ",".join(map(str, (c.clip_id, *c.emotions))))
        path = part_folder(root, "emotion", beat) / "train_labels.txt"
        write(path, [f"Id,{','.join(EMOTIONS)}", *values])


SET_MARKERS = {  # what a finished set is known by; common looks for DEMO.txt
    "demo": (
        "DEMO.txt",
        (
            "Synthesised by make_dataset.py --demo. Scores on these clips say nothing about real"
            " music."
        ),
    ),
    "audio": (
        "AUDIO.txt",
        "Made by make_dataset.py --audio-dir of the files that sources.csv names.",
    ),
}


def read_marker(folder) -> dict | None:
    """The arguments a data set was made with; None if this program did not make it."""
    for name, _ in SET_MARKERS.values():
        if (folder / name).is_file():
            text = (folder / name).read_text(encoding="utf-8")
            try:
                return json.loads(text[text.index("{") :])
            except ValueError:  # another program's file, or one changed by hand
                return None
    return None


def check_folder(out, arguments) -> bool:
    """True if `out` is finished; InputError if something else stands there or was begun."""
    for folder in (out, unfinished(out)):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder}: is a file; name another folder in --out")
        if not folder.is_dir() or not any(folder.iterdir()):
            continue
        made = read_marker(folder)
        if made is None:
            raise InputError(
                f"{folder}: holds something that make_dataset.py did not make; name another folder"
                " in --out"
            )
        changed = [
            f"{key} {made.get(key)}, now {arguments.get(key)}"
            for key in arguments | made
            if made.get(key) != arguments.get(key)
        ]
        if changed:
            raise InputError(
                f"{folder}: made with other arguments ({'; '.join(changed)}); name another folder"
                " in --out, or delete it"
            )
        if folder == out:
            return True
    return False


def unfinished(out) -> Path:
    return out.with_name(out.name + ".unfinished")


def begin(out, arguments, clips) -> None:
    """Make the folders of the unfinished set and note what it is made with."""
    root = unfinished(out)
    root.mkdir(parents=True, exist_ok=True)
    name, text = SET_MARKERS[arguments["source"]]
    write_text(root / name, f"{text}\n\n{json.dumps(arguments, indent=2)}\n")
    for part in {part for clip in clips for part in clip.parts}:
        for beat in (False, True):
            for split in ("train", "test"):
                (part_folder(root, part, beat) / split).mkdir(parents=True, exist_ok=True)


def finish(out) -> None:
    """Give the finished set its name: it is there whole or not at all.

    A part that is added to a set (demo) goes into its folder.
    """
    root = unfinished(out)
    for path in root.rglob(".*.tmp"):
        path.unlink()  # half-written when an earlier run was killed
    try:
        if out.is_dir() and any(out.iterdir()):
            for folder in sorted(path for path in root.iterdir() if path.is_dir()):
                os.replace(folder, out / folder.name)
            shutil.rmtree(root)
        else:
            if out.exists():
                out.rmdir()  # an empty folder that stood there before
            os.replace(root, out)
    except OSError as error:
        where = f"the set is complete in {root}, move it by hand"
        raise InputError(f"{out}: cannot be made ({error.strerror}); {where}") from None


def make_demo(args) -> None:
    """Synthesise the demo set."""
    out, seed = args.out, args.seed
    arguments = {
        "source": "demo",
        "clips": args.clips,
        "emotion_clips": args.emotion_clips,
        "seconds": args.seconds,
        "seed": seed,
    }
    parts = set(args.parts)
    if check_folder(out, arguments):  # the folder of beats is the last one that a part gets
        parts = {part for part in parts if not part_folder(out, part, beat=True).is_dir()}
        if not parts:
            print(f"{out}: made already")
            return
    rng = np.random.default_rng(seed)
    clips = []
    for k, genre in enumerate(MERGE):
        ids = [1000 + i for i in range(k, args.clips, len(MERGE))]
        test = set(rng.permutation(ids)[: n_held_out(len(ids), 0.2)].tolist())
        for i in ids:
            split, name = "test" if i in test else "train", f"{genre} {i}"
            waveform = functools.partial(demo_waveform, seed, i, genre, args.seconds)
            clips.append(Clip(i, name, genre, None, split, waveform))
    ids = [100_000_000 + i for i in range(args.emotion_clips)]  # far from those of the genre clips
    test = set(rng.permutation(ids)[: n_held_out(len(ids), 0.25)].tolist())
    for i in ids:
        split, emotions = "test" if i in test else "train", demo_emotion(clip_rng(seed, i))[1]
        waveform = functools.partial(demo_waveform, seed, i, None, args.seconds)
        clips.append(Clip(i, f"emotion {i}", None, emotions, split, waveform))
    clips = [clip for clip in clips if parts & set(clip.parts)]
    what = " and ".join(sorted(parts))
    print(f"synthesising {len(clips)} {what} clips of {args.seconds:g} s", flush=True)
    begin(out, arguments, clips)
    failed = make_all(unfinished(out), clips, args.workers, args.dask)
    if failed:
        clip, reason = next(iter(failed.items()))
        raise StepFailed(f"demo clip {clip.name}: {reason}")
    write_labels(unfinished(out), clips, seed)
    finish(out)


def read_sources(folder) -> dict[str, tuple[int, str]]:
    """Read sources.csv: file -> (id, split); empty where there is none."""
    path = folder / "sources.csv"
    if not path.exists():
        return {}
    with open(path, encoding="utf-8", newline="") as file:
        return {row["file"]: (int(row["id"]), row["split"]) for row in csv.DictReader(file)}


def plan_audio(files, known, fraction, seed) -> dict[str, tuple[int, str]]:
    """Number the files in sorted order and split them by genre: file -> (id, split).

    What is `known` from an earlier run keeps its number and its split; of the files added
    since, as many go into the test part as its share then lacks.
    """
    plan = dict(known)
    added = [name for name in files if name not in known]
    ids = {name: i for i, name in enumerate(added, start=1 + len(known))}
    rng = np.random.default_rng([seed, len(known)])
    for genre in sorted({genre_of(name) for name in added}):
        new = [name for name in added if genre_of(name) == genre]
        old = [split for name, (_, split) in known.items() if genre_of(name) == genre]
        n_test = max(n_held_out(len(old) + len(new), fraction) - old.count("test"), 0)
        test = set(rng.permutation(new)[:n_test].tolist())
        plan |= {name: (ids[name], "test" if name in test else "train") for name in new}
    return plan


def genre_of(name) -> str:
    return name.split("/")[0]


def make_audio(args) -> None:
    """Make a set of a folder of audio files."""
    out, audio_dir = args.out, args.audio_dir
    files = find_audio(audio_dir)
    emotions = read_emotions(args.emotions, files) if args.emotions else {}
    arguments = {
        "source": "audio",
        "audio_dir": str(audio_dir.resolve()),
        "test_fraction": args.test_fraction,
        "seed": args.seed,
        "emotions": hashlib.sha256(json.dumps(emotions, sort_keys=True).encode()).hexdigest()[:12],
    }
    finished = check_folder(out, arguments)
    known = read_sources(out if finished else unfinished(out))
    plan = plan_audio(files, known, args.test_fraction, args.seed)
    if finished and plan == known and not (out / "unreadable.csv").exists():
        print(f"{out}: made already")
        return
    clips = [
        Clip(
            i,
            name,
            genre_of(name),
            emotions.get(name),
            split,
            functools.partial(read_audio, audio_dir / name),
        )
        for name, (i, split) in plan.items()
    ]
    require_emotions(args.emotions, clips)
    root = unfinished(out)
    if finished:
        os.replace(out, root)  # files were added, or may have been mended: go on with it
    begin(out, arguments, clips)
    write_table(
        root / "sources.csv",
        ("id", "file", "split"),
        [(i, name, split) for name, (i, split) in plan.items()],
    )
    print(
        f"extracting {len(clips)} files of {len({clip.genre for clip in clips})} genres", flush=True
    )
    failed = make_all(root, clips, args.workers, args.dask)

    unreadable = root / "unreadable.csv"
    unreadable.unlink(missing_ok=True)
    if failed:
        write_table(
            unreadable,
            ("file", "reason"),
            sorted((clip.name, reason) for clip, reason in failed.items()),
        )
    made = [clip for clip in clips if clip not in failed]
    # A class that lost all its training files cannot be learned, so it cannot be asked for either.
    trained = {clip.genre for clip in made if clip.split == "train"}
    kept = [clip for clip in made if clip.genre in trained]
    require_emotions(args.emotions, kept)
    if not kept:
        raise InputError(
            f"{audio_dir}: not one file gives a training clip; {len(failed)} of {len(clips)} are"
            f" listed, with reasons, in {unreadable}"
        )
    write_labels(root, kept, args.seed)
    finish(out)
    for clip in sorted(failed)[:10]:
        print(f"left out: {clip.name}: {failed[clip]}", file=sys.stderr)
    if failed:
        print(
            f"{len(failed)} of {len(clips)} files left out; all are listed in"
            f" {out / 'unreadable.csv'}",
            file=sys.stderr,
        )
    for genre in sorted({clip.genre for clip in made} - trained):
        print(
            f"class {genre} left out of the label files: none of its training files can be read",
            file=sys.stderr,
        )
    foreign = sorted(trained - set(MERGE))
    if foreign:
        print(f"class {foreign[0]} is none of the lab's 20: give the steps --no-merge")


def require_emotions(path, clips) -> None:
    if path and clips and not any(clip.emotions and clip.split == "train" for clip in clips):
        raise InputError(
            f"{path}: none of its files gives a clip of the training part; label more files"
        )


def write_table(path, header, rows) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def main(argv=None) -> dict:
    """Read the command line, make the set, say what is in it."""
    parser = Parser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--demo", action="store_true", help="synthesise the demo set")
    add("--audio-dir", type=Path, metavar="DIR", help="make a set of DIR/<genre>/<file>")
    add(
        "--out",
        type=Path,
        help="folder of the new set (default with --demo: data/demo beside this script)",
    )
    parts = "demo: genre clips, emotion clips or (default) both; what is there is kept"
    add("--parts", nargs="+", choices=FOLDERS, default=list(FOLDERS), help=parts)
    workers = "processes that extract side by side (default: one per core)"
    add("--workers", type=bounded(int, 1, 1024), metavar="N", help=workers)
    scheduler = "extract on the Dask cluster of this scheduler, e.g. tcp://HOST:8786"
    add("--dask", metavar="ADDRESS", help=scheduler)
    add("--seed", type=int, default=42, help="seed of the music and of the split (default: 42)")
    add("--clips", type=int, default=240, help="demo: genre clips, 40 or more (default: 240)")
    add(
        "--emotion-clips",
        type=int,
        default=120,
        help="demo: emotion clips, 4 or more (default: 120)",
    )
    add(
        "--seconds",
        type=float,
        default=10.0,
        help="demo: length of a clip, 1 to 60 s (default: 10)",
    )
    add("--emotions", type=Path, metavar="CSV", help="audio: emotion values of the files")
    add(
        "--test-fraction",
        type=float,
        default=0.2,
        help="audio: test part's share of each genre, .05 to .5 (default: 0.2)",
    )
    args = parser.parse_args([] if argv is None and in_notebook() else argv)
    if args.demo == bool(args.audio_dir):
        raise InputError("give either --demo or --audio-dir DIR")
    if args.audio_dir and not args.out:
        raise InputError("--audio-dir needs --out, the folder of the new set")
    for name, low, high in (
        ("seed", 0, 2**31),
        ("clips", 40, 10**6),
        ("emotion_clips", 4, 10**6),
        ("seconds", 1, 60),
        ("test_fraction", 0.05, 0.5),
    ):
        if not low <= getattr(args, name) <= high:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(args, name):g}: must be {low:g} to {high:g}"
            )
    args.out = (
        args.out
        or Path(globals().get("__file__", "make_dataset.py")).resolve().parent / "data" / "demo"
    ).absolute()
    began = time.monotonic()
    try:
        (make_demo if args.demo else make_audio)(args)
    except KeyboardInterrupt:
        print(
            "stopped; finished clips are kept, the same command goes on from here", file=sys.stderr
        )
        raise SystemExit(130) from None
    counts = {
        f"{part} {split}": len(list((part_folder(args.out, part) / split).glob("*.npy")))
        for part in ("genre", "emotion")
        for split in ("train", "test")
    }
    print(
        f"{args.out}: "
        + ", ".join(f"{n} {name}" for name, n in counts.items())
        + f" clips; {time.monotonic() - began:.0f} s"
    )
    return {"out": str(args.out), "clips": counts}


if __name__ == "__main__":
    sys.excepthook = end_in_one_line
    main()
