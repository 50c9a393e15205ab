"""Every step of cluster/Dockerfile, run as it stands in clean Debian roots: what a container engine does, without one.

The base image, python:3.11-slim-bookworm, is replaced by a Debian bookworm of debootstrap with its Python 3.11.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cluster.conftest import write_archive

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster/Dockerfile"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]


def instructions() -> list[tuple[str, str]]:
    """(name, rest) of each instruction, continued lines joined."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]  # type: ignore[misc]


@dataclass
class Stage:
    root: Path
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    user: str = "0"
    workdir: str = "/"


def pip_settings() -> dict[str, str]:
    """This machine's own pip configuration, which the build gets as a secret."""
    shown = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = dict(line.split("=", 1) for line in shown.stdout.splitlines() if "=" in line)
    return {key.rpartition(".")[2]: value.strip("'\"").replace("\\n", "\n  ") for key, value in found.items()}


def run_in(stage: Stage, command: str, *, has_pip_secret: bool = False) -> str:
    """A shell command in the root of a stage, in a mount namespace of its own, as its user."""
    binds: list[str] = []
    if has_pip_secret:
        settings = pip_settings()
        secret = stage.root.parent / "pip.conf"
        secret.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()))
        binds.append(f"touch {stage.root}/etc/pip.conf; mount --bind {secret} {stage.root}/etc/pip.conf")
        for scheme, named in re.findall(r"(file://)?(/[^\s:]+)", " ".join(settings.values())):
            path = Path(named).parent if scheme else Path(named)  # beside the index of a folder lie its files
            place = f"{stage.root}{path}"
            if path.exists():
                make = f"mkdir -p {place}" if path.is_dir() else f"mkdir -p $(dirname {place}); touch {place}"
                binds.append(f"{make}; mount --rbind {path} {place}")
    environment = [f"{name}={value}" for name, value in {**stage.environment, "HOME": "/tmp"}.items()]
    chroot = ["chroot", f"--userspec={stage.user}:{stage.user}", str(stage.root), "/usr/bin/env", "-i", *environment]
    script = "\n".join(
        [
            "set -e; mount --make-rprivate /",
            f"mount -t proc proc {stage.root}/proc; mount --rbind /dev {stage.root}/dev",
            *(f"touch {stage.root}{f}; mount --bind {f} {stage.root}{f}" for f in ("/etc/resolv.conf", "/etc/hosts")),
            *binds,
            shlex.join(["exec", *chroot, "sh", "-c", f"cd {stage.workdir} && {command}"]),
        ]
    )
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script], capture_output=True, text=True, check=False, cwd="/"
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    if has_pip_secret:
        (stage.root / "etc/pip.conf").unlink()
    return done.stdout


def allowed(source: str) -> bool:
    """Whether the build context has it, by Dockerfile.dockerignore."""
    patterns = [line[1:] for line in (ROOT / "cluster/Dockerfile.dockerignore").read_text().split() if line[0] == "!"]
    return any(fnmatch.fnmatch(source, pattern) for pattern in patterns)


