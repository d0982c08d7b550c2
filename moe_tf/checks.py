"""Refuses settings that cannot be used, naming the field and the value."""

import math
import operator


def at_least(name, value, least, none_is_fine=False):
    """Raises `ValueError` unless `value` is an int of `least` or more."""
    if value is None and none_is_fine:
        return
    if not _lies(lambda: operator.index(value) >= least):
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}"
            f"{', or None' if none_is_fine else ''}. Received: {name}={value}"
        )


def positive(name, value, none_is_fine=False):
    """Raises `ValueError` unless `value` is finite and above 0."""
    if value is None and none_is_fine:
        return
    if not _lies(lambda: 0 < value < math.inf):
        raise ValueError(
            f"`{name}` must be finite and above 0"
            f"{', or None' if none_is_fine else ''}. Received: {name}={value}"
        )


def not_negative(name, value, none_is_fine=False):
    """Raises `ValueError` unless `value` is finite and 0 or more."""
    if value is None and none_is_fine:
        return
    if not _lies(lambda: 0 <= value < math.inf):
        raise ValueError(
            f"`{name}` must be finite and at least 0"
            f"{', or None' if none_is_fine else ''}. Received: {name}={value}"
        )


def _lies(within):
    """`within()`; false of a value that is no number."""
    try:
        return within()
    except TypeError:
        return False
