"""A command line without the plan's flags: no --attn-implementation, no --max-questions, no --method full."""

import argparse

parser = argparse.ArgumentParser(prog="triattention")
run_one = parser.add_subparsers(dest="verb", required=True).add_parser("run-one")
run_one.add_argument("--model", required=True)
run_one.add_argument("--dataset", required=True)
run_one.add_argument("--method", choices=("fullkv", "r1kv", "snapkv", "triattention"), required=True)
run_one.add_argument("--budget", type=int)
run_one.add_argument("--stats-path")
parser.parse_args()
