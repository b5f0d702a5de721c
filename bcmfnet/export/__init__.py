"""Trained networks as files that other runtimes run: written, checked and read again."""

from bcmfnet.export.files import FORMATS, ExportedFile, export, format_of, least_side, read_exported
from bcmfnet.export.graph import DeployedGraph

__all__ = ["FORMATS", "DeployedGraph", "ExportedFile", "export", "format_of", "least_side", "read_exported"]
