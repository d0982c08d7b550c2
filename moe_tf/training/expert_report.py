"""Which words a trained model's experts get: table 9 of the paper."""


def report(*a):
    raise ValueError
