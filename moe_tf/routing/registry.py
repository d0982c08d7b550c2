"""The routers by name, and the one that the arguments of a layer ask for."""

import inspect

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
TWO_LEVEL = {
    "noisy_top_k": hierarchical.HierarchicalRouter,
    "batchwise": hierarchical_batchwise.HierarchicalBatchwiseRouter,
}


def make_router(
    num_experts, gating, branching=None, seed=None, dtype=None, **settings
):
    """The router that the arguments of `SparseMoE` ask for."""
    settings = {
        name: value for name, value in settings.items() if value is not None
    }
    if isinstance(gating, router.Router):
        if branching is not None or seed is not None:
            settings.update(branching=branching, seed=seed)
        if settings:
            raise ValueError(
                "With a router as `gating`, give these settings to the "
                f"router. Received: gating={gating}, {settings}"
            )
        if gating.num_experts != num_experts:
            raise ValueError(
                "`num_experts` must be that of the router. Received: "
                f"num_experts={num_experts}, the router's "
                f"num_experts={gating.num_experts}"
            )
        if gating.is_taken:
            raise ValueError(
                "Each layer needs a router of its own: a file could not hold "
                f"one of two layers. Received again: gating={gating}"
            )
        gating.is_taken = True
        return gating
    if not isinstance(gating, str) or gating not in ROUTERS:
        raise ValueError(
            f"`gating` must be one of {', '.join(ROUTERS)}, or a `Router`. "
            f"Received: gating={gating}"
        )
    router_class, size = ROUTERS[gating], num_experts
    if branching is not None:
        router_class, size = _hierarchical(gating, num_experts, branching)
    taken = inspect.signature(router_class).parameters
    for name, value in settings.items():
        if name not in taken:
            raise ValueError(
                f"`{name}` has no meaning with gating={gating}, "
                f"branching={branching}; leave it out. "
                f"Received: {name}={value}"
            )
    if "seed" in taken:
        settings["seed"] = seed
    return router_class(size, dtype=dtype, name="router", **settings)


def _hierarchical(gating, num_experts, branching):
    if gating not in TWO_LEVEL:
        raise ValueError(
            f"`branching` is for gating={' or '.join(TWO_LEVEL)}. "
            f"Received: branching={branching}, gating={gating}"
        )
    groups, group_size = two_level.check_branching(branching)
    if groups * group_size != num_experts:
        raise ValueError(
            "`branching` must be two numbers whose product is `num_experts`. "
            f"Received: branching={branching}, num_experts={num_experts}"
        )
    return TWO_LEVEL[gating], branching
