"""Makes translation models by the names of their variants."""

from moe_tf.models.translation import variants
from moe_tf.models.translation.base import TranslationModel
from moe_tf.models.translation.base import keyword_arguments
from moe_tf.models.translation.gnmt import Gnmt
from moe_tf.models.translation.transformer import Transformer

MODELS = {
    variants.GNMT: Gnmt,
    variants.TRANSFORMER: Transformer,
}


def make_translation_model(
    variant_name: str, vocabulary_size: int, **settings: object
) -> TranslationModel:
    """Makes the model of a variant, a `Gnmt` or a `Transformer`.

    Example:

    >>> model = moe_tf.models.make_translation_model(
    ...     "GNMT-MoE-4", 100, width=8, moe={"hidden_units": 16}
    ... )
    >>> type(model).__name__
    'Gnmt'

    Args:
        variant_name: str, see `translation.variants.variant`.
        vocabulary_size: int, `V`, with padding.
        **settings: those of the model's class; `None` for the default. A
            setting of the other architecture may be given if it is `None`.

    Returns:
        A `keras.Model`, not built.

    Raises:
        ValueError: if no variant has this name, or a setting does not fit.
    """
    architecture = variants.variant(variant_name).architecture
    model_class = MODELS[architecture]
    known = keyword_arguments(model_class)
    settings = {
        name: value for name, value in settings.items() if value is not None
    }
    for name, value in settings.items():
        if name not in (*known, "name", "dtype"):
            raise ValueError(
                f"`{name}` is no setting of the variant {variant_name}, which "
                f"has {', '.join(known)}; leave it out. "
                f"Received: {name}={value}"
            )
    return model_class(variant_name, vocabulary_size, **settings)
