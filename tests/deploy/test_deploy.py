"""The files of examples/deploy agree with each other and with the SDK. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
import trustme
import yaml
from deploy.dockerfile import environment, read_stages
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from pages import ROOT, cli
from prometheus_client.parser import text_string_to_metric_families

from crl_sdk import Client
from crl_sdk.cli._serve_config import read_config
from crl_sdk.errors import EngineError
from crl_sdk.serving._security import ServerTls
from crl_sdk.serving._server import ServerSettings

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEPLOY = ROOT / "examples/deploy"
DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNITS = sorted(path for path in (DEPLOY / "systemd").iterdir() if path.suffix != ".toml")
OWN_VARIABLES = {"CRL_CACHE", "CRL_MODELS"}  # read by the engines, and by compose.yaml alone
PROMETHEUS_LABELS = {"instance", "job", "le", "namespace", "pod"}
MOST_EXPOSED = 1.5  # of systemd-analyze security, from 0 to 10


def script(name: str):
    """Import a script of examples/deploy."""
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", DEPLOY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def documents(path: Path) -> list:
    return [each for each in yaml.safe_load_all(path.read_text(encoding="utf-8")) if each]


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|min|m)?", text).groups()
    return float(number) * (60 if unit in ("m", "min") else 1)


def unit(name: str) -> dict[str, list[str]]:
    """Return the settings of a unit; each may occur several times."""
    found: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / name).read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


# ---- files parse


def test_every_file_parses():
    parsed = 0
    for path in sorted(DEPLOY.rglob("*")):
        if path.suffix in (".yaml", ".yml"):
            assert documents(path), path
        elif path.suffix == ".json":
            assert json.loads(path.read_text(encoding="utf-8")), path
        elif path.suffix == ".toml":
            tomllib.loads(path.read_text(encoding="utf-8"))
        else:
            continue
        parsed += 1
    assert parsed >= 12


# ---- images


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_rules_of_images(path):
    stages = read_stages(path)
    final = stages[-1]
    for stage in stages:
        _, colon, tag = stage.base.rpartition("/")[2].partition(":")
        assert colon and tag != "latest", f"{stage.base} has no fixed tag"
    user = final.last("USER")
    assert user is not None and re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text), "a numeric user"
    after = final.instructions[final.instructions.index(user) :]
    assert not {"RUN", "COPY"} & {each.name for each in after}
    health = final.last("HEALTHCHECK")
    assert health is not None and "/opt/crl/health.py" in health.text
    assert final.last("STOPSIGNAL").text == "SIGTERM"
    assert final.last("ENTRYPOINT").words == ["tini", "--", "crl"]
    assert final.last("CMD").words == ["serve"]
    commands = " ".join(each.text for stage in stages for each in stage.all("RUN"))
    installs = re.findall(r"pip install [^&]*", commands)
    assert installs and all("--require-hashes" in c or "--no-index" in c for c in installs)
    assert "--no-install-recommends" in commands and "curl" not in commands
    assert "rm -rf /var/lib/apt/lists/*" in " ".join(each.text for each in final.all("RUN"))


def test_the_images_differ_in_their_base_alone():
    """One change to what they share is made to all of them."""
    shared = {
        tuple(
            (each.name, each.text)
            for each in read_stages(path)[-1].instructions
            if not each.text.startswith("NVIDIA_")
        )
        for path in DOCKERFILES
    }
    assert len(DOCKERFILES) == 5 and len(shared) == 1


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_images_copy_what_exists(path):
    lock = DEPLOY / "locks" / f"{path.stem}.txt"
    for stage in read_stages(path):
        for copied in stage.all("COPY"):
            words = copied.words
            if words[0].startswith("--from="):
                continue
            for source in words[:-1]:
                assert source.startswith("dist/crl_embeddings-") or (ROOT / source).is_file()
    assert str(lock.relative_to(ROOT)) in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("FROM debian:12\nRUM true\n", "2: expected an instruction, got 'RUM true'"),
        ("RUN true\n", "1: RUN comes before the first FROM"),
        ("FROM debian:12\nRUN\n", "2: expected an instruction"),
    ],
)
def test_a_dockerfile_that_is_wrong(tmp_path, text, what):
    path = tmp_path / "Dockerfile"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(what)):
        read_stages(path)


def test_a_dockerfile_is_read_as_docker_does(tmp_path):
    path = tmp_path / "Dockerfile"
    path.write_text(
        "ARG BASE=debian:12\nFROM ${BASE} AS one\nRUN a \\\n  # a comment\n  && b\n"
        'FROM one\nENV A=1 \\\n    B="$A 2"\nENTRYPOINT ["x", "y z"]\n'
    )
    one, two = read_stages(path)
    assert (one.base, one.name, two.base) == ("debian:12", "one", "one")
    assert one.all("RUN")[0].text == "a && b"
    assert environment(two, {}) == {"A": "1", "B": "1 2"}
    assert two.last("ENTRYPOINT").words == ["x", "y z"]


# ---- locks


def locked(name: str) -> dict[str, Requirement]:
    text = (DEPLOY / "locks" / f"{name}.txt").read_text(encoding="utf-8").replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        pin, *hashes = re.split(r"\s+--hash=", line)
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", each) for each in hashes), line
        requirement = Requirement(pin)
        found[canonicalize_name(requirement.name)] = requirement
    return found


def needed(extras: tuple[str, ...], values: dict[str, str]) -> dict[str, Requirement]:
    """Return the direct requirements of extras on a machine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate(values):
            continue
        if requirement.name == project["name"]:
            found.update(needed(tuple(requirement.extras), values))
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.stem)
def test_locks_hold_what_the_extras_need(path):
    image = script("wheels").IMAGES[path.stem]
    pins = locked(path.stem)
    for machine in image.machines:
        values = {
            **default_environment(), "extra": "", "platform_machine": machine.arch,
            "python_version": machine.python, "python_full_version": f"{machine.python}.0",
            "sys_platform": "linux",
        }  # fmt: skip
        for name, requirement in needed(image.extras, values).items():
            pin = pins[name]
            assert pin.marker is None or pin.marker.evaluate(values), f"{name} on {machine}"
            (version,) = (each.version for each in pin.specifier)
            assert requirement.specifier.contains(version, prereleases=True), (
                f"{requirement} with {pin}: run `make deploy-locks`"
            )
        tested = [
            Requirement(line.split("#")[0])
            for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
            if line.split("#")[0].strip()
        ]
        for constraint in tested:
            pin = pins.get(canonicalize_name(constraint.name))
            if pin is None or constraint.name in image.unpinned:
                continue
            if constraint.marker is None or constraint.marker.evaluate(values):
                assert pin.specifier == constraint.specifier, (
                    f"{pin} is not the version of constraints.txt: run `make deploy-locks`"
                )


