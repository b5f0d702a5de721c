"""Flags of training runs that take seconds."""

FRAMES = ("--data.crop", "64", "96", "--data.batch-size", "2", "--data.length", "8")
TINY = (*FRAMES, "--data.workers", "0", "--device", "cpu", "--amp", "off")
