"""Finds, starts, watches and stops tritonserver.

options       what to serve and where
installation  which tritonserver, and what it needs to run our Python
command       its flags and its environment
log           what its log says about loading
process       its processes and shared memory, until the last of them is gone
supervisor    `Server`, which puts these together
serve         `serve`, the blocking form behind ``triptych serve``
"""

from triptych.server.foreground import serve
from triptych.server.options import ServerOptions
from triptych.server.supervisor import Server

__all__ = ["Server", "ServerOptions", "serve"]
