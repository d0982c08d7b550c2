"""Translation models as plain data, with parameters and operations.

A variant is a width and two stacks of layers, bottom first; embeddings and
softmax are the same in all. `factory.make_translation_model` makes the model,
`count` counts without making anything.
"""

import dataclasses
import math
import re
from typing import NamedTuple

from moe_tf import checks
from moe_tf.models import layer_specs as layers
from moe_tf.models.layer_specs import Experts
from moe_tf.models.layer_specs import FeedForward

GNMT, TRANSFORMER = "gnmt", "transformer"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A translation model but for its vocabulary.

    Attributes:
        name: str, as `variant` takes it.
        architecture: `"gnmt"` or `"transformer"`.
        width: int, width of embeddings and of every layer's output.
        encoder: tuple of `layer_specs`, bottom first.
        decoder: tuple of `layer_specs`, bottom first.
        tie_embeddings: bool, whether source, target and softmax share one
            table.
    """

    name: str
    architecture: str
    width: int
    encoder: tuple
    decoder: tuple
    tie_embeddings: bool = False

    @property
    def layers(self) -> tuple:
        """All layers, those of the encoder first."""
        return (*self.encoder, *self.decoder)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Cost of a variant.

    Attributes:
        parameters: int.
        ops_per_timestep: int, forward multiply-adds with a weight of one
            source and one target word, softmax included.
    """

    parameters: int
    ops_per_timestep: int


_GNMT_DENSE = ("GNMT", "GNMT-wide")
# How the paper splits the experts of its two hierarchical models is unknown.
_GNMT_SPLITS = {"GNMT-MoE-512-h": (16, 32), "GNMT-MoE-2048-h": (32, 64)}
_GNMT_MULTI = re.compile(r"GNMT-multi-([1-9][0-9]*)")
_GNMT_FLAT = re.compile(r"GNMT-MoE-([1-9][0-9]*)")
_GNMT_TWO_LEVEL = re.compile(r"GNMT-MoE-([1-9][0-9]*)x([1-9][0-9]*)-h")
_TRANSFORMER_MOE = re.compile(r"Transformer-MoE-([1-9][0-9]*)")


def variant(
    name: str, *, gating: str = "noisy_top_k", **sizes: int | None
) -> Variant:
    """Looks up a translation model; sizes default to the paper's.

    Another `width` alone scales every layer alike. Sizes that the
    architecture does not have must be left out or `None`.

    Args:
        name: str, one of
            - `GNMT`: LSTMs and attention alone;
            - `GNMT-wide`: a feed-forward net where the others have experts,
              as wide as the `k` experts that a word reaches: equal
              operations;
            - `GNMT-MoE-<n>`: `n` experts, of which `k = 4`; the paper has
              `GNMT-MoE-32`;
            - `GNMT-MoE-<a>x<b>-h`: `a` branches of `b` experts, `k = 2` of
              each; `GNMT-MoE-512-h` is 16 x 32 and `GNMT-MoE-2048-h` 32 x 64;
            - `GNMT-multi-<n>`: `n` experts four times as wide, of which
              `k = 2`; the paper has `GNMT-multi-512` for many languages;
            - `Transformer`: layers normalised before each part;
            - `Transformer-MoE-<n>`: `n` experts in place of the feed-forward
              net of every `moe_every`-th block, by default `k = 2` of half
              its width: equal operations.
        gating: str, see `SparseMoE`. The paper has `"batchwise"` for one
            language pair and `"noisy_top_k"` for many.
        **sizes: optional ints. Of both: `width` (512), `encoder_layers`
            (3, or 6 of the Transformer), `decoder_layers` (2, or 6). Of the
            experts: `num_experts` (the number in the name; two levels have
            no other), `k`, `hidden_units` (`4 * width`; `16 * width` of
            multi; `feed_forward / k`). Of GNMT: `cells` (`4 * width`), of
            each LSTM, `attention_units` (`width`), `bidirectional` (bool,
            `False`), whether the bottom encoder layer reads both ways. Of
            the Transformer: `num_heads` (8), `feed_forward` (`4 * width`),
            `moe_every` (2), `tie_embeddings` (bool, `True`).

    Returns:
        A `Variant`.

    Raises:
        ValueError: if no variant has this name, or a size does not fit it.
    """
    sizes = {key: size for key, size in sizes.items() if size is not None}
    experts = _default_experts(name)
    _check_settings(name, gating, experts, sizes)
    num_experts = sizes.pop("num_experts", None)
    if num_experts is not None:
        layers.check_num_experts(name, experts.branching, num_experts)
        experts = experts._replace(num_experts=num_experts)
    describe = _gnmt if name.startswith("GNMT") else _transformer
    return describe(name, experts, gating, **sizes)


