"""Measurements, imported as bcmfnet.benchmarks; each figure that the project states is a row under results/."""
