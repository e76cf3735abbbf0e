"""What other people's programs are joined by: transformers, open_clip, language models."""
