"""Text to packed token ids on disk, and from there to batches."""
