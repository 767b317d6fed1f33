"""Planners for tests of the loader; workers unpickle them, so they import nothing heavy."""

from __future__ import annotations

from triptych.contract import AudioPlan, GridTHW, ImagePlan, Modality, VideoPlan
from triptych.errors import InvalidValue

WIDTH = 64
"""Columns that `FilePlanner` wants of embeddings."""


class FilePlanner:
    """Keeps the size of pictures, rounded down to tens; small frames; 16 kHz."""

    audio_rate = 16_000

    def plan_image(self, height: int, width: int) -> ImagePlan:
        size = (max(10, height // 10 * 10), max(10, width // 10 * 10))
        return ImagePlan(size, tokens=7)

    def plan_video(self, frames: int, height: int, width: int, fps: float) -> VideoPlan:
        return VideoPlan((height // 2, width // 2), tokens=frames, second_per_grid=2 / fps)

    def plan_audio(self, samples: int) -> AudioPlan:
        return AudioPlan(tokens=samples // 640 + 1)

    def plan_embeddings(
        self, modality: Modality, shape: tuple[int, int], grid_thw: GridTHW | None
    ) -> None:
        if shape[1] != WIDTH:
            raise InvalidValue(f"embeddings are {WIDTH} wide, got {shape[1]}")


class CrashPlanner(FilePlanner):
    """Does to its process what a broken decoder would, by the width of the picture."""

    def plan_image(self, height: int, width: int) -> ImagePlan:
        if width == 13:
            import ctypes

            ctypes.string_at(0)
        while width == 17:
            pass
        if width == 19:
            raise KeyError("a fault of ours")
        return super().plan_image(height, width)
