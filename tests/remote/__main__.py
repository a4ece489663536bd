"""Run the remote tests against a real server, on the path of trusted keys and on the sandboxed one.

python -m tests.remote [arguments of pytest]
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.remote.server import HOME, Server, install

install()
failed = 0
for sandbox in (False, True):
    server = Server(sandbox).up()
    try:
        own = server.client | {
            "HF_HOME": str(HOME / "client"),
            "HOOKBOOK_TEST_SERVER": "sandbox" if sandbox else "trusted",
            "XDG_CONFIG_HOME": str(HOME / "client"),
            "NDIF_API_KEY": "",
        }
        # a process of its own: where the hub is, is read when its library is imported
        command = [sys.executable, "-m", "pytest", "-q", *map(str, sorted(Path(__file__).parent.glob("test_*.py"))), *sys.argv[1:]]
        failed |= subprocess.run(command, env=os.environ | own).returncode
    finally:
        server.down()
sys.exit(failed)
