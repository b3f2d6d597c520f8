"""Do two sweeps show the same? Compares their tables of differences to the baseline: a command, not a test.

    python probe.py --table runs/study > after.md
    git show 9d91ca3:README.md > before.md      # or another sweep's table
    python tests/sweeps_agree.py before.md after.md

A difference is shown where its 95 % interval does not hold zero. Two sweeps of the same seeds begin with the same
weights and see the same clips; only rounding differs, by processor and version, and what grows from it.
"""
import argparse
import re
import sys
from pathlib import Path

CELL = re.compile(r"(\(?)([+-][\d.]+) ± ([\d.]+)\)?")


def differences(path):
    """{(objective, column): (mean, half its interval, whether it is shown)} of a file's first table of differences."""
    for table in re.findall(r"^\| \| direction, linear .*\n(?:\|.*\n)+", Path(path).read_text(), re.M):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        found = {(row[0], column): CELL.fullmatch(cell) for row in rows for column, cell in zip(head[1:], row[1:])}
        if any(found.values()):
            return {key: (float(match[2]), float(match[3]), not match[1]) for key, match in found.items() if match}
    raise ValueError(f"{path} holds no table of differences; `python probe.py --table DIR` prints one")


def main(before, after):
    a, b = differences(before), differences(after)
    pairs = [(a[key], b[key]) for key in a if key in b]
    shown = [pair for pair in pairs if pair[0][2]]
    same = sum(x[0] * y[0] > 0 for x, y in shown)
    near = sum(abs(x[0] - y[0]) <= (x[1] ** 2 + y[1] ** 2) ** 0.5 for x, y in pairs)
    print(f"{len(shown)} of {len(pairs)} differences are shown by {before}: {same} have the same sign in {after}, and "
          f"{sum(y[2] for _, y in shown)} are shown there, too")
    print(f"{near} of all {len(pairs)} lie nearer to each other than their intervals are wide (root of the sum of "
          "squares)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("before", help="a file with the table of one sweep")
    parser.add_argument("after", help="and of the other")
    flags = parser.parse_args()
    try:
        main(flags.before, flags.after)
    except (OSError, ValueError) as error:
        sys.exit(f"sweeps_agree.py: {error}")
