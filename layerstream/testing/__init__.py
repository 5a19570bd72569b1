"""For authors of models and adapters: does this model stream well, and what should be changed?

    from layerstream.testing import check_adapter

    print(check_adapter(model, lambda model: model(torch.ones(1, 16))))

Everything runs on the simulated device, in host memory, so a small build of the model is enough, and the best to take.
"""

from layerstream.comparing import assert_restored, describe
from layerstream.testing.check import check_adapter, harsh_device
from layerstream.testing.report import AdapterReport, BudgetRun, ComponentSummary, Finding

__all__ = [
    "AdapterReport",
    "BudgetRun",
    "ComponentSummary",
    "Finding",
    "assert_restored",
    "check_adapter",
    "describe",
    "harsh_device",
]
