"""Runs several command lines in one process, since importing torch takes longer than they do. They come as one JSON list of
[port, arguments]: the ranks meet anew for each, at that port of rank 0 instead of the launcher's, which allows one."""

import json
import os
import sys

from exporter.cli import main

if __name__ == "__main__":
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    for port, arguments in json.loads(sys.argv[1]):
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        code = main(arguments)
        if code:
            sys.exit(code)
