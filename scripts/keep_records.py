#!/usr/bin/env python3
"""Append all records of a file to another one, all or none: a measured row to its table's file.

    python scripts/keep_records.py runs/cpu/jempp-m10-seed1/eval/table5.jsonl results/table5.jsonl

A last line that a crash cut short is removed from the second file first. Exit code 2 if either is
no JSON-lines file, or if there is no room.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils import program  # noqa: E402
from utils.files import records  # noqa: E402


def main(argv=None):
    p = program.parser(__doc__.splitlines()[0])
    p.add_argument("new", type=program.path, help="the file with the records to append")
    p.add_argument("kept", type=program.path, help="the file that keeps them")
    args = p.parse_args(argv)
    new = records.read_jsonl(args.new)
    if not new:
        raise program.InputError(f"{args.new} holds no records")
    records.append_jsonl(args.kept, *new)
    return program.EXIT_OK


if __name__ == "__main__":
    program.run(main)
