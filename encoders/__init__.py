"""Frozen vision encoders, whose tokens a denoiser's hidden state is aligned with.

    encoder = create_encoder("digits-vit")
    tokens = encoder(images)                      # (B, 1 or 3, H, W) in [0, 1] -> (B, h * w, encoder.embed_dim)
    h, w = encoder.token_grid(images.shape[-2:])

`dic-repa encoders` lists them.
"""

from dic_repa.encoders.base import (
    Card,
    Encoder,
    check_tokens,
    create_encoder,
    encoder_card,
    list_encoders,
    register_encoder,
)
from dic_repa.encoders.licences import encoder_licence

__all__ = [
    "Card",
    "Encoder",
    "check_tokens",
    "create_encoder",
    "encoder_card",
    "encoder_licence",
    "list_encoders",
    "register_encoder",
]
