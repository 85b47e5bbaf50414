"""Decoding speed against Hugging Face's models and the memory bandwidth: the same as `newllm bench decode`."""

import sys

from newllm.cli import main

sys.exit(main(["bench", "decode", *sys.argv[1:]]))
