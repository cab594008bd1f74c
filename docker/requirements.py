"""Prints the requirements of an image, one a line: those of the project and those of the extras named.

python3 requirements.py [EXTRA ...]
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = project["optional-dependencies"]
for name in [*project["dependencies"], *(one for extra in sys.argv[1:] for one in extras[extra])]:
    print(name)  # noqa: T201
