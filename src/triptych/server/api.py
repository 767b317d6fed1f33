"""What is asked of a running tritonserver over its HTTP port."""

from __future__ import annotations

from collections.abc import Mapping

import httpx
import msgspec

from triptych import contract
from triptych.errors import TriptychError, Unavailable

GREETING = msgspec.json.encode(
    {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1,
        "temperature": 0,
        # An engine may refuse what the checkpoint's generation_config.json asks for.
        "min_p": 0,
        "repetition_penalty": 1,
    }
)
"""The chat that a ready server answers."""
PROBE_S = 0.5
"""Seconds for the answer that says that the server lives."""
CONTROL_S = 10.0
"""Seconds for any other that is no chat."""
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class Api:
    """tritonserver's HTTP.

    Args:
        host: Address that it listens on.
        port: And the port.
        key: The header that opens what callers may not use.
    """

    def __init__(self, host: str, port: int, key: Mapping[str, str]) -> None:
        host = _LOOPBACK.get(host, host)
        host = f"[{host}]" if ":" in host else host
        self._key = key
        self._client = httpx.Client(base_url=f"http://{host}:{port}/v2/", trust_env=False)

    def lives(self) -> bool:
        """Whether it answers at all."""
        return self._succeeds("health/live", PROBE_S)

    def serves(self, model: str) -> bool:
        """Whether the model is loaded, as far as Triton knows."""
        return self._succeeds(f"models/{model}/ready", CONTROL_S)

    def greet(self, ensemble: str, timeout_s: float) -> bool:
        """Whether a chat of one token comes back; no connection is no answer.

        Raises:
            TriptychError: It is refused, and why.
        """
        try:
            answer = self._client.post(
                f"models/{ensemble}/generate",
                json={contract.REQUEST: GREETING.decode()},
                timeout=timeout_s,
            )
        except httpx.TransportError:
            return False
        if answer.is_success and contract.CHUNK in answer.json():
            return True
        raise TriptychError.parse(_said(answer))

    def load(self, model: str) -> None:
        """Take a model into service.

        Raises:
            Unavailable: Triton does not.
        """
        self._control(model, "load")

    def unload(self, model: str) -> None:
        """Take a model out of service: Triton then says that it is not ready, and refuses.

        Raises:
            Unavailable: Triton does not.
        """
        self._control(model, "unload")

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()

    def _succeeds(self, path: str, timeout_s: float) -> bool:
        try:
            return self._client.get(path, timeout=timeout_s).is_success
        except httpx.TransportError:
            return False

    def _control(self, model: str, what: str) -> None:
        try:
            answer = self._client.post(
                f"repository/models/{model}/{what}",
                json={},
                headers=self._key,
                timeout=CONTROL_S,
            )
        except httpx.TransportError as error:
            raise Unavailable(f"tritonserver does not {what} {model}: {error}") from None
        if not answer.is_success:
            raise Unavailable(f"tritonserver does not {what} {model}: {_said(answer)}")


class _Refusal(msgspec.Struct):
    """Triton's answer to what it does not do."""

    error: str


def _said(answer: httpx.Response) -> str:
    try:
        return msgspec.json.decode(answer.content, type=_Refusal).error
    except msgspec.MsgspecError:
        return answer.text
