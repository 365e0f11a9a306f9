"""What the steps share and what does not depend on a network."""

import os
import sys

# Names of songs and classes may be in any alphabet; a console may know only one of them.
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding="utf-8", errors="replace")

# Where neither the packages nor the home folder can be written, $PATREC_CACHE serves all.
if "PATREC_CACHE" in os.environ:
    os.environ.setdefault("NUMBA_CACHE_DIR", f"{os.environ['PATREC_CACHE']}/numba")
    os.environ.setdefault("MPLCONFIGDIR", f"{os.environ['PATREC_CACHE']}/matplotlib")
