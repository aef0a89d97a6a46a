"""Deterministic kernels are asked for, what has none is named once, and the host's settings come back."""

from __future__ import annotations

import os
import statistics
import time
import warnings

import pytest
import torch

from finitune.numerics import determinism
from finitune.numerics.determinism import WORKSPACE_VARIABLE, Kernels, ask_cublas, missing_kernel

NO_KERNEL = (
    "put_ does not have a deterministic implementation, but you set 'torch.use_deterministic_algorithms(True)'. You "
    "can turn off determinism just for this operation, or you can use the 'warn_only=True' option, ..."
)
FLASH = (
    "Flash Attention defaults to a non-deterministic algorithm. To explicitly enable determinism call "
    "torch.use_deterministic_algorithms(True, warn_only=False). (Triggered internally at attention_backward.cu:102.)"
)
CUBLAS = (
    "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
    "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic because it uses CuBLAS "
    "and you have CUDA >= 10.2. To enable deterministic behavior in this case, you must set an environment variable "
    "before running your PyTorch application: CUBLAS_WORKSPACE_CONFIG=:4096:8 or CUBLAS_WORKSPACE_CONFIG=:16:8."
)
SPLITS = "Using `num_splits_key > 1` makes the algorithm non-deterministic, and pytorch's deterministic mode is enabled"


def put() -> torch.Tensor:
    """An operation without a deterministic kernel, on the CPU too: two values for one place."""
    return torch.zeros(3).put_(torch.tensor([1, 1]), torch.tensor([2.0, 2.0]))


def settings() -> dict[str, object]:
    return {
        "mode": torch.get_deterministic_debug_mode(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn": torch.backends.cudnn.deterministic,
        "benchmark": torch.backends.cudnn.benchmark,
        "filters": list(warnings.filters),
        "show": warnings.showwarning,
    }


def fail_inside(seen: dict[str, object]) -> None:
    with Kernels() as kernels:
        seen.update(settings())
        kernels.compute(put, lambda: None)
        put()
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("message", "operation"),
    [
        (NO_KERNEL, "put_"),
        (FLASH, "Flash Attention"),
        (CUBLAS, WORKSPACE_VARIABLE),
        (SPLITS, SPLITS[:80]),
        ("cumsum_cuda_kernel does not have a deterministic implementation", "cumsum_cuda_kernel"),
        ("CUDA out of memory. Tried to allocate 2.00 GiB.", None),
        ("a deterministic world view", None),
        ("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)", None),
        ("", None),
    ],
)
def test_torchs_words_about_kernels_are_told_from_all_others(message: str, operation: str | None) -> None:
    assert missing_kernel(message) == operation


@pytest.mark.parametrize("mode", [0, 1, 2])
@pytest.mark.parametrize("other", [False, True])
def test_the_hosts_settings_come_back(mode: int, other: bool) -> None:
    before = settings()
    try:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = other
        torch.backends.cudnn.deterministic = other
        torch.backends.cudnn.benchmark = other
        set_by_host = settings()
        inside: dict[str, object] = {}
        with pytest.raises(ZeroDivisionError):
            fail_inside(inside)
        assert inside["mode"] == 1
        assert (inside["fill"], inside["cudnn"], inside["benchmark"]) == (False, True, False)
        assert settings() == set_by_host
    finally:
        torch.set_deterministic_debug_mode(before["mode"])
        torch.utils.deterministic.fill_uninitialized_memory = before["fill"]
        torch.backends.cudnn.deterministic = before["cudnn"]
        torch.backends.cudnn.benchmark = before["benchmark"]


def test_nothing_is_asked_for_where_it_is_not_wanted() -> None:
    before = settings()
    with Kernels(wanted=False) as kernels:
        assert settings() == before
        assert kernels.compute(torch.get_deterministic_debug_mode, lambda: None) == 0
    outside = Kernels()
    assert outside.compute(torch.get_deterministic_debug_mode, lambda: None) == 0


