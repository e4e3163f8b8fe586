"""Two ranks of which one waits: for the other's work, and then for what never comes."""

import time

from moee.parallel.joining import joined

PATIENCE_S = 3.0


def main() -> None:
    with joined(timeout_s=PATIENCE_S) as group:
        if group.leader:
            until = time.monotonic() + 3 * PATIENCE_S
            while time.monotonic() < until:
                sum(range(10_000))
        group.barrier()
        print("waited for work", flush=True)
        if not group.leader:
            time.sleep(120)
        group.barrier()


if __name__ == "__main__":
    main()
