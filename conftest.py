"""Settings of every process that pytest starts, notebook kernels included; torch reads them when it is imported."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
