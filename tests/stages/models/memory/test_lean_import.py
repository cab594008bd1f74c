import subprocess
import sys

from stages.models.memory.lean_import import UNUSED

ASKED = f"""
import sys
from stages.models.memory.lean_import import import_transformers
import_transformers()
import stages.models.checkpoint.loading, stages.models.blockwise.compress, transformers.generation
print([name for name in {UNUSED} if name in sys.modules])
import scipy.special, sklearn
print(scipy.special.expit(0.0))
"""


def test_transformers_is_imported_without_what_no_stage_uses_which_can_still_be_imported():
    told = subprocess.run([sys.executable, "-c", ASKED], capture_output=True, text=True, check=True).stdout
    assert told.split("\n")[:2] == ["[]", "0.5"]
