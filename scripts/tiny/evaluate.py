"""The evaluation, through transformers' own processor and greedy generation in float32."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from .examples import example, video_example
from .questions import IMAGE_TYPES, PAIR_TYPES, VIDEO_TYPES, Question
from .scenes import draw

ALL_TYPES = IMAGE_TYPES + PAIR_TYPES + VIDEO_TYPES
FRAMES = 6
VIDEO_FPS = 2.0


def random_size(rng: random.Random, most: int = 280) -> tuple[int, int]:
    """Width and height from 84 pixels on; one picture in five is larger than the model's limit."""
    if rng.random() < 0.2:
        return rng.choice(((512, 512), (640, 480), (480, 640), (800, 600), (1024, 768)))
    width = rng.randint(84, most)
    return width, min(most, max(84, round(width * rng.uniform(0.6, 1.7))))


def asked(type_: str, rng: random.Random, *, unseen: bool) -> tuple[list[Image.Image], Question]:
    """Pictures, or a video's frames, and a question about them."""
    if type_ in VIDEO_TYPES:
        video, question = video_example(type_, rng, unseen=unseen)
        size = (rng.randint(84, 196), rng.randint(84, 196))
        return [draw(scene, size) for scene in video.frames(FRAMES)], question
    scenes, question = example(type_, rng, unseen=unseen)
    return [draw(scene, random_size(rng), smooth=rng.choice((1, 2))) for scene in scenes], question


def answer(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Any,
    pictures: list[Image.Image],
    text: str,
    *,
    video: bool,
) -> str:
    """The model's answer to one question, decoded greedily."""
    media = [{"type": "video"}] if video else [{"type": "image"} for _ in pictures]
    messages = [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    if video:
        metadata = {
            "fps": VIDEO_FPS,
            "total_num_frames": FRAMES,
            "frames_indices": list(range(FRAMES)),
        }
        inputs = processor(
            text=[prompt], videos=[pictures], video_metadata=[metadata], return_tensors="pt"
        )
    else:
        inputs = processor(text=[prompt], images=pictures, return_tensors="pt")
    inputs = inputs.to(model.device)
    generated = model.generate(**inputs, max_new_tokens=120, do_sample=False)
    text = processor.tokenizer.decode(
        generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return str(text)


def evaluate(
    folder: Path,
    device: torch.device,
    *,
    count: int = 200,
    seed: int = 0,
    write: Path | None = None,
) -> dict[str, Any]:
    """Accuracy by question type, printed and if asked for written; exact answers alone count.

    Args:
        folder: The checkpoint.
        device: Where to run it.
        count: Questions of each type and split.
        seed: Of the pictures; training pictures come from other streams of random numbers.
        write: The JSON file to write.

    Returns:
        For each type and split ("held_out_pictures", "held_out_combinations") the accuracy, and
        the majority baseline: the share of the commonest answer.
    """
    processor = AutoProcessor.from_pretrained(folder)
    # Pillow's bicubic, as the training used; the other backend's is close to it, not the same.
    processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        .to(device)
        .eval()
    )
    types: dict[str, dict[str, dict[str, float]]] = {}
    for type_ in ALL_TYPES:
        types[type_] = {}
        for split in ("held_out_pictures", "held_out_combinations"):
            rng = random.Random(f"evaluation {seed} {type_} {split}")
            answers: Counter[str] = Counter()
            right = 0
            for _ in range(count):
                pictures, question = asked(type_, rng, unseen=split == "held_out_combinations")
                got = answer(model, processor, pictures, question.text, video=type_ in VIDEO_TYPES)
                right += got == question.answer
                answers[question.answer] += 1
                if got != question.answer:
                    print(
                        f"  {type_}: {question.text!r} wants {question.answer!r}, got {got!r}",
                        flush=True,
                    )
            types[type_][split] = {
                "accuracy": round(right / count, 4),
                "majority_baseline": round(answers.most_common(1)[0][1] / count, 4),
            }
        print(type_, json.dumps(types[type_]), flush=True)
    result = {"questions_per_type_and_split": count, "seed": seed, "types": types}
    if write:
        write.write_text(json.dumps(result, indent=2) + "\n")
    return result