def test_a_step_is_computed_under_error_for_only_so_is_attention_deterministic() -> None:
    with Kernels() as kernels:
        assert kernels.compute(torch.get_deterministic_debug_mode, lambda: None) == 2
        assert torch.get_deterministic_debug_mode() == 1
        assert kernels.strict
        assert kernels.findings() == []


def test_a_step_with_an_operation_without_kernel_is_undone_and_computed_again() -> None:
    calls = []

    def step() -> torch.Tensor:
        calls.append(torch.get_deterministic_debug_mode())
        return put()

    with Kernels() as kernels:
        assert kernels.compute(step, lambda: calls.append("undone")).tolist() == [0, 2, 0]
        assert calls == [2, "undone", 1]
        found = kernels.findings()
        assert [(f.code, f.where, f.data["operation"]) for f in found] == [("NUM111", "put_", "put_")]
        assert not kernels.strict
        # From now on once, without error, and not told again.
        kernels.compute(step, lambda: pytest.fail("undone"))
        assert calls[3:] == [1]
        assert kernels.findings() == []


def test_every_operation_is_told_once_and_others_are_still_found() -> None:
    with Kernels() as kernels:
        kernels.compute(put, lambda: None)
        for _ in range(3):
            put()
            warnings.warn(FLASH, UserWarning, stacklevel=1)
        assert [f.where for f in kernels.findings()] == ["put_", "Flash Attention"]


def test_another_error_in_a_step_is_passed_on_and_the_mode_is_left_right() -> None:
    def fails() -> None:
        raise RuntimeError("CUDA out of memory")

    with Kernels() as kernels:
        with pytest.raises(RuntimeError, match="out of memory"):
            kernels.compute(fails, lambda: pytest.fail("undone"))
        assert torch.get_deterministic_debug_mode() == 1
        assert kernels.strict
        assert kernels.findings() == []


def test_cublas_without_its_setting_is_told_with_the_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    def product() -> int:
        if torch.get_deterministic_debug_mode() == 2:
            raise RuntimeError(CUBLAS)
        warnings.warn(CUBLAS, UserWarning, stacklevel=1)
        return 5

    monkeypatch.setenv(WORKSPACE_VARIABLE, ":0:0")
    with Kernels() as kernels:
        assert kernels.compute(product, lambda: None) == 5
        (found,) = kernels.findings()
    assert (found.code, found.data["setting"], found.data["wanted"]) == ("NUM112", ":0:0", ":4096:8")


@pytest.mark.parametrize("host", ["error", "ignore", "default", "once"])
def test_warnings_about_kernels_are_taken_whatever_the_hosts_filters(host: str) -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter(host)
        with Kernels() as kernels:
            put()
            assert [f.where for f in kernels.findings()] == ["put_"]
    assert shown == []


def test_other_warnings_go_their_way() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with Kernels() as kernels:
            warnings.warn("a deterministic world view", UserWarning, stacklevel=1)
            warnings.warn("put_ does not have a deterministic implementation", DeprecationWarning, stacklevel=1)
            put()
            assert len(kernels.findings()) == 1
        warnings.warn("afterwards", UserWarning, stacklevel=1)
    assert [str(w.message).split()[0] for w in shown] == ["a", "put_", "afterwards"]


def test_a_hosts_error_filter_still_strikes_for_other_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Kernels(), pytest.raises(UserWarning, match="other"):
            warnings.warn("other", UserWarning, stacklevel=1)


def test_who_wraps_the_display_of_warnings_meanwhile_is_left_in_place() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with Kernels() as kernels:
            inner = warnings.showwarning
            heard = []

            def wrapper(message, *args, **kwargs) -> None:
                heard.append(str(message))
                inner(message, *args, **kwargs)

            warnings.showwarning = wrapper
            put()
            assert len(kernels.findings()) == 1
        assert warnings.showwarning is wrapper
        warnings.warn(NO_KERNEL, UserWarning, stacklevel=1)
    assert heard[-1] == NO_KERNEL
    assert [str(w.message) for w in shown] == [NO_KERNEL]


