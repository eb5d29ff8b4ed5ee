"""python shield.py COMMAND ...: runs a command from which SIGTERM and SIGUSR1 are held back.

Slurm signals every process of a step. The deepspeed launcher would die of SIGUSR1, and on SIGTERM it would kill the
trainers after 30 s and lose their exit code. What is blocked here stays blocked in all children until they unblock it,
which only the trainers do, first of all (beit3_dist/leaving.py). A signal that comes before waits.
"""

from __future__ import annotations

import os
import signal
import sys

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})
os.execvp(sys.argv[1], sys.argv[1:])
