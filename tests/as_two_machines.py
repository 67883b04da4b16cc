"""Two processes of torchrun on a machine with one GPU: to NCCL these are two machines, which talk over the loopback.

    torchrun --nproc_per_node=2 tests/as_two_machines.py SCRIPT WORDS

NCCL refuses two processes that share a GPU, which it knows by the GPU's address and the name of the machine. Slower
than two GPUs, but the sums are the same. With two GPUs it does nothing.
"""

import os
import runpy
import sys

import torch

if torch.cuda.device_count() == 1:
    os.environ |= {"NCCL_HOSTID": f"machine-{os.environ['RANK']}", "NCCL_SOCKET_IFNAME": "lo",
                   "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # fmt: skip
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