class _DefaultExperts(NamedTuple):
    """Settings of a variant's experts that its name decides."""

    num_experts: int
    branching: tuple[int, int] | None
    k: int

    def describe(self, hidden_units, k, gating):
        return Experts(
            self.num_experts, hidden_units, k, self.branching, gating
        )


def _default_experts(name):
    """Looks a name up; returns `None` for a variant without experts."""
    if name in ("Transformer", *_GNMT_DENSE):
        return None
    if name in _GNMT_SPLITS:
        a, b = _GNMT_SPLITS[name]
        return _DefaultExperts(a * b, (a, b), 2)
    for pattern, k in (
        (_GNMT_FLAT, 4),
        (_GNMT_MULTI, 2),
        (_TRANSFORMER_MOE, 2),
    ):
        if flat := pattern.fullmatch(name):
            return _DefaultExperts(int(flat[1]), None, k)
    if split := _GNMT_TWO_LEVEL.fullmatch(name):
        a, b = int(split[1]), int(split[2])
        return _DefaultExperts(a * b, (a, b), 2)
    raise ValueError(
        "`name` must be one of GNMT, GNMT-wide, GNMT-MoE-<n>, "
        "GNMT-MoE-<a>x<b>-h, GNMT-MoE-512-h, GNMT-MoE-2048-h, GNMT-multi-<n>, "
        "Transformer, Transformer-MoE-<n>; n, a and b are at least 1. "
        f"Received: name={name}"
    )


def _check_settings(name, gating, experts, sizes):
    """Raises `ValueError` for a setting that the variant does not have."""
    common = {"width", "encoder_layers", "decoder_layers"}
    if name.startswith("GNMT"):
        known = common | {"cells", "attention_units", "bidirectional"}
    else:
        known = common | {"num_heads", "feed_forward", "tie_embeddings"}
    if experts is not None or name == "GNMT-wide":
        known |= {"k", "hidden_units"}
    if experts is not None:
        known |= {"num_experts"}
        known |= set() if name.startswith("GNMT") else {"moe_every"}
    for key, size in sizes.items():
        if key not in known:
            raise ValueError(
                f"`{key}` has no meaning for the variant {name}, which has "
                f"{', '.join(sorted(known))}; leave it out. "
                f"Received: {key}={size}"
            )
        if key not in ("bidirectional", "tie_embeddings"):
            checks.at_least(key, size, 1)
    if experts is None and gating != "noisy_top_k":
        raise ValueError(
            "`gating` is for the variants with a choice of experts; leave it "
            f"out here. Received: gating={gating}, name={name}"
        )
    if gating == "expert_choice":
        raise ValueError(
            "`gating` of a translation model must not look at later words, as "
            f"expert_choice does. Received: gating={gating}"
        )


def _gnmt(
    name,
    experts,
    gating,
    width=512,
    cells=None,
    attention_units=None,
    encoder_layers=3,
    decoder_layers=2,
    k=None,
    hidden_units=None,
    bidirectional=False,
):
    cells = 4 * width if cells is None else cells
    attention_units = width if attention_units is None else attention_units
    if hidden_units is None:
        hidden_units = (16 if _GNMT_MULTI.fullmatch(name) else 4) * width
    if bidirectional and width % 2:
        raise ValueError(
            "`width` must be even with `bidirectional`: each direction gives "
            f"half. Received: width={width}"
        )
    between = ()
    if experts is not None:
        k = experts.k if k is None else k
        between = (experts.describe(hidden_units, k, gating),)
    elif name == "GNMT-wide":
        between = (FeedForward(((4 if k is None else k) * hidden_units,)),)
    lstm = layers.Lstm(cells, projected=True)
    bottom = layers.BidirectionalLstm(cells) if bidirectional else lstm
    encoder = (bottom, *[lstm] * (encoder_layers - 1))
    decoder = (
        layers.AttentionFunction(attention_units),
        layers.AttentionLstm(cells),
        *[lstm] * (decoder_layers - 1),
    )
    if between and min(encoder_layers, decoder_layers) < 2:
        raise ValueError(
            "`encoder_layers` and `decoder_layers` must be at least 2 where "
            "experts stand between the last two. Received: "
            f"encoder_layers={encoder_layers}, decoder_layers={decoder_layers}"
        )
    encoder = (*encoder[:-1], *between, encoder[-1])
    decoder = (*decoder[:-1], *between, decoder[-1])
    return Variant(name, GNMT, width, encoder, decoder)


