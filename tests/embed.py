"""What the ensemble `benches._embed` answers, read."""

from __future__ import annotations

import torch
import tritonclient.grpc as triton

from triptych import contract
from triptych.contract import Prompt, Ticket


class Answer:
    """PROMPT (of the ensemble), TICKET and EMBEDDINGS of one request."""

    def __init__(self, result: triton.InferResult) -> None:
        prompt = result.as_numpy("PROMPT")
        self.prompt = None if prompt is None else contract.decode(prompt[0], Prompt)
        self.ticket = contract.decode(result.as_numpy("TICKET")[0, 0], Ticket)
        self.bytes = result.as_numpy("EMBEDDINGS")[0].tobytes()

    @property
    def embeddings(self) -> list[torch.Tensor]:
        """Of each item, float32."""
        whole = torch.frombuffer(bytearray(self.bytes), dtype=torch.uint8)
        return [
            whole[item.offset : item.offset + item.nbytes].view(torch.float32).view(item.shape)
            for item in self.ticket.items
        ]
