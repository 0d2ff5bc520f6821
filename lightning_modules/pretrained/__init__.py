"""Language models of transformers: loading, prompts and generation."""
