"""A thread reads the next batch while one is used."""

import threading

import pytest
import torch

from bundle.errors import UserError
from bundle.inference.slices import ReadAhead


class Numbers(torch.utils.data.Dataset):
    def __init__(self, broken=None):
        self.read, self.broken = [threading.Event() for _ in range(6)], broken

    def __len__(self):
        return len(self.read)

    def __getitem__(self, index):
        self.read[index].set()
        if index == self.broken:
            raise UserError("5.png: found nothing")
        return index


def test_batches_come_in_order_and_the_next_is_read_meanwhile():
    numbers, found, threads = Numbers(), [], torch.get_num_threads()
    for batch in ReadAhead(numbers, batch_size=2, collate_fn=list):
        found += batch
        assert batch[-1] == 5 or numbers.read[batch[-1] + 1].wait(20), "while this loop waits"
    assert found == list(range(6)) and torch.get_num_threads() == threads


def test_an_error_of_the_thread_is_raised_where_the_batch_is_used():
    loader, found, before = ReadAhead(Numbers(broken=4), batch_size=2, collate_fn=list), [], set(threading.enumerate())
    with pytest.raises(UserError, match="^5.png: found nothing$"):
        for batch in loader:
            found += batch
    assert found == [0, 1, 2, 3]
    assert set(threading.enumerate()) <= before
