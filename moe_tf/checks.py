"""Checks of settings; the errors name the field and the value."""

import math
import operator
from collections.abc import Callable


def at_least(
    name: str, value: object, minimum: int, allow_none: bool = False
) -> None:
    """Raises `ValueError` unless `value` is an int of at least `minimum`."""
    if value is None and allow_none:
        return
    if not _is_within(value, lambda: operator.index(value) >= minimum):
        raise ValueError(
            f"`{name}` must be a whole number of at least {minimum}"
            f"{', or None' if allow_none else ''}. Received: {name}={value}"
        )


def positive(name: str, value: object, allow_none: bool = False) -> None:
    """Raises `ValueError` unless `value` is finite and above 0."""
    if value is None and allow_none:
        return
    if not _is_within(value, lambda: 0 < value < math.inf):
        raise ValueError(
            f"`{name}` must be finite and above 0"
            f"{', or None' if allow_none else ''}. Received: {name}={value}"
        )


def not_negative(name: str, value: object, allow_none: bool = False) -> None:
    """Raises `ValueError` unless `value` is finite and 0 or more."""
    if value is None and allow_none:
        return
    if not _is_within(value, lambda: 0 <= value < math.inf):
        raise ValueError(
            f"`{name}` must be finite and at least 0"
            f"{', or None' if allow_none else ''}. Received: {name}={value}"
        )


def true_or_false(name: str, value: object) -> None:
    """Raises `ValueError` unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ValueError(
            f"`{name}` must be `True` or `False`. Received: {name}={value}"
        )


def _is_within(value: object, within: Callable[[], bool]) -> bool:
    """Returns `within()`; `False` for a bool and whatever is not a number."""
    try:
        return not isinstance(value, bool) and within()
    except TypeError:
        return False
