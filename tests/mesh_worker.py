"""A replica in a process of its own, for tests that kill and freeze it: averages until a group breaks.

Reads one line, {"pipeline", "members", "size", "key"}, and prints its address; reads the addresses of all; prints
"averaging" after the first round.
"""

from __future__ import annotations

import json
import sys
from itertools import count

import torch

from pipeline.errors import GroupBroken
from pipeline.replicas.mesh.mesh import Mesh


def main() -> None:
    torch.set_num_threads(1)
    job = json.loads(sys.stdin.readline())
    mesh = Mesh(job["pipeline"], bytes.fromhex(job["key"]), timeout_s=60)
    print(mesh.address, flush=True)
    peers = {int(pipeline): address for pipeline, address in json.loads(sys.stdin.readline()).items()}
    mesh.set_peers(peers, dict.fromkeys(peers, 0), 0)
    x = torch.full((job["size"],), float(job["pipeline"]))
    try:
        for round in count():
            mesh.average(x, job["members"], round)
            if round == 0:
                print("averaging", flush=True)
    except GroupBroken:
        mesh.close()


if __name__ == "__main__":
    main()
