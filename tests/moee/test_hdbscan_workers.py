import threading

import pytest
import torch

from moee.clustering.workers import spread


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_single_threaded_workers(threads):
    def work(item):
        return item * item, torch.get_num_threads(), threading.get_ident()

    results = list(spread(work, range(40), torch.device("cpu")))
    assert [value for value, _, _ in results] == [item * item for item in range(40)]
    assert {count for _, count, _ in results} == {1}
    assert (threading.get_ident() in {ident for _, _, ident in results}) == (threads == 1)
    assert torch.get_num_threads() == threads


def test_stopping_early_cancels_the_rest(threads):
    begun = []
    results = spread(begun.append, range(10_000), torch.device("cpu"))
    next(results)
    results.close()
    assert len(begun) < 10_000
    assert torch.get_num_threads() == threads


def test_errors_reach_the_caller(threads):
    def work(item):
        raise ZeroDivisionError(f"item {item}")

    with pytest.raises(ZeroDivisionError, match="item 0"):
        list(spread(work, range(5), torch.device("cpu")))
    assert torch.get_num_threads() == threads
