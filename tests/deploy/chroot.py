"""Build the CPU image without a container daemon, run it, and print its size: make deploy-chroot.

The instructions come from the Dockerfile. Debian's base image is made with debootstrap, and what a
build host would configure (the archive that apt uses, pip's certificate) is taken from this machine
and removed again. The server then runs in namespaces of its own, as the user of the image, without
capabilities, with a read-only root and two writable directories. It is asked for its health with
the image's own HEALTHCHECK, makes a basis, embeds a picture, and is stopped with SIGTERM.

It needs root, debootstrap, and Debian's and Python's registries. It leaves nothing but `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dockerfile import Stage, environment, read_stages

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "examples/deploy/cpu.Dockerfile"
BASE = "debian:bookworm-slim"
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
HOST_CERTIFICATES = Path("/etc/build-host.pem")
HOST_VARIABLES = ("PIP_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "http_proxy", "https_proxy")
SLIM = ("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian")
"""What Debian's slim images leave out."""

WRITABLE = ("var/lib/crl", "var/cache/crl")
START_SECONDS = 120
STOP_SECONDS = 60

CLIENT = """
import io
from PIL import Image
from crl_sdk import Client
picture = io.BytesIO()
Image.new("RGB", (96, 96), (200, 30, 30)).save(picture, "PNG")
with Client("127.0.0.1:50051") as client:
    client.create_basis("color", ["red", "green", "blue"])
    result = client.embed([picture.getvalue()], criteria=["color"])
    print("universal", result.universal.shape, "color", result["color"].shape, client.model().name)
"""
METRICS = """
from urllib.request import urlopen
page = urlopen("http://127.0.0.1:9464/metrics", timeout=10).read().decode()
print(next(line for line in page.splitlines() if line.startswith("crl_images_total{")))
"""
WRITES = """
for path in ("/opt/crl/x", "/etc/x", "/tmp/x", "/var/lib/crl/x", "/var/cache/crl/x"):
    try:
        open(path, "w").close()
        print(path, "written")
    except OSError as error:
        print(path, error.strerror)
"""


def main() -> int:
    """Build, run and measure."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--dockerfile", type=Path, default=DOCKERFILE)
    parser.add_argument("--work", type=Path, help="directory to keep; a temporary one by default")
    options = parser.parse_args()
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        print(
            "expected root and debootstrap: run `apt-get install debootstrap` and this as root",
            file=sys.stderr,
        )
        return 2
    with directory(options.work) as work:
        stages = read_stages(options.dockerfile)
        if any(stage.base not in (BASE, *(each.name for each in stages)) for stage in stages):
            print(f"expected stages from {BASE} only, this is {options.dockerfile}: no base image "
                  "can be fetched here", file=sys.stderr)  # fmt: skip
            return 2
        started = time.monotonic()
        base = make_base(work / "base")
        print(f"base like {BASE}: {megabytes(base)} MB, {time.monotonic() - started:.0f} s")
        built: dict[str, Path] = {}
        started = time.monotonic()
        for stage in stages:
            built[stage.name] = build(stage, base, built, work / f"stage-{stage.name}")
        final = built[stages[-1].name]
        print(f"image: {megabytes(final)} MB, built in {time.monotonic() - started:.0f} s")
        print(f"  of this /opt/crl: {megabytes(final / 'opt/crl')} MB")
        run(final, stages[-1])
    return 0


@contextmanager
def directory(path: Path | None) -> Iterator[Path]:
    """Yield a directory, which is removed if it is temporary."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path.resolve()
        return
    with tempfile.TemporaryDirectory(prefix="crl-chroot-") as made:
        yield Path(made)


def make_base(target: Path) -> Path:
    """Make the file system that the Dockerfile starts from, with this machine's Debian archive."""
    if (target / "etc/debian_version").exists():
        return target
    suite = BASE.partition(":")[2].removesuffix("-slim")
    sources = archives(suite)
    command = ["debootstrap", "--variant=minbase", suite, str(target), sources[0].split()[1]]
    log = target.with_suffix(".log")
    with log.open("w") as output:
        if subprocess.run(command, stdout=output, stderr=output, check=False).returncode:
            raise SystemExit(f"debootstrap failed: see {log}\n{log.read_text()[-2000:]}")
    excluded = [f"path-exclude /{path}/*" for path in SLIM]
    (target / "etc/dpkg/dpkg.cfg.d/slim").write_text("\n".join(excluded) + "\n")
    for path in SLIM:
        for each in (target / path).glob("*"):
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()
    (target / "etc/apt/sources.list").write_text("\n".join(sources) + "\n")
    clean(target)
    shutil.rmtree(target / "var/lib/apt/lists", ignore_errors=True)
    return target


