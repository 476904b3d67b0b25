"""How a training script ends when something goes wrong: who is told, what is printed, which exit status.

the user's mistake            one line                 status 2
a peer went away              traceback, secondary     status 1     the launcher shows the peer's error, not this one
a forged message              one line                 status 1
anything else                 traceback                status 1
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.cluster.rendezvous import Channel
from pipeline.errors import Forged, PeerLost, UserError

USER_STATUS, ERROR_STATUS = 2, 1


def control_channel() -> Channel | None:
    """The launcher's control channel, or None in a process that heturun did not start."""
    if "HETURUN_CONTROL" not in os.environ:
        return None
    from pipeline.cluster.control import Control

    return Control.from_environment()


@contextmanager
def report_failures(control: Channel | None = None) -> Iterator[None]:
    """Turns whatever a training script raises into a report, a message on stderr and an exit status.

    Args:
        control: the launcher's channel; without it, the one that the environment names is used.

    Raises:
        SystemExit: with the status above. In an MPI job of several ranks all of them end, so that none waits for ever.
    """
    try:
        yield
    except UserError as error:
        line = " ".join(str(error).split())
        _end(control, f"error: {line}\n", line, status=USER_STATUS, secondary=False)
    except Forged as error:
        line = f"error: {' '.join(str(error).split())}"
        _end(control, f"{line}\n", line, status=ERROR_STATUS, secondary=False)
    except Exception as error:
        text = traceback.format_exc()
        _end(control, text, text, status=ERROR_STATUS, secondary=is_secondary(error))
    except SystemExit as error:
        if error.code:
            abort_mpi(error.code if isinstance(error.code, int) else ERROR_STATUS)
        raise


def is_secondary(error: BaseException) -> bool:
    """Whether an error says that a peer went away, rather than that something is wrong here."""
    import torch.distributed as dist

    if isinstance(error, PeerLost | dist.DistError):
        return True
    words = str(error).lower()
    from_gloo = isinstance(error, RuntimeError) and ("gloo" in words or "connection closed by peer" in words)
    return from_gloo or type(error).__module__.startswith("mpi4py")


def _end(control: Channel | None, printed: str, reported: str, *, status: int, secondary: bool) -> None:
    _report(control, reported, secondary=secondary, status=status)
    sys.stdout.flush()
    sys.stderr.write(printed)
    sys.stderr.flush()
    abort_mpi(status)
    raise SystemExit(status)


def _report(control: Channel | None, message: str, *, secondary: bool, status: int) -> None:
    """Tells the launcher; if it cannot be reached, says so, because the error itself still has to be printed."""
    try:
        channel = control if control is not None else control_channel()
        if channel is not None:
            channel.failed(message, secondary=secondary, status=status)
    except (OSError, EOFError, ValueError) as error:
        sys.stderr.write(f"warning: the launcher could not be told of this error: {error}\n")


def abort_mpi(status: int) -> None:
    """Ends every rank of this MPI world, if there are others: they would wait for this one in MPI_Finalize."""
    if "mpi4py.MPI" not in sys.modules:
        return
    from mpi4py import MPI

    if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(status)
