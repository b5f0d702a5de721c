"""Public ops. A module of this folder that does not start with an underscore and lists `OPS` adds those names."""

from importlib import import_module
from pkgutil import iter_modules

__all__ = []

for _module in iter_modules(__path__):
    if not _module.name.startswith("_"):
        _ops = import_module(f"{__name__}.{_module.name}")
        for _name in getattr(_ops, "OPS", ()):
            globals()[_name] = getattr(_ops, _name)
            __all__.append(_name)
