"""OpenAI's API over HTTP, in front of Triton's gRPC. Needs neither torch nor the engines.

    POST /v1/chat/completions ──▶ body ──▶ asked ──▶ backend (gRPC) ──▶ answers ──▶ JSON or SSE

options   where to listen, whom to ask, what to allow
app       the application around the routes
routes/   one file a subject: chat, models, health, docs, playground
state     what the routes share
faults    every error in OpenAI's form
keys      who may ask
body      a request's bytes, up to a limit
asked     the few fields the gateway reads of a chat; the rest goes through as it came
prompts   the same of a completion, which is small enough to be written anew
backend   Triton: chats, and which ensembles there are
watch     answers that never come
choices   one answer, or several side by side
answers   OpenAI's forms of an answer, whole and as events
answering one request's answer from its first byte to its end, whatever end that is
health    whether a chat would be answered
observe   request ids, the log, Prometheus' numbers
schema    OpenAI's objects, for the document and the answers
document  the OpenAPI document
serving   uvicorn, in the foreground or in a thread
"""

from triptych.gateway.options import GatewayOptions
from triptych.gateway.serving import Gateway, bind, serve

__all__ = ["Gateway", "GatewayOptions", "bind", "serve"]