def _transformer(
    name,
    experts,
    gating,
    width=512,
    num_heads=8,
    feed_forward=None,
    encoder_layers=6,
    decoder_layers=6,
    k=None,
    hidden_units=None,
    moe_every=2,
    tie_embeddings=True,
):
    if width % num_heads:
        raise ValueError(
            "`num_heads` must divide `width`. "
            f"Received: num_heads={num_heads}, width={width}"
        )
    feed_forward = 4 * width if feed_forward is None else feed_forward
    dense = FeedForward((feed_forward,))
    mixture = dense
    if experts is not None:
        k = experts.k if k is None else k
        if hidden_units is None and feed_forward % k:
            raise ValueError(
                "`k` must divide `feed_forward`, or give `hidden_units`. "
                f"Received: k={k}, feed_forward={feed_forward}"
            )
        hidden_units = hidden_units or feed_forward // k
        mixture = experts.describe(hidden_units, k, gating)

    def stack(num_blocks, *attentions):
        blocks = []
        for index in range(num_blocks):
            for attention in attentions:
                blocks += [layers.Norm(), attention]
            has_experts = (index + 1) % moe_every == 0
            blocks += [layers.Norm(), mixture if has_experts else dense]
        return (*blocks, layers.Norm())

    self_attention = layers.SelfAttention(num_heads)
    source_attention = layers.SourceAttention(num_heads)
    return Variant(
        name,
        TRANSFORMER,
        width,
        encoder=stack(encoder_layers, self_attention),
        decoder=stack(decoder_layers, self_attention, source_attention),
        tie_embeddings=tie_embeddings,
    )


def count(
    variant: Variant, vocabulary_size: int, as_in_paper: bool = False
) -> Counts:
    """Counts parameters and operations from the description alone.

    A multiply-add is one operation; experts that a word does not reach cost
    nothing. Operations without weights are not counted: attention scores and
    contexts, whose cost depends on the length. The attention's work for a
    source word counts once.

    Args:
        variant: `Variant`.
        vocabulary_size: int, `V`.
        as_in_paper: bool, whether gates and the attention function, whose
            sizes the paper does not give, are left out, as in the paper's
            tables. Defaults to `False`.

    Returns:
        `Counts`.
    """
    width = variant.width
    table = vocabulary_size * width
    parameters = table * (1 if variant.tie_embeddings else 3)
    operations = table  # of the softmax
    for layer in variant.layers:
        layer_parameters = sum(
            map(math.prod, layers.layer_shapes(layer, width))
        )
        layer_operations = layers.layer_operations(layer, width)
        if as_in_paper and isinstance(layer, layers.AttentionFunction):
            continue
        if as_in_paper and isinstance(layer, Experts):
            expert = 2 * width * layer.hidden_units
            layer_parameters = layer.num_experts * expert
            layer_operations = layer.experts_per_word * expert
        parameters += layer_parameters
        operations += layer_operations
    return Counts(parameters, operations)


def kernel_shapes(
    variant: Variant, vocabulary_size: int
) -> list[tuple[int, ...]]:
    """Returns the shapes of all weights, embeddings and softmax included."""
    table = (vocabulary_size, variant.width)
    shapes = [table] * (1 if variant.tie_embeddings else 3)
    for layer in variant.layers:
        shapes += layers.layer_shapes(layer, variant.width)
    return shapes
