"""Faults played against a running server under load.

room        a place where disk and shared memory can be filled without harm to others
repository  the model repository with the engine echo
served      one ``triptych serve``: its processes, whether it is ready, and what it has left
load        who asks meanwhile, and whether the answers are right
plays       the faults
referee     plays one, and says what became of it
"""