def copy(source: Path, target: str, stage: Stage, *, is_content: bool) -> None:
    place = stage.root / target.lstrip("/")
    if source.is_dir():
        shutil.copytree(source, place, dirs_exist_ok=True, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        (place if target.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, place / source.name if target.endswith("/") else place)
    assert is_content or place.exists()


def build(base: Path, folder: Path, contexts: dict[str, Path], lock: str | None = None) -> Stage:
    """The last stage, after every step of the file. `contexts`: as --build-context."""
    arguments: dict[str, str] = {}
    stages: dict[str, Stage] = {}
    stage: Stage | None = None
    for name, rest in instructions():
        rest = re.sub(r"\$\{(\w+)\}", lambda found: arguments.get(found[1], found[0]), rest)
        if name == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = lock if key == "LOCK" and lock else value
        elif name == "FROM":
            image, _, alias = rest.partition(" AS ")
            stage = stages[alias or "last"] = Stage(folder / (alias or "last"))
            if image == "scratch":
                stage.root.mkdir()
                shutil.copytree(contexts[alias], stage.root, dirs_exist_ok=True) if alias in contexts else None
            else:
                assert image == "python:3.11-slim-bookworm"
                subprocess.run(["cp", "-a", "--reflink=auto", str(base), str(stage.root)], check=True)
        else:
            assert stage is not None
            if name == "RUN":
                mount = re.match(r"--mount=type=secret,id=pip,target=/etc/pip.conf\s+", rest)
                run_in(stage, rest[mount.end() :] if mount else rest, has_pip_secret=mount is not None)
            elif name == "COPY":
                *sources, target = rest.split()
                if sources[0].startswith("--from="):
                    source = sources[1].lstrip("/").removeprefix(".")
                    copy(stages[sources[0][7:]].root / source, target, stage, is_content=True)
                    continue
                for source in sources:
                    assert allowed(source), f"{source} is not in the build context"
                    copy(ROOT / source, target, stage, is_content=False)
            elif name == "ENV":
                for key, value in (part.split("=", 1) for part in rest.split()):
                    stage.environment[key] = value.replace("$PATH", stage.environment["PATH"])
            elif name == "USER":
                stage.user = rest
            elif name == "WORKDIR":
                stage.workdir = rest
                (stage.root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            else:
                assert name == "CMD", f"this test does not know {name}"
                assert rest == '["malaria-ray", "--help"]'
    assert stage is not None
    return stage


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0 or not shutil.which("debootstrap") or not shutil.which("unshare"):
        pytest.skip("needs root, unshare and debootstrap (apt-get install debootstrap)")
    if made_before := os.environ.get("DEBIAN_ROOT"):  # saves two minutes to whoever works on this test
        return Path(made_before)
    root = tmp_path_factory.mktemp("image") / "base"
    made = ["debootstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates", "bookworm", str(root)]
    subprocess.run(made, check=True, capture_output=True)
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    return root


@pytest.fixture(scope="module")
def image(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Stage:
    folder = tmp_path_factory.mktemp("stages")
    contexts = {name: folder / f"context-{name}" for name in ("run", "weights")}
    for name, context in contexts.items():
        context.mkdir()
        (context / f"{name}.txt").write_text("baked in")
    return build(base, folder, contexts)


def test_the_image_runs_as_an_ordinary_user_and_answers(image: Stage):
    assert run_in(image, "id -u").strip() == "1000"
    assert "usage: malaria-ray COMMAND" in run_in(image, "malaria-ray --help")
    assert "RAY_AUTH_MODE=token" in run_in(image, "env")


def test_the_image_holds_what_kuberay_and_the_launcher_call_and_what_was_baked_in(image: Stage):
    run_in(image, "which wget rsync ps ray && test -f jobs/ingest.py")
    assert run_in(image, "cat run/run.txt weights/weights.txt") == "baked inbaked in"


def test_the_image_holds_no_package_index_no_test_tools_and_nothing_of_the_tree_but_the_package(image: Stage):
    assert not (image.root / "etc/pip.conf").exists()
    assert run_in(image, "ls").split() == ["jobs", "run", "weights"]
    installed = run_in(image, "ls /opt/venv/bin")
    assert not {"pytest", "ruff", "mypy"} & set(installed.split())


def test_the_image_ingests_an_archive(image: Stage):
    write_archive(image.root / "tmp/cells.zip", n_patients=4, n_cells_per_patient=5)
    ingest = "RAY_AUTH_MODE=disabled malaria-ray ingest /tmp/cells.zip /tmp/dataset --image-size 32"
    run_in(image, f"({ingest} || {ingest} || {ingest})")  # Ray gives itself 30 s to start, too little on a busy machine
    assert "20" in run_in(image, "malaria-ray verify /tmp/dataset")