def archives(suite: str) -> list[str]:
    """Return the apt sources of this machine for a suite of Debian, the suite itself first."""
    shown = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(CODENAME) $(SUITE) $(COMPONENT)",
         "Created-By: Packages"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found = set()
    for line in shown.splitlines():
        uri, codename, _, component = line.split()
        if component == "main" and (codename == suite or codename.startswith(f"{suite}-")):
            found.add(f"deb {uri} {codename} main")
    if not any(f" {suite} main" in line for line in found):
        raise SystemExit(f"expected a Debian archive with {suite}: run `apt-get update` first")
    return sorted(found, key=lambda line: (f" {suite} main" not in line, line))


def build(stage: Stage, base: Path, built: dict[str, Path], target: Path) -> Path:
    """Run the instructions of a stage in a copy of its base."""
    if target.exists():
        shutil.rmtree(target)
    source = built.get(stage.base, base)
    subprocess.run(["cp", "--archive", "--reflink=auto", str(source), str(target)], check=True)
    configure_host(target)
    inside = {"PATH": DEFAULT_PATH, "HOME": "/root"}
    host = {name: os.environ[name] for name in HOST_VARIABLES if name in os.environ}
    if CERTIFICATES.exists():
        host["PIP_CERT"] = str(HOST_CERTIFICATES)
    for number, instruction in enumerate(stage.instructions):
        values = environment(Stage("", "", stage.instructions[:number]), inside)
        if instruction.name == "RUN":
            started = time.monotonic()
            in_chroot(target, {**values, **host}, instruction.text)
            print(f"  {time.monotonic() - started:5.1f} s  RUN {instruction.text[:60]} …")
        elif instruction.name == "COPY":
            copy(instruction.words, built, target)
        clean(target)
    unconfigure_host(target)
    return target


def configure_host(target: Path) -> None:
    """Give a chroot what a build host has: names, certificates, apt's settings."""
    shutil.copy("/etc/resolv.conf", target / "etc/resolv.conf")
    shutil.copy("/etc/hosts", target / "etc/hosts")
    settings = subprocess.run(
        ["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True
    ).stdout
    if CERTIFICATES.exists():  # under another name: ca-certificates would write its own there
        shutil.copy(CERTIFICATES, target / HOST_CERTIFICATES.relative_to("/"))
        settings += f'Acquire::https::CAInfo "{HOST_CERTIFICATES}";\n'
    (target / "etc/apt/apt.conf.d/99build-host").write_text(settings)


def unconfigure_host(target: Path) -> None:
    """Take away what `configure_host` gave."""
    for path in ("etc/resolv.conf", "etc/hosts", "etc/apt/apt.conf.d/99build-host"):
        (target / path).unlink(missing_ok=True)
    (target / HOST_CERTIFICATES.relative_to("/")).unlink(missing_ok=True)


def clean(target: Path) -> None:
    """Remove packages that apt has kept, as Debian's images do after each of its runs."""
    for pattern in ("var/cache/apt/*.bin", "var/cache/apt/archives/*.deb"):
        for path in target.glob(pattern):
            path.unlink()


def copy(words: list[str], built: dict[str, Path], target: Path) -> None:
    """Copy from the repository or from another stage, as COPY does."""
    root = ROOT
    if words[0].startswith("--from="):
        root = built[words.pop(0).removeprefix("--from=")]
    *sources, destination = words
    place = target / destination.lstrip("/")
    for pattern in sources:
        found = sorted(root.glob(pattern.lstrip("/")))
        if not found:
            raise SystemExit(
                f"COPY {pattern}: there is no such file; run `make deploy-wheel` first"
            )
        for path in found:
            if path.is_dir():
                place.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "--archive", f"{path}/.", str(place)], check=True)
            elif destination.endswith("/"):
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place / path.name)
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place)


MOUNTS = """
mount --make-rprivate /
mount --bind "$1" "$1"
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=755 dev "$1/dev"
for each in null zero full random urandom; do
    touch "$1/dev/$each"; mount --bind "/dev/$each" "$1/dev/$each"
done
"""


