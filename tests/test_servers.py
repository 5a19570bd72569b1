"""The server of the examples: requests wait for each other, one gives up, and the server answers meanwhile."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layerstream.standins import build_tiny

pytest.importorskip("diffusers")
pytest.importorskip("fastapi")
httpx2 = pytest.importorskip("httpx2")

EXAMPLE = Path(__file__).parent.parent / "examples" / "server_fastapi.py"
JOB = {"prompt": "a red fox in the snow", "steps": 2, "size": 32}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*torch_dtype.*:FutureWarning"),  # the older diffusers know no other name
]

Client = Any  # of httpx2, which Python 3.10 does not have


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-sd3"
    build_tiny("sd3").save_pretrained(folder)
    return folder


@pytest.fixture
def load(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], ModuleType]:
    """Import the example as a server of the tiny model, whose requests wait so many seconds."""

    def loaded(wait_s: float) -> ModuleType:
        monkeypatch.setenv("MODEL", str(model))
        monkeypatch.setenv("VRAM_BUDGET", "min")
        monkeypatch.setenv("WAIT_S", str(wait_s))
        spec = importlib.util.spec_from_file_location("server_fastapi", EXAMPLE)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "server_fastapi", module)
        spec.loader.exec_module(module)
        return module

    return loaded


class Held:
    """Holds calls of a pipeline in the middle, until `go_on` is set."""

    def __init__(self, pipe: Any) -> None:
        self.num_inside = 0
        self.is_inside, self.go_on = threading.Event(), threading.Event()
        pipe.transformer.transformer_blocks[1].register_forward_pre_hook(self._wait)

    def _wait(self, *args: object) -> None:
        self.num_inside += 1
        self.is_inside.set()
        assert self.go_on.wait(60)

    async def until_inside(self) -> None:
        assert await asyncio.to_thread(self.is_inside.wait, 60)


def serve(server: ModuleType, act: Callable[[Client, Held], Coroutine[Any, Any, None]]) -> None:
    """Run `act` beside the server, in one event loop."""

    async def run() -> None:
        async with server.app.router.lifespan_context(server.app):
            held = Held(server.app.state.pipe)
            transport = httpx2.ASGITransport(app=server.app)
            async with httpx2.AsyncClient(transport=transport, base_url="http://server", timeout=120) as client:
                try:
                    await act(client, held)
                finally:
                    held.go_on.set()

    asyncio.run(run())


def test_requests_wait_for_each_other(load: Callable[[float], ModuleType]) -> None:
    async def act(client: Client, held: Held) -> None:
        first = asyncio.create_task(client.post("/images", json=JOB))
        await held.until_inside()
        others = [asyncio.create_task(client.post("/images", json={**JOB, "seed": seed})) for seed in (0, 1)]
        # The loop answers while one call runs and two wait, none of which gets in.
        for _ in range(20):
            assert (await client.get("/health")).json() == {"is_active": True}
        assert held.num_inside == 1
        assert not any(task.done() for task in (first, *others))
        held.go_on.set()
        done = await asyncio.gather(first, *others)
        assert [answer.status_code for answer in done] == [200, 200, 200]
        assert done[0].headers["content-type"] == "image/png"
        assert done[0].content == done[1].content, "same prompt and seed"
        assert done[0].content != done[2].content, "another seed"

    server = load(60)
    serve(server, act)
    assert not server.app.state.streamer.is_active


def test_a_request_gives_up_and_the_running_one_does_not_notice(load: Callable[[float], ModuleType]) -> None:
    async def act(client: Client, held: Held) -> None:
        first = asyncio.create_task(client.post("/images", json=JOB))
        await held.until_inside()
        late = await client.post("/images", json=JOB)
        assert late.status_code == 503
        assert late.json() == {"detail": "no turn within 0 s"}
        assert late.headers["retry-after"] == "30"
        assert not first.done()
        held.go_on.set()
        image = await first
        assert image.status_code == 200
        again = await client.post("/images", json=JOB)
        assert (again.status_code, again.content) == (200, image.content)

    serve(load(0), act)


def test_what_was_not_asked_for_rightly_is_refused(load: Callable[[float], ModuleType]) -> None:
    async def act(client: Client, held: Held) -> None:
        for wrong in ({}, {**JOB, "steps": 0}, {**JOB, "size": 33}):
            assert (await client.post("/images", json=wrong)).status_code == 422

    serve(load(0), act)
