from triptych.engines.sglang import SglangEngine
from triptych.stages.decode import DecodeModel


class TritonPythonModel(DecodeModel):
    """PROMPT, TICKET and EMBEDDINGS to text, by SGLang."""

    engine_type = SglangEngine
