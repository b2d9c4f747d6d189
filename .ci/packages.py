"""The packages of an extra of actzip, one a line, as its metadata has them: python .ci/packages.py
test-all"""

import re
import sys
from importlib.metadata import requires


def packages(extra: str) -> list[str]:
    """The requirements of ``extra``, those of extras that it names included."""
    found = []
    for line in requires("actzip") or []:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"""extra == ["']{re.escape(extra)}["']""", marker):
            continue
        own = re.match(r"actzip\[(.*)\]", requirement)
        found += [r for name in own[1].split(",") for r in packages(name)] if own else [requirement.strip()]
    return found


print(*dict.fromkeys(packages(sys.argv[1])), sep="\n")
