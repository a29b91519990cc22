"""Power, temperature and clocks of this machine's devices while a benchmark runs.

RAPL counts the energy of processors, NVML describes NVIDIA's GPUs, and jtop NVIDIA's Jetsons. All
are optional: what cannot be read is recorded with its reason, and stops nothing.

The readings of GPUs and Jetsons were not run on hardware. Tests simulate `pynvml` and `jtop`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import msgspec

_RAPL_PARTS = ("dram",)
"""Parts of a package that its own counter leaves out. Cores and graphics are in it."""

_NVML_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "temperature, by the driver",
    0x40: "temperature, by the hardware",
    0x80: "power brake",
}
"""Bits of NVML's reasons for a clock below the one that was asked for (nvml.h). A GPU that is idle,
or whose clocks somebody has set, does not throttle."""


_HIGHEST_MHZ = 20_000
"""No GPU has so many MHz, and none so few kHz."""


class DeviceUse(msgspec.Struct, frozen=True, kw_only=True):
    """What a device of this machine did in the measured time. What is not known is None.

    Attributes:
        source: Where the readings come from: `rapl`, `processor`, `nvml` or `jtop`.
        name: Name of the device; empty if the source has none.
        mean_power_watts: Mean power.
        energy_joules: Energy.
        joules_per_image: Mean power divided by images per second. It includes what the device needs
            when it is idle.
        peak_celsius: Highest temperature.
        lowest_clock_mhz: Lowest clock.
        peak_memory_bytes: Largest memory in use, by all processes.
        throttled: Whether the device ran slower than it could, for one of `throttle_reasons`.
        throttle_reasons: Reasons, such as `power cap`.
        problem: Why a reading is missing, else empty.
    """

    source: str
    name: str = ""
    mean_power_watts: float | None = None
    energy_joules: float | None = None
    joules_per_image: float | None = None
    peak_celsius: float | None = None
    lowest_clock_mhz: float | None = None
    peak_memory_bytes: int | None = None
    throttled: bool | None = None
    throttle_reasons: tuple[str, ...] = ()
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a sensor says at one moment. What it does not say is None.

    Attributes:
        joules: Counter of energy, which only rises.
        watts: Power.
        celsius: Temperature.
        mhz: Clock.
        memory_bytes: Memory in use.
        reasons: Reasons why the device throttles.
        problem: Why there is no reading, else empty.
    """

    joules: float | None = None
    watts: float | None = None
    celsius: float | None = None
    mhz: float | None = None
    memory_bytes: int | None = None
    reasons: frozenset[str] | None = None
    problem: str = ""


class _Sensor(Protocol):
    @property
    def source(self) -> str: ...

    @property
    def name(self) -> str: ...

    def read(self) -> Reading: ...


class _AbsentError(Exception):
    """A source has no device here. The message says why."""


class Sensors:
    """The sensors of this machine. Use as a context manager."""

    def __init__(self, sysfs: Path = Path("/sys")) -> None:
        """Find the sensors.

        Args:
            sysfs: Directory in which Linux shows its devices.
        """
        self._open, self._sensors = ExitStack(), list[_Sensor]()
        self._absent: list[DeviceUse] = []
        finders: dict[str, Callable[[], Iterator[_Sensor]]] = {
            "rapl": lambda: _find_rapl(sysfs),
            "processor": lambda: _find_processor(sysfs),
            "nvml": lambda: _find_nvml(self._open),
            "jtop": lambda: _find_jtop(self._open),
        }
        for source, find in finders.items():
            try:
                self._sensors += find()
            except Exception as error:  # drivers and their packages raise many types
                self._absent.append(DeviceUse(source=source, problem=_describe(error)))

    def __enter__(self) -> Sensors:
        """Return the sensors themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections to drivers."""
        with suppress(Exception):  # what a driver says at the end must not lose a report
            self._open.close()

    def read(self) -> list[Reading]:
        """Return what each sensor says now. It never raises."""
        return [_read(sensor) for sensor in self._sensors]

    def summarise(
        self, samples: Sequence[tuple[float, Sequence[Reading]]], images_per_second: float
    ) -> tuple[DeviceUse, ...]:
        """Return what each device did.

        Args:
            samples: Time in seconds and result of `read`, in order.
            images_per_second: Images per second of the same time.
        """
        times = [when for when, _ in samples]
        found = []
        for index, sensor in enumerate(self._sensors):
            readings = [taken[index] for _, taken in samples]
            energy, power = _measure_energy(times, readings)
            reasons = [each.reasons for each in readings if each.reasons is not None]
            told = sorted(frozenset().union(*reasons))
            found.append(
                DeviceUse(
                    source=sensor.source,
                    name=sensor.name,
                    mean_power_watts=_short(power),
                    energy_joules=_short(energy),
                    joules_per_image=_short(power / images_per_second)
                    if power is not None and images_per_second
                    else None,
                    peak_celsius=max((r.celsius for r in readings if r.celsius is not None),
                                     default=None),
                    lowest_clock_mhz=min((r.mhz for r in readings if r.mhz is not None),
                                         default=None),
                    peak_memory_bytes=max(
                        (r.memory_bytes for r in readings if r.memory_bytes is not None),
                        default=None,
                    ),
                    throttled=bool(told) if reasons else None,
                    throttle_reasons=tuple(told),
                    problem=next((each.problem for each in readings if each.problem), ""),
                )
            )  # fmt: skip
        return (*found, *self._absent)


