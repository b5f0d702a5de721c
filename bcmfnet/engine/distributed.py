"""The processes of a run: one, or those that torchrun started, which train one network together.

Every process takes the same decisions at the same step, so that none waits for a collective that another does not
enter: what only one of them knows (a signal, a file) goes through `Processes` first.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bcmfnet.errors import ConfigError

LAUNCHER = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets beside WORLD_SIZE."""
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of its run. The one of rank 0 leads: it alone writes files."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    restarts: int = 0
    """How often the launcher has started the processes again after one of them had failed."""

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """What collectives of torch call all of them; None of one."""
        return dist.group.WORLD if self.count > 1 else None

    def from_leader(self, function: Callable[[], T]) -> T:
        """What the function returns in the leading process, in all of them; what it raises there is raised in all."""
        if self.count == 1:
            return function()
        answer: list[Any] = [None, None]
        if self.leads:
            try:
                answer[0] = function()
            except Exception as error:
                answer[1] = error
        dist.broadcast_object_list(answer)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def largest(self, number: int) -> int:
        """The largest of the numbers that the processes bring."""
        if self.count == 1:
            return number
        value = torch.tensor(number)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes; a device is not waited for."""
        if self.count == 1:
            return values
        dist.all_reduce(values)
        return values / self.count

    def add_up(self, arrays: Iterable[np.ndarray]) -> None:
        """Replace each array by its sum over the processes."""
        if self.count > 1:
            for array in arrays:
                dist.all_reduce(torch.from_numpy(array))

    def copy_from_leader(self, model: nn.Module) -> None:
        """Give a network the weights and statistics that it has in the leading process."""
        if self.count > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def lost(self, error: RuntimeError) -> bool:
        """Whether an error says that another process cannot be reached any more."""
        return self.count > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))

    def parallel(self, model: nn.Module) -> nn.Module:
        """The network in a form whose backward averages gradients over the processes, as `forward` and `no_sync`.

        On GPUs its batch norms share their statistics; on CPUs each process has those of its own frames. The running
        ones are those of the leading process.
        """
        if self.count == 1:
            return model
        on_gpu = next(model.parameters()).device.type == "cuda"
        if on_gpu:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return DistributedDataParallel(model, [self.local_rank] if on_gpu else None, gradient_as_bucket_view=True)


ALONE = Processes()


@contextlib.contextmanager
def launched_processes() -> Iterator[Processes]:
    """The processes that torchrun started, joined for the time of the code inside; one where it started none.

    Raises ConfigError where WORLD_SIZE is set by something else than torchrun.
    """
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        yield Processes(restarts=_number("TORCHELASTIC_RESTART_COUNT"))
        return
    missing = [name for name in LAUNCHER if name not in os.environ]
    if missing:
        advice = "start several processes with torchrun"
        raise ConfigError(f"WORLD_SIZE: expected {', '.join(LAUNCHER)} beside {count}, got no {missing[0]}; {advice}")
    processes = Processes(
        _number("RANK"), _number("WORLD_SIZE"), _number("LOCAL_RANK"), _number("TORCHELASTIC_RESTART_COUNT")
    )
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield processes
    finally:
        dist.destroy_process_group()


def _number(variable: str) -> int:
    text = os.environ.get(variable, "0")
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{variable}: expected a number, as torchrun sets it, got {text!r}") from None
