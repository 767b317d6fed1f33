"""What SGLang makes of a request's media for `triptych.engines.sglang_models`.

See ``SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE`` in `triptych.engines.sglang_process`.
"""
