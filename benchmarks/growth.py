"""State bytes and decoding time along a long text: the same as `newllm bench growth`."""

import sys

from newllm.cli import main

sys.exit(main(["bench", "growth", *sys.argv[1:]]))
