"""What the whole suite shares."""

import signal

import pytest

# Before anything imports it: its assertions then explain themselves as those of a test do.
pytest.register_assert_rewrite("taskx.testing")

# Where a shell started the tests in the background, they ignore Ctrl-C, and so would all programs
# that they start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
