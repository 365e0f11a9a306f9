"""Independent work in several processes, or on a Dask cluster."""

import contextlib
import itertools
import multiprocessing
import os
import sys
import threading
import time

import joblib
import torch

from patrec.errors import InputError, StepFailed
from patrec.machine import keep_freed_memory


class WorkerDied(StepFailed):
    """A worker process ended before its task did."""


def parallel_map(function, tasks, workers, dask=None, order="generator"):
    """Yield function(*task) for every task, run in several processes or on a Dask cluster.

    The results come in the order of the tasks or, with "generator_unordered", as they are
    done. One worker without Dask is this process itself. WorkerDied is raised if a process was
    killed; the results yielded before it are valid.
    """
    if workers == 1 and not dask:
        yield from itertools.starmap(function, tasks)
        return
    parent = None if dask else os.getpid()
    calls = [joblib.delayed(in_worker)(parent, function, *task) for task in tasks]
    threads = max(joblib.cpu_count() // workers, 1)
    local = {"backend": "loky", "n_jobs": workers, "inner_max_num_threads": threads}
    with dask_cluster(dask) if dask else contextlib.nullcontext(local) as backend:
        with joblib.parallel_config(**backend):
            pool = joblib.Parallel(batch_size=1, return_as=order)
        try:
            yield from pool(calls)
        except Exception as error:
            if type(error).__name__ in ("TerminatedWorkerError", "KilledWorker"):  # loky's, Dask's
                raise WorkerDied("a worker process was killed") from error
            raise


@contextlib.contextmanager
def dask_cluster(address):
    """What joblib.parallel_config needs to run tasks on the cluster of this Dask scheduler.

    Its workers need the packages of requirements.txt, and data, cache and output folder under the
    same paths. The project's modules travel with the tasks.
    """
    try:
        import cloudpickle
        from distributed import Client
    except ImportError:
        fault = "--dask needs a package that is not installed"
        raise InputError(f'{fault}; pip install "dask[distributed]"') from None
    try:
        client = Client(address, timeout=5)
    except (OSError, ValueError, TimeoutError) as error:
        raise InputError(f"--dask {address}: no scheduler answers there ({error})") from None
    with client, contextlib.ExitStack() as registered:
        for name in {"patrec", "tools", "common"} & set(sys.modules):  # packages with their modules
            cloudpickle.register_pickle_by_value(sys.modules[name])
            registered.callback(cloudpickle.unregister_pickle_by_value, sys.modules[name])
        yield {"backend": "dask", "client": client}


def in_worker(parent, function, *task):
    """Call a function in a worker process that ends when its parent ends (None: no parent).

    After a step is killed, no worker may continue to write into its folder.
    """

    def end_with_parent():
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    name = "end with parent"
    if all(thread.name != name for thread in threading.enumerate()):  # the first task
        keep_freed_memory()
        if parent == os.getppid():
            threading.Thread(target=end_with_parent, daemon=True, name=name).start()
        if parent and torch.cuda.device_count() > 1:  # LokyProcess-1, LokyProcess-2, ...
            place = int(multiprocessing.current_process().name.rpartition("-")[2])
            torch.cuda.set_device(place % torch.cuda.device_count())
    return function(*task)
