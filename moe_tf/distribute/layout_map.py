"""Says how variables are laid out on a mesh."""

import collections.abc
import re

from moe_tf import sharding


class LayoutMap(collections.abc.Mapping):
    """Layouts of variables by regular expressions on their paths.

    As `keras.distribution.LayoutMap`, but for `moe_tf.MeshStrategy`:

    ```python
    LayoutMap({"embedding/embeddings": ("model", None)})
    ```

    A key that is the path itself comes first; otherwise every key that
    `re.search` finds in the path counts, and they must agree.

    Args:
        layouts: mapping from regular expressions to tuples with the name of a
            mesh axis or None for each dimension. Defaults to none.

    Raises:
        ValueError: a key is no regular expression, or a value no such tuple.
    """

    def __init__(self, layouts=None):
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

    def match(self, path):
        """The layout of the variable `path`.

        Args:
            path: str

        Returns:
            `(pattern, tuple)`; None where no key matches.

        Raises:
            ValueError: keys with different layouts match.
        """
        if path in self._layouts:
            return path, self._layouts[path]
        found = {
            pattern: spec
            for pattern, spec in self._layouts.items()
            if re.search(pattern, path)
        }
        if len(set(found.values())) > 1:
            raise ValueError(
                f"Keys of the layout map disagree about the variable {path}; "
                f"make them narrower. Matching: {found}"
            )
        return next(iter(found.items()), None)

    def unmatched(self, paths):
        """The keys that are for none of the variables `paths`, in a list."""
        return [
            pattern
            for pattern in self._layouts
            if pattern not in paths
            and not any(re.search(pattern, path) for path in paths)
        ]

    def check_axes(self, axes):
        """Raises `ValueError` if a layout names an axis that `axes` has not."""
        for pattern, spec in self._layouts.items():
            for axis in _axes_of(spec):
                if axis not in axes:
                    raise ValueError(
                        f"The layout {spec} of {pattern!r} names the axis "
                        f"`{axis}`, which the mesh does not have. "
                        f"Received: axes={axes}"
                    )


def default_layout_map(axes):
    """The `LayoutMap` that shards the experts of every `SparseMoE`."""
    axis = sharding.expert_axis(axes)
    return LayoutMap({r"experts/expert_(in|out)_kernel$": (axis, None, None)})


def check_divides(name, shape, spec, axes):
    """Refuses a layout that does not suit a shape.

    Args:
        name: str, of what is laid out.
        shape: ints, or None for a dimension that is not known.
        spec: tuple of axis names and None.
        axes: dict from axis to size.

    Raises:
        ValueError: the ranks differ, an axis does not exist, or its size does
            not divide the dimension; with the nearest that would.
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
    """The axes that `spec` names; None if it is no layout."""
    if not isinstance(spec, tuple | list):
        return None
    named = [axis for axis in spec if axis is not None]
    return named if all(isinstance(axis, str) for axis in named) else None
