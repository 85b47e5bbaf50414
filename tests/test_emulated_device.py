"""Models on a device that is not the CPU: nothing they make in between may stay on the CPU."""

import subprocess
import sys
from pathlib import Path


def test_no_model_mixes_devices():
    script = Path(__file__).parent / "emulated_device.py"
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, ""), ended.stderr
