"""What the whole suite shares."""

import pytest

# Before anything imports it: its assertions then explain themselves as those of a test do.
pytest.register_assert_rewrite("taskx.testing")
