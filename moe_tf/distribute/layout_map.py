"""Rules that give variables their layouts on a mesh."""

import re
from collections.abc import Mapping
from collections.abc import Sequence

from moe_tf import sharding


class LayoutMap(Mapping):
    """Layouts of variables by regular expressions on their paths.

    Counterpart of `keras.distribution.LayoutMap` for `moe_tf.MeshStrategy`.

    A key equal to the path takes precedence. Otherwise all keys that
    `re.search` finds in the path must give the same layout.

    Args:
        layouts: mapping from regular expressions to tuples with the name of a
            mesh axis or None for each dimension. Defaults to none.

    Raises:
        ValueError: a key is no regular expression, or a value no such tuple.

    Example:

    >>> layout_map = moe_tf.distribute.LayoutMap(
    ...     {"embeddings$": ("model", None)}
    ... )
    >>> layout_map.match("embedding/embeddings")
    ('embeddings$', ('model', None))
    >>> layout_map.match("dense/kernel") is None
    True
    """

    def __init__(
        self,
        layouts: Mapping[str, Sequence[str | None]] | None = None,
    ):
        self._layouts = {}
        for pattern, spec in dict(layouts or {}).items():
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(
                    "Keys of a `LayoutMap` must be regular expressions. "
                    f"Received: {pattern!r} ({error})"
                ) from error
            named = _axes_of(spec)
            if named is None or len(set(named)) < len(named):
                raise ValueError(
                    "Values of a `LayoutMap` must be tuples of the names of "
                    "different axes or None, one for each dimension. "
                    f"Received: {spec!r} for {pattern!r}"
                )
            self._layouts[pattern] = tuple(spec)

    def __getitem__(self, pattern):
        return self._layouts[pattern]

    def __iter__(self):
        return iter(self._layouts)

    def __len__(self):
        return len(self._layouts)

    def match(self, path: str) -> tuple[str, tuple[str | None, ...]] | None:
        """Looks up the layout of a variable.

        Args:
            path: str, path of the variable.

        Returns:
            `(key, layout)`, or None where no key matches.

        Raises:
            ValueError: keys with different layouts match.
        """
        if path in self._layouts:
            return path, self._layouts[path]
        matching = {
            pattern: spec
            for pattern, spec in self._layouts.items()
            if re.search(pattern, path)
        }
        if len(set(matching.values())) > 1:
            raise ValueError(
                f"Keys of the layout map disagree about the variable {path}; "
                f"make them more specific. Matching: {matching}"
            )
        return next(iter(matching.items()), None)

    def unmatched(self, paths: Sequence[str]) -> list[str]:
        """Lists the keys that match none of the variables' paths."""
        return [
            pattern
            for pattern in self._layouts
            if pattern not in paths
            and not any(re.search(pattern, path) for path in paths)
        ]

    def check_axes(self, axes: Mapping[str, int]) -> None:
        """Raises `ValueError` if a layout names an axis not in `axes`."""
        for pattern, spec in self._layouts.items():
            for axis in _axes_of(spec):
                if axis not in axes:
                    raise ValueError(
                        f"The layout {spec} of {pattern!r} names the axis "
                        f"`{axis}`, which the mesh does not have. "
                        f"Received: axes={axes}"
                    )


def default_layout_map(axes: Mapping[str, int]) -> LayoutMap:
    """Returns the `LayoutMap` that shards the experts of every `SparseMoE`."""
    axis = sharding.expert_axis(axes)
    return LayoutMap({r"experts/expert_(in|out)_kernel$": (axis, None, None)})


def check_divides(
    name: str,
    shape: Sequence[int | None],
    spec: Sequence[str | None],
    axes: Mapping[str, int],
) -> None:
    """Refuses a layout that does not suit a shape.

    Args:
        name: str, name of the tensor or variable for error messages.
        shape: ints, or None for an unknown dimension.
        spec: tuple of axis names and None.
        axes: dict from axis to size.

    Raises:
        ValueError: the ranks differ, an axis does not exist, or its size does
            not divide the dimension. The message has the nearest sizes that
            would.
    """
    shape = tuple(shape)
    if len(spec) != len(shape):
        raise ValueError(
            f"The layout of {name} must have one entry for each of its "
            f"{len(shape)} dimensions. Received: {spec}, shape={shape}"
        )
    for dimension, (length, axis) in enumerate(zip(shape, spec, strict=True)):
        if axis is None:
            continue
        if axis not in axes:
            raise ValueError(
                f"The layout of {name} names an axis that the mesh does not "
                f"have. Received: {spec}, axes={axes}"
            )
        size = axes[axis]
        if length is not None and length % size:
            below = length // size * size
            nearest = " or ".join(str(n) for n in (below, below + size) if n)
            raise ValueError(
                f"Dimension {dimension} of {name} is sharded over the axis "
                f"`{axis}`, whose size {size} must divide it. Nearest lengths "
                f"that fit: {nearest}; nearest sizes of the axis: "
                f"{sharding.nearest_sizes(length, size)}. "
                f"Received: {length}, shape={shape}"
            )


def _axes_of(spec):
    """Returns the axes that `spec` names; None if `spec` is no layout."""
    if not isinstance(spec, tuple | list):
        return None
    named = [axis for axis in spec if axis is not None]
    return named if all(isinstance(axis, str) for axis in named) else None
