"""A rank that has lost the others: their end is the cause, what this rank meets is a consequence."""

import re

from torch.distributed import DistNetworkError

from todi.errors import RunError

# Exit code of a process that ends because others did: EX_TEMPFAIL of sysexits.h, "try again".
LOST = 75

# What gloo and NCCL say when the other end of a connection has gone. A wait that was too long is not among them.
_GONE = re.compile(r"gloo/transport\S*\]? .*(closed|reset|broken pipe|refused|closure)"
                   r"|ncclRemoteError|remote process exited|recvValue failed|failed to recv, got 0 bytes",
                   re.IGNORECASE | re.DOTALL)


class PeersLost(RunError):
    """Other ranks have ended, so that this one cannot go on. Whoever ended first says why."""

    exit_code = LOST


def peers_are_lost(error: BaseException | None) -> bool:
    """Whether an error, or one that it follows from, says that another rank is no longer there."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if _says_so(error):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def _says_so(error: BaseException) -> bool:
    if isinstance(error, (PeersLost, DistNetworkError)):
        return True
    # torch raises RuntimeError and its kinds; an OSError is a file's or that of a download
    return isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None
