"""Refuses settings that cannot be used, naming the field and the value."""

import math
import operator


def at_least(name, value, least, none_is_fine=False):
    """Raises `ValueError` unless `value` is an int of `least` or more."""
    if value is None and none_is_fine:
        return
    if not _lies(value, lambda: operator.index(value) >= least):
        raise ValueError(
            f"`{name}` must be a whole number of at least {least}"
            f"{', or None' if none_is_fine else ''}. Received: {name}={value}"
        )


def positive(name, value, none_is_fine=False):
    """Raises `ValueError` unless `value` is finite and above 0."""
    if value is None and none_is_fine:
        return
    if not _lies(value, lambda: 0 < value < math.inf):
        raise ValueError(
            f"`{name}` must be finite and above 0"
            f"{', or None' if none_is_fine else ''}. Received: {name}={value}"
        )


def not_negative(name, value, none_is_fine=False):
    """Raises `ValueError` unless `value` is finite and 0 or more."""
    if value is None and none_is_fine:
        return
    if not _lies(value, lambda: 0 <= value < math.inf):
        raise ValueError(
            f"`{name}` must be finite and at least 0"
            f"{', or None' if none_is_fine else ''}. Received: {name}={value}"
        )


def true_or_false(name, value):
    """Raises `ValueError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` must be `True` or `False`. Received: {name}={value}"
        )


def _lies(value, within):
    """`within()`; false of a value that is no number, as a bool is none."""
    try:
        return not isinstance(value, bool) and within()
    except TypeError:
        return False
