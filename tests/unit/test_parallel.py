"""Which card a worker takes; workers as processes are in tests/system/test_workers.py."""

import os

import torch
from conftest import patch_everywhere

import patrec.parallel


def test_each_worker_takes_a_card_of_its_own(monkeypatch):
    """Workers are named LokyProcess-1, -2, ...; a card of Kaggle's two was idle before."""
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    patch_everywhere(monkeypatch, "keep_freed_memory", lambda: None)
    for number in (1, 2, 3):
        named = type("Process", (), {"name": f"LokyProcess-{number}"})
        processes = patrec.parallel.multiprocessing
        monkeypatch.setattr(processes, "current_process", lambda process=named: process)
        assert patrec.parallel.in_worker(os.getpid(), max, number, 0) == number
    assert sorted(taken[:2]) == [0, 1] and taken[2] == taken[0]
