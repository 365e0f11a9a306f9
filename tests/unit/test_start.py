"""What importing the package sets, for consoles and for the folders of libraries."""

import os
import subprocess
import sys

from conftest import ROOT


def test_any_alphabet_is_printed_and_libraries_cache_where_the_user_says(tmp_path):
    code = "import os, patrec; print('Ρεμπέτικα', os.environ['NUMBA_CACHE_DIR'])"
    env = {key: value for key, value in os.environ.items() if key != "NUMBA_CACHE_DIR"}
    env |= {"PYTHONIOENCODING": "cp1252", "PATREC_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.stdout.decode() == f"Ρεμπέτικα {tmp_path}/numba{os.linesep}", done.stderr
