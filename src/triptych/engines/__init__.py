"""The engines: each turns a prompt and its embeddings into text, behind one interface.

`base` says what an engine promises, `echo` is the fake and the template for the next one, `vllm`
is the first real one. Each engine's library is imported in its own file and nowhere else.
"""
