"""Parallel text: corpora, the tokenizer (`wordpieces`), and batches."""
