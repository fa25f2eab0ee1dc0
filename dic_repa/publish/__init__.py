"""A model as a repository of the Hugging Face hub: its folder, its scores, its card, the upload."""

from dic_repa.publish.folder import write_repository
from dic_repa.publish.upload import push

__all__ = ["push", "write_repository"]
