"""The environment of a stage's child: the store's credentials and no others, and how its threads compute and wait."""

from __future__ import annotations

import os

from stages.runtime.fingerprint import ROOT

_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT", "TZ")
_OUTSIDE = (
    "HF_",
    "PIP_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_CERT",
    "REQUESTS_CA",
)
_STORE = ("AWS_", "ENGINERY_", "COVERAGE_", "MPLCONFIGDIR", "OPENBLAS_")
_REACH_OUTSIDE = ("fetch", "corpus", "items")
_WAIT_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
_WAITING = {"GOMP_SPINCOUNT": "400", "KMP_BLOCKTIME": "0"}
"""By default an OpenMP thread that waits for another spins for milliseconds, on a core that the other one, or a
neighbour, needs; one that sleeps at once is woken for every small product. In between nothing is lost alone and little
beside others: `make bench ONLY=beside`. torch's wheels bring GNU's runtime, other builds Intel's."""


def child_environment(name: str, threads: int) -> dict[str, str]:
    """What the child of a stage finds in its environment.

    Args:
        name: the stage; those that bring bytes from outside get what reaches it.
        threads: threads of computation.
    """
    prefixes = (*_STORE, *_OUTSIDE) if name in _REACH_OUTSIDE else _STORE
    kept = {k: v for k, v in os.environ.items() if k in _PASSED_ON or k.startswith(prefixes)}
    kept.pop("ENGINERY_WEBHOOK_SECRET", None)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    offline = {} if name in _REACH_OUTSIDE else {"HF_HUB_OFFLINE": "1"}
    asked = {policy: os.environ[policy] for policy in _WAIT_POLICIES if policy in os.environ}
    return kept | offline | (asked or _WAITING) | {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # Tensors of a few MB come and go all the time: freed blocks are kept for the next one, since memory from
        # the system costs more time than the products that fill it. Larger ones go back at once.
        "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
        "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    }  # fmt: skip
