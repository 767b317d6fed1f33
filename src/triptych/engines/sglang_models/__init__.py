"""Models that SGLang is given in place of its own: it asks this package by its name.

See ``SGLANG_EXTERNAL_MODEL_PACKAGE`` in `triptych.engines.sglang_process`.
"""
