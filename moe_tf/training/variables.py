"""Names for the state of a model in training, for checkpoints."""

import re

import tensorflow as tf


def named_variables(model) -> dict[str, tf.Variable]:
    """The variables that make up the state of a model in training.

    They are those of `model` (weights and states of `SeedGenerator`s, which
    Keras's weight files leave out; no metrics) as `model/<path>`, and those
    of its optimizer as `optimizer/<path>`, where a slot has its weight's path:
    `optimizer/adam/dense/kernel/momentum`.

    Keras numbers names that the user did not choose (`dense_7`) by what the
    process has built before. Such numbers are given anew, in the order of
    `model.variables`, so an identical model gets the same names in any
    process; chosen names stay. A name counts as not chosen if it is the
    class's in lower case, with or without a number.

    Args:
        model: compiled and built Keras model with a built optimizer.

    Returns:
        dict of `tf.Variable` by name, in the order of the model.

    Raises:
        ValueError: something is not built, or weights have the same path.
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
    """Without repetitions: layers that share a seed generator list it twice."""
    return list({id(v): v for v in variables}.values())


def _renumber(owners, paths):
    """A function from a path to the path with its automatic numbers anew."""
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


def list_some(names, limit=10):
    """The first `limit` of the names, sorted, and how many there are."""
    some = ", ".join(sorted(names)[:limit])
    return some if len(names) <= limit else f"{some}, ... ({len(names)} in all)"
