"""A stand-in for TensorRT-LLM, which needs an NVIDIA GPU: as strict as its documentation.

It has what `triptych.engines.trtllm` may depend on and nothing else: another name, argument or
field raises, and so does a use that the library would answer wrongly without saying so. What it
has really computes, with Hugging Face's model less its vision tower, so answers can be checked.

It lies on the path of a test's own process, or of a test's stub, and nowhere else.
"""

from __future__ import annotations

from tensorrt_llm.llm import LLM
from tensorrt_llm.parameters import DisaggregatedParams, SamplingParams

__all__ = ["LLM", "DisaggregatedParams", "SamplingParams"]