def wheel(*files: str) -> dict:
    each = [{"name": file, "size": 1, "hashes": {"sha256": "0" * 64}} for file in files]
    return {"name": "thing", "version": "1", "wheels": each}


def test_the_best_wheel_for_another_machine():
    wheels = script("wheels")
    package = wheel(
        "thing-1-py3-none-any.whl",
        "thing-1-cp310-abi3-manylinux_2_28_aarch64.whl",
        "thing-1-cp312-cp312-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
        "thing-1-cp312-cp312-manylinux_2_39_aarch64.whl",
        "thing-1-cp312-cp312-manylinux_2_28_x86_64.whl",
    )
    chosen = {
        python: wheels.best_wheel(package, wheels.Machine("aarch64", python)).file
        for python in ("3.9", "3.11", "3.12")
    }
    assert chosen == {
        "3.9": "thing-1-py3-none-any.whl",
        "3.11": "thing-1-cp310-abi3-manylinux_2_28_aarch64.whl",
        "3.12": "thing-1-cp312-cp312-manylinux_2_17_aarch64.manylinux2014_aarch64.whl",
    }


def test_a_package_without_a_wheel():
    wheels = script("wheels")
    package = wheel("thing-1-cp312-cp312-manylinux_2_28_x86_64.whl")
    with pytest.raises(wheels.NoWheels, match=r"thing 1 has no wheel for Python 3\.12 on aarch64"):
        wheels.best_wheel(package, wheels.Machine("aarch64", "3.12"))


# ---- options of the server


def serve_variables() -> set[str]:
    command = cli().commands["serve"]
    names = {
        str(p.envvar or f"CRL_SERVE_{p.name.upper()}") for p in command.params if p.name != "help"
    }
    return names | OWN_VARIABLES


def test_variables_are_read():
    used = {}
    for path in DEPLOY.rglob("*"):
        if path.is_file() and path.suffix not in (".pyc", ".json"):
            for name in re.findall(r"\bCRL_[A-Z_]+\b", path.read_text(encoding="utf-8")):
                used.setdefault(name, path.name)
    assert len(used) >= 10
    assert not {name: where for name, where in used.items() if name not in serve_variables()}


