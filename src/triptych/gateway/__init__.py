"""OpenAI's API over HTTP, in front of Triton's gRPC. Needs neither torch nor the engines.

    POST /v1/chat/completions ──▶ body ──▶ asked ──▶ backend (gRPC) ──▶ answers ──▶ JSON or SSE

options   where to listen, whom to ask, what to allow
faults    every error in OpenAI's form
keys      who may ask
body      a request's bytes, up to a limit
asked     the few fields the gateway reads; the rest goes through as it came
backend   Triton: chats, and which ensembles there are
choices   one answer, or ``n`` of them side by side
answers   chunks as server-sent events, or as one ``chat.completion``
chat      one request from its first byte to its end, whatever end that is
health    whether a chat would be answered
observe   request ids, the log, Prometheus' numbers
schema    OpenAI's objects, for the document and the answers
document  the OpenAPI document
app       the routes
serving   uvicorn, in the foreground or in a thread
"""

from triptych.gateway.options import GatewayOptions
from triptych.gateway.serving import Gateway, bind, serve

__all__ = ["Gateway", "GatewayOptions", "bind", "serve"]
