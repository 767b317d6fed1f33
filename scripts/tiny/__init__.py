"""The tiny models: the media they are about, their training and their evaluation."""
