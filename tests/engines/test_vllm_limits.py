"""Where vLLM's own path ends: while these hold, so do the refusals that they explain."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from triptych.engines import vllm_environment
from triptych.families.llava_next_video import MAX_VIDEOS, LlavaNextVideo

pytestmark = [
    pytest.mark.engine,
    # vLLM's own warnings are not ours.
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def models() -> Any:
    """The installed vLLM's models."""
    vllm_environment.prepare(eager=True)
    import vllm.model_executor.models as models
    from vllm.model_executor.models import llava_next_video, qwen2_audio

    assert llava_next_video.__package__ == qwen2_audio.__package__ == models.__name__
    return models


def test_llava_next_video_serves_one_video_and_no_image(models: Any) -> None:
    model = models.llava_next_video
    limits = model.LlavaNextVideoProcessingInfo.get_supported_mm_limits(None)
    assert limits == {"video": MAX_VIDEOS}
    served = model.LlavaNextVideoForConditionalGeneration
    assert served.get_placeholder_str("video", 1) == "<video>"
    with pytest.raises(ValueError, match="Only video modality is supported"):
        served.get_placeholder_str("image", 1)
    assert LlavaNextVideo.modalities == limits.keys()
    assert "image" in LlavaNextVideo.unserved


def test_qwen2_audio_takes_features_of_30_seconds_alone(models: Any) -> None:
    """Embeddings of other windows are taken, but vLLM makes none of them itself."""

    def features(frames: int) -> None:
        models.qwen2_audio.Qwen2AudioFeatureInputs(
            type="audio_features",
            input_features=torch.zeros(1, 16, frames),
            feature_attention_mask=torch.ones(1, frames),
        )

    features(3000)
    with pytest.raises(ValueError, match="expected 3000, got 200"):
        features(200)
