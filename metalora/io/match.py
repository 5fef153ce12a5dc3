"""Matches regular expressions from a file against names, in a process of its own.

`patterns` runs this file and kills it when it takes too long; it imports nothing but the standard
library. It reads {"patterns", "names", "cpu_seconds", "bytes"} as JSON, and writes a line of JSON
for each pattern: the places of the names that it is the first to match, or what is wrong with it.
"""

from __future__ import annotations

import json
import re
import sys


def main() -> None:
    """Answers the request on the standard input."""
    request = json.load(sys.stdin)
    _limit(request["cpu_seconds"], request["bytes"])
    left = dict(enumerate(request["names"]))
    for pattern in request["patterns"]:
        try:
            compiled = re.compile(rf"(.*\.)?({pattern})$")  # as peft writes it
            found = [place for place, name in left.items() if compiled.match(name)]
        except (re.error, OverflowError) as error:
            return _answer(f"is no valid regular expression ({error})")
        except RecursionError:
            return _answer("is nested too deeply")
        except MemoryError:
            return _answer("needs too much memory")
        _answer(found)
        for place in found:
            del left[place]
    return None


def _answer(answer: list[int] | str) -> None:
    print(json.dumps(answer), flush=True)


def _limit(cpu_seconds: int, memory: int) -> None:
    try:
        import resource
    except ImportError:  # not on this system; the caller's own limit of time remains
        return
    wanted = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_AS: memory,
    }
    for kind, limit in wanted.items():
        _, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY or limit <= hard:
            resource.setrlimit(kind, (limit, limit))


if __name__ == "__main__":
    main()
