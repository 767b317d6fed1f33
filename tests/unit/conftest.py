"""Fixtures of the unit tests."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import settings

from triptych.engines.torchvision_ops import define_missing

# A machine with other things to do fails no test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def hf():
    """What is compared with: transformers' processors and model, PIL backend."""
    define_missing()
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    return SimpleNamespace(
        smart_resize=processing.smart_resize,
        ImageProcessor=processing.Qwen2VLImageProcessorPil,
        VideoProcessor=Qwen2VLVideoProcessor,
        Config=Qwen2_5_VLConfig,
        Model=Qwen2_5_VLForConditionalGeneration,
    )
