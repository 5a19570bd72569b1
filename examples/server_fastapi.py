"""A server of one streamed pipeline: images wait for each other in line, everything else is answered at once.

MODEL=stabilityai/stable-diffusion-3.5-medium uvicorn --app-dir examples server_fastapi:app  # no MODEL: a stand-in
"""

import io
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import diffusers
import torch
from fastapi import FastAPI, HTTPException, Response
from pydantic import BaseModel, Field

import layerstream
from layerstream.standins import build_demo

MODEL = os.environ.get("MODEL")
VRAM_BUDGET = os.environ.get("VRAM_BUDGET", "auto")
WAIT_S = float(os.environ.get("WAIT_S", "60"))  # that a request waits for those before it


class Job(BaseModel):
    prompt: str
    seed: int = 0
    steps: int = Field(28, ge=1, le=100)
    size: int = Field(1024, ge=32, le=2048, multiple_of=32)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    pipe = diffusers.DiffusionPipeline.from_pretrained(MODEL, torch_dtype=torch.bfloat16) if MODEL else build_demo()
    with layerstream.offload(pipe, vram_budget=VRAM_BUDGET, call_timeout=WAIT_S) as streamer:
        app.state.pipe, app.state.streamer = pipe, streamer
        yield  # a call that runs when the server stops is not cut off: streaming ends when it does


app = FastAPI(lifespan=lifespan)


@app.post("/images")
def images(job: Job) -> Response:  # no `async def`: FastAPI runs it in a thread, where it may wait and compute
    generator = torch.Generator("cpu").manual_seed(job.seed)
    options = {"num_inference_steps": job.steps, "height": job.size, "width": job.size}
    try:
        image = app.state.pipe(job.prompt, generator=generator, **options).images[0]
    except layerstream.ConcurrentUseError as exc:
        raise HTTPException(503, f"no turn within {WAIT_S:g} s", headers={"Retry-After": "30"}) from exc
    except torch.OutOfMemoryError as exc:
        raise HTTPException(413, "more memory than the budget has: ask for a smaller image") from exc
    png = io.BytesIO()
    image.save(png, "PNG")
    return Response(png.getvalue(), media_type="image/png")


@app.get("/health")
async def health() -> dict[str, bool]:
    return {"is_active": app.state.streamer.is_active}
