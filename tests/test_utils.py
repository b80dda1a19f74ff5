"""The utilities as the published reference describes them."""

from __future__ import annotations

import inspect
import math
import re
import time

import pytest
import torch

from sparsek_vllm.utils import (
    benchmark_latency,
    compare_to_sdpa,
    print_comparison_summary,
    validate_correctness,
)

sdpa = torch.nn.functional.scaled_dot_product_attention
TIMES = ("mean_us", "median_us", "min_us", "max_us", "std_us")
METRICS = {
    "max_diff": float,
    "mean_diff": float,
    "median_diff": float,
    "num_elements": int,
    "num_mismatches": int,
    "mismatch_rate": float,
    "worst_diff_location": tuple,
    "worst_diff_output": float,
    "worst_diff_reference": float,
}


def refuses(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def defaults(function) -> dict[str, object]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


def test_signatures():
    assert defaults(benchmark_latency) == {"num_warmup": 10, "num_iters": 100}
    assert defaults(validate_correctness) == {"rtol": 1e-3, "atol": 2e-3}
    assert defaults(compare_to_sdpa) == {"scale": None, "rtol": 1e-3, "atol": 2e-3}
    names = list(inspect.signature(compare_to_sdpa).parameters)
    assert names == ["Q", "K", "V", "kernel_fn", "scale", "rtol", "atol"]


# benchmark_latency


def test_benchmark_calls_with_the_arguments():
    calls = []

    def kernel(*args, **kwargs):
        calls.append((args, kwargs))

    stats = benchmark_latency(kernel, 1, "b", num_warmup=3, num_iters=5, scale=0.5)
    assert calls == [((1, "b"), {"scale": 0.5})] * 8
    assert set(stats) == {*TIMES, "num_iters"} and stats["num_iters"] == 5
    assert isinstance(stats["num_iters"], int)
    assert all(isinstance(stats[name], float) for name in TIMES)


def test_benchmark_defaults():
    calls = []
    assert benchmark_latency(lambda: calls.append(1))["num_iters"] == 100
    assert len(calls) == 110


def test_benchmark_measures_microseconds_of_the_timed_calls_only():
    naps = iter([0.2, 0.02, 0.02, 0.04])  # the first is the warm-up
    stats = benchmark_latency(lambda: time.sleep(next(naps)), num_warmup=1, num_iters=3)
    assert 20e3 <= stats["min_us"] <= stats["median_us"] <= stats["max_us"] < 200e3
    assert stats["min_us"] < stats["mean_us"] < stats["max_us"] and stats["max_us"] >= 40e3
    assert 0 < stats["std_us"] < stats["max_us"] - stats["min_us"]


def test_benchmark_of_one_call_has_no_deviation():
    stats = benchmark_latency(torch.zeros, 4, num_warmup=0, num_iters=1)
    assert stats["std_us"] == 0.0 and len({stats[name] for name in TIMES[:4]}) == 1


def test_benchmark_on_the_device(device):
    x = torch.ones(64, 64, device=device)
    for arguments, options in (((x, x), {}), ((x,), {"other": x})):
        stats = benchmark_latency(torch.mul, *arguments, num_warmup=1, num_iters=4, **options)
        assert 0 < stats["min_us"] < 1e6


def test_benchmark_refuses():
    with refuses("num_iters must be at least 1, got 0"):
        benchmark_latency(print, num_iters=0)
    with refuses("num_warmup must be at least 0, got -1"):
        benchmark_latency(print, num_warmup=-1)


def test_benchmark_passes_errors_on():
    with pytest.raises(ZeroDivisionError):
        benchmark_latency(lambda: 1 / 0)


# validate_correctness


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_equal_tensors(dtype, device):
    x = torch.randn(2, 3, 5, device=device).to(dtype)
    correct, metrics = validate_correctness(x, x.clone())
    assert correct is True
    assert {name: type(value) for name, value in metrics.items()} == METRICS
    assert metrics["max_diff"] == metrics["mean_diff"] == metrics["median_diff"] == 0.0
    assert metrics["num_elements"] == 30
    assert metrics["num_mismatches"] == 0 and metrics["mismatch_rate"] == 0.0
    where = metrics["worst_diff_location"]
    assert metrics["worst_diff_output"] == metrics["worst_diff_reference"] == float(x[where])


def test_metrics_of_a_mismatch(device):
    reference = torch.ones(2, 4, device=device)
    output = reference.clone()
    output[0, 1] += 0.5
    output[1, 2] -= 3.0
    correct, metrics = validate_correctness(output, reference)
    assert correct is False
    assert metrics == {
        "max_diff": 3.0,
        "mean_diff": 3.5 / 8,
        "median_diff": 0.0,
        "num_elements": 8,
        "num_mismatches": 2,
        "mismatch_rate": 25.0,
        "worst_diff_location": (1, 2),
        "worst_diff_output": -2.0,
        "worst_diff_reference": 1.0,
    }


def test_tolerances_add_up():
    reference = torch.tensor([0.0, 100.0], dtype=torch.float64)
    just_in = torch.tensor([0.0019, 100.1019], dtype=torch.float64)
    just_out = torch.tensor([0.0021, 100.1021], dtype=torch.float64)
    assert validate_correctness(just_in, reference)[0] is True
    assert validate_correctness(just_out, reference)[1]["num_mismatches"] == 2
    assert validate_correctness(just_out, reference, atol=0.01)[0] is True
    assert validate_correctness(just_out, reference, rtol=0.01)[1]["num_mismatches"] == 1
    assert validate_correctness(just_in, reference, rtol=0.0, atol=0.0)[0] is False
    # It is relative to the reference, not to the output.
    assert validate_correctness(reference + 1.0, reference, rtol=0.0099, atol=0.0)[0] is False


@pytest.mark.parametrize("sides", ["output", "reference", "both"])
def test_nan_matches_nothing(sides):
    output, reference = torch.zeros(4), torch.zeros(4)
    output[1] = 50.0
    if sides != "reference":
        output[2] = torch.nan
    if sides != "output":
        reference[2] = torch.nan
    correct, metrics = validate_correctness(output, reference, atol=100.0)
    assert correct is False and metrics["num_mismatches"] == 1
    assert metrics["worst_diff_location"] == (2,) and math.isnan(metrics["max_diff"])


def test_equal_infinities_match():
    inf = torch.tensor([math.inf, -math.inf, 1.0])
    assert validate_correctness(inf, inf.clone())[0] is True
    assert validate_correctness(inf, torch.ones(3))[1]["num_mismatches"] == 2


@pytest.mark.parametrize("output", [1.0, -math.inf])
def test_an_infinite_reference_matches_only_itself(output):
    correct, metrics = validate_correctness(torch.tensor([output]), torch.tensor([math.inf]))
    assert correct is False and metrics["num_mismatches"] == 1


def test_validate_takes_mixed_dtypes_scalars_and_gradients():
    x = torch.randn(6, dtype=torch.float64)
    assert validate_correctness(x.half(), x, atol=2e-3)[0] is True
    assert validate_correctness(x[0], x[0])[1]["worst_diff_location"] == ()
    assert validate_correctness(x.clone().requires_grad_(), x)[0] is True


def test_validate_refuses():
    with refuses("output must have the shape of reference, [3, 2], got [2, 3]"):
        validate_correctness(torch.zeros(2, 3), torch.zeros(3, 2))
    with refuses("output must have the shape of reference, [2, 3], got [3]"):
        validate_correctness(torch.zeros(3), torch.zeros(2, 3))  # not broadcast
    with refuses("output must have at least one element, got an empty tensor"):
        validate_correctness(torch.zeros(0, 3), torch.zeros(0, 3))


# compare_to_sdpa


def qkv(device, *shape: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=random).to(device) for _ in "QKV"]


