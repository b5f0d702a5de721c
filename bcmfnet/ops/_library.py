"""The one library that every op of this package is defined in; schemas stand in Python, so ops need no binary."""

import torch

LIBRARY = torch.library.Library("bcmfnet", "DEF")
