"""bfloat16 is used where the processor has it."""

import pytest
import torch

from training.precision import has_bfloat16


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": False, "avx512_f": True}, False), ({"amx_bf16": True}, True), ({"bf16": True}, True)],
)
def test_a_cpu_trains_in_bfloat16_only_where_it_computes_in_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert has_bfloat16(torch.device("cpu")) == expected


@pytest.mark.parametrize("computes", [True, False])
def test_a_gpu_trains_in_bfloat16_only_where_it_computes_in_it(monkeypatch, computes):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: computes and not including_emulation)
    assert has_bfloat16(torch.device("cuda")) == computes
