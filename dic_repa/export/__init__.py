"""Models for other runtimes: a torch.export program, an ONNX file, or a folder that diffusers opens."""

from dic_repa.export.exporting import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
