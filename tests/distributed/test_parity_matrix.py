"""Invariant 2 over the whole matrix: topology x ZeRO x batch x recomputation x precision (`make test-slow`)."""

import pytest

from tests.distributed.layouts import Trained, check_agreement, check_bf16, every_layout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
FP32, BF16 = every_layout(""), every_layout("bf16")


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    return Trained(dataset, tmp_path_factory.mktemp("matrix"), FP32 | BF16)


@pytest.mark.parametrize("name", FP32)
def test_layouts_agree_with_one_fp64_process(name, trained, tmp_path):
    check_agreement(trained, name, tmp_path)


@pytest.mark.parametrize("name", BF16)
def test_bf16_follows_fp64(name, trained, tmp_path):
    check_bf16(trained, name, tmp_path)
