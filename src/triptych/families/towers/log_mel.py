"""Whisper's log-mel spectrogram, after transformers' ``WhisperFeatureExtractor``.

Both compute it in torch and in float32. There every sound is filled up with silence to half a
minute first; here only the frames that the tower looks at are computed, which differ from those in
the last bits at most.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.functional import pad

from triptych.families.qwen2_audio import FeatureExtractor

Floats = npt.NDArray[np.float64]

MAX_FREQUENCY = 8000.0
"""Hertz, whatever the sampling rate."""
# Slaney's mel scale: linear up to 1 kHz, logarithmic above (Auditory Toolbox, 1998).
_BREAK_HERTZ, _BREAK_MEL = 1000.0, 15.0
_STEP = np.log(6.4) / 27.0


class LogMel(nn.Module):
    """Samples to the spectrogram that Whisper's encoder takes."""

    filters: torch.Tensor
    """float32, shape (bands, 1 + n_fft / 2)."""
    window: torch.Tensor
    """float32, shape (n_fft,)."""

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        filters = mel_filters(extractor.n_fft, extractor.feature_size, extractor.sampling_rate)
        self.register_buffer("filters", torch.from_numpy(filters).float().T, persistent=False)
        self.register_buffer("window", torch.hann_window(extractor.n_fft), persistent=False)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """The spectrogram of one sound.

        Args:
            samples: float32, shape (samples,), of `FeatureExtractor.max_samples` at most.

        Returns:
            float32, shape (bands, frames + 2), with no more than `FeatureExtractor.max_frames`:
            the two frames after the last sample still see some of it.
        """
        extractor = self.extractor
        frames = min(extractor.frames(samples.numel()) + 2, extractor.max_frames)
        # So much silence that the mirror image at the end of what is transformed is not seen,
        # where a sound of full length does not mirror there itself.
        length = min(frames * extractor.hop_length + extractor.n_fft, extractor.max_samples)
        samples = pad(samples, (0, max(0, length - samples.numel())))
        spectrum = torch.stft(
            samples, extractor.n_fft, extractor.hop_length, window=self.window, return_complex=True
        )
        power = (spectrum[:, :frames].abs() ** 2).contiguous()
        mel = torch.clamp(self.filters @ power, min=1e-10).log10()
        return (torch.maximum(mel, mel.max() - 8.0) + 4.0) / 4.0


def mel_filters(n_fft: int, bands: int, sampling_rate: int) -> Floats:
    """Triangles on Slaney's mel scale, each of the same area; transformers' ``mel_filter_bank``.

    Returns:
        Shape (1 + n_fft / 2, bands).
    """
    edges = _hertz(np.linspace(0.0, _mel(MAX_FREQUENCY), bands + 2))
    bins = np.linspace(0, sampling_rate // 2, 1 + n_fft // 2)
    slopes = edges[None] - bins[:, None]
    widths = np.diff(edges)
    slanted = np.minimum(-slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:])
    triangles: Floats = np.maximum(0.0, slanted)
    return triangles * (2.0 / (edges[2:] - edges[:-2]))


def _mel(hertz: float) -> float:
    """For frequencies in the logarithmic part."""
    return float(_BREAK_MEL + np.log(hertz / _BREAK_HERTZ) * (27.0 / np.log(6.4)))


def _hertz(mels: Floats) -> Floats:
    above = _BREAK_HERTZ * np.exp(_STEP * (mels - _BREAK_MEL))
    return np.where(mels >= _BREAK_MEL, above, 200.0 * mels / 3.0)
