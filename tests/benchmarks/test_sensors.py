"""Sensors of power and temperature, on simulated trees of /sys and simulated drivers."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from crl_benchmarks.bench import BenchSettings, _sampled, engine_rows, report
from crl_benchmarks.bench_report import Subject
from crl_benchmarks.sampling import Sampling
from crl_benchmarks.sensors import Sensors
from crl_sdk import ModelBundle, demo_bundle
from crl_sdk.cli._bench_tables import print_report
from crl_sdk.engines._selection import open_engine


@pytest.fixture(autouse=True)
def no_drivers(monkeypatch):
    """Neither NVML nor jtop is installed, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "jtop", None)


def counter(sysfs: Path, folder: str, name: str, joules: float, full: float = 1000.0) -> Path:
    """Write a counter of RAPL, and return its file."""
    directory = sysfs / "class" / "powercap" / folder
    directory.mkdir(parents=True)
    (directory / "name").write_text(f"{name}\n")
    (directory / "max_energy_range_uj").write_text(f"{int(full * 1e6)}\n")
    (directory / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    return directory / "energy_uj"


def zone(sysfs: Path, kind: str, degrees: float) -> Path:
    """Write a temperature, and return its file."""
    thermal = sysfs / "class" / "thermal"
    directory = thermal / f"thermal_zone{len(list(thermal.glob('*')))}"
    directory.mkdir(parents=True)
    (directory / "type").write_text(f"{kind}\n")
    (directory / "temp").write_text(f"{int(degrees * 1000)}\n")
    return directory / "temp"


def throttle_count(sysfs: Path, core: int, count: int) -> Path:
    """Write how often a core was throttled, and return the file."""
    directory = sysfs / f"devices/system/cpu/cpu{core}/thermal_throttle"
    directory.mkdir(parents=True)
    (directory / "core_throttle_count").write_text(f"{count}\n")
    return directory / "core_throttle_count"


def used(found, source, name=None):
    """Return what one device did."""
    (device,) = (d for d in found if d.source == source and name in (None, d.name))
    return device


def test_energy_is_counted_and_a_full_counter_starts_again(tmp_path):
    package = counter(tmp_path, "intel-rapl:0", "package-0", 900)
    counter(tmp_path, "intel-rapl:0:0", "core", 1)  # it is in the package
    memory = counter(tmp_path, "intel-rapl:0:1", "dram", 5)
    counter(tmp_path, "intel-rapl:1", "psys", 1)  # the package is in it
    with Sensors(tmp_path) as opened:
        samples = [(10.0, opened.read())]
        for when, joules in ((11.0, 980), (12.0, 60), (14.0, 100)):  # full at 1000
            package.write_text(f"{joules * 10**6}")
            memory.write_text(f"{int(5 + when - 10) * 10**6}")
            samples.append((when, opened.read()))
        found = opened.summarise(samples, images_per_second=25.0)
    assert [d.name for d in found if d.source == "rapl"] == ["package-0", "package-0 dram"]
    assert used(found, "rapl", "package-0").energy_joules == pytest.approx(200)
    assert used(found, "rapl", "package-0").mean_power_watts == pytest.approx(50)
    assert used(found, "rapl", "package-0").joules_per_image == pytest.approx(2)
    assert used(found, "rapl", "package-0 dram").energy_joules == pytest.approx(4)
    assert used(found, "rapl", "package-0").throttled is None  # RAPL does not say


def test_a_counter_that_may_not_be_read_says_what_to_do(tmp_path, monkeypatch):
    energy = counter(tmp_path, "intel-rapl:0", "package-0", 1)
    read_text = Path.read_text

    def denied(self, *args, **options):
        if self == energy:
            raise PermissionError(13, "Permission denied", str(self))
        return read_text(self, *args, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    with Sensors(tmp_path) as opened:
        found = opened.summarise([(0.0, opened.read()), (1.0, opened.read())], 10.0)
    device = used(found, "rapl")
    assert device.energy_joules is None and device.mean_power_watts is None
    assert str(energy) in device.problem and "permission denied; run as root" in device.problem


def test_a_processor_that_gets_hot_and_slow(tmp_path):
    degrees = zone(tmp_path, "x86_pkg_temp", 60)
    zone(tmp_path, "iwlwifi_1", 99)  # not the processor
    counts = [throttle_count(tmp_path, core, 7) for core in range(2)]
    with Sensors(tmp_path) as opened:
        samples = [(0.0, opened.read()), (1.0, opened.read())]
        assert used(opened.summarise(samples, 1.0), "processor").throttled is False
        degrees.write_text("95500")
        counts[1].write_text("9")
        samples.append((2.0, opened.read()))
        degrees.write_text("70000")
        samples.append((3.0, opened.read()))
        device = used(opened.summarise(samples, 1.0), "processor")
    assert device.throttled is True and device.throttle_reasons == ("temperature",)
    assert device.peak_celsius == 95.5 and device.mean_power_watts is None


def test_what_is_not_there_is_said(tmp_path):
    with Sensors(tmp_path) as opened:
        assert opened.read() == []
        found = opened.summarise([], 0.0)
    assert {device.source for device in found} == {"rapl", "processor", "nvml", "jtop"}
    assert all(device.problem and device.mean_power_watts is None for device in found)
    assert used(found, "nvml").problem == "the package nvidia-ml-py is not installed"
    assert used(found, "jtop").problem == "the package jetson-stats is not installed"


QUESTIONS = (
    "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetTemperature",
    "nvmlDeviceGetClockInfo", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
)  # fmt: skip


class NVMLError(Exception):
    """As in nvidia-ml-py."""


class Nvml(ModuleType):
    """A driver with one GPU. What is `unsupported` raises, and what is `absent` does not exist."""

    NVMLError, NVML_TEMPERATURE_GPU, NVML_CLOCK_SM = NVMLError, 0, 1

    def __init__(self, unsupported=(), absent=()):
        super().__init__("pynvml")
        self.joules, self.watts, self.bits, self.closed = 100.0, 300.0, 0x1, False
        self._unsupported, self._absent = unsupported, absent

    def __getattr__(self, name):
        values = {
            "nvmlInit": lambda: None,
            "nvmlShutdown": lambda: setattr(self, "closed", True),
            "nvmlDeviceGetCount": lambda: 1,
            "nvmlDeviceGetHandleByIndex": lambda index: f"handle {index}",
            "nvmlDeviceGetName": lambda device: b"NVIDIA Fake",
            "nvmlDeviceGetTotalEnergyConsumption": lambda device: int(self.joules * 1000),
            "nvmlDeviceGetPowerUsage": lambda device: int(self.watts * 1000),
            "nvmlDeviceGetTemperature": lambda device, sensor: 71,
            "nvmlDeviceGetClockInfo": lambda device, clock: 1410,
            "nvmlDeviceGetMemoryInfo": lambda device: SimpleNamespace(used=3 * 2**30),
            "nvmlDeviceGetCurrentClocksEventReasons": lambda device: self.bits,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda device: self.bits,
        }
        if name.startswith("__") or name in self._absent or name not in values:
            raise AttributeError(name)
        if name in self._unsupported:
            return lambda *_: (_ for _ in ()).throw(NVMLError("Not Supported"))
        return values[name]


def test_a_gpu_with_a_counter_of_energy(tmp_path, monkeypatch):
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Sensors(tmp_path) as opened:
        samples = [(0.0, opened.read())]
        nvml.joules, nvml.bits = 700.0, 0x1 | 0x4 | 0x40
        samples.append((2.0, opened.read()))
        device = used(opened.summarise(samples, 100.0), "nvml")
    assert nvml.closed
    assert device.name == "NVIDIA Fake (0)" and device.problem == ""
    assert device.energy_joules == 600 and device.mean_power_watts == 300
    assert device.joules_per_image == 3 and device.peak_celsius == 71
    assert device.lowest_clock_mhz == 1410 and device.peak_memory_bytes == 3 * 2**30
    assert device.throttled and device.throttle_reasons == (
        "power cap", "temperature, by the hardware",
    )  # fmt: skip


def test_a_gpu_whose_driver_says_less(tmp_path, monkeypatch):
    nvml = Nvml(
        unsupported=("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetMemoryInfo"),
        absent=("nvmlDeviceGetCurrentClocksEventReasons",),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Sensors(tmp_path) as opened:
        samples = [(0.0, opened.read())]
        for when, watts in ((1.0, 100.0), (3.0, 200.0)):
            nvml.watts = watts
            samples.append((when, opened.read()))
        device = used(opened.summarise(samples, 0.0), "nvml")
    assert device.energy_joules == pytest.approx(200 + 300)  # the trapezoids
    assert device.mean_power_watts == pytest.approx(500 / 3, rel=1e-4)
    assert device.peak_memory_bytes is None and device.joules_per_image is None
    assert device.throttled is False  # an idle GPU does not throttle


def test_a_driver_that_fails_stops_nothing(tmp_path, monkeypatch):
    nvml = Nvml(unsupported=("nvmlInit",))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Sensors(tmp_path) as opened:
        assert used(opened.summarise([], 0.0), "nvml").problem == "Not Supported"
    nvml = Nvml(unsupported=("nvmlShutdown",))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with Sensors(tmp_path) as opened:
        samples = [(0.0, opened.read()), (1.0, opened.read())]
        nvml._unsupported = QUESTIONS
        samples.append((2.0, opened.read()))
        device = used(opened.summarise(samples, 0.0), "nvml")
    assert "says nothing about this GPU" in device.problem and device.peak_celsius == 71


class FakeJetson:
    """The connection to the service of jetson-stats."""

    power = {"rail": {}, "tot": {"power": 12500, "avg": 9000}}  # noqa: RUF012
    temperature = {"CPU": {"temp": 55.5, "online": True}, "CV": {"temp": -256.0, "online": False}}  # noqa: RUF012
    gpu = {  # noqa: RUF012
        "ga10b": {"type": "integrated", "freq": {"cur": 918000}},  # kHz
        "Thor": {"type": "integrated", "freq": {"cur": 1575}, "power_control": "nvml"},  # MHz
        "off": {"type": "integrated", "freq": {"cur": 0}},
    }
    memory = {"RAM": {"used": 2048}}  # noqa: RUF012

    def __init__(self, interval):
        self.running = True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.running = False

    def ok(self, spin=False):
        return spin and self.running


def test_a_jetson(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jtop", SimpleNamespace(jtop=FakeJetson))
    with Sensors(tmp_path) as opened:
        samples = [(0.0, opened.read()), (4.0, opened.read())]
    samples.append((5.0, opened.read()))  # the service has gone
    device = used(opened.summarise(samples, 5.0), "jtop")
    assert device.mean_power_watts == 12.5 and device.energy_joules == 50
    assert device.joules_per_image == 2.5 and device.peak_celsius == 55.5
    assert device.lowest_clock_mhz == 918 and device.peak_memory_bytes == 2**21
    assert device.throttled is None and "connection" in device.problem


def test_readings_begin_and_end_with_the_measured_time():
    begins = time.time() + 0.2
    with Sampling(time.time, begins=begins, seconds=0.5, every=0.2) as sampling:
        while len(sampling.samples) < 4:
            time.sleep(0.01)
    said = [value for _, value in sampling.samples]
    assert said[0] >= begins - 0.05 and said[-1] >= begins + 0.45 and len(said) == 4
    with Sampling(time.time, begins=time.time() + 3600, seconds=1.0) as sampling:
        pass  # it does not wait for its time
    assert sampling.samples == []
    with Sampling(time.time, begins=time.time(), seconds=0.0) as sampling:
        pass
    assert len(sampling.samples) == 1  # the first is the last
    with _sampled(None, begins, 1.0) as nothing:
        assert nothing is None


def test_a_thread_that_is_late_loses_neither_end(monkeypatch):
    monkeypatch.setattr(Sampling, "_sample", lambda self: None)  # it never runs
    begins = time.time()
    with Sampling(time.time, begins=begins, seconds=0.05) as sampling:
        time.sleep(0.06)
    first, last = (value for _, value in sampling.samples)
    assert begins <= first and last >= begins + 0.05


def test_a_run_says_what_its_devices_did(tmp_path, capsys, monkeypatch):
    counter(tmp_path, "intel-rapl:0", "package-0", 0)
    zone(tmp_path, "x86_pkg_temp", 88)
    count = throttle_count(tmp_path, 0, 0)
    bundle = ModelBundle.open(demo_bundle())
    engine = open_engine(bundle, "onnx/cpu/fp32")
    counted = iter(range(100))
    read = Sensors.read

    def heating(self):  # each reading finds the processor slower
        count.write_text(str(next(counted)))
        return read(self)

    monkeypatch.setattr(Sensors, "read", heating)
    try:
        with Sensors(tmp_path) as opened:
            settings = BenchSettings(warm_up=0.0, seconds=0.3)
            (row,) = engine_rows(bundle, engine, [1], settings, lambda _: None, sensors=opened)
    finally:
        engine.close()
    processor = used(row.devices, "processor")
    assert processor.peak_celsius == 88 and processor.throttled
    assert used(row.devices, "rapl").mean_power_watts == 0  # the counter of this test stands still
    print_report(report("crl bench", Subject(), {}, [row]))
    told = " ".join(capsys.readouterr().out.split())
    assert "processor throttled (temperature): it can be faster" in told
    assert "devices of this machine" in told and "88" in told
