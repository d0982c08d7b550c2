"""Table of routers by name, and creation of a layer's router.

A new router is a subclass of `Router` and a row in `ROUTERS` here, or in
`TWO_LEVEL_ROUTERS`. The class gives the shapes of its weights and its
operations, which models and dry runs read (`router_class`).
"""

import inspect

import keras

from moe_tf.routing import batchwise
from moe_tf.routing import expert_choice
from moe_tf.routing import hierarchical
from moe_tf.routing import hierarchical_batchwise
from moe_tf.routing import noisy_top_k
from moe_tf.routing import router
from moe_tf.routing import softmax_top_k
from moe_tf.routing import two_level

ROUTERS = {
    "noisy_top_k": noisy_top_k.NoisyTopKRouter,
    "softmax_top_k": softmax_top_k.SoftmaxTopKRouter,
    "switch": softmax_top_k.SwitchRouter,
    "batchwise": batchwise.BatchwiseRouter,
    "expert_choice": expert_choice.ExpertChoiceRouter,
}
TWO_LEVEL_ROUTERS = {
    "noisy_top_k": hierarchical.HierarchicalRouter,
    "batchwise": hierarchical_batchwise.HierarchicalBatchwiseRouter,
}


def router_class(
    gating: str, branching: tuple[int, int] | None = None
) -> type[router.Router]:
    """Returns the class of a router by its name.

    Args:
        gating: str, a name in `ROUTERS`.
        branching: optional pair of ints, for a router of two levels.

    Raises:
        ValueError: if there is no router of this name, or none of two levels.
    """
    if not isinstance(gating, str) or gating not in ROUTERS:
        raise ValueError(
            f"`gating` must be one of {', '.join(ROUTERS)}, or a `Router`. "
            f"Received: gating={gating}"
        )
    if branching is None:
        return ROUTERS[gating]
    if gating not in TWO_LEVEL_ROUTERS:
        raise ValueError(
            f"`branching` is for gating={' or '.join(TWO_LEVEL_ROUTERS)}. "
            f"Received: branching={branching}, gating={gating}"
        )
    return TWO_LEVEL_ROUTERS[gating]


def make_router(
    num_experts: int,
    gating: str | router.Router,
    branching: tuple[int, int] | None = None,
    seed: int | None = None,
    dtype: str | keras.DTypePolicy | None = None,
    **settings,
) -> router.Router:
    """Makes the router of a `SparseMoE` from the layer's arguments.

    Args:
        num_experts, gating, branching, seed: see `SparseMoE`.
        dtype: optional, the layer's policy.
        **settings: arguments of the router's constructor; `None` stands for
            the router's default.

    Raises:
        ValueError: if the router has no such setting, or a router that is
            passed as `gating` does not fit.
    """
    settings = {
        name: value for name, value in settings.items() if value is not None
    }
    if isinstance(gating, router.Router):
        if branching is not None or seed is not None:
            settings.update(branching=branching, seed=seed)
        return _claim(gating, num_experts, settings)
    router_type = router_class(gating, branching)
    if branching is not None:
        _check_product(branching, num_experts)
    known = inspect.signature(router_type).parameters
    for name, value in settings.items():
        if name not in known:
            raise ValueError(
                f"`{name}` has no meaning with gating={gating}, "
                f"branching={branching}; leave it out. "
                f"Received: {name}={value}"
            )
    if "seed" in known:
        settings["seed"] = seed
    size = num_experts if branching is None else branching
    return router_type(size, dtype=dtype, name="router", **settings)


def _claim(given, num_experts, settings):
    """Returns a router that was passed to a layer, and marks it as taken."""
    if settings:
        raise ValueError(
            "With a router as `gating`, give these settings to the "
            f"router. Received: gating={given}, {settings}"
        )
    if given.num_experts != num_experts:
        raise ValueError(
            "`num_experts` must be that of the router. Received: "
            f"num_experts={num_experts}, the router's "
            f"num_experts={given.num_experts}"
        )
    if given.is_taken:
        raise ValueError(
            "Each layer needs a router of its own, since a saved model cannot "
            f"share one between layers. Received again: gating={given}"
        )
    given.is_taken = True
    return given


def _check_product(branching, num_experts):
    num_branches, branch_size = two_level.check_branching(branching)
    if num_branches * branch_size != num_experts:
        raise ValueError(
            "`branching` must be two numbers whose product is `num_experts`. "
            f"Received: branching={branching}, num_experts={num_experts}"
        )