def test_a_second_run_in_the_process_tells_again() -> None:
    for _ in range(2):
        with Kernels() as kernels:
            put()
            assert len(kernels.findings()) == 1


def test_a_change_of_the_number_of_threads_is_told() -> None:
    threads = torch.get_num_threads()
    with Kernels() as kernels:
        assert kernels.findings() == []
        try:
            torch.set_num_threads(threads + 1)
            (found,) = kernels.findings()
            assert (found.code, found.data["was"], found.data["now"]) == ("NUM113", threads, threads + 1)
            assert kernels.findings() == []
        finally:
            torch.set_num_threads(threads)
        assert [f.data["now"] for f in kernels.findings()] == [threads]


def test_adding_in_place_repeats_on_many_threads_where_it_is_asked_for() -> None:
    """``index_put_`` accumulates by atomic additions otherwise: the gradient of ``x[index]`` is made of it."""
    index = torch.randint(0, 50, (100_000,), generator=torch.Generator().manual_seed(0))
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(1))

    def add() -> torch.Tensor:
        return torch.zeros(50).index_put_((index,), values, accumulate=True)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        with Kernels() as kernels:
            first = kernels.compute(add, lambda: None)
            assert all(torch.equal(kernels.compute(add, lambda: None), first) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


class TestAskingCublas:
    @pytest.fixture(autouse=True)
    def _unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(WORKSPACE_VARIABLE, "to be restored after the test")
        monkeypatch.delenv(WORKSPACE_VARIABLE)
        monkeypatch.setattr(torch.version, "cuda", "12.8")

    def test_before_cuda_is_in_use(self) -> None:
        ask_cublas()
        assert os.environ[WORKSPACE_VARIABLE] == ":4096:8"

    def test_not_where_cuda_is_in_use_already(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        ask_cublas()
        assert WORKSPACE_VARIABLE not in os.environ

    def test_not_against_the_users_own_setting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(WORKSPACE_VARIABLE, ":16:8")
        ask_cublas()
        assert os.environ[WORKSPACE_VARIABLE] == ":16:8"

    def test_not_where_torch_has_no_cuda(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", None)
        ask_cublas()
        assert WORKSPACE_VARIABLE not in os.environ


def test_the_promise_names_threads_and_device_and_promises_nothing_where_it_is_off() -> None:
    value, why = Kernels().promise(torch.device("cpu"))
    assert "bit for bit" in value
    assert f"{torch.get_num_threads()} CPU threads" in why
    value, why = Kernels().promise(torch.device("cuda:1"))
    assert "bit for bit" in value
    assert "cuda:1" in why
    value, why = Kernels(wanted=False).promise(torch.device("cpu"))
    assert "not promised" in value
    assert "guard.deterministic=false" in why


def test_asking_costs_a_step_a_few_microseconds() -> None:
    """Two switches of the mode, and one look at the number of threads."""

    def nothing() -> None:
        return None

    costs_s = []
    with Kernels() as kernels:
        for _ in range(200):
            started_s = time.perf_counter()
            kernels.compute(nothing, nothing)
            kernels.findings()
            costs_s.append(time.perf_counter() - started_s)
    assert statistics.median(costs_s) < 1e-4


def test_the_compiler_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's usual switch imports it: two seconds before a run."""
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *_, **__: pytest.fail("called"))
    with Kernels() as kernels:
        assert kernels.compute(put, lambda: None).shape == (3,)


def test_the_settings_are_those_that_torch_has() -> None:
    """A setting that torch renames would be set in vain."""
    for place, name, value in determinism._SETTINGS:
        assert isinstance(getattr(place, name), bool)
        assert isinstance(value, bool)
