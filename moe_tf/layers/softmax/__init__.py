"""Output layers: softmax over the vocabulary, sampled or in chunks."""
