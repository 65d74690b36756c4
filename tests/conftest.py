"""Settings every test shares."""

import os

# Threads of torch and ggml that wait by spinning starve each other as soon as anything else runs
# on the machine: tests then take twenty times as long. Read when the OpenMP library is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
