"""What several test files use. Its assertions say what they compared, as those of a test do."""

import pytest

pytest.register_assert_rewrite("tests.support")
