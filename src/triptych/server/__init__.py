"""Finds, starts, watches, replaces and stops tritonserver.

options       what to serve and where
installation  which tritonserver, and what it needs to run our Python
command       its flags and its environment
log           what its log says about loading
ports         free ones, kept until tritonserver listens
process       its processes and shared memory, until the last of them is gone
remains       shared memory of servers that were killed
api           what it is asked over HTTP
vitals        whether its processes live and move
tritonserver  `Server`, which puts these together: one tritonserver from start to stop
supervisor    `Supervisor`, which starts the next one
foreground    `serve`, the blocking form behind ``triptych serve``
"""

from triptych.server.foreground import serve
from triptych.server.options import ServerOptions
from triptych.server.supervisor import Supervisor
from triptych.server.tritonserver import Server

__all__ = ["Server", "ServerOptions", "Supervisor", "serve"]
