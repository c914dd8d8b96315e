"""Serves the board beside a run that trains, in a process of its own: what it reads costs the training no time.

python -m jaxlm.training.board.beside FOLDER    # prints its address, and ends when its input does
"""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxlm.training.board.runs import Runs
from jaxlm.training.board.server import Server


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serves the runs of a folder while it is entered; yields the address. ValueError: it can't be served."""
    command = [sys.executable, "-m", "jaxlm.training.board.beside", str(folder)]
    # A session of its own, as Ctrl-C is for the run to end in good order; it ends when its input is closed, and so also
    # when this process is killed.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdin and process.stdout
        try:
            told = json.loads(process.stdout.readline() or '{"error": "the board ended before it began"}')
            if "error" in told:
                raise ValueError(f"--board: {told['error']}")
            yield told["address"]
        finally:
            process.stdin.close()


def main(folder: str) -> None:
    """Serves until the input ends."""
    try:
        runs = Runs(Path(folder))
        try:
            server = Server(runs)
        except ValueError:  # another board has the usual port; the address that is printed says which it got
            server = Server(runs, port=0)
    except ValueError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return
    print(json.dumps({"address": server.address}), flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    server.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
