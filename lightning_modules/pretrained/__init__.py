"""Pretrained language models of the transformers library: loading, prompts and generation."""
