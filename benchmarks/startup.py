"""Times how long a user waits for the first answer: help, the first line of an error, `import jaxlm`, each in a fresh
process, beside `python -c pass` in the same round. Prints medians of 7 rounds and the slowest imports of each."""

import re
import statistics
import subprocess
import sys
import time

ROUNDS = 7
CASES = {
    "python -c pass": ["-c", "pass"],
    "import jaxlm": ["-c", "import jaxlm"],
    "jaxlm --help": ["-m", "jaxlm", "--help"],
    "jaxlm evl": ["-m", "jaxlm", "evl"],
    "jaxlm eval --help": ["-m", "jaxlm", "eval", "--help"],
    "jaxlm train nosuch": ["-m", "jaxlm", "train", "nosuch"],
    "jaxlm train quickstart --help": ["-m", "jaxlm", "train", "quickstart", "--help"],
    "import jax": ["-c", "import jax"],
}


def run(*arguments: str) -> tuple[float, str]:
    """Returns the seconds of a process of this Python, and what it wrote to its error output."""
    before = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    return time.perf_counter() - before, done.stderr


def slowest(arguments: list[str], count: int = 3) -> str:
    """Returns the packages that take longest to import, by `python -X importtime`, with their milliseconds."""
    rows = re.findall(r"\|\s+(\d+) \|( +)([\w.]+)$", run("-X", "importtime", *arguments)[1], re.MULTILINE)
    top = {name: int(us) / 1000 for us, _, name in rows if "." not in name}
    return ", ".join(f"{name} {ms:.0f} ms" for name, ms in sorted(top.items(), key=lambda row: -row[1])[:count])


def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, arguments in CASES.items():
            seconds[name].append(run(*arguments)[0])
    for name, arguments in CASES.items():
        print(f"{name:32} {statistics.median(seconds[name]):6.2f} s   {slowest(arguments)}")


if __name__ == "__main__":
    main()
