"""Global state is as it was after every test, or the test fails."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch

from layerstream.hooks import eager
from layerstream.pipeline.owners import ACTIVE


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    yield
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()) == modes
    if ACTIVE or eager._held:
        gc.collect()
    assert not list(ACTIVE), "a streamer left active"
    assert not eager._held, "code that dynamo passes over still"


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    import torch._dynamo

    torch._dynamo.reset()
    yield
    sys.modules["torch._dynamo"].reset()
