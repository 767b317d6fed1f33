"""OpenAI chat JSON to typed messages, prompts and chunks. No Triton, no GPU, no torch."""
