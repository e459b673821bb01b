"""How many threads a figure or a problem depends on."""

import os
from typing import Any

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


def threads() -> dict[str, Any]:
    """How many processors there are, how many this process may use, and what the environment says about threads."""
    from fastfsl.runtime.threads import available_cpus

    set_here = {name: os.environ[name] for name in _THREAD_VARIABLES if name in os.environ}
    return {"cpus": os.cpu_count(), "usable": available_cpus(), "environment": set_here}
