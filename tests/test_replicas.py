"""The replicas of the examples: processes that share the weights, of which one is killed; and the same on Ray Serve."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from layerstream.standins import build_tiny

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

ROOT = Path(__file__).parent.parent
JOB = {"prompt": "a red fox in the snow", "seed": 3, "steps": 2, "size": 32}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),  # the older diffusers know no other name
]

# A replica that does what it is told, line by line.
PROGRAM = """
import hashlib, json, sys
from pathlib import Path
import replicas

replica = replicas.Replica(
    lambda: replicas.load(sys.argv[1]), "tiny", Path(sys.argv[2]), device="cpu", vram_budget="min", call_timeout=60
)
for line in sys.stdin:
    image = hashlib.sha256(replica.paint(**json.loads(line))).hexdigest()
    stats = replica.streamer.stats()
    print(json.dumps([image, stats.num_shared_units, stats.shared_bytes]), flush=True)
replica.streamer.close()
print("closed", flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    build_tiny("sd3").save_pretrained(folder)
    return folder


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("replicas", ROOT / "examples" / "replicas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "replicas", module)
    spec.loader.exec_module(module)
    return module


class Process:
    """A replica in a process of its own."""

    def __init__(self, model: Path, meet_in: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(model), str(meet_in)],
            env=_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def paint(self, **job: object) -> tuple[str, int, int]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({**JOB, **job}) + "\n")
        self._process.stdin.flush()
        image, num_shared, shared_bytes = json.loads(self._line())
        return image, num_shared, shared_bytes

    def close(self) -> None:
        assert self._process.communicate(timeout=60)[0] == "closed\n"
        assert self._process.returncode == 0

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate(timeout=60)

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextlib.contextmanager
def processes(num: int, model: Path, meet_in: Path) -> Iterator[list[Process]]:
    started: list[Process] = []
    try:
        started += [Process(model, meet_in) for _ in range(num)]
        yield started
    finally:
        for each in started:
            each.kill()


def test_replicas_share_the_weights_and_one_that_died_comes_back(
    model: Path, tmp_path: Path, example: ModuleType
) -> None:
    pipe = example.load(str(model))
    expected = hashlib.sha256(example.Replica.paint(_resident(pipe), **JOB)).hexdigest()
    num_bytes = sum(t.numel() * t.element_size() for part in pipe.components.values() for t in _weights(part))
    with processes(2, model, tmp_path / "meet") as group:
        found = [each.paint() for each in group]
        assert [image for image, _, _ in found] == [expected] * 2
        assert found[0][1:] == found[1][1:]
        assert found[0][1] > 5
        assert found[0][2] > 0.9 * num_bytes
        group[0].kill()
        assert group[1].paint() == found[1], "it runs on, whoever has led"
        assert group[1].paint(seed=4)[0] != expected
        group.append(Process(model, tmp_path / "meet"))
        assert group[2].paint() == found[0], "it shares with the other, or leads anew"
        group[1].close()
        group[2].close()


def test_a_place_that_others_may_write_to_is_refused(tmp_path: Path, example: ModuleType) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="could say whose memory is shared"):
        example.join(tmp_path)
    assert not torch.distributed.is_initialized()


# What `serve run` does, on a port that is free.
SERVER = """
import sys
import ray, replicas
from ray import serve

model, port = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": int(port)})
serve.run(replicas.app({"model": model, "replicas": "2", "gpus": "0", "vram_budget": "min"}))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "ray[serve]"')
def test_on_ray_serve(model: Path, example: ModuleType) -> None:
    """In a process of its own: what Ray warns of is none of our business."""
    port = _free_port()
    command = [sys.executable, "-c", SERVER, str(model), str(port)]
    with contextlib.ExitStack() as stack:
        # The replicas meet there, and Ray has its sockets there, whose paths have to be short.
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ls"))
        environment = _environment() | {"TMPDIR": folder, "RAY_AUTH_MODE": "disabled"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        server = stack.enter_context(subprocess.Popen(command, env=environment, **pipes))
        stack.callback(server.communicate, timeout=120)
        assert "ready\n" in iter(server.stdout.readline, "")
        images = {_posted(port, JOB) for _ in range(6)}
        assert images == {(200, example.Replica.paint(_resident(example.load(str(model))), **JOB))}
        assert _posted(port, {**JOB, "size": "large"})[0] == 422
        assert (Path(folder) / f"layerstream-{os.getuid()}" / "store").exists()


def _environment() -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "examples")])
    return {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo"}


def _resident(pipe: Any) -> Any:
    """What paints with a pipeline that does not stream."""
    return SimpleNamespace(pipe=pipe)


def _weights(part: Any) -> list[torch.Tensor]:
    return [*part.parameters(), *part.buffers()] if isinstance(part, torch.nn.Module) else []


def _posted(port: int, job: object) -> tuple[int, bytes]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/", json.dumps(job).encode(), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
