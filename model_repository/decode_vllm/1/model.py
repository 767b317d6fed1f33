from triptych.engines.vllm import VllmEngine
from triptych.stages.decode import DecodeModel


class TritonPythonModel(DecodeModel):
    """PROMPT, TICKET and EMBEDDINGS to text, by vLLM."""

    engine_type = VllmEngine
