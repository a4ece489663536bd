"""The tests. What several of them use is in `support`, whose assertions say what they compared, as those of a test do."""

import pytest

pytest.register_assert_rewrite("tests.support")
