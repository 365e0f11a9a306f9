"""The one reader of sound files: mono, decoded to the end, whatever a file's header says.

PyAV, which brings FFmpeg along, reads all of SUFFIXES. Where it is not installed, soundfile
reads wav and flac, which give the same samples bit for bit, and mp3 and ogg as well as it can.
"""

import collections
import importlib.util
from pathlib import Path

import librosa
import numpy as np
import soundfile

from patrec.errors import InputError
from patrec.features import SR

SUFFIXES = (".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".au", ".aif", ".wma")
CLIP_S = 30  # length of a clip of the lab, in s
HIGHEST = 1e6  # of a sample's value; 1 is full scale, 32,768 that of whole numbers left unscaled


class Sound:
    """A sound file that is decoded block by block."""

    def __init__(self, path):
        self.path = Path(path)
        self.rate = 0  # samples per second, known from the first block on
        self.seconds = 0.0  # decoded so far
        self.stated = 0.0  # length that the file's header states, in s; 0 if unknown
        self.lost = 0.0  # length of the packets that could not be decoded, in s
        self.fault = ""  # why decoding ended before the end of the file

    def blocks(self, seconds=CLIP_S):
        """Yield the mean of the channels, float32 (n,), in blocks of this many seconds.

        Raises InputError: no such file, no sound in it, or samples that are no numbers.
        """
        if not self.path.is_file():
            raise InputError(f"{self.path}: no such file; give a sound file, e.g. wav or mp3")
        pieces, n, form = [], 0, None
        try:
            for piece, rate in self._decode():  # (n, channels)
                if pieces and form != (rate, piece.shape[1]):  # joined files may change both
                    yield self._mix(np.concatenate(pieces), form[0])
                    pieces, n = [], 0
                form, size = (rate, piece.shape[1]), seconds * rate
                pieces.append(piece)
                n += len(piece)
                while n >= size:
                    whole = np.concatenate(pieces)
                    yield self._mix(whole[:size], rate)
                    pieces, n = [whole[size:]], n - size
        except InputError:
            raise
        except Exception as error:  # PyAV, soundfile and the system each raise their own
            text = getattr(error, "strerror", None) or str(error) or type(error).__name__
            self.fault = text.splitlines()[0].replace(str(self.path), self.path.name)
        if n:
            yield self._mix(np.concatenate(pieces), form[0])
        if not self.seconds:
            cure = 'check that it plays, or convert it to wav (most others need "pip install av")'
            fault = f"not readable as sound ({self.fault or 'none in it'})"
            raise InputError(f"{self.path}: {fault}; {cure}")

    @property
    def damage(self) -> str:
        """What is wrong with a file that was read to the end, if it holds clearly more."""
        whole = max(self.stated, self.seconds + self.lost)
        fault = f"decoding ended after {self.seconds:.1f} s ({self.fault})" if self.fault else ""
        if whole - self.seconds > max(1, 0.05 * whole):
            fault = f"only {self.seconds:.1f} s of {whole:.1f} s could be decoded"
        return fault and f"{fault}; the file is damaged or incomplete"

    def _mix(self, block, rate) -> np.ndarray:
        """Mean of the channels (n, channels) -> (n,), at the rate of the file's first block."""
        if not (np.abs(block) < HIGHEST).all():
            fault = f"holds samples that are not finite or beyond {HIGHEST:g}"
            raise InputError(f"{self.path}: {fault}; export it again, with samples in [-1, 1]")
        mono, levels = np.mean(block.T, axis=0), block.std(axis=0)
        if mono.std() < 0.01 * levels.max():  # opposite channels cancel out; take the louder one
            mono = block[:, levels.argmax()]
        self.rate = self.rate or rate
        self.seconds += len(mono) / rate
        return librosa.resample(mono, orig_sr=rate, target_sr=self.rate)

    def _decode(self):
        """Yield (float32 samples (n, channels), rate), piece by piece."""
        if not self.path.stat().st_size:  # of which PyAV would print a traceback
            raise ValueError("empty file")
        try:
            import av
        except ImportError:
            yield from self._decode_with_soundfile()
            return
        # An open file: its name may hold what FFmpeg takes for an address, or no UTF-8.
        with open(self.path, "rb") as file, av.open(file) as container:
            if not container.streams.audio:
                return
            stream = container.streams.audio[0]
            # Without a header that states it, the length of these two is guessed from the bit rate.
            guessed = container.format.name in ("mp3", "aac") and not stream.start_time
            if stream.duration and not guessed:
                self.stated = float(stream.duration * stream.time_base)
            for packet in container.demux(stream):
                try:
                    frames = packet.decode()
                except av.FFmpegError:  # a damaged packet; what follows may be whole
                    # A few ms; in damaged files some state hours.
                    self.lost += min(float((packet.duration or 0) * stream.time_base), 1.0)
                    continue
                for frame in frames:
                    yield to_float(frame), frame.sample_rate

    def _decode_with_soundfile(self):
        with soundfile.SoundFile(self.path) as sound:
            if sound.frames < 2**60:  # else unknown
                self.stated = sound.frames / sound.samplerate
            while len(piece := sound.read(2**16, "float32", always_2d=True)):
                yield piece, sound.samplerate


def to_float(frame) -> np.ndarray:
    """Samples of a PyAV frame -> float32 (n, channels), full scale at 1, as soundfile does."""
    samples, channels = frame.to_ndarray(), frame.layout.nb_channels
    samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128) / 128
    full_scale = 1 if samples.dtype.kind == "f" else -float(np.iinfo(samples.dtype).min)
    return samples.astype(np.float32) / np.float32(full_scale)


def read_clip(path) -> tuple[np.ndarray, str]:
    """Read the middle 30 s of a file (all of a shorter one) at SR, as librosa.load does.

    Returns the waveform (n,), float32, and what could not be decoded, if anything.
    """
    sound, blocks, n_dropped, n = Sound(path), collections.deque(), 0, 0
    for block in sound.blocks():
        blocks.append(block)
        n += len(block)
        # What lies before the middle of what was read so far will lie before the clip.
        while n_dropped + len(blocks[0]) < (n - CLIP_S * sound.rate) / 2 - 1:
            n_dropped += len(blocks.popleft())
    start = int(max(0.0, n / sound.rate - CLIP_S) / 2 * sound.rate) - n_dropped
    waveform = np.concatenate(blocks)[start : start + CLIP_S * sound.rate]
    return librosa.resample(waveform, orig_sr=sound.rate, target_sr=SR), sound.damage


def require_decoder(paths) -> None:
    """InputError where one of the files needs PyAV, which is not installed."""
    compressed = [path for path in paths if Path(path).suffix.lower() not in (".wav", ".flac")]
    if compressed and not importlib.util.find_spec("av"):
        fault = "reading this format needs PyAV, which is not installed"
        raise InputError(f'{compressed[0]}: {fault}; run "pip install av"')
