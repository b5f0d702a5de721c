"""`bcmfnet env`."""

from __future__ import annotations

import json
from typing import Annotated, Any

from cyclopts import Parameter

from bcmfnet.cli.options import CommonOptions


def env(
    *, json_output: Annotated[bool, Parameter(name="--json")] = False, common: CommonOptions = CommonOptions()
) -> int:
    """Print versions, devices, what was built, and which backend serves each op and why.

    Parameters
    ----------
    json_output
        Print JSON.
    """
    from bcmfnet.engine.environment import describe_environment

    facts = describe_environment()
    print(json.dumps(facts, indent=2) if json_output else "\n".join(_lines(facts)))
    return 0


def _lines(facts: dict[str, Any]) -> list[str]:
    cpu, cuda, native = facts["cpu"], facts["cuda"], facts["native"]
    lines = [f"bcmfnet {facts['bcmfnet']}, Python {facts['python']}, {facts['platform']}"]
    lines += [f"{name}: {version or 'not installed'}" for name, version in facts["packages"].items()]
    bf16 = "computes in bf16" if cpu["bf16"] else "no bf16 arithmetic"
    lines.append(f"CPU: {cpu['cores']} cores, {cpu['threads']} threads, {cpu['capability']}, {bf16}")
    devices = ", ".join(cuda["devices"]) or "none"
    lines.append(f"CUDA: torch built with {cuda['torch_built_with'] or 'none'}; devices: {devices}")
    build = native["build"] or {}
    without = f" ({build['without']})" if build.get("without") else ""
    cuda = f"CUDA {build.get('cuda') or 'not built'}{without}"
    loaded = f"loaded, {build.get('cpu')}, compiler {build.get('compiler')}, {cuda}"
    lines.append(f"native library: {native['reason'] or loaded}")
    why = native["reason"] or build.get("without")
    for row in facts["backends"]:
        reason = row["reason"].replace(why, "see the native library") if why else row["reason"]
        lines.append(f"{row['op']} on {row['device']}: {row['backend']} ({reason})")
    return lines
