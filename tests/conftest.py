"""Settings every test shares."""

import os
import signal

# Threads of torch and ggml that wait by spinning starve each other as soon as anything else runs
# on the machine: tests then take twenty times as long. Read when the OpenMP library is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A job that a script starts in the background ignores SIGINT, and so would every program the tests
# start to interrupt it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
