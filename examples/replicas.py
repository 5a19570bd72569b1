"""A server of one pipeline on each GPU of a host, whose replicas share one copy of the weights in host memory.

cd examples
serve run --working-dir . replicas:app model=stabilityai/stable-diffusion-3.5-medium replicas=2
"""

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import layerstream
from layerstream.standins import build_demo

MEET_IN = Path(tempfile.gettempdir()) / f"layerstream-{os.getuid()}"


class Replica:
    """One streamed pipeline. Ray has no part in it: any process may have one.

    Args:
        build: loads the pipeline, with the same weights in every replica.
        name: under which replicas of one host share these weights.
        options: more of `layerstream.offload`.
    """

    def __init__(self, build: Callable[[], Any], name: str, meet_in: Path = MEET_IN, **options: Any) -> None:
        join(meet_in)
        self.pipe = build()
        self.streamer = layerstream.offload(self.pipe, shared_as=name, **options).start()

    def paint(self, prompt: str, seed: int = 0, steps: int = 28, size: int = 1024) -> bytes:
        """One image, as PNG; a second caller waits for the first."""
        generator = torch.Generator("cpu").manual_seed(int(seed))
        options = {"num_inference_steps": int(steps), "height": int(size), "width": int(size)}
        png = io.BytesIO()
        self.pipe(str(prompt), generator=generator, **options).images[0].save(png, "PNG")
        return png.getvalue()


def join(meet_in: Path) -> None:
    """Make a process group of this process alone. Its store is a file that all replicas of the host have: they find
    each other there, none waits for another, and one that has died can be started again."""
    if torch.distributed.is_initialized():
        return
    meet_in.mkdir(mode=0o700, parents=True, exist_ok=True)
    if meet_in.stat().st_uid != os.getuid() or meet_in.stat().st_mode & 0o022:
        raise PermissionError(f"others may write to {meet_in}, and could say whose memory is shared")
    store = torch.distributed.FileStore(str(meet_in / "store"))
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def load(model: str | None) -> Any:
    if model is None:
        return build_demo()
    import diffusers

    return diffusers.DiffusionPipeline.from_pretrained(model, torch_dtype=torch.bfloat16)


def app(arguments: dict[str, str]) -> Any:
    """What `serve run` starts: each replica has a GPU, which it sees as cuda:0; with `gpus=0` the simulated device."""
    from ray import serve
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import Response

    model, gpus = arguments.get("model"), int(arguments.get("gpus", 1))
    options = {"vram_budget": arguments.get("vram_budget", "auto"), "device": None if gpus else "cpu"}

    class Server:
        def __init__(self) -> None:
            self.replica = Replica(lambda: load(model), model or "stand-in", call_timeout=60, **options)

        async def __call__(self, request: Request) -> Response:
            job = await request.json()
            try:  # in a thread, where it may wait and compute
                png = await run_in_threadpool(self.replica.paint, **job)
            except layerstream.ConcurrentUseError:
                return Response("no turn within a minute", 503, {"Retry-After": "30"})
            except (TypeError, ValueError) as exc:
                return Response(str(exc), 422)
            return Response(png, media_type="image/png")

    deployment = serve.deployment(
        Server,
        num_replicas=int(arguments.get("replicas", 2)),
        max_ongoing_requests=4,  # one runs, the others wait in line
        ray_actor_options={"num_gpus": gpus},
    )
    return deployment.bind()
