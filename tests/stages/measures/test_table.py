import subprocess
import sys
from importlib import import_module

from stages.measures.table import MEASURES
from stages.runtime.fingerprint import ROOT


def test_every_line_names_a_function_and_a_key_of_its_own():
    for one in MEASURES.values():
        module, _, name = one.function.partition(":")
        assert callable(getattr(import_module(module), name))
    scores = [one.score for one in MEASURES.values() if not one.of_items]
    assert len(set(scores)) == len(scores) and not {"id", "tokens"} & set(scores)
    assert not {"size_bytes", "tokens"} & set(MEASURES)


def test_table_is_read_without_torch():
    code = "import sys, stages.measures.table; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
