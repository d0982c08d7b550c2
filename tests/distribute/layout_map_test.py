"""Layouts by path: which rule wins, and what is refused."""

import pytest

from moe_tf.distribute import LayoutMap
from moe_tf.distribute import layout_map as layout_maps


def test_search_and_exact_keys():
    layouts = LayoutMap(
        {"kernel": ("batch", None), "a/kernel": (None, "batch")}
    )
    assert layouts.match("a/kernel") == ("a/kernel", (None, "batch"))
    assert layouts.match("b/kernel_1") == ("kernel", ("batch", None))
    assert layouts.match("b/bias") is None


def test_keys_that_agree():
    layouts = LayoutMap({"kernel": ("batch",), "a": ("batch",)})
    assert layouts.match("a/kernel")[1] == ("batch",)


def test_keys_for_nothing():
    layouts = LayoutMap({"a/kernel": (None,), "b$": (None,), "c": (None,)})
    assert layouts.unmatched(["a/kernel", "b/c"]) == ["b$"]


def test_keys_that_disagree():
    layouts = LayoutMap({"kernel": ("batch",), "a": (None,)})
    with pytest.raises(ValueError, match="disagree about the variable a/ker"):
        layouts.match("a/kernel")


@pytest.mark.parametrize(
    "layouts,message",
    [
        ({"(": ("batch",)}, "must be regular expressions"),
        ({3: ("batch",)}, "must be regular expressions"),
        ({"a": "batch"}, "must be tuples"),
        ({"a": ("batch", 2)}, "must be tuples"),
        ({"a": ("batch", "batch")}, "different axes"),
    ],
)
def test_layouts_are_refused(layouts, message):
    with pytest.raises(ValueError, match=message):
        LayoutMap(layouts)


@pytest.mark.parametrize(
    "axes,axis",
    [({"batch": 2}, "batch"), ({"batch": 2, "expert": 2}, "expert")],
)
def test_default(axes, axis):
    layouts = layout_maps.default_layout_map(axes)
    for path in ("moe/experts/expert_in_kernel", "experts/expert_out_kernel"):
        assert layouts.match(path)[1] == (axis, None, None)
    assert layouts.match("moe/router/expert_in_kernel") is None
    assert layouts.match("moe/experts/expert_in_kernel_2") is None


@pytest.mark.parametrize(
    "shape,spec,message",
    [
        (
            (6, 2),
            ("batch", None),
            r"fit: 4 or 8; .* axis: 3 or 6\. Received: 6",
        ),
        ((3, 2), ("batch", None), r"fit: 4; .* axis: 3\. Received: 3"),
        ((2, 6), (None, "batch"), r"Dimension 1 of w .* `batch`"),
        ((8,), ("batch", None), "one entry for each of its 1 dim"),
        ((8,), ("model",), "names an axis that the mesh does not"),
    ],
)
def test_what_does_not_divide(shape, spec, message):
    with pytest.raises(ValueError, match=message):
        layout_maps.check_divides("w", shape, spec, {"batch": 4})


def test_what_divides():
    layout_maps.check_divides("w", (8, 3), ("batch", None), {"batch": 4})
    layout_maps.check_divides("w", (None,), ("batch",), {"batch": 4})
