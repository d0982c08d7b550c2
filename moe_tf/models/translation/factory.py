"""Makes translation models by the names of their variants."""

from moe_tf.models.translation import variants
from moe_tf.models.translation.base import settings_of
from moe_tf.models.translation.gnmt import Gnmt
from moe_tf.models.translation.transformer import Transformer

MODELS = {
    variants.GNMT: Gnmt,
    variants.TRANSFORMER: Transformer,
}


def make(variant_name, vocabulary_size, **settings):
    """The model of a variant, `Gnmt` or `Transformer`.

    Args:
        variant_name: str, see `translation.variants.variant`.
        vocabulary_size: int, `V`, with padding.
        **settings: of the model's class; `None` for its default. Sizes that
            are `None` need not be of the architecture.

    Returns:
        A `keras.Model`, not built.

    Raises:
        ValueError: if no variant has this name, or a setting does not fit.
    """
    architecture = variants.variant(variant_name).architecture
    model_class = MODELS[architecture]
    known = settings_of(model_class)
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
