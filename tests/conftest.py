"""What holds for every test: no network, no display, no more threads than a small machine has."""

import os

# Before any library is imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
# Triton reads it when it is imported: kernels run in its interpreter, and are compiled in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from hypothesis import settings

# How long one example takes says more of the machine than of the code: the first one may pay for an import.
settings.register_profile("fastfsl", deadline=None)
settings.load_profile("fastfsl")
