"""The run of the kernel tests that under_sanitizers.py starts: on another library, and for addresses alone.

What the kernels compute is compared with numpy in the usual run. The comparison takes minutes under the sanitizer's
allocator, for it makes many small objects.
"""

import os

VARIABLE = "HEADWATER_SANITIZED_KERNELS"  # the path of that library
LIBRARY = os.environ.get(VARIABLE)
