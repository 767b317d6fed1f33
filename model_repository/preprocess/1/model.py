from triptych.stages.preprocess import PreprocessModel


class TritonPythonModel(PreprocessModel):
    """OpenAI chat JSON to PROMPT, MEDIA and ITEMS."""
