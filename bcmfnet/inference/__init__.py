"""Trained networks made fast: folded, fused, captured, or handed to another runtime."""

from bcmfnet.inference.network import InferenceNetwork, for_inference

__all__ = ["InferenceNetwork", "for_inference"]
