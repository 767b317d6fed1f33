from triptych.stages.encoder import EncoderModel


class TritonPythonModel(EncoderModel):
    """Resized pixels to EMBEDDINGS and TICKET."""
