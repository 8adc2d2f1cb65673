"""Directories that Hugging Face's transformers loads, and checkpoints that others have published."""
