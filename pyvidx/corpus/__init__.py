"""Many files in, many embeddings out."""