@pytest.mark.parametrize("scale", [None, 0.7])
def test_compare(scale, device):
    seen = []

    def kernel(q, k, v, scale=None):
        seen.append(scale)
        return sdpa(q, k, v, scale=scale)

    result = compare_to_sdpa(*qkv(device, 1, 2, 8, 64), kernel, scale=scale)
    assert set(result) == {
        "is_correct",
        "correctness_metrics",
        "sdpa_time_us",
        "kernel_time_us",
        "speedup",
        "input_shape",
    }
    assert result["is_correct"] is True and set(seen) == {scale}
    assert set(result["correctness_metrics"]) == set(METRICS)
    assert result["input_shape"] == {"B": 1, "H": 2, "S": 8, "D": 64}
    assert result["sdpa_time_us"] > 0 and result["kernel_time_us"] > 0
    assert result["speedup"] == pytest.approx(result["sdpa_time_us"] / result["kernel_time_us"])


def test_compare_finds_a_wrong_kernel_and_takes_tolerances(device):
    def wrong(q, k, v, scale=None):
        out = sdpa(q, k, v, scale=scale)
        out[0, 1, 2, 3] += 0.5
        return out

    inputs = qkv(device, 1, 2, 8, 64)
    result = compare_to_sdpa(*inputs, wrong)
    assert result["is_correct"] is False
    assert result["correctness_metrics"]["worst_diff_location"] == (0, 1, 2, 3)
    assert result["correctness_metrics"]["num_mismatches"] == 1
    assert compare_to_sdpa(*inputs, wrong, atol=1.0)["is_correct"] is True


def test_a_slow_kernel_has_a_speedup_below_one(device):
    def slow(q, k, v, scale=None):
        time.sleep(0.002)
        return sdpa(q, k, v, scale=scale)

    result = compare_to_sdpa(*qkv(device, 1, 1, 2, 64), slow)
    assert result["speedup"] < 1 and result["kernel_time_us"] >= 2000


def test_compare_refuses():
    with refuses("Q must have shape [B, H, S, D], got [8, 64]"):
        compare_to_sdpa(*[torch.zeros(8, 64)] * 3, sdpa)
    with refuses("output must have the shape of reference, [1, 1, 4, 64], got [1, 1, 4]"):
        compare_to_sdpa(*[torch.zeros(1, 1, 4, 64)] * 3, lambda q, k, v, scale: q[..., 0])


def test_summary(capsys):
    metrics = {"max_diff": 0.00123, "num_mismatches": 3, "num_elements": 1024}
    comparison = {
        "is_correct": True,
        "correctness_metrics": metrics,
        "sdpa_time_us": 30.0,
        "kernel_time_us": 12.0,
        "speedup": 2.5,
        "input_shape": {"B": 1, "H": 2, "S": 8, "D": 64},
    }
    assert print_comparison_summary(comparison) is None
    good = capsys.readouterr().out
    for text in ("B=1, H=2, S=8, D=64", "correct", "1.230e-03", "30.00 us", "12.00 us", "2.50x"):
        assert text in good
    assert "WRONG" not in good and "1024" not in good
    print_comparison_summary(comparison | {"is_correct": False})
    bad = capsys.readouterr().out
    assert "WRONG" in bad and "3 of 1024" in bad
