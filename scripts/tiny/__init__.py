"""The tiny Qwen2.5-VL model: the pictures it is about, its training and its evaluation."""
