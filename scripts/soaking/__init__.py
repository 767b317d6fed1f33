"""``scripts/soak``: thousands of requests and aborts, after which a server is as it was before.

kinds      what is asked: every medium in every form, and what is refused
callers    over which road, and when the caller leaves
sample     what a server at rest holds: memory, descriptors, files, leases, slots
verdict    whether that grows, and what growth is none
plot       the curves
"""