def in_chroot(target: Path, values: dict[str, str], command: str) -> None:
    """Run a shell command as root in a chroot, with the network of this machine."""
    script = f'set -e\n{MOUNTS}\nexec chroot "$1" /usr/bin/env -i "${{@:2}}"'
    assignments = [f"{name}={value}" for name, value in values.items()]
    ran = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-c", script, "build",
         str(target), *assignments, "DEBIAN_FRONTEND=noninteractive", "/bin/sh", "-c", command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if ran.returncode:
        raise SystemExit(f"status {ran.returncode}: RUN {command}\n{ran.stdout[-4000:]}")


def run(image: Path, stage: Stage) -> None:
    """Start the image's command as its user with a read-only root, use it, and stop it."""
    last = {name: stage.last(name) for name in ("USER", "ENTRYPOINT", "CMD", "HEALTHCHECK")}
    assert all(last.values()), "expected USER, ENTRYPOINT, CMD and HEALTHCHECK"
    user, group = last["USER"].text.split(":")
    command = [*last["ENTRYPOINT"].words, *last["CMD"].words]
    check = json.loads(last["HEALTHCHECK"].text.partition("CMD ")[2])
    values = environment(stage, {"PATH": DEFAULT_PATH, "HOME": "/" + WRITABLE[0]})
    as_user = [
        "setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs",
        "--inh-caps=-all", "--bounding-set=-all", "env", "-i",
        *(f"{name}={value}" for name, value in values.items()),
    ]  # fmt: skip
    script = "\n".join(
        [
            "set -e",
            "ip link set lo up",
            MOUNTS,
            *(f'mount -t tmpfs -o uid={user},gid={group},mode=700 s "$1/{p}"' for p in WRITABLE),
            'mount -o remount,bind,ro "$1"',
            'exec chroot "$1" "${@:2}"',
        ]
    )
    started = time.monotonic()
    namespaces = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [*namespaces, "bash", "-c", script, "run", str(image), *as_user, *command],
            stdout=subprocess.PIPE, stderr=log, text=True,
        ) as process,
    ):  # fmt: skip
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                process.wait(STOP_SECONDS)
                log.seek(0)
                raise SystemExit(
                    f"the server ended with {process.returncode}: {log.read()[-3000:]}"
                )
            ready = json.loads(line)
            print(f"serving after {time.monotonic() - started:.1f} s: {line.strip()}")
            first = child_of(process.pid)

            def inside(words: Sequence[str]) -> str:
                entered = ["nsenter", f"--target={first}", "--mount", "--pid", "--net", "--root",
                           "--wd=/", *as_user, *words]  # fmt: skip
                ran = subprocess.run(entered, capture_output=True, text=True, check=False)
                if ran.returncode:
                    raise SystemExit(f"{shlex.join(words)}: {ran.stdout}{ran.stderr}")
                return ran.stdout.strip()

            asked = time.monotonic()
            inside(check)
            print(f"healthy, asked in {time.monotonic() - asked:.2f} s: {shlex.join(check)}")
            print("user:", inside(["id"]))
            print("client:", inside(["python", "-c", CLIENT]))
            print("metrics:", inside(["python", "-c", METRICS]))
            print(inside(["python", "-c", WRITES]))
            server = child_of(first)
            status = Path(f"/proc/{server}/status").read_text()
            facts = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
            print(
                "memory at most:", facts["VmHWM"].strip(), "capabilities:", facts["CapBnd"].strip()
            )
            assert ready["engine"]
            stopped = time.monotonic()
            os.kill(first, 15)
            code = process.wait(STOP_SECONDS)
            print(f"SIGTERM: status {code} after {time.monotonic() - stopped:.1f} s")
            if code:
                raise SystemExit("expected status 0 after SIGTERM")
        finally:
            process.kill()


def child_of(pid: int) -> int:
    """Return the only child of a process."""
    ends = time.monotonic() + 10
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < ends, f"process {pid} has no child"
        time.sleep(0.05)
    return int(children[0])


def megabytes(path: Path) -> int:
    """Return the size of the files below a path, in units of 10^6 bytes."""
    shown = subprocess.run(
        ["du", "--summarize", "--apparent-size", "--block-size=1", "--one-file-system", str(path)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    return round(int(shown.split()[0]) / 1e6)


if __name__ == "__main__":
    sys.exit(main())
