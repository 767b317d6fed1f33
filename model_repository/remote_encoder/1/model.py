from triptych.stages.remote_encoder import RemoteEncoderModel


class TritonPythonModel(RemoteEncoderModel):
    """Resized pixels to EMBEDDINGS and TICKET, by encoders on other servers."""
