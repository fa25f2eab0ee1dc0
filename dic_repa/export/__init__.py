"""Models for other runtimes: a torch.export program, an ONNX file, or a folder that diffusers opens.

from dic_repa.export import export

The names load on first use.
"""

from dic_repa.runtime.lazy import load_name

_EXPORTS = {
    "FORMATS": "exporting",
    "Exported": "exporting",
    "export": "exporting",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    return load_name(__name__, _EXPORTS, name)


def __dir__():
    return sorted(__all__)
