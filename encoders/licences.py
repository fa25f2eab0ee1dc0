"""Under which licence an encoder's weights are, without building it."""

from dic_repa.encoders.base import encoders
from dic_repa.errors import UserError


def encoder_licence(name: str) -> str:
    """The licence of the weights of the encoder `name`; "" where it is not known."""
    family, colon, model = name.partition(":")
    if family == "timm" and colon:
        from timm.models import get_pretrained_cfg  # timm takes seconds to import

        return getattr(get_pretrained_cfg(model), "license", None) or ""
    try:
        card = encoders.fact(name, "card")
    except UserError:  # an encoder of somebody's own, which is not on this machine
        card = None
    return card.licence if card else ""
