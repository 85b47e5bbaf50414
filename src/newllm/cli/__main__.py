"""`python -m newllm.cli`: the same as `newllm`."""

import sys

from newllm.cli import main

sys.exit(main())
