"""Flags of a training run that takes seconds."""

TINY = ("--data.crop", "64", "96", "--data.batch-size", "2", "--data.workers", "0", "--data.length", "8",
        "--device", "cpu", "--amp", "off")  # fmt: skip
