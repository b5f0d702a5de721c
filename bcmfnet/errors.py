"""Errors that a user can act on: each message is one line that names what was given and what was expected."""


class ConfigError(ValueError):
    """A command line, preset or configuration that cannot be used (exit code 2)."""


class DataError(ValueError):
    """A dataset, image or label file that cannot be used."""


class CheckpointError(ValueError):
    """A weights file or checkpoint that cannot be read, or that belongs to another model."""


class TrainingError(RuntimeError):
    """A training run that cannot go on, with the step and what to try."""
