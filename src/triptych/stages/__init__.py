"""The Triton models, and the only place that imports ``triton_python_backend_utils``."""
