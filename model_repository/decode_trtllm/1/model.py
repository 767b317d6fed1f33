from triptych.engines.trtllm import TrtllmEngine
from triptych.stages.decode import DecodeModel


class TritonPythonModel(DecodeModel):
    """PROMPT, TICKET and EMBEDDINGS to text, by TensorRT-LLM."""

    engine_type = TrtllmEngine
