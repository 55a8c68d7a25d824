"""A run of several processes: `jax.distributed` started with checks before it, and a lookout for lost processes.

    with distributed.start("tpu") as processes:  # or "slurm", "auto", "manual"; the same program in each process
        ...

Call it before anything that uses a device. In the `with` an error in one process ends all of them at once; at its end
each waits until all are done.
"""

import contextlib
import functools
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma_jax.parallel import lookout
from gemma_jax.parallel.lookout import Lookout

HOWS = ("auto", "tpu", "slurm", "manual")
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
FALLBACKS = {  # environment variables that stand for arguments of "manual"; JAX itself reads the first
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
NET = 1.5  # JAX's heartbeats wait so many times as long as the lookout, which ends a run with a clearer message
JAX_HEARTBEAT_S = 100  # JAX's default
GRACE_S = 2.0  # before an error here counts as this process's own: a lost process makes collectives of others fail too
MESSAGE_BYTES = 2048


@dataclass(frozen=True)
class Processes:
    """This process among those of its run. To be used in a `with`, or closed when its work is done."""

    index: int
    count: int
    local_devices: tuple[Any, ...]  # jax.Device; those of this process
    lookout: Lookout | None = field(default=None, repr=False)

    def close(self) -> None:
        """Waits until all processes have come here. If one is lost meanwhile, this one ends as `start` says."""
        if self.lookout is not None:
            self.lookout.leave()

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Closes it; after an error tells the others, shows the traceback and ends this process with code 1.

        It must end here: on its way out of Python it would wait for the others at JAX's shutdown barrier.
        """
        code = exit_code(error)
        if code == 0:
            self.close()
        if code == 0 or self.lookout is None:
            return
        if isinstance(error, Exception):  # gloo's errors come as JaxRuntimeError or ValueError
            self.lookout.wait_for_loss(GRACE_S)
        self.lookout.fail(f"{type(error).__name__}: {str(error).strip()[:500]}")
        if not isinstance(error, SystemExit) and kind is not None and error is not None:
            sys.excepthook(kind, error, at)
        elif isinstance(error, SystemExit) and not isinstance(error.code, int):
            sys.stderr.write(f"{error.code}\n")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def exit_code(error: BaseException | None) -> int:
    """The code with which Python ends after `error`."""
    if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
        return 0
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def start(
    how: str = "auto",
    *,
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    timeout_s: int = 300,
    lost_after_s: int | None = 60,
) -> Processes:
    """Joins the processes of a run into one JAX runtime. All of them call it, before any device is used.

    Args:
        how: who says which processes there are. "tpu": a TPU VM's or GKE's metadata; "slurm": the variables that `srun`
            sets, a process for each GPU; "auto": whichever of these, or Open MPI, JAX finds; "manual": the arguments.
        coordinator: "host:port" of process 0, the same in all; a free port there that the others can reach.
        processes, process: how many there are, and which this is, from 0. These three are for "manual" alone; those not
            given are read from $JAX_COORDINATOR_ADDRESS, $JAX_NUM_PROCESSES and $JAX_PROCESS_ID.
            $JAX_LOCAL_DEVICE_IDS ("0,1") restricts the GPUs of a process.
        timeout_s: seconds that processes wait for each other at the start.
        lost_after_s: seconds without a sign of life after which a process counts as lost; one that is killed or has an
            error is noticed at once. The others then write which it was to standard error and end with code 75 (see
            `lookout`). None: no lookout, only JAX's heartbeats.

    Raises, before JAX is touched: ValueError for bad or inconsistent arguments; RuntimeError if JAX is already
        distributed or has used a device, or no cluster is found; TimeoutError if the coordinator cannot be reached;
        OSError if its port is not free.
        If then not all processes come in time, or they disagree on their number, the process writes so to standard
        error and ends with code 75: JAX's wait for the others cannot be interrupted.
    """
    begin = time.monotonic()
    given = {"coordinator": coordinator, "processes": processes, "process": process}
    arguments = _checked(how, given, timeout_s, lost_after_s)
    heartbeat = JAX_HEARTBEAT_S if lost_after_s is None else round(lost_after_s * NET)
    _initialize(arguments, heartbeat, max(1.0, timeout_s - (time.monotonic() - begin)))
    watch = None
    if lost_after_s is not None and jax.process_count() > 1:
        watch = _look_out(arguments.get("coordinator_address"), timeout_s, lost_after_s)
    _check_count(arguments.get("num_processes"), watch)
    return Processes(jax.process_index(), jax.process_count(), tuple(jax.local_devices()), watch)


def _checked(how: str, given: dict[str, Any], timeout_s: int, lost_after_s: int | None) -> dict[str, Any]:
    """Arguments for JAX. Raises what is wrong with them."""
    if how not in HOWS:
        raise ValueError(f"how is {how!r}; wanted {', '.join(map(repr, HOWS))}")
    if timeout_s < 1 or (lost_after_s is not None and lost_after_s < 3):
        raise ValueError(f"timeout_s is {timeout_s} and lost_after_s {lost_after_s}; wanted at least 1 and 3 seconds")
    if jax.distributed.is_initialized():
        raise RuntimeError("jax.distributed is already initialised; start it once, at the beginning of the program")
    return _manual(given, timeout_s) if how == "manual" else _detected(how, given)


def _check_count(told: int | None, watch: Lookout | None) -> None:
    """Ends all processes if this one was told another number of them than process 0: JAX does not mind."""
    index, count = jax.process_index(), jax.process_count()
    if told is None or told == count:
        return
    message = f"process {index} was started as one of {told}, but process 0 counts {count}; tell all the same number"
    if watch is not None:
        watch.fail(message)
    lookout.end_process(message)


def _manual(given: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Arguments for JAX, checked: also that the coordinator's port is free, or that it answers."""
    values = {name: os.environ.get(FALLBACKS[name]) if value is None else value for name, value in given.items()}
    missing = [f"{name} (or ${FALLBACKS[name]})" for name, value in values.items() if value is None]
    if missing:
        raise ValueError(f"how='manual' needs {', '.join(missing)}")
    host, port = address(values["coordinator"])
    count, index = (_whole(name, values[name]) for name in ("processes", "process"))
    if count < 1 or not 0 <= index < count:
        raise ValueError(f"process is {index} of {count}; wanted one of 0 to {max(count, 1) - 1}")
    if index == 0:
        _check_free(port)
    else:
        _reach(host, port, index, timeout_s)
    return {
        "coordinator_address": f"{host}:{port}",
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def address(text: Any) -> tuple[str, int]:
    """Host and port of "host:port". Raises ValueError for anything else."""
    host, _, port = str(text).rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"coordinator is {text!r}; wanted 'host:port', such as '10.0.0.1:8476'")
    return host, int(port)


def _whole(name: str, value: Any) -> int:
    try:
        return int(str(value))
    except ValueError:
        raise ValueError(f"{name} is {value!r}; wanted a whole number") from None


def _check_free(port: int) -> None:
    """JAX's coordinator crashes (SIGSEGV, JAX 0.10.2) on a port that is taken."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        message = f"the coordinator cannot listen at port {port}: {error.strerror}; give a free one"
        raise OSError(error.errno, message) from None


def _reach(host: str, port: int, index: int, timeout_s: float) -> None:
    """Waits for the coordinator: JAX aborts in C++ when it does not come."""
    deadline, why = time.monotonic() + timeout_s, "no answer"
    while time.monotonic() < deadline:
        try:
            socket.create_connection(
                (host.strip("[]"), port), timeout=max(0.1, min(5.0, deadline - time.monotonic()))
            ).close()
            return
        except OSError as error:
            why = error.strerror or str(error)
            time.sleep(min(0.2, max(0.0, deadline - time.monotonic())))
    raise TimeoutError(
        f"process {index} could not reach the coordinator at {host}:{port} within {timeout_s:g} s ({why}); is process "
        "0 running there, and may this machine connect to it?"
    )


def _detected(how: str, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments for JAX's own detection of a cluster."""
    extra = [name for name, value in given.items() if value is not None]
    if extra:
        raise ValueError(f"how={how!r} finds out {', '.join(extra)} by itself; leave it out, or use how='manual'")
    if how == "slurm":
        missing = [name for name in SLURM if name not in os.environ]
        if missing:
            raise RuntimeError(f"not started by srun: {', '.join(missing)} not set; start the program with `srun`")
        return {"cluster_detection_method": "slurm"}
    if how == "tpu":
        is_gke = "TPU_PROCESS_ADDRESSES" in os.environ or "TPU_WORKER_HOSTNAMES" in os.environ
        return {"cluster_detection_method": "gketpu" if is_gke else "gcetpu"}
    return {}


def _initialize(arguments: dict[str, Any], heartbeat_s: int, timeout_s: float) -> None:
    """`jax.distributed.initialize`, with messages for what goes wrong in it."""
    late = f"not all processes of the run came within {timeout_s:.0f} s; see which of them did not start, and why"
    try:
        with _deadline(timeout_s, late):
            jax.distributed.initialize(
                **arguments,
                initialization_timeout=round(timeout_s) + 30,  # the deadline is first
                heartbeat_timeout_seconds=heartbeat_s,
            )
    except ValueError as error:
        raise RuntimeError(
            f"no cluster found ({error}); a single process needs no start, and processes that no TPU, Slurm or Open "
            "MPI has started need how='manual'"
        ) from error
    except RuntimeError as error:
        if "before" not in str(error):
            raise
        raise RuntimeError(
            "JAX has used its devices already, so it cannot become distributed; call distributed.start() before any "
            "array is made, any model loaded, and any call of jax.devices() or jax.default_backend()"
        ) from error


@contextlib.contextmanager
def _deadline(timeout_s: float, message: str) -> Iterator[None]:
    """Ends this process with a message if what is within takes longer."""
    timer = threading.Timer(timeout_s, functools.partial(lookout.end_process, message))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _look_out(coordinator: str | None, timeout_s: float, lost_after_s: float) -> Lookout:
    """Tells all where process 0 listens, by JAX itself, and connects them."""
    index, count = jax.process_index(), jax.process_count()
    try:
        if index == 0:
            hosts = [coordinator.rpartition(":")[0].strip("[]")] if coordinator else []
            with lookout.listen() as listener:
                token = secrets.token_hex(16)
                _shared({"hosts": hosts + lookout.own_hosts(), "port": listener.getsockname()[1], "token": token})
                sockets = lookout.gather(listener, token, count, timeout_s)
        else:
            place = _shared(None)
            sockets = {0: lookout.join(place["hosts"], place["port"], place["token"], index, timeout_s)}
    except TimeoutError as error:
        lookout.end_process(str(error))
        raise
    return Lookout(index, count, sockets, lost_after_s)


def _shared(data: Any) -> Any:
    """What process 0 gives, in all."""
    text = b"" if data is None else json.dumps(data).encode()
    assert len(text) <= MESSAGE_BYTES, "more than fits"
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(text.ljust(MESSAGE_BYTES), np.uint8))
    return json.loads(np.asarray(received).tobytes())
