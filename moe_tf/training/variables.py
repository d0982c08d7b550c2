"""Names for the state of a model in training, for checkpoints."""

import re
from collections.abc import Collection

import keras
import tensorflow as tf


def named_variables(model: keras.Model) -> dict[str, tf.Variable]:
    """Returns the state of a model in training, as variables by name.

    Variables of the model are named `model/<path>`. They are weights and
    states of `SeedGenerator`s, which Keras's weight files leave out, but no
    metrics. Variables of the optimizer are named `optimizer/<path>`, where a
    slot has the path of its weight:
    `optimizer/adam/dense/kernel/momentum`.

    Keras numbers automatic names (`dense_7`) by the layers that the process
    has built before. This function counts anew, in the order of
    `model.variables`, so an identical model gets the same names in any
    process. Names that the user chose stay. A name counts as automatic if it
    is the class's name in lower case, with or without a number.

    Args:
        model: compiled and built Keras model with a built optimizer.

    Returns:
        dict of `tf.Variable` by name, in the order of the model.

    Raises:
        ValueError: model or optimizer is not built, or two weights have the
            same path.
    """
    optimizer = getattr(model, "optimizer", None)
    if not (model.built and optimizer is not None and optimizer.built):
        raise ValueError(
            "`model` must be built and compiled, and its optimizer built. "
            "Call `model.build`, `model.compile` and "
            "`model.optimizer.build(model.trainable_variables)`. Received: "
            f"{model.name}, optimizer {optimizer}"
        )
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    # `model.layers` has no layers of layers, and nothing public has.
    owners = [*model._flatten_layers(), optimizer, inner]
    weights = _unique(model.variables)
    slots = _unique(optimizer.variables)
    rename = _renumber(owners, [v.path for v in weights + slots])
    flat = {v.path.replace("/", "_"): rename(v.path) for v in weights}
    named = [(f"model/{rename(v.path)}", v) for v in weights]
    named += [(f"optimizer/{_name_slot(v, flat, rename)}", v) for v in slots]
    return _to_dict(named)


def _unique(variables):
    """Drops repetitions: layers that share a seed generator list it twice."""
    return list({id(v): v for v in variables}.values())


def _renumber(owners, paths):
    """Returns a function that counts automatic names in a path anew."""
    automatic = {}
    for owner in owners:
        base = re.sub(r"_\d+$", "", owner.name)
        kind = re.sub(r"^(forward|backward)_", "", base)  # of `Bidirectional`
        kind = kind.replace("_", "").lower()
        if kind == type(owner).__name__.replace("_", "").lower():
            automatic[owner.name] = base
    fresh, counts = {}, {}
    for part in "/".join(paths).split("/"):
        if part in fresh:
            continue
        nameless = re.fullmatch(r"(seed_generator|variable)(_\d+)?", part)
        base = nameless[1] if nameless else automatic.get(part)
        if base is None:
            fresh[part] = part
            continue
        number = counts[base] = counts.get(base, -1) + 1
        fresh[part] = f"{base}_{number}" if number else base
    return lambda path: "/".join(fresh[part] for part in path.split("/"))


def _name_slot(variable, flat, rename):
    """`adam/<flattened path>_momentum` as `adam/<path>/momentum`."""
    scope, _, name = variable.path.rpartition("/")
    owners = [path for path in flat if name.startswith(path + "_")]
    if not owners:
        return rename(variable.path)
    owner = max(owners, key=len)
    return f"{rename(scope)}/{flat[owner]}/{name[len(owner) + 1 :]}"


def _to_dict(named):
    result, twice = {}, []
    for name, variable in named:
        if name in result and name.endswith("/seed_generator_state"):
            # Copies of a layer share the name of its generator.
            number = sum(n.partition(":")[0] == name for n in result)
            name = f"{name}:{number}"
        if name in result:
            twice.append(name)
        result[name] = variable.value
    if twice:
        raise ValueError(
            "Variables must have different paths; give layers and weights "
            f"different names. Received more than once: {list_some(twice)}"
        )
    return result


def list_some(names: Collection[str], limit: int = 10) -> str:
    """Lists the first `limit` of the sorted names, and their count."""
    some = ", ".join(sorted(names)[:limit])
    return some if len(names) <= limit else f"{some}, ... ({len(names)} in all)"
