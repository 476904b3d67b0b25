"""The benches start, and the one for GPUs runs its steps on small models where there is none."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import thorough

BENCH = Path(__file__).resolve().parent.parent / "bench"


def run(name: str, *arguments: str, **environment: str) -> str:
    """What a bench prints; it must end well."""
    done = subprocess.run(
        [sys.executable, str(BENCH / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def gpu() -> Any:
    """bench/gpu.py as a module."""
    spec = importlib.util.spec_from_file_location("bench_gpu", BENCH / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["bench_gpu"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["pipeline.py", "transport.py", "gpu.py"])
def test_a_bench_says_how_it_is_used(name: str) -> None:
    text = run(name, "--help")
    assert f"bench/{name}" in text and "--rounds" in text


def test_the_bench_for_gpus_says_so_in_one_line_where_there_is_none() -> None:
    text = run("gpu.py", CUDA_VISIBLE_DEVICES="")
    assert "no CUDA device" in text and len(text.splitlines()) == 1


@thorough
def test_the_bench_for_gpus_runs_all_its_ways_on_small_models() -> None:
    text = run("gpu.py", "--device", "cpu", "--tiny", "--models", "bert", "--rounds", "1")
    assert "sequences/s" in text
    for way in ("plain PyTorch loop", "ours, one stage", "ours, two stages, 1f1b", "ours, two stages, pipedream"):
        assert re.search(rf"^{way} +\d+\.\d\d +\d+\.\d +\d+\.\d\d +\? +\d+\.\d{{3}}$", text, re.MULTILINE), text


def test_the_peak_is_that_of_the_card_whose_name_fits_best(gpu: Any) -> None:
    assert gpu.peak_flops("NVIDIA H200") == 989e12
    assert gpu.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert gpu.peak_flops("NVIDIA L40S") == 362e12
    assert gpu.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert gpu.peak_flops("Some Card") is None


def test_a_resnet50_takes_three_times_its_forward_without_the_images_gradient(gpu: Any) -> None:
    forward = 2 * 4.089e9  # multiplications and additions at 224 x 224 (He et al., 2015, and torchvision's table)
    stem = 2 * 64 * 112 * 112 * 3 * 49
    assert gpu.training_flops(gpu.CASES["resnet50"].model()) == pytest.approx(3 * forward - stem, rel=0.001)


@pytest.mark.parametrize("name", ["resnet50", "bert"])
def test_the_plain_loop_and_ours_minimise_the_same_loss(gpu: Any, name: str) -> None:
    case = gpu.TINY[name]
    (inputs, targets), _ = gpu.resident(case, torch.device("cpu"))
    outputs = gpu.build_whole(case.model(), 0).eval()(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    ours, _ = case.criterion(outputs, targets, case.criterion.count(targets))
    torch.testing.assert_close(ours, case.loss(outputs, targets))
