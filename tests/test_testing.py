"""`check_adapter` says what is right, what is wrong, and what to change."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import layerstream
from layerstream.comparing import output_differences, state_differences
from layerstream.model.adapters import registry
from layerstream.testing import AdapterReport, check_adapter, describe, harsh_device
from tests.fakes import toy, toy_input
from tests.token_loops import token_pipeline


@pytest.fixture(autouse=True)
def clean_registry() -> Iterator[None]:
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


class Layer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.up(x))


class Net(nn.Module):
    """Each oddity is one that real models have."""

    def __init__(self, oddity: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(5))
        self.head = nn.Linear(16, 4)
        self.register_buffer("count", torch.zeros(()))
        self.oddity = oddity
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.oddity == "order":
            for number in torch.randperm(5, generator=torch.Generator().manual_seed(self.calls)).tolist():
                self.layers[number](x)
        for layer in self.layers:
            x = layer(x)
        if self.oddity == "reads":
            x = F.linear(x, self.layers[1].up.weight)
        if self.oddity == "counts":
            self.count += 1
        return self.head(x)


def x() -> torch.Tensor:
    return torch.ones(2, 16)


def found(pipe: Any, call: Any, **options: Any) -> AdapterReport:
    return check_adapter(pipe, call, raises=False, **options)


def test_a_model_that_streams_well() -> None:
    report = check_adapter(Net(), lambda net: {"image": [net(x()), 3]})
    assert report.ok
    assert report.findings == ()
    assert report.adapters == ()
    assert report.check() is report
    (summary,) = report.components
    assert (summary.name, summary.class_name, summary.num_blocks, summary.unused) == ("Net", "Net", 5, ())
    assert 0.5 < summary.share_in_blocks < 1
    assert [run.budget for run in report.runs] == ["min", report.runs[1].budget, "auto"]
    assert report.least_bytes < report.runs[1].budget < summary.num_bytes  # type: ignore[operator]
    assert all(len(run.loads) == 5 for run in report.runs)
    assert report.runs[0].loads[4] >= 4
    assert report.runs[2].loads[4] == 0
    text = str(report)
    assert text.startswith("ok; the least budget for the weights is ")
    assert "Net        Net    " in text


def test_everything_is_restored_after_a_check() -> None:
    net = Net()
    before = describe(net)
    check_adapter(net, lambda net: net(x()))
    assert list(state_differences(before, describe(net))) == []


def test_weights_read_outside_of_their_block() -> None:
    with pytest.raises(AssertionError) as error:
        check_adapter(Net("reads"), lambda net: net(x()))
    text = str(error.value)
    assert text.startswith("0 wrong, 1 slow")
    assert (
        "weights of `Net.layers.1` are read outside of its block's forward, by `Net.forward` (test_testing.py:" in text
    )
    assert ": `Net.layers.1.up.weight`. Each time all of it is loaded. Name it in resident" in text
    line = 'layerstream.register_adapter("Net", layerstream.Adapter(stacks=["layers"], is_repeated=True, resident=['
    assert f'{line}"layers.1"]))' in text


def test_what_the_report_says_helps() -> None:
    report = found(Net("reads"), lambda net: net(x()))
    exec(report.adapters[0], {"layerstream": layerstream})
    assert check_adapter(Net("reads"), lambda net: net(x())).findings == ()


def test_entrances_that_were_found_by_themselves() -> None:
    def call(pipe: Any) -> torch.Tensor:
        return pipe.generate_image([3, 1, 4, 1, 5], num_tokens=9)

    report = check_adapter(token_pipeline(), call)
    texts = report.texts("hint")
    wanted = "`model.head` was entered by `sample`, which was found by itself; name it in entry_points"
    assert f'{wanted} ("head.sample")' in texts
    (line,) = (line for line in report.adapters if "TokenModel" in line)
    exec(line, {"layerstream": layerstream})
    again = check_adapter(token_pipeline(), call)
    assert not [text for text in again.texts("hint") if "found by itself" in text]
    assert sum(again.runs[2].loads) <= sum(report.runs[2].loads)
    assert again.components[0].unused == ("model.lm_head",)


def test_blocks_that_run_in_another_order_each_time() -> None:
    report = found(Net("order"), lambda net: net(x()).shape)
    assert not report.ok
    assert any("since blocks run in another order in each call" in text for text in report.texts("slow"))
    assert "the output holds no tensor, array or image: that it is equal says little" in report.texts("hint")


def test_blocks_called_from_outside() -> None:
    def call(net: Net) -> torch.Tensor:
        out = x()
        for layer in net.layers:
            out = layer(out)
        return out

    report = found(Net(), call)
    assert [t for t in report.texts("slow") if "are used by `call` (test_testing.py:" in t and "no method of it" in t]


def test_most_of_it_in_no_block() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(x)

    report = check_adapter(Other().eval(), lambda net: net(x()))
    texts = " ".join(report.texts("hint"))
    assert "100% of `Other` (" in texts
    assert "Name what holds its blocks in stacks. Its largest lists of modules are `body` (" in texts
    assert "no block stacks found in `Other`" in texts


def test_a_call_that_does_not_repeat() -> None:
    report = found(Net(), lambda net: net(torch.rand(2, 16)))
    assert report.runs == ()
    (text,) = report.texts("wrong")
    assert text.startswith("two calls without streaming differ: `output` differs in 8 of 8 values, by ")


def test_a_model_that_writes_is_no_fault_of_streaming() -> None:
    net = Net("counts")
    assert check_adapter(net, lambda net: net(x())).ok
    assert net.count == 1 + 2 + 15 + 1
    assert check_adapter(toy(writes_buffer=False), lambda net: net(toy_input())).ok


def test_what_differs_while_streaming_is_named() -> None:
    def call(net: Net) -> dict[str, Any]:
        is_streamed = layerstream.active(net) is not None
        return {"image": net(x()) + is_streamed, "kept": [is_streamed]}

    report = found(Net(), call)
    assert "call 1 under \"min\": `output['image']` differs in 8 of 8 values, by 1 at most" in report.texts("wrong")
    assert "call 5 under \"auto\": `output['kept'][0]` is True and was False" in report.texts("wrong")
    with pytest.raises(AssertionError, match="30 wrong, 0 slow"):
        report.check()


def test_an_error_while_streaming_is_in_the_report() -> None:
    def call(net: Net) -> torch.Tensor:
        if layerstream.active(net) is not None:
            raise KeyError("only then")
        return net(x())

    report = found(Net(), call)
    assert report.texts("wrong")[0] == "call 1 under \"min\" raised KeyError: 'only then'"
    with pytest.raises(AssertionError) as error:
        report.check()
    assert isinstance(error.value.__cause__, KeyError)


def test_what_is_left_on_the_model_is_named() -> None:
    def call(net: Net) -> torch.Tensor:
        if layerstream.active(net) is not None:
            net.left = 3
            net.head.register_forward_hook(lambda *args: None)
        return net(x())

    texts = found(Net(), call).texts("wrong")
    assert 'after leaving "min", the Net. instance has other attributes: left' in texts
    assert 'after leaving "min", the Net.head instance has other hooks' in texts


def test_warnings_of_others_go_where_they_went() -> None:
    def call(net: Net) -> torch.Tensor:
        warnings.warn("of the model", UserWarning, stacklevel=1)
        return net(x())

    with pytest.warns(UserWarning, match="of the model"):
        check_adapter(Net(), call)


def test_bad_arguments() -> None:
    def call(net: Net) -> torch.Tensor:
        return net(x())

    num_calls: Any
    for num_calls in (3, "5", None):
        with pytest.raises(layerstream.ArgumentError, match="num_calls must be an int of at least 4"):
            check_adapter(Net(), call, num_calls=num_calls)
    no_call: Any
    for no_call in (None, x()):
        with pytest.raises(layerstream.ArgumentError, match="call must be a function of the pipeline"):
            check_adapter(Net(), no_call)
    with pytest.raises(layerstream.PipelineError, match="on the meta device"):
        check_adapter(Net().to("meta"), call)
    net = Net()
    with (
        layerstream.offload(net, device=harsh_device()),
        pytest.raises(layerstream.AlreadyOffloadedError, match="is streamed by layerstream already"),
    ):
        check_adapter(net, call)
    layerstream.register_adapter(Net, layerstream.Adapter(stacks=["layer"]))
    with pytest.raises(layerstream.AdapterError, match="stack `layer` does not exist"):
        check_adapter(Net(), lambda net: net(x()))


def test_it_is_imported_by_whom_asks_for_it() -> None:
    code = "import layerstream, sys; assert 'layerstream.testing' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- comparing


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclass
class Output:
    images: Any


class Plain:
    def __init__(self, value: Any) -> None:
        self.value = value


ONE = torch.ones(2)
ZERO = torch.zeros(1)


@pytest.mark.parametrize(
    ("output", "expected", "differences"),
    [
        (ONE, ONE.clone(), []),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), []),
        (ONE + 1, ONE, ["`output` differs in 2 of 2 values, by 1 at most"]),
        (-ZERO, ZERO, ["`output` differs in the sign of zeros or the bits of NaN"]),
        (ONE.double(), ONE, ["`output` is torch.float64 [2] and was torch.float32 [2]"]),
        (3, ONE, ["`output` is a int and was a tensor"]),
        ([1, "a"], [1, "b"], ["`output[1]` is 'a' and was 'b'"]),
        ((1,), [1], ["`output` is a tuple and was a list"]),
        ([1, 2], [1], ["`output` has 2 parts (output[0], output[1]) and had 1 parts (output[0])"]),
        ({"x": {"y": ONE}}, {"x": {"y": ONE + 1}}, ["`output['x']['y']` differs in 2 of 2 values, by 1 at most"]),
        (Output([ONE, ZERO]), Output([ONE, ZERO + 2]), ["`output.images[1]` differs in 1 of 1 values, by 2 at most"]),
        (Pair(1, ONE), Pair(2, ONE), ["`output.a` is 1 and was 2"]),
        (Plain(ZERO), Plain(ZERO + 1), ["`output.value` differs in 1 of 1 values, by 1 at most"]),
        ({3, 4}, {4, 3}, []),
        (float("nan"), float("nan"), []),
        (object(), object(), []),
        (ONE.to(torch.bfloat16), ONE.to(torch.bfloat16), []),
        (ONE > 0, ONE < 0, ["`output` differs in 2 of 2 values, by 1 at most"]),
    ],
)
def test_differences_of_outputs(output: Any, expected: Any, differences: list[str]) -> None:
    assert list(output_differences(output, expected)) == differences


def test_differences_of_arrays_and_images() -> None:
    np = pytest.importorskip("numpy")
    assert list(output_differences(np.ones(2), np.ones(2))) == []
    (text,) = output_differences(np.ones(2), np.zeros(2))
    assert text.startswith("`output bytes` is ")
    image = pytest.importorskip("PIL.Image")
    red, blue = (image.new("RGB", (1, 1), colour) for colour in ("red", "blue"))
    assert list(output_differences(red, red.copy())) == []
    assert len(list(output_differences(red, blue))) == 1


def test_weights_that_blocks_share_are_told_of() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Layer(64) for _ in range(4))
            for block in list(self.blocks)[1:]:
                block.up.weight = self.blocks[0].up.weight  # type: ignore[union-attr]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    report = check_adapter(Shared().eval(), lambda model: model(torch.ones(2, 64)))
    hints = [finding.text for finding in report.findings if finding.kind == "hint"]
    expected = "94% of `Shared` (16.0 KiB) is shared by blocks, belongs to none, and is on the device whenever it runs"
    assert any(text.startswith(expected) for text in hints), hints
    assert not any("Name what holds its blocks" in text for text in hints)
