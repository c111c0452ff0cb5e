"""bfloat16 is used where the processor has it."""

import pytest
import torch

from training.precision import mixed_precision


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": False, "avx512_f": True}, torch.float32),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"bf16": True}, torch.bfloat16),
    ],
)
def test_a_cpu_computes_in_bfloat16_only_where_it_has_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    ones = torch.ones(2, 2)
    with mixed_precision(torch.device("cpu")):
        assert (ones @ ones).dtype == expected
