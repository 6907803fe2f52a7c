"""For tests that compile kernels: skip them, with the reason, where there is no compiler."""

import pytest

from flute.errors import CompileError
from flute.kernels import jit

try:
    jit.nvrtc_version()
    MISSING = ""
except CompileError as error:
    MISSING = str(error)

needs_nvrtc = pytest.mark.skipif(bool(MISSING), reason=MISSING)
