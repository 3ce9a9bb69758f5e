"""What sets are made of the images that the package draws: a digest for each method, to be the same before and after a change.

    python bench/set_bytes.py WORK [--infoutil path/to/infoutil]

Trains a small teacher and two experts in WORK, distils by each method, and prints the SHA-256 of all that decides a set: its images,
labels and scores. Run it with the commands of both versions (--infoutil) in folders of their own, on one machine.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

METHODS = {
    "infoutil": ["--factor", "2", "--pool", "20"],
    "rded": ["--factor", "2", "--pool", "20"],
    "random": ["--windows", "random", "--factor", "2", "--pool", "20"],
    "tesla": ["--ipc", "1", "--iterations", "3", "--syn-steps", "2", "--expert-epochs", "1", "--max-start", "1"],
}


def digest(folder: Path) -> str:
    """Of the bytes of a set's images, labels and scores, by name."""
    found = hashlib.sha256()
    for file in sorted(file for part in ("images", "labels", "scores") for file in (folder / part).rglob("*") if file.is_file()):
        found.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--infoutil", default=str(Path(sys.executable).with_name("infoutil")))
    args = parser.parse_args()

    def run(*words: str) -> None:
        subprocess.run([args.infoutil, *words, "--quiet"], check=True, stdout=subprocess.DEVNULL)

    run("teach", "demo", f"{args.work}/teacher", "--net", "convnet4-w16", "--epochs", "2")
    run(
        "experts",
        "demo",
        f"{args.work}/experts",
        "--net",
        "convnet3-in",
        "--experts",
        "1",
        "--epochs",
        "12",
        "--size",
        "32",
        "--lr",
        "0.05",
        "--batch",
        "32",
    )
    for method, options in METHODS.items():
        teacher = args.work / ("experts" if method == "tesla" else "teacher")
        run("distill", "demo", f"{args.work}/{method}", "--method", method, "--teacher", str(teacher), "--ipc", "2", *options)
        print(method, digest(args.work / method), flush=True)


if __name__ == "__main__":
    main()