def _read(sensor: _Sensor) -> Reading:
    try:
        return sensor.read()
    except Exception as error:  # drivers and their packages raise many types
        return Reading(problem=_describe(error))


def _describe(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return f"{error.filename}: permission denied; run as root, or let root run chmod a+r on it"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _measure_energy(
    times: Sequence[float], readings: Sequence[Reading]
) -> tuple[float | None, float | None]:
    """Return joules and mean watts, from a counter of energy or else from the power."""
    counted = [(t, r.joules) for t, r in zip(times, readings, strict=True) if r.joules is not None]
    if len(counted) > 1 and counted[-1][1] >= counted[0][1]:
        energy, elapsed = counted[-1][1] - counted[0][1], counted[-1][0] - counted[0][0]
        return energy, energy / elapsed
    drawn = [(t, r.watts) for t, r in zip(times, readings, strict=True) if r.watts is not None]
    if len(drawn) > 1:
        energy = sum(
            (one + other) / 2 * (end - start) for (start, one), (end, other) in pairwise(drawn)
        )
        return energy, energy / (drawn[-1][0] - drawn[0][0])
    return None, drawn[0][1] if drawn else None


class _Rapl:
    """The counter of energy of a processor or its memory. It starts again when it is full."""

    source = "rapl"

    def __init__(self, directory: Path, name: str) -> None:
        self.name, self._path = name, directory / "energy_uj"
        self._range = int((directory / "max_energy_range_uj").read_text())
        self._last, self._total = -1, 0

    def read(self) -> Reading:
        now = int(self._path.read_text())
        if self._last >= 0:
            self._total += now - self._last + (self._range if now < self._last else 0)
        self._last = now
        return Reading(joules=self._total / 1e6)


def _find_rapl(sysfs: Path) -> Iterator[_Sensor]:
    root = sysfs / "class" / "powercap"
    packages = sorted(root.glob("intel-rapl:[0-9]*"))  # AMD's processors have this name too
    if not packages:
        raise _AbsentError(f"{root}: no intel-rapl, so the processor does not count its energy")
    names = {path: (path / "name").read_text().strip() for path in packages}
    for path, name in names.items():
        outer = names.get(path.with_name(path.name.rpartition(":")[0]))
        if outer is None and name.startswith("package"):
            yield _Rapl(path, name)
        elif outer is not None and name in _RAPL_PARTS:
            yield _Rapl(path, f"{outer} {name}")


class _Processor:
    """Temperature of the processor, and how often its cores were slowed down because of it."""

    source, name = "processor", "processor"

    def __init__(self, zones: Sequence[Path], counts: Sequence[Path]) -> None:
        self._zones, self._counts = zones, counts
        self._last: int | None = None

    def read(self) -> Reading:
        degrees = [int((zone / "temp").read_text()) / 1e3 for zone in self._zones]
        reasons = None
        if self._counts:
            count = sum(int(path.read_text()) for path in self._counts)
            rose = self._last is not None and count > self._last
            self._last, reasons = count, frozenset({"temperature"} if rose else ())
        return Reading(celsius=max(degrees, default=None), reasons=reasons)


def _find_processor(sysfs: Path) -> Iterator[_Sensor]:
    zones = [
        path.parent
        for path in sorted((sysfs / "class" / "thermal").glob("thermal_zone*/type"))
        if path.read_text().strip().lower().startswith(("x86_pkg_temp", "cpu"))
    ]
    cores = sysfs / "devices" / "system" / "cpu"
    counts = sorted(cores.glob("cpu[0-9]*/thermal_throttle/*_throttle_count"))
    if not zones and not counts:
        raise _AbsentError(f"{sysfs}: neither a temperature of the processor nor throttle counts")
    yield _Processor(zones, counts)


class _Nvml:
    """A GPU of NVIDIA. What its driver does not support is None."""

    source = "nvml"

    def __init__(self, nvml: Any, index: int) -> None:
        self._nvml, self._device = nvml, nvml.nvmlDeviceGetHandleByIndex(index)
        name = nvml.nvmlDeviceGetName(self._device)
        self.name = f"{name.decode() if isinstance(name, bytes) else name} ({index})"

    def read(self) -> Reading:
        nvml = self._nvml
        energy = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        power = self._ask("nvmlDeviceGetPowerUsage")
        celsius = self._ask("nvmlDeviceGetTemperatureV", nvml.NVML_TEMPERATURE_GPU)
        if celsius is None:  # an older package or driver
            celsius = self._ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        memory = self._ask("nvmlDeviceGetMemoryInfo")
        bits = self._ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons")
        reading = Reading(
            joules=None if energy is None else energy / 1e3,
            watts=None if power is None else power / 1e3,
            celsius=celsius,
            mhz=self._ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            memory_bytes=None if memory is None else int(memory.used),
            reasons=None if bits is None else _name_reasons(bits),
        )
        if reading == Reading():
            raise _AbsentError("the driver says nothing about this GPU")
        return reading

    def _ask(self, question: str, *details: Any) -> Any:
        function = getattr(self._nvml, question, None)
        if function is None:
            return None
        with suppress(self._nvml.NVMLError):
            return function(self._device, *details)
        return None


def _name_reasons(bits: int) -> frozenset[str]:
    return frozenset(reason for bit, reason in _NVML_REASONS.items() if bits & bit)


def _find_nvml(opened: ExitStack) -> Iterator[_Sensor]:
    nvml = _import("pynvml", "nvidia-ml-py")
    nvml.nvmlInit()
    opened.callback(nvml.nvmlShutdown)
    for index in range(nvml.nvmlDeviceGetCount()):
        yield _Nvml(nvml, index)


class _Jetson:
    """A Jetson, as the service of jetson-stats describes it."""

    source, name = "jtop", "Jetson"

    def __init__(self, jetson: Any) -> None:
        self._jetson = jetson

    def read(self) -> Reading:
        jetson = self._jetson
        if not jetson.ok(spin=True):
            raise _AbsentError("the connection to the service of jetson-stats ended")
        milliwatts = jetson.power.get("tot", {}).get("power")
        degrees = [zone["temp"] for zone in jetson.temperature.values() if zone.get("online", True)]
        clocks = [gpu.get("freq", {}).get("cur") or 0 for gpu in jetson.gpu.values()]
        kibibytes = jetson.memory.get("RAM", {}).get("used")
        return Reading(
            watts=None if milliwatts is None else milliwatts / 1e3,
            celsius=max(degrees, default=None),
            mhz=min((_to_mhz(clock) for clock in clocks if clock), default=None),
            memory_bytes=None if kibibytes is None else int(kibibytes) * 1024,
        )


def _to_mhz(clock: float) -> float:
    """Return the clock of a GPU in MHz. jetson-stats says kHz, or MHz if it asks NVML."""
    return clock / 1e3 if clock > _HIGHEST_MHZ else clock


def _find_jtop(opened: ExitStack) -> Iterator[_Sensor]:
    jtop = _import("jtop", "jetson-stats")
    yield _Jetson(opened.enter_context(jtop.jtop(interval=0.5)))


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise _AbsentError(f"the package {package} is not installed") from None


def _short(value: float | None) -> float | None:
    """Return a value without digits that mean nothing."""
    return None if value is None else float(f"{value:.6g}")