def configurations() -> dict[str, str]:
    (config_map,) = documents(DEPLOY / "kubernetes/configmap.yaml")
    text = (DEPLOY / "systemd/crl.toml").read_text(encoding="utf-8")
    everything = re.sub(r"^# (?=[\w-]+ = )", "", text, flags=re.MULTILINE)
    return {
        "systemd": text,
        "systemd, all": everything,
        "kubernetes": config_map["data"]["crl.toml"],
    }


@pytest.mark.parametrize("name", ["systemd", "systemd, all", "kubernetes"])
def test_the_server_accepts_the_configurations(name, tmp_path):
    path = tmp_path / "crl.toml"
    path.write_text(configurations()[name])
    command = cli().commands["serve"]
    context = command.context_class(command, info_name="serve")
    read_config(context, path)
    assert len(context.default_map) >= 2


def test_every_supervisor_waits_for_running_calls():
    drain = ServerSettings().drain_seconds
    compose = documents(DEPLOY / "compose.yaml")[0]["services"]["server"]
    assert seconds(compose["stop_grace_period"]) > drain
    service = unit("crl.service")
    assert seconds(service["TimeoutStopSec"][0]) > drain
    (waits,) = re.findall(r"--wait (\d+)", service["ExecStartPost"][0])
    assert seconds(service["TimeoutStartSec"][0]) > float(waits)
    (deployment,) = documents(DEPLOY / "kubernetes/deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > drain + pause


def test_the_server_of_compose_is_confined():
    server = documents(DEPLOY / "compose.yaml")[0]["services"]["server"]
    stage = read_stages(DEPLOY / "cpu.Dockerfile")[-1]
    assert server["read_only"] and server["cap_drop"] == ["ALL"]
    assert server["user"] == stage.last("USER").text
    mounted = {volume.split(":")[1] for volume in server["volumes"] if not volume.endswith(":ro")}
    values = environment(stage, {"PATH": ""})
    assert mounted == {str(Path(values["CRL_BASES"]).parent), values["CRL_CACHE"]}


# ---- Kubernetes


def test_pods_are_confined():
    (deployment,) = documents(DEPLOY / "kubernetes/deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    user = read_stages(DEPLOY / "cpu.Dockerfile")[-1].last("USER").text
    security = pod["securityContext"]
    assert security["runAsNonRoot"] and security["seccompProfile"]["type"] == "RuntimeDefault"
    assert f"{security['runAsUser']}:{security['runAsGroup']}" == user
    assert not pod["automountServiceAccountToken"]
    for container in pod["containers"] + pod["initContainers"]:
        own = container["securityContext"]
        assert own["readOnlyRootFilesystem"] and own["capabilities"]["drop"] == ["ALL"]
        assert not own["allowPrivilegeEscalation"]
        assert {"cpu", "memory"} <= set(container["resources"]["limits"])
        assert not container["image"].endswith(":latest") and ":" in container["image"]
    (server,) = pod["containers"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["grpc"]["port"] in {p["containerPort"] for p in server["ports"]}


def test_manifests_select_the_same_pods():
    wanted = {"app.kubernetes.io/name": "crl"}
    (deployment,) = documents(DEPLOY / "kubernetes/deployment.yaml")
    assert deployment["spec"]["template"]["metadata"]["labels"] == wanted
    ports = {
        p["name"]: p["containerPort"]
        for p in deployment["spec"]["template"]["spec"]["containers"][0]["ports"]
    }
    found = {}
    for path in MANIFESTS:
        for each in documents(path):
            found[each["kind"]] = each["spec"] if "spec" in each else each["data"]
    assert found["Deployment"]["selector"]["matchLabels"] == wanted
    assert found["PodDisruptionBudget"]["selector"]["matchLabels"] == wanted
    assert found["NetworkPolicy"]["podSelector"]["matchLabels"] == wanted
    assert found["Service"]["selector"] == wanted
    assert found["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == "crl"
    assert found["Service"]["ports"][0]["targetPort"] in ports
    assert {rule["ports"][0]["port"] for rule in found["NetworkPolicy"]["ingress"]} == set(ports)
    budget = found["PodDisruptionBudget"]["minAvailable"]
    assert found["HorizontalPodAutoscaler"]["minReplicas"] > budget


def test_ports_are_those_of_the_images():
    values = environment(read_stages(DEPLOY / "cpu.Dockerfile")[-1], {"PATH": ""})
    port, metrics = (
        values[name].rpartition(":")[2] for name in ("CRL_SERVE_ADDRESS", "CRL_SERVE_METRICS")
    )
    (deployment,) = documents(DEPLOY / "kubernetes/deployment.yaml")
    template = deployment["spec"]["template"]
    named = {p["name"]: p["containerPort"] for p in template["spec"]["containers"][0]["ports"]}
    assert named == {"grpc": int(port), "metrics": int(metrics)}
    assert template["metadata"]["annotations"]["prometheus.io/port"] == metrics
    (scraped,) = documents(DEPLOY / "prometheus.yml")[0]["scrape_configs"]
    assert scraped["static_configs"][0]["targets"] == [f"server:{metrics}"]
    (compose,) = documents(DEPLOY / "compose.yaml")
    assert compose["services"]["server"]["ports"] == [f"127.0.0.1:{port}:{port}"]


# ---- metrics


def expressions() -> dict[str, str]:
    """Return all expressions of Prometheus, by where they are."""
    dashboard = json.loads((DEPLOY / "grafana/dashboards/crl.json").read_text(encoding="utf-8"))
    found = {
        f"panel {panel['title']}, {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    for variable in dashboard["templating"]["list"]:
        found[f"variable {variable['name']}"] = variable["definition"]
    for group in documents(DEPLOY / "alerts.yml")[0]["groups"]:
        found.update({f"alert {rule['alert']}": rule["expr"] for rule in group["rules"]})
    (adapter,) = documents(DEPLOY / "prometheus-adapter.yaml")
    for rule in adapter["rules"]["custom"]:
        found["the adapter's series"] = rule["seriesQuery"]
        found["the adapter's name"] = rule["name"]["as"]
    (autoscaler,) = documents(DEPLOY / "kubernetes/hpa.yaml")
    for metric in autoscaler["spec"]["metrics"]:
        found["the autoscaler"] = metric["pods"]["metric"]["name"]
    return found


def wrong_names(expression: str, samples: dict[str, dict[str, set[str]]]) -> list[str]:
    """Return metrics, labels and values of an expression that the server does not have.

    `samples` has the values of each label of each metric.
    """
    metrics = re.findall(r"\bcrl_[a-z_]+\b", expression)
    wrong = [metric for metric in metrics if metric not in samples]
    known = PROMETHEUS_LABELS.union(*(samples.get(metric, {}) for metric in metrics))
    for labels in re.findall(r"\bby \(([^)]*)\)", expression):
        wrong += [label for label in re.split(r",\s*", labels) if label not in known]
    for metric, matchers in re.findall(r"\b(crl_[a-z_]+)\{([^}]*)\}", expression):
        for label, how, text in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
            if label in PROMETHEUS_LABELS:
                continue
            values = samples.get(metric, {}).get(label, set())
            if label == "code":
                values = {code.name for code in grpc.StatusCode}
            asked = text.split("|") if how.endswith("~") else [text]
            wrong += [f"{label}={value}" for value in asked if value not in values]
    return wrong


@pytest.fixture
def samples(serve, embedder, image_files) -> dict[str, dict[str, set[str]]]:
    """What a server's page has after a few calls."""
    server = serve(embedder, metrics_address="127.0.0.1:0")
    with Client(server.address) as client:
        client.create_basis("color", ["red", "green", "blue"])
        client.embed([image_files[0], b"junk"], criteria=["color"], on_error="collect")
    with urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as page:
        families = text_string_to_metric_families(page.read().decode())
    found: dict[str, dict[str, set[str]]] = {}
    for family in families:
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for label, value in sample.labels.items():
                labels.setdefault(label, set()).add(value)
    return found


def test_metrics_exist(samples):
    found = expressions()
    assert len(found) >= 25
    wrong = {where: names for where, text in found.items() if (names := wrong_names(text, samples))}
    assert not wrong
    shown = " ".join(text for where, text in found.items() if where.startswith("panel"))
    families = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in samples
        if not name.endswith("_created")
    }
    assert not {family for family in families if family not in shown}, "metrics without a panel"


def test_metrics_that_do_not_exist_are_found(samples):
    assert wrong_names("sum(crl_queue_length)", samples) == ["crl_queue_length"]
    assert wrong_names("sum by (kind) (crl_images_total)", samples) == ["kind"]
    assert wrong_names('crl_images_total{outcome="lost"}', samples) == ["outcome=lost"]
    assert wrong_names('crl_calls_total{code=~"OK|LOST"}', samples) == ["code=LOST"]


def test_the_autoscaler_asks_the_adapter():
    (adapter,) = documents(DEPLOY / "prometheus-adapter.yaml")
    (rule,) = adapter["rules"]["custom"]
    assert re.fullmatch(rule["name"]["matches"], rule["seriesQuery"].partition("{")[0])
    found = expressions()
    assert found["the autoscaler"] == found["the adapter's name"] == rule["name"]["as"]


def test_panels_have_places_of_their_own():
    dashboard = json.loads((DEPLOY / "grafana/dashboards/crl.json").read_text(encoding="utf-8"))
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells
    (source,) = documents(DEPLOY / "grafana/provisioning/datasources/prometheus.yaml")[0][
        "datasources"
    ]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {source["uid"]}


# ---- health


def test_a_healthy_server(serve, embedder, monkeypatch, capsys):
    health = script("health")
    server = serve(embedder)
    assert health.main([server.address]) == 0
    port = server.address.rpartition(":")[2]
    monkeypatch.setenv("CRL_SERVE_ADDRESS", f"0.0.0.0:{port}")  # as in the images
    assert health.main([]) == 0
    server.stop()
    assert health.main(["--timeout", "1"]) == 1
    assert f"127.0.0.1:{port}: UNAVAILABLE" in capsys.readouterr().err


def test_a_server_that_does_not_serve(serve, faked, engine, image_files, capsys):
    health = script("health")
    server = serve(faked)
    engine.fails = True
    with Client(server.address) as client, pytest.raises(EngineError):
        client.embed(image_files[:1])
    ends = time.monotonic() + 30
    while health.main([server.address]) == 0:
        assert time.monotonic() < ends
    assert "NOT_SERVING" in capsys.readouterr().err
    engine.fails = False
    assert health.main([server.address, "--wait", "30"]) == 0


@pytest.fixture
def certificates(tmp_path) -> dict[str, Path]:
    """A server's certificate for other names than 127.0.0.1, a client's, and a stranger's."""
    authority = trustme.CA()
    paths = {
        name: tmp_path / f"{name}.pem"
        for name in ("ca", "server", "server_key", "client", "client_key", "stranger", "none")
    }
    for name, host in (("server", "crl.example"), ("client", "probe")):
        issued = authority.issue_cert(host)
        issued.private_key_pem.write_to_path(str(paths[f"{name}_key"]))
        issued.cert_chain_pems[0].write_to_path(str(paths[name]))
    authority.cert_pem.write_to_path(str(paths["ca"]))
    stranger = trustme.CA().issue_cert("crl.example")
    stranger.cert_chain_pems[0].write_to_path(str(paths["stranger"]))
    return paths


@pytest.mark.parametrize("mutual", [False, True])
def test_health_with_tls(serve, embedder, certificates, capsys, mutual):
    health, paths = script("health"), certificates
    tls = ServerTls(paths["server"], paths["server_key"], paths["ca"] if mutual else None)
    address = serve(embedder, tls=tls).address
    shown = ["--cert", str(paths["client"]), "--key", str(paths["client_key"])] if mutual else []

    def ask(name: str, *more: str) -> int:
        return health.main([address, "--tls-cert", str(paths[name]), *more])

    assert ask("server", *shown) == 0
    assert ask("server") == int(mutual)
    assert ask("stranger", *shown) == 1
    assert ask("none") == 1
    errors = capsys.readouterr().err
    assert "certificate verify failed" in errors and "No such file" in errors


# ---- systemd

analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


@pytest.fixture
def installed(tmp_path) -> Path:
    """The units, with commands that exist in place of those of an installation."""
    command = tmp_path / "command"
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    folder = tmp_path / "units"
    folder.mkdir()
    for path in UNITS:
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"(?<==)/(opt/crl/bin|usr/bin)/\w+", str(command), text)
        if path.suffix == ".conf":
            (folder / "crl.service.d").mkdir(exist_ok=True)
            (folder / "crl.service.d" / path.name).write_text(text)
        else:
            (folder / path.name).write_text(text)
    return folder


@analyze
def test_units_are_valid(installed):
    names = sorted(path.name for path in installed.iterdir() if path.suffix != ".d")
    assert len(names) == 4
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *names],
        cwd=installed, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    about_ours = [
        line for line in ran.stderr.splitlines() if "crl" in line or str(installed) in line
    ]
    assert ran.returncode == 0 and not about_ours, ran.stderr


@analyze
def test_the_service_is_confined():
    ran = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--threshold={MOST_EXPOSED * 10:.0f}",
         "--no-pager", str(DEPLOY / "systemd/crl.service")],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout[-1500:] + ran.stderr
    (level,) = re.findall(r"Overall exposure level for crl\.service: ([\d.]+)", ran.stdout)
    version = subprocess.run(
        ["systemd-analyze", "--version"], capture_output=True, text=True, check=True
    ).stdout.split()[1]
    page = (ROOT / "docs/DEPLOY.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"exposure of ([\d.]+) with systemd (\d+)", page)
    assert shown[1] != version or shown[0] == level  # other versions count other things
