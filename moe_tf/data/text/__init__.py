"""Text for language models: corpora, counts, and batches."""
