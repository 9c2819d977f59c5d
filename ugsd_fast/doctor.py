"""What this installation can do on this machine, and why it cannot do the rest."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = ("torch", "triton", "transformers", "numpy", "soundfile", "soxr")
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}  # of the dispatcher


def examine() -> dict[str, Any]:
    """Look at everything that the library builds on.

    Returns
    -------
    dict
        ``versions`` (None where a package is absent), ``cpu``, ``gpu``, ``cuda_kernels`` (what they were compiled for,
        the CUDA driver's version and why they cannot run here, each None where there is none), ``ops`` (for each op the
        backend it runs on by default, all backends that it has here, and why the others are missing), ``pair``, and
        ``problems``: what has to be put right before anything can be captioned.

    Examples
    --------
    >>> found = examine()
    >>> "reference" in found["ops"]["token_stats"]["available"]
    True
    """
    problems: list[str] = []
    gpu = _gpu()
    return {
        "versions": _versions(),
        "cpu": _cpu(),
        "gpu": gpu,
        "cuda_kernels": _cuda_kernels(gpu["capability"]),
        "ops": _ops(),
        "pair": _pair(problems),
        "problems": problems,
    }


def _versions() -> dict[str, str | None]:
    from ugsd_fast import __version__

    found: dict[str, str | None] = {"ugsd_fast": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _cpu() -> dict[str, Any]:
    import torch

    from ugsd_fast.demo.run import processor

    try:
        from ugsd_fast import _C as extension
    except ImportError:
        extension = None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": processor(),
        "machine": platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "isa": extension.isa() if extension else None,
        "isa_available": list(extension.isas()) if extension else [],
        "isa_override": os.environ.get("UGSD_CPU_ISA"),
    }


def _gpu() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return {
            "available": True,
            "name": torch.cuda.get_device_name(),
            "capability": f"{major}.{minor}",
            "memory_bytes": torch.cuda.get_device_properties(0).total_memory,
            "reason": None,
        }
    if torch.version.cuda is None and torch.version.hip is None:
        reason = "this torch is a CPU build"
    elif not torch.cuda.device_count():
        reason = f"torch is built for CUDA {torch.version.cuda}, but sees no device"
    else:
        reason = "torch sees a device, but cannot use it"
    return {"available": False, "name": None, "capability": None, "memory_bytes": None, "reason": reason}


def _cuda_kernels(capability: str | None) -> dict[str, Any]:
    try:
        from ugsd_fast.kernels import cuda

        architectures = cuda.architectures().split()
    except ImportError as error:
        return {"architectures": None, "driver": _driver(), "reason": str(error)}
    driver = _driver()
    if driver is None:
        reason = "there is no CUDA driver (libcuda.so.1)"
    elif capability is None:
        reason = "torch sees no CUDA device"
    elif not any(_runs_on(capability, architecture) for architecture in architectures):
        reason = f"the GPU has compute capability {capability}: set UGSD_CUDA_ARCHS and build anew"
    else:
        reason = None
    return {"architectures": architectures, "driver": driver, "reason": reason}


def _runs_on(capability: str, architecture: str) -> bool:
    """Return whether code for ``"sm_90"``, or PTX for ``"compute_75"``, runs on a GPU of a compute capability."""
    kind, _, number = architecture.partition("_")
    have, needed = divmod(int(capability.replace(".", "")), 10), divmod(int(number.rstrip("af")), 10)
    return have >= needed and (kind == "compute" or have[0] == needed[0])


def _driver() -> str | None:
    """Return the version of CUDA that the driver has, None without one. No device is touched."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def _ops() -> dict[str, Any]:
    import torch

    from ugsd_fast import ops

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found: dict[str, Any] = {}
    listed = ops.backends()
    for op, available in listed.items():
        chosen = {device: next((name for name in _PREFERENCE[device] if name in available), None) for device in devices}
        found[op] = {"uses": chosen, "available": list(available), "missing": listed.missing[op]}
    return found


def _pair(problems: list[str]) -> dict[str, Any]:
    from ugsd_fast import demo
    from ugsd_fast.errors import ModelError

    found: dict[str, Any] = {"present": False, "bytes": 0, "clips": 0, "config": None}
    weights = [demo.PAIR_FOLDER / model / "model.safetensors" for model in ("draft", "verifier")]
    for path in weights:
        if not path.is_file():
            problems.append(f"embedded pair: {path.parent.name} has no {path.name}")
    try:
        found["config"] = demo.pair_settings().config.to_dict()
        found["clips"] = len(demo.clips())
    except ModelError as error:
        problems.append(str(error))
    found["bytes"] = _size(demo.PAIR_FOLDER)
    found["present"] = not problems
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def show(found: dict[str, Any], console: Console) -> None:
    """Print what `examine` found."""
    from rich.table import Table
    from rich.text import Text

    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    for name, version in found["versions"].items():
        facts.add_row(name, Text(version or "not installed", style="" if version else "dim"))
    cpu, gpu, pair = found["cpu"], found["gpu"], found["pair"]
    facts.add_row("processor", Text(f"{cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads"))
    if cpu["isa"] is None:
        isa = "none: ugsd_fast._C is not built, the ops run on plain torch"
    else:
        forced = " (UGSD_CPU_ISA)" if cpu["isa_override"] else ""
        isa = f"{cpu['isa']}{forced}, of {', '.join(cpu['isa_available'])}"
    facts.add_row("instruction set", Text(isa))
    memory = f", {gpu['memory_bytes'] / 2**30:.0f} GiB" if gpu["available"] else ""
    facts.add_row(
        "GPU",
        Text(f"{gpu['name']} (compute {gpu['capability']}){memory}" if gpu["available"] else f"none: {gpu['reason']}"),
    )
    facts.add_row("CUDA kernels", Text(_cuda_line(found["cuda_kernels"])))
    described = f"{pair['bytes'] / 2**20:.1f} MiB, {pair['clips']} clips" if pair["present"] else "missing or damaged"
    facts.add_row("embedded pair", Text(described))
    console.print(facts)
    console.print()

    table = Table(title="What each op runs on", title_justify="left")
    table.add_column("op")
    devices = list(next(iter(found["ops"].values()))["uses"])
    for device in devices:
        table.add_column(f"on {device}")
    table.add_column("also here")
    for op, one in found["ops"].items():
        uses = [one["uses"][device] for device in devices]
        also = [name for name in one["available"] if name not in uses]
        cells = [Text(name or "–", style="dim" if name == "reference" else "green") for name in uses]
        table.add_row(op, *cells, Text(", ".join(also) or "–", style="dim"))
    console.print(table)
    console.print(Text("reference is plain torch: right, and no faster than that", style="dim"))
    for backend in ("cpp", "triton", "cuda"):
        reasons = [one["missing"][backend] for one in found["ops"].values() if backend in one["missing"]]
        if reasons:
            others = f", and {len(reasons) - 1} ops more" if len(reasons) > 1 else ""
            console.print(Text(f"no {backend}: {reasons[0]}{others}", style="dim"))
    for problem in found["problems"]:
        console.print(Text.assemble(("problem: ", "bold red"), problem))


def _cuda_line(found: dict[str, Any]) -> str:
    driver = f"driver of CUDA {found['driver']}" if found["driver"] else "no driver"
    if found["architectures"] is None:
        return f"not built: {found['reason']}; {driver}"
    built = [name.replace("compute", "PTX of compute") for name in found["architectures"]]
    reason = f"; not used: {found['reason']}" if found["reason"] else ""
    return f"built for {', '.join(built)}; {driver}{reason}"
