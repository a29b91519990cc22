"""`crl doctor`: what this machine has, and which engine it would use for a bundle."""

from __future__ import annotations

import msgspec
from rich.markup import escape
from rich.table import Table

from crl_sdk.cli._console import JsonOption, note, out, print_facts, print_json
from crl_sdk.cli._options import BundleOption, command, open_bundle
from crl_sdk.engines._family import EngineCandidate
from crl_sdk.engines._machine import Machine, inspect_machine
from crl_sdk.engines._ranking import has_records
from crl_sdk.engines._selection import choose_engine, list_candidates
from crl_sdk.errors import EngineError
from crl_sdk.model._bundle import ModelBundle


def doctor(bundle: BundleOption = None, as_json: JsonOption = False) -> None:
    """Show what this machine has, which engine runs a bundle here, and why not the others."""
    opened = open_bundle(bundle)
    machine = inspect_machine()
    engines = list_candidates(opened)
    if as_json:
        print_json(
            {
                "machine": msgspec.to_builtins(machine),
                "bundle": str(opened.path),
                "engines": [_record(each) for each in engines],
                "chosen": str(chosen.name) if (chosen := _chosen(engines)) else None,
            }
        )
        return
    print_facts("this machine", _facts(machine))
    out.print(_table(opened, engines))
    if not any(each.measured for each in engines):
        again = command("verify", str(opened.path), "--all")
        others = "; records of other machines or versions are ignored"
        note(
            f"the engines were not measured here{others if has_records(opened) else ''}: {again} "
            "lets auto take the fastest that agrees"
        )


def _facts(machine: Machine) -> dict[str, object]:
    gpus = [f"{gpu.name}, {gpu.architecture}, {gpu.memory >> 20} MiB" for gpu in machine.gpus]
    return {
        "system": machine.system,
        "processor": machine.processor,
        "threads": _threads(machine),
        "instructions": ", ".join(machine.features) or "none that matter to inference",
        "memory": f"{machine.memory >> 20} MiB",
        "GPUs": "; ".join(gpus) or "none",
        "CUDA": machine.cuda,
        **{str(runtime): version for runtime, version in machine.runtimes.items()},
        "ONNX Runtime": ", ".join(machine.providers) or "not installed",
        "packages": ", ".join(f"{name} {found}" for name, found in machine.packages.items()),
        "CRL SDK": f"{machine.crl_sdk}, Python {machine.python}",
    }


def _threads(machine: Machine) -> str:
    """Return how many threads the SDK uses here, and what limits them."""
    limits = [f"of {machine.processors} processors"]
    if machine.allowed < machine.processors:
        limits.append(f"{machine.allowed} allowed by the affinity of this process")
    if machine.quota is not None:
        limits.append(f"a CPU quota of {machine.quota:g}")
    return f"{machine.threads}, {machine.cores} in an engine run ({', '.join(limits)})"


def _record(candidate: EngineCandidate) -> dict[str, object]:
    return {
        "engine": str(candidate.name),
        "usable": candidate.usable,
        "automatic": candidate.automatic,
        "measured": candidate.measured,
        "reason": candidate.reason,
    }


def _table(bundle: ModelBundle, engines: list[EngineCandidate]) -> Table:
    table = Table("engine", "state", title=str(bundle.path), title_justify="left")
    table.add_column("why", overflow="fold")  # it contains commands to copy
    chosen = _chosen(engines)
    for each in engines:
        state = "chosen" if each is chosen else "usable" if each.usable else "no"
        table.add_row(escape(str(each.name)), state, escape(each.reason))
    return table


def _chosen(engines: list[EngineCandidate]) -> EngineCandidate | None:
    try:
        return choose_engine(engines, "auto")
    except EngineError:
        return None
