"""Prunes a tiny model and kills itself. Arguments: the folder for finished subgraphs, and how many to finish first."""

import os
import signal
import sys

from helpers.architectures import ARCHITECTURES

from hf_sparse import OneshotConfig, prune_oneshot
from hf_sparse.oneshot.resume import FinishedSubgraphs


def main():
    folder, subgraphs = sys.argv[1], int(sys.argv[2])
    real, written = FinishedSubgraphs.write, []

    def write(self, *arguments):
        if len(written) == subgraphs:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, *arguments)
        written.append(arguments)

    FinishedSubgraphs.write = write
    architecture = ARCHITECTURES["bert"]
    config = OneshotConfig(target_sparsity=0.5, solver="sparsegpt", targets=["all-body"])
    prune_oneshot(architecture.model(), architecture.batches(), config, folder, progress=False)


if __name__ == "__main__":
    main()
