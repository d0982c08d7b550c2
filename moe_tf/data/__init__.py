"""Data: corpora, vocabularies, the tokenizer, and batches."""
