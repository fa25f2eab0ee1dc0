"""`lite-vae`: the small autoencoder in the package, trained by `python -m dic_repa.training.train_autoencoder`."""

from importlib import resources

from dic_repa.data.autoencoders.base import AutoencoderCard, autoencoders
from dic_repa.data.autoencoders.diffusers_models import KLAutoencoder, open_diffusers


@autoencoders.register("lite-vae", card=AutoencoderCard(4, 4, 1.08, "CC BY-SA 3.0, MIT", "in this package"))
def lite_vae() -> KLAutoencoder:
    """The small autoencoder in the package, for digits, emoji and tests: 4 channels, 4x4 pixels to a latent pixel."""
    return open_diffusers(str(resources.files("dic_repa.data").joinpath("assets/lite-vae")))
