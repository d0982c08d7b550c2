"""Ids that stand for no word, the same in every vocabulary."""

SPECIALS = ("<pad>", "<UNK>", "<S>", "</S>")
PAD, UNK, START, END = range(len(SPECIALS))
