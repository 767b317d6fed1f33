"""Clips and pictures in one conversation with Qwen3-VL, through a real tritonserver and vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

import qwen_checkpoints as tiny
from conftest import ServerFactory
from media_files import clip, settings
from pictures import encoded, noise
from triptych import families
from triptych.media.base import MediaOptions
from triptych.media.video import load
from triptych_client import Client, image, user, video

pytestmark = pytest.mark.server
QUESTION = "What moves?"
FRAMES = 5
TOKENS = 24


@torch.inference_mode()
def hugging_face(directory: Path, picture: Image.Image, shown: bytes) -> tuple[str, int]:
    """Greedy, from the frames that our loader takes, through their processor."""
    import transformers

    torch.set_num_threads(1)
    family = families.load(directory)
    loaded = load(shown, family, settings(), MediaOptions(num_frames=FRAMES))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    images = transformers.Qwen2VLImageProcessorPil.from_pretrained(directory)
    videos = transformers.Qwen3VLVideoProcessor.from_pretrained(directory)
    processor = transformers.Qwen3VLProcessor(images, tokenizer, videos)
    content = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    rate = 1000.0  # frames by their times in milliseconds
    inputs = processor(
        text=[text],
        images=[picture],
        videos=[torch.from_numpy(loaded.frames).permute(0, 3, 1, 2)],
        video_metadata=[
            {
                "total_num_frames": FRAMES,
                "fps": rate,
                "frames_indices": [time * rate for time in loaded.timestamps],
            }
        ],
        do_sample_frames=False,
        videos_kwargs={"do_resize": False},
        return_tensors="pt",
    )
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32
    ).eval()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
    length = inputs["input_ids"].shape[1]
    return tokenizer.decode(output[0, length:], skip_special_tokens=True), length


def test_answer_about_a_picture_and_a_clip_is_hugging_faces(
    start_server: ServerFactory, tmp_path: Path
) -> None:
    directory = tiny.tiny_qwen3_vl(tmp_path / "model")
    picture, shown = noise(150, 130), clip(frames=37)
    server = start_server("vllm", options={"model": str(directory)})
    try:
        with Client(f"localhost:{server.grpc_port}") as client:
            moving = video(shown)
            moving["video_url"]["num_frames"] = FRAMES
            message = user(image(encoded(picture, "PNG")), moving, QUESTION)
            said = client.chat([message], stream=False, temperature=0, max_tokens=TOKENS)
    finally:
        server.stop()
    expected, length = hugging_face(directory, picture, shown)
    assert said.text == expected
    assert said.usage is not None
    assert said.usage.prompt_tokens == length
