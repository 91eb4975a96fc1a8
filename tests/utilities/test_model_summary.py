from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightlite.utilities.model_summary import ModelSummary, get_human_readable_count, summarize


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(64, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False).eval()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.scale[0]


def with_example() -> Net:
    net = Net()
    net.example_input_array = torch.zeros(4, 32)  # type: ignore[assignment]
    return net


def test_the_table_lists_the_modules_of_the_first_level_and_the_totals() -> None:
    assert str(summarize(Net())) == "\n".join(
        [
            "  | Name         | Type       | Params | Mode",
            "----------------------------------------------",
            "0 | body         | Sequential | 2.1 K  | train",
            "1 | head         | Linear     | 130    | train",
            "2 | frozen       | Linear     | 6      | eval",
            "  | other params | n/a        | 5      | n/a",
            "----------------------------------------------",
            "2.2 K     Trainable params",
            "6         Non-trainable params",
            "2.3 K     Total params",
            "0.009     Total estimated model params size (MB)",
            "5         Modules in train mode",
            "1         Modules in eval mode",
        ]
    )


def test_all_levels_are_listed_where_asked_for() -> None:
    names = ["body", "body.0", "body.1", "body.2", "head", "frozen"]
    assert summarize(Net(), max_depth=-1).layer_names == names
    assert summarize(Net(), max_depth=2).layer_names == names
    assert summarize(Net(), max_depth=0).layer_names == []


def test_an_example_input_gives_sizes_and_operations() -> None:
    summary = ModelSummary(with_example())
    assert summary.in_sizes == [[4, 32], [4, 64], "?"]
    assert summary.out_sizes == [[4, 64], [4, 2], "?"]
    assert summary.total_flops == 2 * 4 * (32 * 64 + 64 * 2)
    assert [sum(counts.values()) for counts in summary.flop_counts.values()] == [2 * 4 * 32 * 64, 2 * 4 * 64 * 2, 0]
    assert "| In sizes | Out sizes" in str(summary)


def test_running_the_example_changes_neither_modes_nor_random_numbers_nor_hooks() -> None:
    net = with_example()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    ModelSummary(net)
    assert torch.equal(torch.rand(1), expected)
    assert (net.training, net.frozen.training) == (True, False)
    assert not any(module._forward_hooks for module in net.modules())


def test_parameters_count_once_and_lazy_ones_not_yet() -> None:
    net = nn.Module()
    net.a, net.b, net.lazy = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.LazyLinear(2)
    net.b.weight = net.a.weight
    summary = ModelSummary(net)
    assert (summary.total_parameters, summary.param_nums) == (9, [9, 9, 0])
    assert summary.model_size == 9 * 4e-6


def test_a_depth_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="max_depth=-2"):
        ModelSummary(Net(), max_depth=-2)


@pytest.mark.parametrize(
    ("number", "shown"), [(0, "0"), (999, "999"), (1234, "1.2 K"), (2_000_000, "2.0 M"), (4 * 10**14, "400 T")]
)
def test_counts_are_shortened(number: int, shown: str) -> None:
    assert get_human_readable_count(number) == shown
