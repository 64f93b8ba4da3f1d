"""The process in which images that were in hand when a run ended are decoded again, watched by `train.data.suspects`.

A source and indexes of it are on stdin. It says on stdout which of them it is about to decode, and where one wants too much memory.
"""

import pickle
import resource
import sys

from train.data.decode import DECODERS
from train.data.source import BadImage


def main(decoder: str, memory: int) -> None:
    """Decodes one after the other. memory: bytes that it may take beside those that it holds by then."""
    source, indexes = pickle.load(sys.stdin.buffer)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open("/proc/self/statm") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    for place, index in enumerate(indexes):
        print("begin", place, flush=True)
        try:
            data, _, name = source.encoded(index)
            DECODERS[decoder](data, name)
        except BadImage as error:  # merely damaged, unless it is memory that was missing
            if isinstance(error.__cause__, MemoryError):
                print("memory", flush=True)
        except MemoryError:
            print("memory", flush=True)
    print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
