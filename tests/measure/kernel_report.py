"""What the two kernel programs print: a line a check, `ok` or `FAILED`."""

from collections.abc import Iterable


def report(checks: Iterable[tuple[str, bool, str]]) -> int:
    """Print each check (kind and case, whether all is well, what was found) as it is made; returns the exit status."""
    failed = 0
    for name, ok, said in checks:
        print("ok    " if ok else "FAILED", name, "--", said, flush=True)
        failed += not ok
    return int(failed > 0)
